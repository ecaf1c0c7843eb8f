//! From the names in a request to a vCPU and the state to answer from.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;
use tokio::time::timeout_at;
use tonic::Request;

use super::Daemon;
use crate::convert::address::{SymbolOffset, Written, hex_hint, written};
use crate::convert::snapshot::{age, run_state};
use crate::layer::Deadline;
use crate::machine::{GuestRam, Machine};
use crate::status::Error;
use crate::symbols::Unresolved;
use crate::vcpu::{Snapshot, Vcpu, VcpuError};

/// How long a call waits for a vCPU if its client set no deadline.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU and the machine it belongs to.
pub(super) struct Target {
    // Before the machine: whoever waits for the machine to be let go of finds the vCPU let go of, too.
    pub(super) vcpu: Arc<Vcpu>,
    pub(super) machine: Arc<Machine>,
}

impl Daemon {
    pub(super) fn target(&self, vcpu: Option<v1::VcpuRef>) -> Result<Target, Error> {
        let named = vcpu.unwrap_or_default();
        let machine = self.machines.get(&named.machine)?;
        let vcpu = Arc::clone(machine.vcpu(named.vcpu)?);
        still_there(&machine)?;
        Ok(Target { vcpu, machine })
    }

    /// Where an answer about a vCPU comes from. Asked for last: what was read of a machine that was lost meanwhile is no
    /// answer.
    pub(super) fn provenance(&self, target: &Target, snapshot: &Snapshot) -> Result<v1::Provenance, Error> {
        still_there(&target.machine)?;
        Ok(v1::Provenance {
            machine: target.machine.id().to_owned(),
            vcpu: target.vcpu.index(),
            source: target.machine.source().kind().to_owned(),
            generation: snapshot.generation,
            run_state: run_state(target.vcpu.run_state(snapshot)).into(),
            snapshot_age: Some(age(snapshot)),
            assumed: snapshot.assumed.clone(),
            validated: false,
            torn: false,
            host: self.host.to_string(),
            repeated_walks: 0,
        })
    }

    /// Where an answer about a machine comes from.
    pub(super) fn machine_provenance(&self, machine: &Machine) -> v1::Provenance {
        v1::Provenance {
            machine: machine.id().to_owned(),
            source: machine.source().kind().to_owned(),
            host: self.host.to_string(),
            ..Default::default()
        }
    }
}

pub(super) fn still_there(machine: &Machine) -> Result<(), Error> {
    match machine.lost() {
        None => Ok(()),
        Some(reason) => Err(Error::Lost { machine: machine.id().to_owned(), reason }),
    }
}

/// Why a vCPU did not do what it was asked: where its machine went away meanwhile, because of that.
pub(super) fn refused(machine: &Machine, problem: VcpuError) -> Error {
    match still_there(machine) {
        Ok(()) => problem.into(),
        Err(lost) => lost,
    }
}

/// Why nothing more can be said of a machine that is gone: `lost` says what became of it, if it was not detached.
pub(super) fn gone(machine: &Machine, lost: Option<Arc<str>>) -> Error {
    let machine = machine.id().to_owned();
    match lost {
        Some(reason) => Error::Lost { machine, reason },
        None => Error::Detached { machine },
    }
}

impl Target {
    /// Has `work` read the machine's memory. Where that may block, it waits for one of a few places first, not beyond `until`
    /// if that is set, and holds up no other call.
    pub(super) async fn read<T>(
        &self,
        daemon: &Daemon,
        until: impl Into<Option<Instant>>,
        work: impl FnOnce(&GuestRam) -> T,
    ) -> Result<T, Error> {
        let memory = self.machine.source().memory();
        if !memory.blocks() {
            return Ok(work(&memory));
        }
        let place = daemon.blocking.acquire();
        let _place = match until.into() {
            Some(until) => timeout_at(until.into(), place).await.map_err(|_| Error::Deadline)?,
            None => place.await,
        };
        Ok(match Handle::current().runtime_flavor() {
            // This thread has nobody to hand its other work to.
            RuntimeFlavor::CurrentThread => work(&memory),
            _ => tokio::task::block_in_place(|| work(&memory)),
        })
    }

