//! The words after `--machine`: which machine to make, and under which id.
//!
//! `demo`, `demo:plain`, `kvm:elf=FILE,mem=64M,cpus=1`, `kvm:kernel=FILE,initrd=FILE,cmdline=TEXT,mem=512M,cpus=2`,
//! `qemu:qmp=SOCKET,pid=N`, `dump:FILE`, `image:FILE.toml`, each optionally as `ID=SPEC`. SOCKET cannot contain a comma; in
//! the values of `kvm:`, two commas stand for one. Each source takes one more option, `symbols=FILE`: the symbols of its guest's
//! kernel.

mod parse;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pages::HugePages;
use super::{LinuxSpec, Machine, OpenError, Source, demo, dump, image, kvm, linux, qemu};
use crate::symbols::Symbols;

/// Longest id of a machine.
const ID_MAX: usize = 64;

/// What `--machine` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// Id of the machine: what precedes `=`, else the kind of its source.
    pub id: String,
    /// Its source.
    pub source: SourceSpec,
    /// The file that has the symbols of its guest's kernel.
    pub symbols: Option<PathBuf>,
}

/// Which source, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// The demo guest.
    Demo {
        /// Serve it from plain memory even where `/dev/kvm` can be used.
        plain: bool,
    },
    /// A guest on `/dev/kvm`.
    Kvm {
        /// What runs there.
        guest: KvmGuest,
        /// Size of memory in bytes.
        memory: u64,
        /// Number of vCPUs.
        cpus: u32,
        /// Pages of the host that hold the memory.
        pages: HugePages,
    },
    /// A guest as QEMU's `dump-guest-memory` left it.
    Dump(PathBuf),
    /// Memory files, and the TOML file that describes them.
    Image(PathBuf),
    /// A running guest of QEMU's.
    Qemu {
        /// QEMU's QMP socket.
        qmp: PathBuf,
        /// Its process, where that cannot be told from the socket: one that was handed to QEMU open.
        pid: Option<u32>,
    },
}

/// What to run on `/dev/kvm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmGuest {
    /// A freestanding ELF file.
    Elf(PathBuf),
    /// A Linux kernel.
    Linux(LinuxSpec),
}

/// What is wrong with a machine's specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No such source.
    #[error(
        "there is no source `{0}`: use demo, demo:plain, kvm:elf=FILE,mem=64M,cpus=1, kvm:kernel=FILE,initrd=FILE, qemu:qmp=SOCKET, dump:FILE or image:FILE.toml, each optionally with symbols=FILE as one more option, and as ID=SPEC"
    )]
    Source(String),
    /// An id that is empty, too long or has odd characters.
    #[error(
        "`{0}` cannot be a machine's id: use 1 to {ID_MAX} letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
    )]
    Id(String),
    /// An option that the source does not know.
    #[error("`{key}` is no option of source {source_kind}: it knows {known}; every source knows symbols")]
    Key {
        /// The source.
        source_kind: &'static str,
        /// The option.
        key: String,
        /// The options there are.
        known: &'static str,
    },
    /// An option that is given twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// Nothing to run.
    #[error(
        "source kvm needs elf=FILE, a freestanding ELF64 executable, or kernel=FILE, a Linux kernel, and not both"
    )]
    NoGuest,
    /// An option of Linux's without a kernel.
    #[error("`{0}` is for Linux: it goes with kernel=FILE, not with elf=FILE")]
    WithoutKernel(&'static str),
    /// An option that names nothing.
    #[error("`{0}` needs a value: {0}=PATH")]
    Empty(&'static str),
    /// A missing file.
    #[error("source {0} needs a file: {0}:FILE")]
    NoFile(&'static str),
    /// A missing file.
    #[error(
        "symbols= needs a file: a System.map, a copy of /proc/kallsyms, or an ELF file with symbols, such as vmlinux"
    )]
    NoSymbols,
    /// A missing option.
    #[error("source qemu needs qmp=SOCKET: the path in QEMU's -qmp unix:SOCKET,server=on,wait=off")]
    NoQmp,
    /// A value that is no number, or out of range.
    #[error("{key}={value} is not accepted: {expected}")]
    Value {
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

/// The one name of a file, whichever way it is named; as it stands, where there is no such file.
fn real_name(file: &Path) -> String {
    std::fs::canonicalize(file).as_deref().unwrap_or(file).display().to_string()
}

impl MachineSpec {
    /// What the specification names that belongs to one guest, so that no two machines may name it.
    pub(super) fn names(&self) -> Option<String> {
        match &self.source {
            SourceSpec::Demo { .. } | SourceSpec::Kvm { .. } => None,
            SourceSpec::Dump(file) | SourceSpec::Image(file) => Some(real_name(file)),
            SourceSpec::Qemu { qmp, .. } => {
                let path = qmp.canonicalize().unwrap_or_else(|_| qmp.clone());
                Some(format!("QMP socket {}", path.display()))
            }
        }
    }

    /// The files that are made with the machine, each with the option that names it.
    pub(crate) fn made_files(&mut self) -> impl Iterator<Item = (&'static str, &mut PathBuf)> {
        let (console, log) = match &mut self.source {
            SourceSpec::Kvm { guest: KvmGuest::Linux(linux), .. } => {
                (linux.console.as_mut(), linux.log.as_mut())
            }
            _ => (None, None),
        };
        let named = |key| move |path| (key, path);
        console.map(named("console")).into_iter().chain(log.map(named("log")))
    }

    /// Makes the machine. Its guest, if it can, runs at once.
    ///
    /// # Errors
    /// When the file cannot be loaded or the host lacks something. The demo machine makes do with plain memory where
    /// `/dev/kvm` cannot be used.
    pub fn open(&self) -> Result<Machine, OpenError> {
        // Before the guest: what the file lacks needs no guest to be said.
        let symbols = self.symbols.as_deref().map(Symbols::read).transpose()?;
        let source: Arc<dyn Source> = match &self.source {
            SourceSpec::Demo { plain } => Arc::new(demo::open(&self.id, *plain)?),
            SourceSpec::Kvm { guest, memory, cpus, pages } => Arc::new(match guest {
                KvmGuest::Elf(elf) => kvm::open_elf(&self.id, elf, *memory, *cpus, *pages)?,
                KvmGuest::Linux(spec) => linux::open(&self.id, spec, *memory, *cpus, *pages)?,
            }),
            SourceSpec::Qemu { qmp, pid } => Arc::new(qemu::open(&self.id, qmp, *pid)?),
            SourceSpec::Dump(file) => Arc::new(dump::open(&self.id, file)?),
            SourceSpec::Image(file) => Arc::new(image::open(&self.id, file)?),
        };
        tracing::info!(machine = %self.id, "{}", source.description());
        let machine = Machine::new(&self.id, source);
        let Some(symbols) = symbols else { return Ok(machine) };
        let machine = machine.with_symbols(symbols);
        if let Some(symbols) = machine.symbols() {
            // A guest that has not booted yet is looked at again when somebody asks.
            let why = match symbols.place(&machine, &machine.source().memory()) {
                Ok(placed) => placed.reason(),
                Err(why) => why,
            };
            tracing::info!(machine = %self.id, "{} symbols of {}: {why}", symbols.count(), symbols.file().display());
        }
        Ok(machine)
    }
}
