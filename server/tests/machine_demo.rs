//! The demo machine on `/dev/kvm`: it runs, and each landmark means what it promises.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
#[allow(dead_code)]
mod demo_landmarks;
#[allow(dead_code)]
mod kvm_bed;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bed::{block_on, soon};
use libtest_mimic::Failed;
use pagewalk::{Access, AccessKind, Backing, Gva, Memory, PageSize, Privilege};
use pagewalkd::machine::{Machine, MachineSpec, demo};
use pagewalkd::vcpu::{NestedRequest, RunState, Vcpu};

fn main() -> ExitCode {
    kvm_bed::main(&[
        ("runs_and_switches_and_remaps", runs_and_switches_and_remaps),
        ("every_landmark_means_what_it_promises", every_landmark_means_what_it_promises),
        ("rests", rests),
    ])
}

fn open() -> (Machine, Arc<Vcpu>) {
    let machine = "demo".parse::<MachineSpec>().unwrap().open().unwrap();
    let vcpu = Arc::clone(machine.vcpu(0).unwrap());
    (machine, vcpu)
}

fn rounds(machine: &Machine, vcpu: &Vcpu) -> u64 {
    let read = Access::new(AccessKind::Read, Privilege::Supervisor);
    let memory = &*machine.source().memory();
    let counter =
        vcpu.latest().walker.as_ref().unwrap().translate(memory, Gva(demo::ROUND_COUNTER), &read).unwrap();
    memory.load_u64(counter.gpa).unwrap()
}

fn runs_and_switches_and_remaps() -> Result<(), Failed> {
    let (machine, vcpu) = open();
    assert_eq!(machine.source().description(), "demo guest, running on /dev/kvm");
    let memory = &*machine.source().memory();
    let read = Access::new(AccessKind::Read, Privilege::Supervisor);
    let remapped = machine.source().landmarks().iter().find(|l| l.name == "remapped").unwrap().address;
    let user_data = machine.source().landmarks().iter().find(|l| l.name == "user-data").unwrap().address;

    let (mut roots, mut frames, mut generations) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let end = soon();
    while rounds(&machine, &vcpu) < 6 || roots.len() < 2 || frames.len() < 2 {
        assert!(Instant::now() < end, "{:?}", vcpu.latest());
        let snapshot = block_on(vcpu.sync(soon()))?;
        assert!(matches!(snapshot.run_state, RunState::Running | RunState::Halted), "{snapshot:?}");
        let walker = snapshot.walker.as_ref().unwrap();
        roots.insert(snapshot.registers.cr3);
        generations.insert(snapshot.generation);
        frames.insert(walker.translate(memory, Gva(remapped), &read).unwrap().gpa.0);
        let data = walker.translate(memory, Gva(user_data), &read).unwrap().gpa.0;
        let space = demo::ADDRESS_SPACES.iter().position(|&root| root == snapshot.registers.cr3).unwrap();
        assert_eq!(
            data,
            demo::USER_DATA_FRAMES[space],
            "the same GVA means another frame in each address space"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(roots, BTreeSet::from(demo::ADDRESS_SPACES));
    assert_eq!(frames, BTreeSet::from(demo::REMAPPED_FRAMES));
    assert!(generations.len() >= 2, "a new CR3 is a new generation: {generations:?}");

    let huge = machine.source().landmarks().iter().find(|l| l.name == "huge-2m").unwrap().address;
    let page = vcpu.latest().walker.as_ref().unwrap().translate(memory, Gva(huge), &read).unwrap();
    assert_eq!(
        (page.page_size(), page.backing(), page.accessed(), page.dirty()),
        (PageSize::Size2M, Backing::Ram, true, false)
    );
    Ok(())
}

fn every_landmark_means_what_it_promises() -> Result<(), Failed> {
    let (machine, vcpu) = open();
    block_on(async {
        let own = vcpu.pause(soon()).await?;
        let nested = vcpu.set_nested(NestedRequest::Enter(demo_landmarks::overlay()), soon()).await?.0;
        demo_landmarks::check(&machine, &own, &nested);
        let off = vcpu.set_nested(NestedRequest::Off { walker_only: false }, soon()).await?.0;
        assert_eq!(off.walker, own.walker);
        Ok(())
    })
}

/// The demo guest takes under a twentieth of a CPU, all threads of this process together.
fn rests() -> Result<(), Failed> {
    let (machine, vcpu) = open();
    let (used, before) = (cpu_time(), rounds(&machine, &vcpu));
    std::thread::sleep(Duration::from_secs(1));
    let used = cpu_time() - used;
    let ran = rounds(&machine, &vcpu) - before;
    println!("demo: {ran} rounds in 1 s took {used:?} of CPU time");
    assert!(ran > 5, "{ran}");
    assert!(used < Duration::from_millis(50), "{used:?}");
    Ok(())
}

fn cpu_time() -> Duration {
    // utime and stime, the 14th and 15th field, in ticks of 10 ms: fine enough for a bound of 50.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).map(|t| t.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}
