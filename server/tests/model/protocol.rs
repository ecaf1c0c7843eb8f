//! The threads of the model: a vCPU's, askers, and one that watches generations.

use std::sync::atomic::{AtomicU64 as Count, Ordering as CountOrdering};
use std::time::Instant;

use libtest_mimic::Failed;

use crate::kick::Kicker;
use crate::publication::{Published, Publisher};
use crate::signal;
use crate::sync::{Arc, AtomicU64, Ordering, thread, watch};

/// What the vCPU does when nobody asks anything of it.
#[derive(Clone, Copy, Debug)]
enum Activity {
    Executes,
    Waits,
}

/// What is published: the registers are two words that the askers write before they ask.
#[derive(Clone, Copy)]
struct Snapshot {
    ticket: u64,
    generation: u64,
    registers: [u64; 2],
}

struct Machine {
    kicker: Kicker,
    published: Published<Snapshot>,
    registers: [AtomicU64; 2],
    served: watch::Receiver<u64>,
    generation: watch::Receiver<u64>,
}

impl Machine {
    fn start(activity: Activity) -> (Arc<Machine>, loom::thread::JoinHandle<()>) {
        let (served_by_thread, served) = watch::channel(0);
        let (generation_by_thread, generation) = watch::channel(1);
        let machine = Arc::new(Machine {
            kicker: Kicker::default(),
            published: Published::new(Snapshot { ticket: 0, generation: 1, registers: [0; 2] }),
            registers: [AtomicU64::new(0), AtomicU64::new(0)],
            served,
            generation,
        });
        let publisher = Publisher { served: served_by_thread, generation: generation_by_thread };
        let of_thread = Arc::clone(&machine);
        let thread = thread::spawn(move || of_thread.run(&publisher, activity));
        (machine, thread)
    }

    /// As the thread of a vCPU turns, without commands.
    fn run(&self, publisher: &Publisher, activity: Activity) {
        let on_thread = self.kicker.enter(None).unwrap();
        while let Some(ticket) = self.published.attend(&on_thread) {
            let previous = self.published.latest();
            if ticket > previous.ticket {
                let registers = std::array::from_fn(|number| self.registers[number].load(Ordering::Relaxed));
                let changed = registers != previous.registers;
                let generation = previous.generation + u64::from(changed);
                let snapshot = Arc::new(Snapshot { ticket, generation, registers });
                publisher.publish(&self.published, snapshot, ticket, changed.then_some(generation));
            }
            match activity {
                Activity::Executes if on_thread.pending() => {}
                Activity::Executes => signal::run_guest(),
                Activity::Waits => on_thread.wait(None),
            }
        }
    }

    /// Writes a register, and asks for a snapshot that has it.
    fn ask(&self, number: usize) {
        self.registers[number].store(1, Ordering::Relaxed);
        let ticket = self.published.ask(&self.kicker);
        self.served.wait_for(|served| *served >= ticket);
        let snapshot = self.published.latest();
        assert!(snapshot.ticket >= ticket, "the snapshot is older than the ticket that was announced");
        assert_eq!(snapshot.registers[number], 1, "the registers were read before the ticket was drawn");
    }

    fn watch(&self, generation: u64) {
        self.generation.wait_for(|now| *now >= generation);
        assert!(
            self.published.latest().generation >= generation,
            "a generation was announced that is not there"
        );
    }

    fn stop(&self) {
        self.published.stop(&self.kicker);
    }
}

/// Context switches that are forced in one execution; those where a thread waits come on top. With `PAGEWALK_FULL=1`, one more:
/// twenty times as many executions.
const PREEMPTIONS: usize = 2;

pub(crate) fn judge() -> Result<(), Failed> {
    let started = Instant::now();
    let full = std::env::var("PAGEWALK_FULL").is_ok_and(|value| value == "1");
    let mut cases = 0;
    for activity in [Activity::Executes, Activity::Waits] {
        for (name, scenario) in SCENARIOS {
            let executions = Arc::new(Count::new(0));
            let counted = Arc::clone(&executions);
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = Some(PREEMPTIONS + usize::from(full));
            builder.check(move || {
                counted.fetch_add(1, CountOrdering::Relaxed);
                scenario(activity);
            });
            let executions = executions.load(CountOrdering::Relaxed);
            println!("  {:<52} {executions:>10}", format!("{name}; the vCPU {activity:?}"));
            if executions < 100 {
                return Err(format!("only {executions} executions of {name}").into());
            }
            cases += executions;
        }
    }
    println!(
        "judge loom-publication: {cases} cases, 0 disagreements, {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

type Scenario = (&'static str, fn(Activity));

const SCENARIOS: [Scenario; 3] = [
    ("two askers", |activity| {
        let (machine, thread) = Machine::start(activity);
        let other = Arc::clone(&machine);
        let asker = thread::spawn(move || other.ask(1));
        machine.ask(0);
        asker.join().unwrap();
        machine.stop();
        thread.join().unwrap();
    }),
    ("an asker and a watcher", |activity| {
        let (machine, thread) = Machine::start(activity);
        let other = Arc::clone(&machine);
        let watcher = thread::spawn(move || other.watch(2));
        machine.ask(0);
        watcher.join().unwrap();
        machine.stop();
        thread.join().unwrap();
    }),
    ("asked twice, then stopped at once", |activity| {
        let (machine, thread) = Machine::start(activity);
        machine.ask(0);
        machine.ask(1);
        machine.stop();
        thread.join().unwrap();
    }),
];