    /// Has `work` read the machine's memory for longer than others should wait for this thread: on one that holds up nobody, once
    /// it has one of these `places`.
    pub(super) async fn read_at_length<T: Send + 'static>(
        &self,
        daemon: &Daemon,
        places: &Arc<Semaphore>,
        work: impl FnOnce(&GuestRam) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let memory = self.machine.source().memory();
        // Memory that may block has places of its own: it would keep others from theirs.
        let places = if memory.blocks() { &daemon.blocking } else { places };
        let place = Arc::clone(places).acquire_owned().await.map_err(|_| Error::ShuttingDown)?;
        let read = tokio::task::spawn_blocking(move || {
            let read = work(&memory);
            // Work whose client has left holds its place until it ends.
            drop(place);
            read
        });
        read.await.map_err(|panicked| Error::Failed(panicked.to_string()))
    }

    /// The guest virtual address that a client wrote in `field`. A symbol is looked up on a thread that holds up nobody: memory is
    /// read for it, and names that are close to one that is not there take their time to be found.
    pub(super) async fn gva(
        &self,
        daemon: &Daemon,
        patience: Instant,
        address: Option<v1::Address>,
        field: &'static str,
    ) -> Result<u64, Error> {
        let symbol = match written(address, field)? {
            Written::Number(number) => return Ok(number),
            Written::Symbol(symbol) => symbol,
        };
        let place = timeout_at(patience.into(), Arc::clone(&daemon.blocking).acquire_owned()).await;
        let place = place.map_err(|_| Error::Deadline)?;
        let machine = Arc::clone(&self.machine);
        let looked_up = tokio::task::spawn_blocking(move || {
            let found = address_of(&machine, &symbol, field);
            // A lookup whose client has left holds its place until it ends.
            drop(place);
            found
        });
        looked_up.await.map_err(|panicked| Error::Failed(panicked.to_string()))?
    }

    /// A range of guest virtual addresses, with both ends as numbers.
    pub(super) async fn range(
        &self,
        daemon: &Daemon,
        patience: Instant,
        range: Option<v1::GvaRange>,
    ) -> Result<Option<v1::GvaRange>, Error> {
        let Some(v1::GvaRange { start, end }) = range else { return Ok(None) };
        let number = |gva| Some(v1::Address { value: Some(v1::address::Value::Number(gva)) });
        let start = match start {
            None => None,
            start => number(self.gva(daemon, patience, start, "range.start").await?),
        };
        let end = match end {
            None => None,
            end => number(self.gva(daemon, patience, end, "range.end").await?),
        };
        Ok(Some(v1::GvaRange { start, end }))
    }

    /// The state to answer from, as fresh as the request wants it.
    pub(super) async fn snapshot(&self, freshness: i32, patience: Instant) -> Result<Arc<Snapshot>, Error> {
        match v1::Freshness::try_from(freshness) {
            Ok(v1::Freshness::Unspecified | v1::Freshness::Latest) => Ok(self.vcpu.latest()),
            Ok(v1::Freshness::Sync) => {
                self.vcpu.sync(patience).await.map_err(|problem| refused(&self.machine, problem))
            }
            Err(_) => Err(Error::invalid("freshness", format!("{freshness} is no freshness"))),
        }
    }
}

fn address_of(machine: &Machine, symbol: &SymbolOffset, field: &'static str) -> Result<u64, Error> {
    let SymbolOffset { name, offset } = symbol;
    let Some(symbols) = machine.symbols() else {
        let id = machine.id();
        return Err(Error::invalid(
            field,
            format!(
                "`{name}` is no number, and machine `{id}` has no symbols: attach it with symbols=FILE, or write 0x and hex digits{}",
                hex_hint(name)
            ),
        ));
    };
    let address = symbols.resolve(machine, &machine.source().memory(), name).map_err(|why| match why {
        Unresolved::Name(problem) => Error::invalid(field, problem),
        Unresolved::Placement(problem) => Error::Precondition(format!("{field}: {problem}")),
    })?;
    u64::try_from(i128::from(address) + offset).map_err(|_| {
        Error::invalid(field, format!("`{name}` is {address:#x}, and the offset reaches beyond 64 bits"))
    })
}

/// Until when a call waits for vCPUs, places and symbols: its deadline, or what the daemon allows a client that set none.
pub(super) fn patience<T>(request: &Request<T>) -> Instant {
    deadline(request).unwrap_or_else(|| Instant::now() + PATIENCE)
}

/// When the client wants a call to be over, the work included: never, unless it says so.
pub(super) fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    request.extensions().get::<Deadline>().map(|deadline| deadline.0)
}
