//! Answers that come in parts: maps of an address space, made slice by slice.
//!
//! A slice takes about a millisecond at most, and runs on a thread that may block, a few at a time over all calls: unary calls go
//! by. The next slice begins when the client has taken the part before, so that a client that does not read costs one part
//! of memory until its stream ends for that, and one that leaves is noticed between two slices.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk::map::{Map, Progress};
use pagewalk_proto::v1;
use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tonic::Status;

use super::Daemon;
use super::outlet::Outlet;
use super::resolve::{Target, gone};
use crate::convert;
use crate::status::Error;
use crate::vcpu::Snapshot;

/// Extents in one message.
const EXTENTS: usize = 2048;
/// How long a slice takes, give or take [`ENTRIES`].
const SLICE: Duration = Duration::from_millis(1);
/// Entries read between two looks at the clock: many more than a descent from the root, with which each begins.
const ENTRIES: u64 = 1 << 15;
/// How long a client that waits for the next extent hears nothing of what has been reached.
const SILENCE: Duration = Duration::from_millis(250);

/// How many slices may run at a time: half of the CPUs stay with those who serve.
pub(super) fn slices() -> Arc<Semaphore> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new((cpus / 2).max(1)))
}

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
    pub(super) until: Option<Instant>,
}

impl Sending {
    pub(super) fn stream<T: From<Part> + Send + 'static>(self) -> Parts<T> {
        let (parts, stream) = Outlet::new();
        tokio::spawn(self.run(parts));
        Box::pin(stream)
    }

    async fn run<T: From<Part>>(self, parts: Outlet<T>) {
        let mut draining = self.daemon.draining.clone();
        let machine = Arc::clone(&self.target.machine);
        let until = self.until;
        let late = async {
            match until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
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
                let slice = target.read_at_length(&daemon, move |memory| {
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
    loop {
        let progress = map.advance(memory, ENTRIES, |extent| {
            extents.push(convert::mapping::extent(&extent, &format));
            // The map may have one more in hand when it ends.
            if extents.len() + 1 < EXTENTS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        if progress != Progress::Going || extents.len() + 1 >= EXTENTS || begun.elapsed() >= SLICE {
            return (extents, progress);
        }
    }
}
