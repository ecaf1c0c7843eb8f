//! Batches: one walk an address, all by the same walker, for the same access.
//!
//! The addresses are walked a slice at a time, from a copy on the stack, into the column that becomes the answer.

use std::time::Instant;

use pagewalk::{Access, AdPolicy, Gva, PageWord, Trace, Walker};
use pagewalk_proto::Column;
use pagewalk_proto::v1;

use super::Daemon;
use super::translation::{check_width, walker};
use super::turns::Slice;
use crate::convert;
use crate::machine::GuestRam;
use crate::status::Error;

/// Most addresses of a batch. The answer to so many fits into what gRPC clients take by default, 4 MiB.
pub(super) const MAX_ADDRESSES: usize = 1 << 18;
/// Most faults that an answer tells in full.
const MAX_FAULTS: u32 = 1 << 16;
/// As many as it tells unless asked for another number.
const DEFAULT_FAULTS: u32 = 4096;
/// Addresses of a slice: enough to have many walks in flight, and few enough to be over in a fraction of a millisecond.
const SLICE: usize = 4096;
/// Under a second dimension a walk is six times as many steps; and one that is validated is made alone.
const LONG_SLICE: usize = 1024;
/// Both together; and in memory that has to be fetched entry by entry, a walk takes microseconds.
const BLOCKING_SLICE: usize = 256;
/// By how much a slice is smaller where some of memory has to be fetched: all of its walks may lead there.
const PARTLY_FETCHED: usize = 16;

