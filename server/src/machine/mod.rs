//! Machines: guests with their memory, their vCPUs, and the source they come from.
//!
//! [`Source`] is all that the services know of a guest. It is public, so that a VMM can serve its own guest next to its
//! own vCPUs; the sources of this daemon share one implementation, [`LocalSource`].

mod boot;
pub mod demo;
pub mod dump;
mod elf;
mod health;
pub mod image;
mod kvm;
mod linux;
mod mapping;
mod memory;
mod pages;
mod qemu;
mod registry;
mod sigbus;
mod spec;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use pagewalk::CpuProfile;

use crate::symbols::SymbolsError;
use crate::vcpu::{SpawnError, Vcpu};

pub use elf::{ElfError, ElfProblem};
pub use health::Health;
pub use kvm::KvmError;
pub use linux::{InitrdProblem, KernelProblem, LinuxError, LinuxSpec};
pub use mapping::{Fetch, FileMapping};
pub(crate) use memory::PAGE;
pub use memory::{GuestRam, MemoryError, Place, Region};
pub use pages::HugePages;
pub use qemu::{MonitorError, ProcessError, QemuError};
pub(crate) use registry::MACHINES_MAX;
pub use registry::{AttachError, DetachError, LookupError, Machine, Machines};
pub use spec::{KvmGuest, MachineSpec, SourceSpec, SpecError};

/// An address worth asking about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landmark {
    /// Short name, unique in its machine.
    pub name: String,
    /// The guest virtual address; for names that end in `cr3`, the value of that register.
    pub address: u64,
    /// What is to be seen there, in one sentence.
    pub description: String,
}

/// What can be done with a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The guest runs, so answers change.
    pub live: bool,
    /// Pause and resume work.
    pub can_pause: bool,
    /// Single steps work.
    pub can_step: bool,
    /// Registers can be written.
    pub can_set_registers: bool,
    /// Memory can be written, accessed and dirty bits included.
    pub can_write_memory: bool,
    /// The guest runs in this process, and ends when its machine is detached.
    pub ends_when_detached: bool,
    /// The real vCPU can be put into guest mode.
    pub real_nested: bool,
    /// Why it can or cannot.
    pub nested_reason: String,
}

impl Capabilities {
    /// What can be done with a guest that was recorded: nothing but looking at it, for that `reason`.
    fn of_a_record(reason: &str) -> Self {
        Self {
            live: false,
            can_pause: false,
            can_step: false,
            can_set_registers: false,
            can_write_memory: false,
            ends_when_detached: false,
            real_nested: false,
            nested_reason: reason.to_owned(),
        }
    }
}

/// Opens a file to be read that is neither a folder, nor a device, nor a pipe.
pub(crate) fn regular_file(path: &Path) -> io::Result<File> {
    // Opening a pipe would wait for its other end.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    Ok(file)
}

/// Where a machine comes from.
pub trait Source: Send + Sync {
    /// The kind of source, in one word: `kvm`, `qemu`, `demo`.
    fn kind(&self) -> &str;
    /// What it is, for a person.
    fn description(&self) -> &str;
    /// Its memory, as it is laid out now.
    fn memory(&self) -> Arc<GuestRam>;
    /// Its vCPUs, by index.
    fn vcpus(&self) -> &[Arc<Vcpu>];
    /// What can be done with it.
    fn capabilities(&self) -> &Capabilities;
    /// What CPUID says to its vCPUs, as far as paging depends on it.
    fn cpu(&self) -> CpuProfile;
    /// Addresses worth asking about.
    fn landmarks(&self) -> &[Landmark] {
        &[]
    }
    /// Whether it is still there.
    fn health(&self) -> &Health;
    /// What tells this guest from all others on the host, so that it is not attached twice. `None` for a guest that nobody
    /// else could name.
    fn identity(&self) -> Option<&str> {
        None
    }
}

/// A source whose memory and vCPUs live in this process.
#[derive(Debug)]
pub struct LocalSource {
    /// The kind of source.
    pub kind: &'static str,
    /// What it is.
    pub description: String,
    /// Its vCPUs. Before the memory, so that they stop first.
    pub vcpus: Vec<Arc<Vcpu>>,
    /// Its memory.
    pub memory: Arc<GuestRam>,
    /// What can be done with it.
    pub capabilities: Capabilities,
    /// What CPUID says.
    pub cpu: CpuProfile,
    /// Addresses worth asking about.
    pub landmarks: Vec<Landmark>,
    /// Whether it is still there: a guest in this process always is, unless a file behind its memory is truncated.
    pub health: Health,
}

impl Source for LocalSource {
    fn kind(&self) -> &str {
        self.kind
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn memory(&self) -> Arc<GuestRam> {
        Arc::clone(&self.memory)
    }

    fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn cpu(&self) -> CpuProfile {
        self.cpu
    }

    fn landmarks(&self) -> &[Landmark] {
        &self.landmarks
    }

    fn health(&self) -> &Health {
        &self.health
    }
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The ELF file cannot be loaded.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Linux cannot be booted.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// The dump cannot be read.
    #[error(transparent)]
    Dump(#[from] dump::DumpError),
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// The guest of QEMU's cannot be attached to.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// A vCPU cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The symbols of its kernel cannot be read.
    #[error(transparent)]
    Symbols(#[from] SymbolsError),
}
