//! The machines that the daemon serves, by id. They come and go at run time.
//!
//! Readers take the whole registry as one value, without a lock; changes replace it. A call that has found its machine keeps
//! it: what is detached meanwhile lives until the last such call has ended.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{MachineSpec, OpenError, Source};
use crate::symbols::Symbols;
use crate::vcpu::Vcpu;

/// Machines that there may be, so that a list of them fits an answer.
pub(crate) const MACHINES_MAX: usize = 1024;

/// A machine under its id.
#[derive(Clone)]
pub struct Machine {
    id: String,
    source: Arc<dyn Source>,
    /// What its specification names, where nobody else may name the same.
    named: Option<String>,
    symbols: Option<Arc<Symbols>>,
    detached: watch::Sender<bool>,
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
        Self { id: id.into(), source, named: None, symbols: None, detached: watch::Sender::new(false) }
    }

    /// Gives it the symbols of its guest's kernel.
    #[must_use]
    pub fn with_symbols(self, symbols: Symbols) -> Self {
        Self { symbols: Some(Arc::new(symbols)), ..self }
    }

    /// The symbols of its guest's kernel.
    #[must_use]
    pub fn symbols(&self) -> Option<&Symbols> {
        self.symbols.as_deref()
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

    /// Why the machine is lost; `None` while it is there. What was read of it is worth something only if it is still there
    /// afterwards.
    #[must_use]
    pub fn lost(&self) -> Option<Arc<str>> {
        let health = self.source.health();
        let lost = health.lost();
        if lost.is_none() && self.source.memory().is_broken() {
            health.declare_lost("a file behind its memory was truncated, or the host could not read it");
            return health.lost();
        }
        lost
    }

    /// Waits until nobody can be told anything about the machine any more: it was lost, for the reason given, or detached.
    pub async fn when_gone(&self) -> Option<Arc<str>> {
        let mut detached = self.detached.subscribe();
        tokio::select! {
            reason = self.source.health().when_lost() => Some(reason),
            // The sender is `self`, which is borrowed.
            _ = detached.wait_for(|detached| *detached) => None,
        }
    }
}

/// Why a name leads to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No machine was named, and there is not exactly one.
    #[error("{}", unnamed(.ids))]
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

fn unnamed(ids: &[String]) -> String {
    if ids.is_empty() {
        "there is no machine: attach one, such as `demo`".to_owned()
    } else {
        format!("name a machine in `machine`: {}", list(ids))
    }
}

fn list(ids: &[String]) -> String {
    if ids.is_empty() {
        "there is none, attach one, such as `demo`".to_owned()
    } else {
        format!("there are `{}`", ids.join("`, `"))
    }
}

/// Why a machine is not taken into the registry.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is one of that id.
    #[error(
        "there is a machine `{id}` already: name this one otherwise, as in `other=SPEC`, or detach that one"
    )]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// There are as many as there may be.
    #[error("there are {most} machines already, and no more are served: detach one first")]
    TooMany {
        /// How many there may be.
        most: usize,
    },
    /// The guest is attached already.
    #[error("this guest is attached already, as machine `{id}`: {what}; ask that one, or detach it first")]
    SameGuest {
        /// The machine that it is.
        id: String,
        /// What both name.
        what: String,
    },
    /// It cannot be made.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Why a machine is not taken out of the registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DetachError {
    /// It is not there.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// Its guest would end.
    #[error("the guest of machine `{id}` runs in the daemon and would end: set `end_guest` if it may")]
    WouldEnd {
        /// The machine.
        id: String,
    },
}

type ById = BTreeMap<String, Arc<Machine>>;

/// The machines of the daemon, by id.
#[derive(Debug, Default)]
pub struct Machines {
    by_id: ArcSwap<ById>,
    /// The machines that are being made: id, and what they name. Held while the registry is changed.
    pending: Mutex<BTreeMap<String, Option<String>>>,
}

impl Machines {
    /// A registry of `machines`.
    ///
    /// # Errors
    /// When two have the same id, or are the same guest.
    pub fn new(machines: impl IntoIterator<Item = Machine>) -> Result<Self, AttachError> {
        let registry = Self::default();
        for machine in machines {
            registry.add(machine)?;
        }
        Ok(registry)
    }

    /// Takes in a machine that is there.
    ///
    /// # Errors
    /// When there is one of that id, or it is the same guest.
    pub fn add(&self, machine: Machine) -> Result<Arc<Machine>, AttachError> {
        self.insert(&self.pending(), machine)
    }

