//! Source `dump`: a guest as QEMU's `dump-guest-memory` left it in a file.
//!
//! The file is an ELF core file: QEMU's notes hold the registers of every vCPU, its segments hold guest memory. Memory is
//! mapped, not read, so that a dump of any size opens at once; what the note does not tell is inferred, and named in
//! `assumed`. Nothing of a dump changes and nothing executes.

mod elf;
mod infer;
mod note;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::read::ReadCache;
use pagewalk::{CpuProfile, Vendor};

use super::mapping::FileMapping;
use super::memory::{GuestRam, Place, Region};
use super::{Capabilities, Health, LocalSource, OpenError, regular_file};
use crate::vcpu::{RecordedBackend, Vcpu};

pub use elf::{Dump, DumpProblem, Stretch};
pub use note::CpuState;

/// Why a dump cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", .file.display())]
pub struct DumpError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: DumpProblem,
}

/// What a dump does not tell of the CPU: the profile that calls the fewest bits reserved.
const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 52, gib_pages: true, encryption_bit: None };

/// Says so in `assumed`.
const CPU_ASSUMED: [&str; 3] = ["MAXPHYADDR=52", "1 GiB pages=yes", "vendor=Intel"];

/// Opens the dump `path`.
pub(super) fn open(id: &str, path: &Path) -> Result<LocalSource, OpenError> {
    let fail = |problem| DumpError { file: path.to_owned(), problem };
    let file = regular_file(path).map_err(|e| fail(DumpProblem::Read(e)))?;
    let cache = ReadCache::new(&file);
    let dump = Dump::read(&cache).map_err(fail)?;
    let memory = Arc::new(memory(&file, &dump).map_err(fail)?);
    let reason = "nothing executes in a dump: its memory and registers are as they were";
    let vcpus = (0..)
        .zip(&dump.cpus)
        .map(|(index, state)| {
            let (registers, mut assumed) = infer::registers(state, dump.long_mode, memory.as_ref());
            assumed.extend(CPU_ASSUMED.map(str::to_owned));
            Vcpu::spawn(id, index, CPU, RecordedBackend::new(registers, reason).with_assumed(assumed))
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(LocalSource {
        kind: "dump",
        description: format!("dump {}, taken by QEMU", path.display()),
        vcpus,
        memory,
        capabilities: Capabilities::of_a_record(reason),
        cpu: CPU,
        landmarks: Vec::new(),
        health: Health::default(),
    })
}

fn memory(file: &File, dump: &Dump) -> Result<GuestRam, DumpProblem> {
    let mapping = FileMapping::of(file)?;
    let regions = dump.stretches.iter().map(|stretch| {
        let region = Region { start: stretch.gpa, size: stretch.size, read_only: false };
        (region, Place::Mapped(Arc::clone(&mapping), stretch.offset))
    });
    GuestRam::of_others(regions).map_err(|e| DumpProblem::Memory(e.to_string()))
}
