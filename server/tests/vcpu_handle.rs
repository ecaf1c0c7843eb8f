//! The handle and the thread of a vCPU, over a backend that does as it is told: no `/dev/kvm` needed.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagewalk::{CpuProfile, Vendor};
use pagewalkd::vcpu::{
    Backend, Exit, Hold, Holders, ImmediateExit, NestedRequest, RegisterChanges, Registers, RunState, Vcpu,
    VcpuError,
};

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn within(milliseconds: u64) -> Instant {
    Instant::now() + Duration::from_millis(milliseconds)
}

#[derive(Debug, PartialEq)]
enum Trouble {
    None,
    PanicOnRead,
    PanicOnWrite,
    FailOnRead,
}

/// `run` gives the exits that the test sends, and blocks, deaf to kicks, until there is one.
struct Script {
    exits: Receiver<Exit>,
    entered: Sender<()>,
    registers: Registers,
    reads: Arc<AtomicU64>,
    trouble: Arc<Mutex<Trouble>>,
}

struct Control {
    vcpu: Arc<Vcpu>,
    exits: Sender<Exit>,
    reads: Arc<AtomicU64>,
    trouble: Arc<Mutex<Trouble>>,
}

fn long_mode() -> Registers {
    Registers {
        cr0: 0x8000_0001,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0x500,
        pat: 0x0007_0406_0007_0406,
        ..Registers::default()
    }
}

fn spawn() -> Control {
    let (exits, script) = channel();
    let (entered, is_running) = channel();
    let reads = Arc::new(AtomicU64::new(0));
    let trouble = Arc::new(Mutex::new(Trouble::None));
    let backend = Script {
        exits: script,
        entered,
        registers: long_mode(),
        reads: Arc::clone(&reads),
        trouble: Arc::clone(&trouble),
    };
    let vcpu = Vcpu::spawn("script", 0, CPU, backend).unwrap();
    is_running.recv().unwrap();
    Control { vcpu, exits, reads, trouble }
}

impl Script {
    fn in_trouble(&self, kind: &Trouble) -> bool {
        *self.trouble.lock().unwrap_or_else(std::sync::PoisonError::into_inner) == *kind
    }
}

impl Backend for Script {
    fn run(&mut self) -> Exit {
        // Only the first entry has somebody who waits for it.
        let _ = self.entered.send(());
        match self.exits.recv() {
            Ok(Exit::Failed(text)) if text == "panic" => panic!("run was told to panic"),
            Ok(exit) => exit,
            Err(_) => Exit::Kicked,
        }
    }

    fn step(&mut self) -> Result<Exit, VcpuError> {
        self.registers.rip += 1;
        Ok(Exit::Stepped)
    }

    fn registers(&mut self) -> Result<Registers, String> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        assert!(!self.in_trouble(&Trouble::PanicOnRead), "registers was told to panic");
        if self.in_trouble(&Trouble::FailOnRead) {
            return Err("no registers today".into());
        }
        Ok(self.registers.clone())
    }

    fn set_registers(&mut self, changes: &RegisterChanges) -> Result<(), VcpuError> {
        assert!(!self.in_trouble(&Trouble::PanicOnWrite), "set_registers was told to panic");
        self.registers = changes.applied_to(&self.registers);
        Ok(())
    }
}