    /// Makes the machine that `spec` describes, and takes it in. Blocks, for as long as its source takes.
    ///
    /// # Errors
    /// When there is one of that id, it is the same guest, or it cannot be made.
    pub fn open(&self, spec: &MachineSpec) -> Result<Arc<Machine>, AttachError> {
        let named = spec.names();
        let reserved = self.reserve(&spec.id, named.clone())?;
        let machine = Machine { named, ..spec.open()? };
        reserved.take_in(machine)
    }

    /// Keeps an id, and what the machine names, for one that is to be made.
    fn reserve<'a>(&'a self, id: &'a str, named: Option<String>) -> Result<Reserved<'a>, AttachError> {
        let mut pending = self.pending();
        self.check(&pending, id, named.as_deref())?;
        pending.insert(id.to_owned(), named);
        Ok(Reserved { machines: self, id })
    }

    /// Takes out a machine. Calls that are under way end with it; `end_guest` agrees to the end of a guest that runs here.
    ///
    /// # Errors
    /// When it is not there, or its guest would end without having been agreed to.
    pub fn detach(&self, id: &str, end_guest: bool) -> Result<Arc<Machine>, DetachError> {
        let pending = self.pending();
        let mut by_id = ById::clone(&self.by_id.load());
        let Some(machine) = by_id.remove(id) else {
            let ids = by_id.into_keys().collect();
            return Err(LookupError::NoMachine { id: id.to_owned(), ids }.into());
        };
        if machine.source.capabilities().ends_when_detached && !end_guest {
            return Err(DetachError::WouldEnd { id: id.to_owned() });
        }
        self.by_id.store(Arc::new(by_id));
        drop(pending);
        machine.detached.send_replace(true);
        Ok(machine)
    }

    /// The machine `id`; empty means the only one. Takes no lock.
    ///
    /// # Errors
    /// Lists the ids there are.
    pub fn get(&self, id: &str) -> Result<Arc<Machine>, LookupError> {
        let by_id = self.by_id.load();
        let ids = || by_id.keys().cloned().collect();
        if id.is_empty() {
            let mut all = by_id.values();
            return match (all.next(), all.next()) {
                (Some(only), None) => Ok(Arc::clone(only)),
                _ => Err(LookupError::Unnamed { ids: ids() }),
            };
        }
        by_id.get(id).cloned().ok_or_else(|| LookupError::NoMachine { id: id.to_owned(), ids: ids() })
    }

    /// All machines, by id.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Machine>> {
        self.by_id.load().values().cloned().collect()
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a machine of this id, that names this, can be taken in.
    fn check(
        &self,
        pending: &BTreeMap<String, Option<String>>,
        id: &str,
        named: Option<&str>,
    ) -> Result<(), AttachError> {
        let by_id = self.by_id.load();
        if by_id.contains_key(id) || pending.contains_key(id) {
            return Err(AttachError::DuplicateId { id: id.to_owned() });
        }
        if by_id.len() + pending.len() >= MACHINES_MAX {
            return Err(AttachError::TooMany { most: MACHINES_MAX });
        }
        let there = by_id.iter().map(|(id, machine)| (id, machine.named.as_deref()));
        let coming = pending.iter().map(|(id, named)| (id, named.as_deref()));
        let same = there.chain(coming).find(|(_, other)| named.is_some() && *other == named);
        match same.zip(named) {
            Some(((id, _), what)) => Err(AttachError::SameGuest { id: id.clone(), what: what.to_owned() }),
            None => Ok(()),
        }
    }

    /// `pending` shows that the caller holds the lock.
    fn insert(
        &self,
        pending: &BTreeMap<String, Option<String>>,
        machine: Machine,
    ) -> Result<Arc<Machine>, AttachError> {
        self.check(pending, machine.id(), machine.named.as_deref())?;
        let mut by_id = ById::clone(&self.by_id.load());
        let identity = machine.source.identity();
        if let Some(what) = identity
            && let Some(same) = by_id.values().find(|other| other.source.identity() == identity)
        {
            return Err(AttachError::SameGuest { id: same.id.clone(), what: what.to_owned() });
        }
        let machine = Arc::new(machine);
        by_id.insert(machine.id.clone(), Arc::clone(&machine));
        self.by_id.store(Arc::new(by_id));
        Ok(machine)
    }
}

