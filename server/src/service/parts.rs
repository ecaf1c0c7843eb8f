//! Answers that come in parts: maps of an address space, made slice by slice.
//!
//! A slice takes about a millisecond at most, and runs on a thread that may block, as one of the turns of bulk work: unary calls
//! go by. The next slice begins when the client has taken the part before, so that a client that does not read costs one part
//! of memory until its stream ends for that, and one that leaves is noticed between two slices.

use std::ops::{ControlFlow, RangeInclusive};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk::map::{Map, Progress};
use pagewalk_proto::v1;
use tokio_stream::Stream;
use tonic::Status;

use super::Daemon;
use super::outlet::Outlet;
use super::resolve::{Target, gone};
use crate::convert;
use crate::layer::STALLED;
use crate::status::Error;
use crate::vcpu::Snapshot;

/// Extents in one message.
const EXTENTS: usize = 2048;
/// How long a slice takes, give or take the last of its steps.
const SLICE: Duration = Duration::from_millis(1);
/// Entries read before the first look at the clock, and at most between two. What an entry costs is known by then: memory may
/// have to be fetched. Each step begins with a descent from the root, of which the largest are many times as much.
const ENTRIES: RangeInclusive<u64> = 1 << 12..=1 << 15;
/// How long a client that waits for the next extent hears nothing of what has been reached.
const SILENCE: Duration = Duration::from_millis(250);

pub(super) type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One part, whatever RPC it answers.
pub(super) struct Part {
    extents: Vec<v1::Extent>,
    tally: Option<v1::MappingTally>,
    position: u64,
    last: bool,
    truncation: Option<v1::Truncation>,
    provenance: Option<v1::Provenance>,
}

macro_rules! from_part {
    ($($message:ident),*) => {$(
        impl From<Part> for v1::$message {
            fn from(part: Part) -> Self {
                let Part { extents, tally, position, last, truncation, provenance } = part;
                Self { extents, tally, position, last, truncation, provenance }
            }
        }
    )*};
}

from_part!(ListMappingsResponse, FindMappingsResponse, TranslateRangeResponse);

/// A map that is being sent.
pub(super) struct Sending {
    pub(super) daemon: Daemon,
    pub(super) target: Target,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) map: Map,
    /// When the client wants the last part at the latest.
    pub(super) deadline: Option<Instant>,
}

impl Sending {
    pub(super) fn stream<T: From<Part> + Send + 'static>(self) -> Parts<T> {
        let (parts, stream) = Outlet::new(STALLED);
        tokio::spawn(self.run(parts));
        Box::pin(stream)
    }

    async fn run<T: From<Part>>(self, parts: Outlet<T>) {
        let mut draining = self.daemon.draining.clone();
        let machine = Arc::clone(&self.target.machine);
        let deadline = self.deadline;
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = self.send_all(&parts) => ended,
            () = parts.closed() => return,
            () = late => Some(Error::Deadline),
            _ = draining.wait_for(|draining| *draining) => Some(Error::ShuttingDown),
            lost = machine.when_gone() => Some(gone(&machine, lost)),
        };
        if let Some(error) = ended {
            parts.end(error);
        }
    }

    async fn send_all<T: From<Part>>(self, parts: &Outlet<T>) -> Option<Error> {
        let Self { daemon, target, snapshot, map, .. } = self;
        let mut map = Box::new(map);
        loop {
            let place = match parts.place().await {
                Ok(place) => place,
                Err(error) => return Some(error),
            };
            let begun = Instant::now();
            let (extents, progress) = loop {
                let (extents, progress);
                let slice = target.read_at_length(&daemon, daemon.turns.places(), move |memory| {
                    let sliced = slice(&mut map, memory);
                    (map, sliced)
                });
                (map, (extents, progress)) = match slice.await {
                    Ok(sliced) => sliced,
                    Err(error) => return Some(error),
                };
                if !extents.is_empty() || progress != Progress::Going || begun.elapsed() >= SILENCE {
                    break (extents, progress);
                }
            };
            let last = progress != Progress::Going;
            let provenance = match daemon.provenance(&target, &snapshot) {
                Ok(provenance) => Some(provenance),
                Err(error) => return Some(error),
            };
            place.send(Ok(T::from(Part {
                extents,
                tally: Some(convert::mapping::tally(map.tally())),
                position: if progress == Progress::Done { 0 } else { map.position().0 },
                last,
                truncation: convert::mapping::truncation(progress),
                provenance,
            })));
            if last {
                return None;
            }
        }
    }
}

