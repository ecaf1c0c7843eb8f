//! Machines: guests with their memory, their vCPUs, and the source they come from.
//!
//! [`Source`] is all that the services know of a guest. It is public, so that a VMM can serve its own guest next to its
//! own vCPUs; the sources of this daemon share one implementation, [`LocalSource`].

mod boot;
pub mod demo;
mod elf;
mod kvm;
mod memory;
mod spec;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use pagewalk::CpuProfile;

use crate::vcpu::{SpawnError, Vcpu};

pub use elf::{ElfError, ElfProblem};
pub use kvm::KvmError;
pub use memory::{GuestRam, MemoryError, Region};
pub use spec::{MachineSpec, SourceSpec, SpecError};

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
    /// The real vCPU can be put into guest mode.
    pub real_nested: bool,
    /// Why it can or cannot.
    pub nested_reason: String,
}

/// Where a machine comes from.
pub trait Source: Send + Sync {
    /// The kind of source, in one word: `kvm`, `demo`.
    fn kind(&self) -> &str;
    /// What it is, for a person.
    fn description(&self) -> &str;
    /// Its memory.
    fn memory(&self) -> &Arc<GuestRam>;
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
}

impl Source for LocalSource {
    fn kind(&self) -> &str {
        self.kind
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
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
    /// A vCPU cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// A machine under its id.
#[derive(Clone)]
pub struct Machine {
    id: String,
    source: Arc<dyn Source>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("id", &self.id)
            .field("kind", &self.source.kind())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Names a source.
    pub fn new(id: impl Into<String>, source: Arc<dyn Source>) -> Self {
        Self { id: id.into(), source }
    }

    /// Its id, unique in the daemon.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// One of its vCPUs.
    ///
    /// # Errors
    /// Says how many there are.
    pub fn vcpu(&self, index: u32) -> Result<&Arc<Vcpu>, LookupError> {
        let vcpus = self.source.vcpus();
        usize::try_from(index).ok().and_then(|i| vcpus.get(i)).ok_or_else(|| LookupError::NoVcpu {
            machine: self.id.clone(),
            index,
            count: vcpus.len(),
        })
    }
}

/// Why a name leads to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No machine was named, and there is not exactly one.
    #[error("name a machine: {}", list(.ids))]
    Unnamed {
        /// The ids there are.
        ids: Vec<String>,
    },
    /// No machine of that name.
    #[error("there is no machine `{id}`: {}", list(.ids))]
    NoMachine {
        /// The id that was asked for.
        id: String,
        /// The ids there are.
        ids: Vec<String>,
    },
    /// No vCPU of that index.
    #[error("machine `{machine}` has no vCPU {index}: it has {count}, from 0")]
    NoVcpu {
        /// The machine.
        machine: String,
        /// The index that was asked for.
        index: u32,
        /// How many vCPUs there are.
        count: usize,
    },
}

fn list(ids: &[String]) -> String {
    if ids.is_empty() { "there is none".to_owned() } else { format!("there are `{}`", ids.join("`, `")) }
}

/// Two machines want the same id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two machines are called `{id}`: name one of them otherwise, as in `--machine other=SPEC`")]
pub struct DuplicateId {
    /// The id.
    pub id: String,
}

/// The machines of the daemon, by id.
#[derive(Debug, Default)]
pub struct Machines {
    by_id: BTreeMap<String, Arc<Machine>>,
}

impl Machines {
    /// A registry of `machines`.
    ///
    /// # Errors
    /// When two have the same id.
    pub fn new(machines: impl IntoIterator<Item = Machine>) -> Result<Self, DuplicateId> {
        let mut by_id = BTreeMap::new();
        for machine in machines {
            let id = machine.id.clone();
            if by_id.insert(id.clone(), Arc::new(machine)).is_some() {
                return Err(DuplicateId { id });
            }
        }
        Ok(Self { by_id })
    }

    /// The machine `id`; empty means the only one.
    ///
    /// # Errors
    /// Lists the ids there are.
    pub fn get(&self, id: &str) -> Result<&Arc<Machine>, LookupError> {
        let ids = || self.by_id.keys().cloned().collect();
        if id.is_empty() {
            let mut all = self.by_id.values();
            return match (all.next(), all.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(LookupError::Unnamed { ids: ids() }),
            };
        }
        self.by_id.get(id).ok_or_else(|| LookupError::NoMachine { id: id.to_owned(), ids: ids() })
    }

    /// All machines, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Machine>> {
        self.by_id.values()
    }
}