/// Keeps an id for a machine that is being made.
struct Reserved<'a> {
    machines: &'a Machines,
    id: &'a str,
}

impl Reserved<'_> {
    /// Takes in the machine that it was kept for.
    fn take_in(self, machine: Machine) -> Result<Arc<Machine>, AttachError> {
        let mut pending = self.machines.pending();
        pending.remove(self.id);
        let taken_in = self.machines.insert(&pending, machine);
        // Once the lock is let go of, the id may be somebody else's.
        std::mem::forget(self);
        taken_in
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.machines.pending().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn spec(text: &str) -> MachineSpec {
        text.parse().unwrap()
    }

    #[test]
    fn machines_come_and_go() {
        let machines = Machines::default();
        assert!(matches!(machines.get(""), Err(LookupError::Unnamed { .. })));
        machines.open(&spec("a=demo:plain")).unwrap();
        let held = machines.get("").unwrap();
        assert_eq!(held.id(), "a");
        assert!(matches!(
            machines.open(&spec("a=demo:plain")),
            Err(AttachError::DuplicateId { id }) if id == "a"
        ));
        machines.open(&spec("b=demo:plain")).unwrap();
        assert!(matches!(machines.get(""), Err(LookupError::Unnamed { ids }) if ids == ["a", "b"]));
        assert!(matches!(machines.detach("a", false), Err(DetachError::WouldEnd { .. })));
        machines.detach("a", true).unwrap();
        assert!(matches!(machines.detach("a", true), Err(DetachError::Lookup(_))));
        assert_eq!(machines.get("").unwrap().id(), "b");
        // Who found it before still has it.
        assert!(held.lost().is_none() && held.vcpu(0).is_ok());
        // What could not be made keeps no id.
        assert!(matches!(
            machines.open(&spec("c=kvm:elf=/nonexistent")),
            Err(AttachError::Open(OpenError::Elf(_)))
        ));
        machines.open(&spec("c=demo:plain")).unwrap();
    }

    #[test]
    fn a_failure_takes_nobodys_reservation_away() {
        let machines = Machines::default();
        machines.open(&spec("a=demo:plain")).unwrap();
        let other = || Machine::new("a", Arc::clone(&machines.get("a").unwrap().source));
        assert!(matches!(machines.add(other()), Err(AttachError::DuplicateId { .. })));
        // Under another id than it was kept for: it fails for being there.
        let fail = || machines.reserve("b", None).map(|reserved| reserved.take_in(other()));
        assert!(matches!(fail(), Ok(Err(AttachError::DuplicateId { id })) if id == "a"));
        std::thread::scope(|scope| {
            let failing = scope.spawn(|| (0..20_000).for_each(|_| drop(fail())));
            while !failing.is_finished() {
                let Ok(reserved) = machines.reserve("b", None) else { continue };
                for _ in 0..20 {
                    std::thread::yield_now();
                    assert!(machines.pending().contains_key("b"), "it was kept");
                }
                drop(reserved);
            }
        });
        assert!(machines.pending().is_empty());
    }

    #[test]
    fn there_are_no_more_than_there_may_be() {
        let demo = spec("demo:plain").open().unwrap();
        let machine = |id: usize| Machine::new(id.to_string(), Arc::clone(&demo.source));
        let machines = Machines::new((1..MACHINES_MAX).map(machine)).unwrap();
        let reserved = machines.reserve("a", None).unwrap();
        let refused = machines.add(machine(0)).unwrap_err().to_string();
        assert!(refused.contains("1024 machines already"), "{refused}");
        reserved.take_in(Machine::new("a", Arc::clone(&demo.source))).unwrap();
        assert!(matches!(machines.reserve("b", None), Err(AttachError::TooMany { .. })));
        machines.detach("a", true).unwrap();
        machines.add(machine(0)).unwrap();
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_the_end() {
        let machines = Machines::default();
        let (a, b) =
            (machines.open(&spec("a=demo:plain")).unwrap(), machines.open(&spec("b=demo:plain")).unwrap());
        machines.detach("a", true).unwrap();
        assert_eq!(a.when_gone().await, None);
        b.source().health().declare_lost("gone");
        assert_eq!(b.when_gone().await.as_deref(), Some("gone"));
        assert_eq!(b.lost().as_deref(), Some("gone"));
    }
}