/// Goes on with a map for about a millisecond.
fn slice<M: pagewalk::Memory>(map: &mut Map, memory: &M) -> (Vec<v1::Extent>, Progress) {
    let format = map.walker().gva_walk().format().clone();
    let mut extents = Vec::new();
    let begun = Instant::now();
    let mut entries = *ENTRIES.start();
    loop {
        let progress = map.advance(memory, entries, |extent| {
            extents.push(convert::mapping::extent(&extent, &format));
            // The map may have one more in hand when it ends.
            if extents.len() + 1 < EXTENTS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let elapsed = begun.elapsed();
        if progress != Progress::Going || extents.len() + 1 >= EXTENTS || elapsed >= SLICE {
            return (extents, progress);
        }
        if elapsed < SLICE / 8 {
            entries = (2 * entries).min(*ENTRIES.end());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::thread::sleep;

    use pagewalk::{Backing, ExchangeError, Gpa, Memory};
    use tokio::time::timeout;
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::machine::Machines;

    /// One table, which refers to itself, and takes its time.
    struct Slow(Duration);

    impl Memory for Slow {
        fn load_u64(&self, _: Gpa) -> Option<u64> {
            Some(7)
        }
        fn load_table(&self, _: Gpa, entries: &mut [u64; 512]) -> bool {
            sleep(self.0);
            *entries = [7; 512];
            true
        }
        fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
            Err(ExchangeError::ReadOnly)
        }
        fn backing(&self, _: Gpa) -> Backing {
            Backing::Ram
        }
    }

    /// A client that leaves is noticed between two slices.
    #[test]
    fn a_slice_is_short_however_slow_memory_is() {
        let demo = "demo:plain".parse::<crate::machine::MachineSpec>().unwrap().open().unwrap();
        let walker = demo.vcpu(0).unwrap().latest().walker.clone().unwrap();
        // Nothing leads there, so that a slice ends for its time alone.
        let gpas = (Gpa(1 << 40), Gpa(1 << 40));
        let filter = pagewalk::map::Filter { gpas, ..Default::default() };
        let mut map = Map::new(walker).filtered(filter);
        let begun = Instant::now();
        let (extents, progress) = slice(&mut map, &Slow(Duration::from_millis(2)));
        assert_eq!((extents.len(), progress), (0, Progress::Going));
        assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());
    }

    /// Bulk work of either kind leaves a processor to small calls.
    #[tokio::test(start_paused = true)]
    async fn a_map_has_its_turn_as_batches_have() {
        let demo = "demo:plain".parse::<crate::machine::MachineSpec>().unwrap().open().unwrap();
        let (_stop, draining) = tokio::sync::watch::channel(false);
        let daemon = Daemon::new(Machines::new(vec![demo]).unwrap(), "here".into(), draining, None);
        let target = daemon.target(None).unwrap();
        let snapshot = target.vcpu.latest();
        let map = Map::new(snapshot.walker.clone().unwrap());
        let turns = Arc::clone(daemon.turns.places());
        let all = turns.available_permits() as u32;
        let processors = std::thread::available_parallelism().unwrap().get() as u32;
        assert_eq!(all, processors.max(2) - 1);
        let taken = turns.acquire_many_owned(all).await.unwrap();
        let sending = Sending { daemon, target, snapshot, map, deadline: None };
        let mut parts = sending.stream::<v1::ListMappingsResponse>();
        assert!(timeout(Duration::from_secs(1), parts.next()).await.is_err(), "it waits for a turn");
        drop(taken);
        assert!(!parts.next().await.unwrap().unwrap().extents.is_empty());
    }
}