/// Waits for the vCPU until `patience` ends, and walks for as long as the client lets it.
pub(super) async fn translate(
    daemon: &Daemon,
    request: v1::BatchTranslateRequest,
    patience: Instant,
    deadline: Option<Instant>,
) -> Result<v1::BatchTranslateResponse, Error> {
    let v1::BatchTranslateRequest { head, column } = request;
    let count = count(&column)?;
    let max_faults = max_faults(head.max_faults)?;
    let target = daemon.target(head.vcpu)?;
    let snapshot = target.snapshot(head.freshness, patience).await?;
    let access = convert::access::access(head.access, &snapshot.registers)?;
    let walker = walker(head.r#override.as_ref(), &snapshot)?;
    convert::access::check(&access, &walker)?;
    if !walker.gva_walk().format().mode().is_long() {
        column.iter().try_for_each(|gva| check_width(&walker, gva, "addresses"))?;
    }

    let mut answer = Answer {
        words: Vec::with_capacity(count),
        faults: Vec::new(),
        max_faults,
        fault_count: 0,
        validate: head.validate,
        repeated_walks: 0,
        torn: false,
    };
    let memory = target.machine.source().memory();
    let mut start = 0;
    if memory.blocks() {
        while start < count {
            let walk =
                |memory: &GuestRam| answer.walk(&walker, memory, &access, &column, start, BLOCKING_SLICE);
            start += target.read(daemon, deadline, walk).await?;
        }
    } else {
        let size = match (walker.ngpa_walk(), head.validate) {
            (None, false) => SLICE,
            (Some(_), true) => BLOCKING_SLICE,
            _ => LONG_SLICE,
        };
        let size = if memory.is_mapped() { size } else { size / PARTLY_FETCHED };
        let slice = || {
            start += answer.walk(&walker, &memory, &access, &column, start, size);
            if start < count { Slice::More } else { Slice::Last }
        };
        daemon.turns.take(slice).await;
    }

    Ok(v1::BatchTranslateResponse {
        head: v1::BatchTranslateResponseHead {
            provenance: Some(v1::Provenance {
                validated: head.validate,
                torn: answer.torn,
                repeated_walks: answer.repeated_walks,
                ..daemon.provenance(&target, &snapshot)?
            }),
            faults: answer.faults,
            fault_count: answer.fault_count,
        },
        column: answer.words.into(),
    })
}

fn count(column: &Column) -> Result<usize, Error> {
    let Some(count) = column.len() else {
        let problem = format!("{} bytes are not made of whole 8-byte words", column.as_bytes().len());
        return Err(Error::invalid("addresses", problem));
    };
    match count {
        0 => Err(Error::invalid("addresses", format!("required: 1 to {MAX_ADDRESSES}"))),
        1..=MAX_ADDRESSES => Ok(count),
        _ => {
            let problem =
                format!("{count} are more than the {MAX_ADDRESSES} of one batch: split it, or use a stream");
            Err(Error::invalid("addresses", problem))
        }
    }
}

fn max_faults(requested: Option<u32>) -> Result<usize, Error> {
    match requested.unwrap_or(DEFAULT_FAULTS) {
        faults @ 0..=MAX_FAULTS => Ok(faults as usize),
        faults => Err(Error::invalid("max_faults", format!("{faults} is more than {MAX_FAULTS}"))),
    }
}

/// An answer in the making.
struct Answer {
    words: Vec<u64>,
    faults: Vec<v1::BatchFault>,
    max_faults: usize,
    fault_count: u32,
    validate: bool,
    repeated_walks: u32,
    torn: bool,
}

impl Answer {
    /// Walks the addresses from number `start` on, `size` of them if there are so many; says how many they were.
    fn walk(
        &mut self,
        walker: &Walker,
        memory: &GuestRam,
        access: &Access,
        column: &Column,
        start: usize,
        size: usize,
    ) -> usize {
        let mut gvas = [0; SLICE];
        let size = column.copy_to(start, &mut gvas[..size.min(SLICE)]);
        let gvas = &gvas[..size];
        self.words.resize(start + size, 0);
        let words = &mut self.words[start..];
        let mut refused = Vec::new();
        let mut refuse = |at, fault| {
            refused.push((at, convert::fault::word(&fault)));
            self.fault_count += 1;
            if self.faults.len() < self.max_faults {
                self.faults.push(v1::BatchFault {
                    // No larger than `MAX_ADDRESSES`.
                    index: (start + at) as u32,
                    fault: Some(convert::fault::without_reason(&fault)),
                });
            }
        };
        if self.validate {
            let mut trace = Trace::new();
            for (at, (gva, word)) in gvas.iter().zip(&mut *words).enumerate() {
                let gva = Gva(*gva);
                let walked = walker.translate_validated(memory, gva, access, AdPolicy::Observe, &mut trace);
                self.repeated_walks += walked.repeated;
                self.torn |= walked.torn.is_some();
                match walked.settled(gva) {
                    Ok(page) => *word = PageWord::of(&page).bits(),
                    Err(fault) => refuse(at, fault),
                }
            }
        } else {
            walker.translate_batch(memory, access, gvas, words, &mut refuse);
        }
        for (at, word) in refused {
            words[at] = word;
        }
        size
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::watch;

    use super::*;
    use crate::machine::{Fetch, FileMapping, LocalSource, Machine, MachineSpec, Machines, Place, Region};
    use crate::service::resolve::PATIENCE;

    const TEXT: u64 = 0xffff_8000_0001_0000;

    /// Memory that has to be fetched, at some cost.
    struct Fetched {
        from: Arc<GuestRam>,
        fetches: AtomicUsize,
        cost: Duration,
    }

    impl Fetch for Fetched {
        fn fetch(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            let begun = Instant::now();
            while begun.elapsed() < self.cost {}
            self.from.read(pagewalk::Gpa(offset), into).map(drop).map_err(std::io::Error::other)
        }
    }

    /// A daemon that serves the demo machine out of such memory, beside which there is as much that is `mapped`.
    fn daemon(cost: Duration, mapped: bool) -> (Daemon, Arc<Fetched>, watch::Sender<bool>) {
        let demo = "demo:plain".parse::<MachineSpec>().unwrap().open().unwrap();
        let source = demo.source();
        let from = source.memory();
        let fetched = Arc::new(Fetched { from: Arc::clone(&from), fetches: AtomicUsize::new(0), cost });
        let place = |gpa| Place::Fetched(Arc::clone(&fetched) as Arc<dyn Fetch>, gpa);
        let mut regions: Vec<_> =
            from.regions().iter().map(|region| (*region, place(region.start.0))).collect();
        if mapped {
            let file = tempfile::tempfile().unwrap();
            file.set_len(from.size()).unwrap();
            let region = Region { start: pagewalk::Gpa(1 << 40), size: from.size(), read_only: false };
            regions.push((region, Place::Mapped(FileMapping::of(&file).unwrap(), 0)));
        }
        let source = LocalSource {
            kind: "fetched",
            description: "memory that has to be fetched".into(),
            vcpus: source.vcpus().to_vec(),
            memory: Arc::new(GuestRam::of_others(regions).unwrap()),
            capabilities: source.capabilities().clone(),
            cpu: source.cpu(),
            landmarks: Vec::new(),
            health: crate::machine::Health::default(),
        };
        let machines = Machines::new(vec![Machine::new("demo", Arc::new(source))]).unwrap();
        let (stop, draining) = watch::channel(false);
        (Daemon::new(machines, "here".into(), draining, None), fetched, stop)
    }

    fn reads(count: usize) -> v1::BatchTranslateRequest {
        let access = v1::Access { kind: v1::AccessKind::Read.into(), ..Default::default() };
        v1::BatchTranslateRequest {
            head: v1::BatchTranslateRequestHead { access: Some(access), ..Default::default() },
            column: vec![TEXT; count].as_slice().into(),
        }
    }

    /// The patience that vCPUs get is none of a walk's.
    #[tokio::test(start_paused = true)]
    async fn a_batch_without_a_deadline_waits_for_a_place() {
        let (daemon, _, _stop) = daemon(Duration::ZERO, false);
        let taken = Arc::clone(&daemon.blocking).acquire_many_owned(16).await.unwrap();
        let waiting = tokio::spawn({
            let daemon = daemon.clone();
            async move { translate(&daemon, reads(300), Instant::now() + PATIENCE, None).await }
        });
        tokio::time::sleep(3 * PATIENCE).await;
        assert!(!waiting.is_finished(), "{:?}", waiting.await.unwrap().map(|answer| answer.head));
        let deadline = Instant::now();
        let late = translate(&daemon, reads(300), deadline, Some(deadline)).await;
        assert!(matches!(late, Err(Error::Deadline)));
        drop(taken);
        assert_eq!(waiting.await.unwrap().unwrap().column.len(), Some(300));
    }

    /// However little of it, a small call waits for what is fetched between two turns.
    #[tokio::test]
    async fn a_turn_in_memory_that_is_half_fetched_is_short() {
        let (daemon, fetched, _stop) = daemon(Duration::from_micros(2), true);
        assert!(!daemon.machines.get("").unwrap().source().memory().blocks());
        let patience = Instant::now() + PATIENCE;
        let batch = tokio::spawn(async move { translate(&daemon, reads(20_000), patience, None).await });
        let (mut longest, mut before) = (0, 0);
        while !batch.is_finished() {
            tokio::task::yield_now().await;
            let now = fetched.fetches.load(Ordering::Relaxed);
            longest = longest.max(now - before);
            before = now;
        }
        assert_eq!(batch.await.unwrap().unwrap().column.len(), Some(20_000));
        assert!(before >= 20_000 && longest < 2000, "{longest} of {before}");
    }
}
