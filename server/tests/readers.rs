//! Readers wait for nobody: not for a vCPU that is being paused, stepped, toggled and resumed a thousand times a second, not for
//! a control call that hangs. `benches/readers` measures by how little they are slowed down; here, on a machine that others
//! use at the same time, the bounds are loose.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "../benches/readers/churn.rs"]
#[allow(dead_code, reason = "rates by the clock are the bench's")]
mod churn;
#[path = "service/stuck.rs"]
mod stuck;

use std::sync::Arc;
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use churn::{Reads, read};
use pagewalkd::machine::Machine;

mod bed {
    use pagewalkd::machine::{Machine, MachineSpec};

    pub(crate) fn open(spec: &str) -> Machine {
        spec.parse::<MachineSpec>().unwrap().open().unwrap()
    }
}

const ROUND: Duration = Duration::from_millis(300);

/// The best of three: what others do to the machine only ever slows readers down.
fn best(mut round: impl FnMut() -> Reads) -> Reads {
    let rounds = (0..3).map(|_| round());
    rounds.max_by(|one, other| one.per_second.total_cmp(&other.per_second)).unwrap()
}

fn readers() -> usize {
    available_parallelism().map_or(1, usize::from)
}

#[test]
fn a_vcpu_that_is_controlled_all_the_time() {
    let demo = bed::open("demo");
    let quiet = best(|| read(&demo, readers(), ROUND, false));
    let churned = best(|| read(&demo, readers(), ROUND, true));
    println!("{quiet:?}, controlled: {churned:?}");
    assert!(churned.controls > 50.0 && churned.generations > 10, "nothing was published: {churned:?}");
    assert!(churned.per_second > quiet.per_second / 2.0, "{quiet:?}, controlled: {churned:?}");
}

#[test]
fn a_control_call_that_hangs() {
    let gate = stuck::Gate::default();
    let _end = stuck::OpenAtEnd(gate.clone());
    let stuck: Machine = stuck::machine("stuck", &gate);
    let quiet = best(|| read(&stuck, readers(), ROUND, false));
    let vcpu = Arc::clone(stuck.vcpu(0).unwrap());
    let deadline = Instant::now() + 4 * ROUND;
    let call = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(vcpu.pause(deadline)).is_err()
    });
    let beside = best(|| read(&stuck, readers(), ROUND, false));
    println!("{quiet:?}, beside a call: {beside:?}");
    assert!(beside.per_second > quiet.per_second / 2.0, "{quiet:?}, beside a call: {beside:?}");
    assert!(call.join().unwrap(), "the call hung until its deadline");
}