async fn settle(vcpu: &Vcpu, state: RunState) {
    let end = soon();
    while vcpu.latest().run_state != state {
        assert!(Instant::now() < end, "{:?}", vcpu.latest());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_vcpu_that_does_not_come_out_is_unresponsive_until_it_does() {
    let Control { vcpu, exits, .. } = spawn();
    let before = vcpu.latest();
    assert_eq!(vcpu.run_state(&before), RunState::Running);
    let start = Instant::now();
    let error = vcpu.sync(within(50)).await.unwrap_err();
    assert!(matches!(error, VcpuError::Timeout { .. }), "{error}");
    assert!((Duration::from_millis(50)..Duration::from_secs(5)).contains(&start.elapsed()));
    assert_eq!(vcpu.run_state(&vcpu.latest()), RunState::Unresponsive);
    assert!(matches!(vcpu.pause(within(10)).await, Err(VcpuError::Timeout { .. })));
    // Readers of the latest state do not care.
    assert_eq!(vcpu.latest().registers, before.registers);

    exits.send(Exit::Kicked).unwrap();
    let end = soon();
    while vcpu.run_state(&vcpu.latest()) == RunState::Unresponsive {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(
        vcpu.run_state(&vcpu.latest()),
        RunState::Running,
        "a pause that nobody waits for is not carried out"
    );
    drop(exits);
}

#[tokio::test]
async fn concurrent_syncs_share_one_publication() {
    let Control { vcpu, exits, reads, .. } = spawn();
    let before = reads.load(Ordering::Relaxed);
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let vcpu = Arc::clone(&vcpu);
            tokio::spawn(async move { vcpu.sync(soon()).await })
        })
        .collect();
    // All of them draw a ticket and wait: the guest is not coming out yet.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    exits.send(Exit::Kicked).unwrap();
    for task in waiting {
        task.await.unwrap().unwrap();
    }
    let reads = reads.load(Ordering::Relaxed) - before;
    assert!((1..=2).contains(&reads), "{reads} reads of the registers for 200 requests");
    drop(exits);
}

#[tokio::test]
async fn a_panic_while_running_is_an_internal_error() {
    let Control { vcpu, exits, .. } = spawn();
    exits.send(Exit::Failed("panic".into())).unwrap();
    settle(&vcpu, RunState::InternalError).await;
    let snapshot = vcpu.sync(soon()).await.unwrap();
    assert!(snapshot.run_state_reason.contains("run was told to panic"), "{}", snapshot.run_state_reason);
    assert_eq!(snapshot.registers, long_mode(), "the last known ones");
    assert!(!snapshot.assumed.is_empty(), "and it says that they are");
    assert!(matches!(vcpu.resume(soon()).await, Err(VcpuError::Stopped { .. })));
    let changes = RegisterChanges { rax: Some(1), ..RegisterChanges::default() };
    assert!(matches!(vcpu.set_registers(changes, soon()).await, Err(VcpuError::Hypervisor(_))));
    // The walkers can still be switched.
    assert!(vcpu.set_nested(NestedRequest::Off { walker_only: false }, soon()).await.is_ok());
}

#[tokio::test]
async fn a_panic_or_failure_with_registers_is_an_internal_error() {
    for trouble in [Trouble::PanicOnRead, Trouble::FailOnRead] {
        let control = spawn();
        let expected = if trouble == Trouble::PanicOnRead { "told to panic" } else { "no registers today" };
        *control.trouble.lock().unwrap() = trouble;
        control.exits.send(Exit::Kicked).unwrap();
        // Not by `sync` alone: the kick above may be over before its ticket is drawn.
        drop(control.exits);
        let snapshot = control.vcpu.sync(soon()).await.unwrap();
        assert_eq!(snapshot.run_state, RunState::InternalError);
        assert!(snapshot.run_state_reason.contains(expected), "{}", snapshot.run_state_reason);
    }
    let control = spawn();
    *control.trouble.lock().unwrap() = Trouble::PanicOnWrite;
    drop(control.exits);
    let changes = RegisterChanges { rax: Some(1), ..RegisterChanges::default() };
    let error = control.vcpu.set_registers(changes, soon()).await.unwrap_err();
    assert!(matches!(&error, VcpuError::Hypervisor(why) if why.contains("told to panic")), "{error}");
    settle(&control.vcpu, RunState::InternalError).await;
}

#[tokio::test]
async fn halted_then_runs_on_by_itself() {
    let Control { vcpu, exits, .. } = spawn();
    exits.send(Exit::Halted).unwrap();
    settle(&vcpu, RunState::Halted).await;
    let halted = vcpu.latest().taken;
    let looked = vcpu.sync(soon()).await.unwrap();
    // On a busy host the look itself may come after the rest of 50 ms.
    if looked.taken.duration_since(halted) < Duration::from_millis(40) {
        assert_eq!(looked.run_state, RunState::Halted, "a rest is not cut short by a look");
    }
    settle(&vcpu, RunState::Running).await;
    assert!(halted.elapsed() < Duration::from_secs(5));
    drop(exits);
}

#[tokio::test]
async fn a_shutdown_is_final() {
    let Control { vcpu, exits, .. } = spawn();
    exits.send(Exit::Shutdown("triple fault".into())).unwrap();
    settle(&vcpu, RunState::Shutdown).await;
    let error = vcpu.resume(soon()).await.unwrap_err();
    assert_eq!(error, VcpuError::Stopped { state: RunState::Shutdown, reason: "triple fault".into() });
    drop(exits);
}

#[tokio::test]
async fn the_queue_is_bounded_and_its_askers_time_out() {
    let Control { vcpu, exits, .. } = spawn();
    let start = Instant::now();
    let tasks: Vec<_> = (0..500)
        .map(|_| {
            let vcpu = Arc::clone(&vcpu);
            tokio::spawn(async move { vcpu.pause(within(200)).await })
        })
        .collect();
    for task in tasks {
        assert!(matches!(task.await.unwrap(), Err(VcpuError::Timeout { .. })));
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    drop(exits);
    assert_eq!(vcpu.sync(soon()).await.unwrap().run_state, RunState::Running);
}

#[test]
fn dropping_a_stuck_vcpu_is_bounded() {
    let Control { vcpu, exits, .. } = spawn();
    let start = Instant::now();
    drop(vcpu);
    let took = start.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(5)).contains(&took), "{took:?}");
    drop(exits);
}

