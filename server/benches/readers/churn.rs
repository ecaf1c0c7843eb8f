//! Readers of a vCPU's walkers, and what is done to the vCPU meanwhile.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pagewalk::{Access, AccessKind, ControlRegisters, Gva, NptControls, Privilege};
use pagewalkd::machine::Machine;
use pagewalkd::machine::demo::{L2_CR3, NCR3};
use pagewalkd::vcpu::{EnterL2, L2Registers, NestedRequest, SecondDimension, Vcpu};

/// Control calls a second: somewhat more than half of them publish a generation.
pub(crate) const PACE: u32 = 2000;

/// What readers did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reads {
    /// Snapshots taken and walked by, for each second of processor that the readers had.
    pub(crate) per_second: f64,
    /// The same, for each second by the clock: less where others had the processor.
    pub(crate) by_the_clock: f64,
    /// Control calls that were answered meanwhile, for each second by the clock.
    pub(crate) controls: f64,
    /// Generations that readers saw.
    pub(crate) generations: u64,
}

/// Reads vCPU 0 of `machine` on `readers` threads for `time`; with `churn`, while it is paused, stepped, toggled and resumed.
pub(crate) fn read(machine: &Machine, readers: usize, time: Duration, churn: bool) -> Reads {
    let vcpu = Arc::clone(machine.vcpu(0).unwrap());
    let stop = AtomicBool::new(false);
    let controls = AtomicU64::new(0);
    let before = vcpu.latest().generation;
    let start = Instant::now();
    let read: Vec<(u64, f64)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..readers).map(|_| scope.spawn(|| reader(machine, &vcpu, &stop))).collect();
        if churn {
            scope.spawn(|| control(&vcpu, &stop, &controls));
        }
        thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let elapsed = start.elapsed().as_secs_f64();
    let reads: u64 = read.iter().map(|(reads, _)| reads).sum();
    let used: f64 = read.iter().map(|(_, used)| used).sum();
    Reads {
        per_second: reads as f64 / used,
        by_the_clock: reads as f64 / elapsed,
        controls: controls.load(Ordering::Relaxed) as f64 / elapsed,
        generations: vcpu.latest().generation - before,
    }
}

fn reader(machine: &Machine, vcpu: &Vcpu, stop: &AtomicBool) -> (u64, f64) {
    let memory = machine.source().memory();
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let text = machine.source().landmarks().iter().find(|landmark| landmark.name == "kernel-text");
    let gva = Gva(text.unwrap().address);
    let (mut reads, before, mut newest) = (0, used(), 0);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..64 {
            let snapshot = vcpu.latest();
            assert!(snapshot.generation >= newest, "generations never go back");
            newest = snapshot.generation;
            let _ = black_box(snapshot.walker.as_ref().unwrap().translate(memory.as_ref(), gva, &access));
        }
        reads += 64;
    }
    (reads, used() - before)
}

/// Seconds of processor that this thread has used.
fn used() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// Calls one control after another, [`PACE`] of them a second. Where nothing runs, there is nothing to pause or step.
fn control(vcpu: &Vcpu, stop: &AtomicBool, answered: &AtomicU64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let host = ControlRegisters { cr0: 0x8000_0011, cr4: 0x20, efer: 0x1d00, ..Default::default() };
    let l2 = L2Registers { cr3: Some(L2_CR3), ..Default::default() };
    let second = SecondDimension::Npt { ncr3: NCR3, host, controls: NptControls::default() };
    let on = NestedRequest::Enter(EnterL2::walker_only(second, l2));
    let off = NestedRequest::Off { walker_only: true };
    runtime.block_on(async {
        let mut due = Instant::now();
        let mut turn = 0;
        while !stop.load(Ordering::Relaxed) {
            let deadline = Instant::now() + Duration::from_secs(5);
            let done = match turn % 5 {
                0 => vcpu.pause(deadline).await,
                1 => vcpu.step(deadline).await,
                2 => vcpu.set_nested(on, deadline).await.map(|(snapshot, _)| snapshot),
                3 => vcpu.set_nested(off, deadline).await.map(|(snapshot, _)| snapshot),
                _ => vcpu.resume(deadline).await,
            };
            turn += 1;
            answered.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
            due += Duration::from_secs(1) / PACE;
            tokio::time::sleep_until(due.into()).await;
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        let _ = vcpu.set_nested(off, deadline).await;
        let _ = vcpu.resume(deadline).await;
    });
}