#[tokio::test]
async fn a_thread_that_panics_is_gone_and_says_so() {
    struct Hopeless;
    impl Backend for Hopeless {
        fn run(&mut self) -> Exit {
            Exit::Kicked
        }
        fn step(&mut self) -> Result<Exit, VcpuError> {
            Ok(Exit::Stepped)
        }
        fn registers(&mut self) -> Result<Registers, String> {
            Ok(long_mode())
        }
        fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
            Ok(())
        }
        fn immediate_exit(&mut self) -> Option<ImmediateExit> {
            panic!("no way to reach this one")
        }
    }
    let vcpu = Vcpu::spawn("hopeless", 0, CPU, Hopeless).unwrap();
    settle(&vcpu, RunState::InternalError).await;
    assert!(vcpu.latest().run_state_reason.contains("no way to reach this one"));
    let gone = VcpuError::Gone { vcpu: "hopeless/vcpu0".into() };
    assert_eq!(vcpu.sync(soon()).await.unwrap_err(), gone);
    assert_eq!(vcpu.pause(soon()).await.unwrap_err(), gone);
}

#[tokio::test]
async fn a_static_backend_is_never_run() {
    struct Memory;
    impl Backend for Memory {
        fn static_reason(&self) -> Option<String> {
            Some("only memory: nothing runs".into())
        }
        fn run(&mut self) -> Exit {
            panic!("nobody runs this")
        }
        fn step(&mut self) -> Result<Exit, VcpuError> {
            panic!("nobody steps this")
        }
        fn registers(&mut self) -> Result<Registers, String> {
            Ok(long_mode())
        }
        fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
            Ok(())
        }
    }
    let vcpu = Vcpu::spawn("static", 3, CPU, Memory).unwrap();
    assert_eq!((vcpu.name(), vcpu.index()), ("static/vcpu3", 3));
    assert_eq!(
        vcpu.step(soon()).await.unwrap_err(),
        VcpuError::Unsupported("only memory: nothing runs".into())
    );
    assert_eq!(vcpu.sync(soon()).await.unwrap().run_state, RunState::Static);
}

/// A vCPU of a guest that another process runs, all of whose vCPUs stop together; and how often it was let run on.
#[derive(Clone, Default)]
struct Elsewhere {
    paused: Arc<AtomicBool>,
    resumed: Arc<AtomicU64>,
    holders: Arc<Mutex<Holders>>,
}

impl Elsewhere {
    fn spawn(&self) -> Arc<Vcpu> {
        Vcpu::spawn("elsewhere", 0, CPU, self.clone()).unwrap()
    }
}

impl Backend for Elsewhere {
    fn run(&mut self) -> Exit {
        panic!("it runs elsewhere")
    }
    fn step(&mut self) -> Result<Exit, VcpuError> {
        panic!("nobody steps this")
    }
    fn registers(&mut self) -> Result<Registers, String> {
        Ok(long_mode())
    }
    fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
        Ok(())
    }
    fn elsewhere(&mut self) -> Option<(RunState, String)> {
        let paused = self.paused.load(Ordering::Relaxed);
        Some((if paused { RunState::Paused } else { RunState::Running }, String::new()))
    }
    fn pause(&mut self) -> Result<bool, VcpuError> {
        Ok(!self.paused.swap(true, Ordering::Relaxed))
    }
    fn resume(&mut self) -> Result<(), VcpuError> {
        self.paused.store(false, Ordering::Relaxed);
        self.resumed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn holders(&self) -> Arc<Mutex<Holders>> {
        Arc::clone(&self.holders)
    }
}

#[tokio::test]
async fn a_guest_that_is_held_runs_on_when_its_vcpu_goes() {
    for round in 1..=200 {
        let guest = Elsewhere { paused: Arc::new((round % 2 == 0).into()), ..Elsewhere::default() };
        let hold = Hold::new(guest.spawn());
        assert_eq!(hold.pause(soon()).await.unwrap().run_state, RunState::Paused);
        // The vCPU goes with it, and waits for its thread.
        drop(hold);
        assert_eq!(
            guest.resumed.load(Ordering::Relaxed),
            round % 2,
            "a guest that was stopped before stays so"
        );
    }
}

#[tokio::test]
async fn what_is_said_while_a_guest_is_held_stays() {
    let elsewhere = Elsewhere::default().spawn();
    // Its script over, it comes out at once, for ever.
    let Control { vcpu: here, .. } = spawn();
    for vcpu in [elsewhere, here] {
        let state = async || vcpu.sync(soon()).await.unwrap().run_state;
        let hold = async || {
            let hold = Hold::new(Arc::clone(&vcpu));
            assert_eq!(hold.pause(soon()).await.unwrap().run_state, RunState::Paused);
            hold
        };
        // The last one lets it go.
        let (first, second) = (hold().await, hold().await);
        drop(first);
        assert_eq!(state().await, RunState::Paused);
        drop(second);
        assert_eq!(state().await, RunState::Running);
        // A pause outlasts it.
        let held = hold().await;
        vcpu.pause(soon()).await.unwrap();
        drop(held);
        assert_eq!(state().await, RunState::Paused);
        // One that was not heeded does not count later.
        drop(hold().await);
        assert_eq!(state().await, RunState::Paused);
        vcpu.resume(soon()).await.unwrap();
        // Run on, and stopped by the next one, it runs on after that.
        let held = hold().await;
        vcpu.resume(soon()).await.unwrap();
        assert_eq!(state().await, RunState::Running);
        let again = hold().await;
        drop(held);
        assert_eq!(state().await, RunState::Paused);
        drop(again);
        assert_eq!(state().await, RunState::Running);
    }
}

#[tokio::test]
async fn vcpus_that_stop_together_are_held_together() {
    for first in [0, 1] {
        let guest = Elsewhere::default();
        let mut holds = [guest.spawn(), guest.spawn()].map(Hold::new).map(Some);
        for hold in holds.iter().flatten() {
            // Asked again, as after a wait that was too short, it holds once.
            hold.pause(soon()).await.unwrap();
            hold.pause(soon()).await.unwrap();
        }
        // The vCPU goes with it, and its thread has let go then.
        drop(holds[first].take());
        assert_eq!(guest.resumed.load(Ordering::Relaxed), 0, "the other one holds it");
        drop(holds);
        assert_eq!(guest.resumed.load(Ordering::Relaxed), 1);
        assert!(!guest.paused.load(Ordering::Relaxed));
    }
}
