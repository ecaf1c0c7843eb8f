//! vCPUs on `/dev/kvm`: commands, guests that misbehave, and the end of a machine.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
#[allow(dead_code)]
mod kvm_bed;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bed::{CODE, block_on, elf, soon, write_file};
use libtest_mimic::Failed;
use pagewalk::{Access, AccessKind, Backing, Gpa, Gva, Privilege};
use pagewalkd::machine::{Machine, MachineSpec};
use pagewalkd::vcpu::{RegisterChanges, RunState, Snapshot, Vcpu, VcpuError};

fn main() -> ExitCode {
    kvm_bed::main(&[
        ("pauses_steps_and_resumes", pauses_steps_and_resumes),
        ("steps_a_running_vcpu_and_leaves_it_paused", steps_a_running_vcpu_and_leaves_it_paused),
        ("writes_registers_whole_or_not_at_all", writes_registers_whole_or_not_at_all),
        ("kicks_a_spinning_guest_out", kicks_a_spinning_guest_out),
        (
            "a_guest_that_never_leaves_publishes_all_the_same",
            a_guest_that_never_leaves_publishes_all_the_same,
        ),
        ("many_syncs_share_exits", many_syncs_share_exits),
        ("a_guest_that_loops_on_ports_still_answers", a_guest_that_loops_on_ports_still_answers),
        ("a_triple_fault_is_a_state", a_triple_fault_is_a_state),
        ("an_access_without_memory_is_a_state", an_access_without_memory_is_a_state),
        ("an_instruction_outside_memory_is_a_state", an_instruction_outside_memory_is_a_state),
        ("several_vcpus_know_their_index", several_vcpus_know_their_index),
        ("all_of_memory_is_mapped_to_itself", all_of_memory_is_mapped_to_itself),
        ("no_request_is_lost_under_load", no_request_is_lost_under_load),
        ("dropping_a_machine_ends_its_threads", dropping_a_machine_ends_its_threads),
    ])
}

/// inc rbx; jmp back to it.
const COUNT: &[u8] = &[0x48, 0xff, 0xc3, 0xeb, 0xfb];
/// jmp to itself.
const SPIN: &[u8] = &[0xeb, 0xfe];

fn guest_with(name: &str, code: &[u8], options: &str) -> (Machine, Arc<Vcpu>) {
    let file = write_file(name, &elf(code));
    let spec = format!("{name}=kvm:elf={},mem=2M{options}", file.display());
    let machine = spec.parse::<MachineSpec>().unwrap().open();
    std::fs::remove_file(&file).unwrap();
    let machine = machine.unwrap();
    let vcpu = Arc::clone(machine.vcpu(0).unwrap());
    (machine, vcpu)
}

fn guest(name: &str, code: &[u8]) -> (Machine, Arc<Vcpu>) {
    guest_with(name, code, "")
}

/// Waits until the vCPU has come to `state` by itself.
fn wait_for(vcpu: &Vcpu, state: RunState) -> Arc<Snapshot> {
    let end = soon();
    loop {
        let snapshot = vcpu.latest();
        if snapshot.run_state == state {
            return snapshot;
        }
        assert!(Instant::now() < end, "not {state:?}: {snapshot:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn pauses_steps_and_resumes() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("steps", COUNT);
    block_on(async {
        let paused = vcpu.pause(soon()).await?;
        assert_eq!(paused.run_state, RunState::Paused);
        std::thread::sleep(Duration::from_millis(30));
        let still = vcpu.sync(soon()).await?;
        assert_eq!(still.registers, paused.registers, "nothing runs while paused");
        assert_eq!(vcpu.pause(soon()).await?.registers, paused.registers, "pausing twice changes nothing");

        let mut before = still;
        for _ in 0..20 {
            let after = vcpu.step(soon()).await?;
            let (counted, next) = match before.registers.rip {
                CODE => (1, CODE + 3),
                rip if rip == CODE + 3 => (0, CODE),
                other => panic!("RIP {other:#x}"),
            };
            assert_eq!(after.registers.rip, next);
            assert_eq!(after.registers.rbx, before.registers.rbx + counted);
            assert_eq!(after.registers.rflags & 0x100, 0, "no trap flag is left behind");
            assert_eq!(after.run_state, RunState::Paused);
            before = after;
        }
        assert_eq!(vcpu.resume(soon()).await?.run_state, RunState::Running);
        assert_eq!(vcpu.resume(soon()).await?.run_state, RunState::Running);
        let first = vcpu.sync(soon()).await?;
        std::thread::sleep(Duration::from_millis(30));
        assert!(vcpu.sync(soon()).await?.registers.rbx > first.registers.rbx, "it runs again");
        Ok(())
    })
}

fn steps_a_running_vcpu_and_leaves_it_paused() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("step-running", COUNT);
    block_on(async {
        assert_eq!(vcpu.sync(soon()).await?.run_state, RunState::Running);
        let stepped = vcpu.step(soon()).await?;
        std::thread::sleep(Duration::from_millis(20));
        let later = vcpu.sync(soon()).await?;
        assert_eq!((later.run_state, &later.registers), (RunState::Paused, &stepped.registers));
        Ok(())
    })
}

fn writes_registers_whole_or_not_at_all() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("registers", SPIN);
    block_on(async {
        let before = vcpu.sync(soon()).await?;
        let changes = RegisterChanges {
            r15: Some(0x1234_5678_9abc_def0),
            cr2: Some(0xffff_8000_dead_b000),
            gs_base: Some(0xffff_8000_0000_1000),
            pat: Some(0x0007_0406_0007_0401),
            cr8: Some(3),
            ..RegisterChanges::default()
        };
        let after = vcpu.set_registers(changes.clone(), soon()).await?;
        assert_eq!(after.registers, changes.applied_to(&before.registers));
        assert_eq!(after.run_state, RunState::Running, "it runs on");
        assert_eq!(after.generation, before.generation + 1, "PAT is part of the walker's state");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(vcpu.sync(soon()).await?.registers, after.registers, "running does not take it back");

        // Not valid for any CPU: refused with the register's name, and nothing else is written either.
        let invalid = RegisterChanges { r15: Some(1), cr4: Some(1 << 60), ..RegisterChanges::default() };
        let error = vcpu.set_registers(invalid, soon()).await.unwrap_err();
        assert!(matches!(&error, VcpuError::InvalidRegisters(why) if why.contains("CR4")), "{error}");
        let bad_pat = RegisterChanges { r15: Some(1), pat: Some(0x02), ..RegisterChanges::default() };
        let error = vcpu.set_registers(bad_pat, soon()).await.unwrap_err();
        assert!(matches!(&error, VcpuError::InvalidRegisters(why) if why.contains("PAT")), "{error}");
        // KVM would drop the one without an error, and fail to enter the guest with the other.
        for (name, invalid) in [
            ("CR8", RegisterChanges { cr8: Some(0x20), ..RegisterChanges::default() }),
            ("RIP", RegisterChanges { rip: Some(1 << 63), ..RegisterChanges::default() }),
        ] {
            let error =
                vcpu.set_registers(RegisterChanges { r15: Some(1), ..invalid }, soon()).await.unwrap_err();
            assert!(matches!(&error, VcpuError::InvalidRegisters(why) if why.starts_with(name)), "{error}");
        }
        assert_eq!(vcpu.sync(soon()).await?.registers, after.registers);
        // Valid for a CPU, and KVM here takes it or not; either way all of it or nothing.
        let legacy = RegisterChanges { r15: Some(1), efer: Some(0), ..RegisterChanges::default() };
        let taken = vcpu.set_registers(legacy, soon()).await;
        println!("EFER = 0 with paging on: {:?}", taken.as_ref().map(|s| s.registers.control()));
        if taken.is_err() {
            assert_eq!(vcpu.sync(soon()).await?.registers, after.registers);
        }
        let pkru = RegisterChanges { pkru: Some(4), ..RegisterChanges::default() };
        assert!(matches!(vcpu.set_registers(pkru, soon()).await, Err(VcpuError::Unsupported(_))));
        // No state of long mode: KVM is not asked, which may drop it.
        let before = vcpu.sync(soon()).await?.registers.clone();
        let virtual_8086 =
            RegisterChanges { r15: Some(1), rflags: Some(1 << 17), ..RegisterChanges::default() };
        let refused = vcpu.set_registers(virtual_8086, soon()).await;
        assert!(matches!(refused, Err(VcpuError::InvalidRegisters(_))), "{refused:?}");
        assert_eq!(vcpu.sync(soon()).await?.registers, before);
        Ok(())
    })
}

fn kicks_a_spinning_guest_out() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("spin", SPIN);
    block_on(async {
        let mut slowest = Duration::ZERO;
        for _ in 0..200 {
            let start = Instant::now();
            let snapshot = vcpu.sync(soon()).await?;
            assert!(snapshot.taken >= start, "SYNC gives a state from after the request");
            assert_eq!(snapshot.registers.rip, CODE);
            slowest = slowest.max(start.elapsed());
        }
        println!("spinning guest: slowest of 200 syncs {slowest:?}");
        assert!(slowest < Duration::from_secs(2), "{slowest:?}");
        Ok(())
    })
}

fn a_guest_that_never_leaves_publishes_all_the_same() -> Result<(), Failed> {
    // out dx, al; inc rbx; jmp back to the out.
    let ports = [0xee, 0x48, 0xff, 0xc3, 0xeb, 0xfa];
    for (name, code) in [("never-leaves", COUNT), ("only-ports", &ports)] {
        let (_machine, vcpu) = guest(name, code);
        let (end, mut last, mut seen) = (soon(), 0, 0);
        while seen < 5 {
            assert!(Instant::now() < end, "{name}: {:?}", vcpu.latest());
            let snapshot = vcpu.latest();
            if snapshot.registers.rbx > last {
                last = snapshot.registers.rbx;
                seen += 1;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(vcpu.latest().ticket, 0, "{name}: nobody asked");
    }
    Ok(())
}

fn many_syncs_share_exits() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("syncs", SPIN);
    let taken: BTreeSet<Instant> = block_on(async {
        let tasks: Vec<_> = (0..200)
            .map(|_| {
                let vcpu = Arc::clone(&vcpu);
                tokio::spawn(async move {
                    let start = Instant::now();
                    let snapshot = vcpu.sync(soon()).await.unwrap();
                    assert!(snapshot.taken >= start);
                    snapshot.taken
                })
            })
            .collect();
        let mut taken = BTreeSet::new();
        for task in tasks {
            taken.insert(task.await.unwrap());
        }
        taken
    });
    println!("200 concurrent syncs were answered by {} snapshots", taken.len());
    assert!(taken.len() < 150, "{}", taken.len());
    Ok(())
}

fn a_guest_that_loops_on_ports_still_answers() -> Result<(), Failed> {
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; in al, dx; in eax, 0x60; mov ecx, eax; jmp to the out.
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xec, 0xe5, 0x60, 0x89, 0xc1, 0xeb, 0xf8];
    let (_machine, vcpu) = guest("ports", &code);
    block_on(async {
        for _ in 0..50 {
            vcpu.sync(soon()).await?;
        }
        std::thread::sleep(Duration::from_millis(20));
        let paused = vcpu.pause(soon()).await?;
        assert_eq!(paused.registers.rcx, 0xffff_ffff, "an empty port reads as all ones");
        Ok(())
    })
}

fn stays_stopped(vcpu: &Vcpu, state: RunState) -> Result<(), Failed> {
    block_on(async {
        for refused in [vcpu.resume(soon()).await, vcpu.pause(soon()).await, vcpu.step(soon()).await] {
            let error = refused.unwrap_err();
            assert!(matches!(&error, VcpuError::Stopped { state: s, .. } if *s == state), "{error}");
        }
        // It still answers, and its registers can be looked at and written.
        let changes = RegisterChanges { rbx: Some(5), ..RegisterChanges::default() };
        assert_eq!(vcpu.set_registers(changes, soon()).await?.registers.rbx, 5);
        let snapshot = vcpu.sync(soon()).await?;
        assert_eq!((snapshot.run_state, vcpu.run_state(&snapshot)), (state, state));
        assert!(snapshot.walker.is_ok());
        Ok(())
    })
}

fn a_triple_fault_is_a_state() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("ud2", &[0x0f, 0x0b]);
    let snapshot = wait_for(&vcpu, RunState::Shutdown);
    assert!(snapshot.run_state_reason.contains("triple fault at RIP"), "{}", snapshot.run_state_reason);
    stays_stopped(&vcpu, RunState::Shutdown)
}

fn an_access_without_memory_is_a_state() -> Result<(), Failed> {
    // The guest maps its second 2 MiB to where no memory is, and reads from there.
    let code = [
        0x48, 0xc7, 0x04, 0x25, 0x08, 0x40, 0x00, 0x00, 0x83, 0x00, 0x00,
        0x40, // mov qword [0x4008], 0x40000083
        0x8b, 0x04, 0x25, 0x10, 0x00, 0x20, 0x00, // mov eax, [0x200010]
        0xf4, // hlt
    ];
    let (_machine, vcpu) = guest("mmio", &code);
    let snapshot = wait_for(&vcpu, RunState::InternalError);
    assert!(snapshot.run_state_reason.contains("GPA 0x40000010"), "{}", snapshot.run_state_reason);
    stays_stopped(&vcpu, RunState::InternalError)
}

fn an_instruction_outside_memory_is_a_state() -> Result<(), Failed> {
    let code = [
        0x48, 0xc7, 0x04, 0x25, 0x08, 0x40, 0x00, 0x00, 0x83, 0x00, 0x00,
        0x40, // mov qword [0x4008], 0x40000083
        0xb8, 0x00, 0x00, 0x20, 0x00, // mov eax, 0x200000
        0xff, 0xe0, // jmp rax
    ];
    let (_machine, vcpu) = guest("fetch", &code);
    let snapshot = wait_for(&vcpu, RunState::InternalError);
    let reason = &snapshot.run_state_reason;
    assert!(reason.contains("suberror 1") && reason.contains("RIP 0x200000"), "{reason}");
    stays_stopped(&vcpu, RunState::InternalError)
}

fn several_vcpus_know_their_index() -> Result<(), Failed> {
    // hlt; jmp back to it: RDI and RSI stay as they were at the entry.
    let (machine, _) = guest_with("smp", &[0xf4, 0xeb, 0xfd], ",cpus=3");
    let mut stacks = BTreeSet::new();
    for index in 0..3 {
        let vcpu = machine.vcpu(index).unwrap();
        let snapshot = wait_for(vcpu, RunState::Halted);
        assert_eq!((snapshot.registers.rdi, snapshot.registers.rsi), (u64::from(index), 3));
        assert_eq!(snapshot.registers.rsp % 16, 8);
        assert_eq!(vcpu.name(), format!("smp/vcpu{index}"));
        stacks.insert(snapshot.registers.rsp);
    }
    assert_eq!(stacks.len(), 3);
    assert!(machine.vcpu(3).is_err());
    Ok(())
}

fn all_of_memory_is_mapped_to_itself() -> Result<(), Failed> {
    for (size, bytes) in [("2M", 2u64 << 20), ("2052K", 2052 << 10), ("1030M", 1030 << 20), ("16G", 16 << 30)]
    {
        let file = write_file("identity", &elf(SPIN));
        let spec = format!("kvm:elf={},mem={size},cpus=16", file.display());
        let machine = spec.parse::<MachineSpec>()?.open();
        std::fs::remove_file(&file)?;
        let machine = machine?;
        let memory = &*machine.source().memory();
        assert_eq!(memory.size(), bytes);
        let read = Access::new(AccessKind::Read, Privilege::Supervisor);
        for index in [0, 15] {
            let snapshot = block_on(machine.vcpu(index)?.sync(soon()))?;
            let walker = snapshot.walker.as_ref().unwrap();
            for at in [0, CODE, bytes / 2, bytes - 1] {
                let page = walker.translate(memory, Gva(at), &read).unwrap();
                assert_eq!((page.gpa, page.backing()), (Gpa(at), Backing::Ram), "{size}");
            }
            let end = bytes.next_multiple_of(2 << 20);
            assert!(walker.translate(memory, Gva(end), &read).is_err(), "{size}: nothing above memory");
        }
    }
    Ok(())
}

/// Many askers at once, some giving up early: each request that waits long enough is answered, and the vCPU comes to rest
/// in the state that was asked for last.
fn no_request_is_lost_under_load() -> Result<(), Failed> {
    let (_machine, vcpu) = guest("load", COUNT);
    let until = Instant::now() + Duration::from_secs(2);
    let answered: u64 = block_on(async {
        let tasks: Vec<_> = (0..16u64)
            .map(|task| {
                let vcpu = Arc::clone(&vcpu);
                tokio::spawn(async move {
                    let mut answered = 0;
                    while Instant::now() < until {
                        let impatient = Instant::now() + Duration::from_micros(30);
                        let changes = RegisterChanges { r15: Some(task), ..RegisterChanges::default() };
                        match task % 8 {
                            0 => vcpu.pause(soon()).await,
                            1 => vcpu.resume(soon()).await,
                            2 => vcpu.step(soon()).await,
                            3 => vcpu.set_registers(changes, soon()).await,
                            4 => match vcpu.step(impatient).await {
                                Err(VcpuError::Timeout { .. }) => continue,
                                reply => reply,
                            },
                            5 => match vcpu.sync(impatient).await {
                                Err(VcpuError::Timeout { .. }) => continue,
                                reply => reply,
                            },
                            _ => vcpu.sync(soon()).await,
                        }
                        .unwrap();
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        let mut answered = 0;
        for task in tasks {
            answered += task.await.unwrap();
        }
        answered
    });
    println!("load: {answered} requests answered in 2 s");
    assert!(answered > 500, "{answered}");
    block_on(async {
        assert_eq!(vcpu.resume(soon()).await?.run_state, RunState::Running);
        let first = vcpu.sync(soon()).await?.registers.rbx;
        std::thread::sleep(Duration::from_millis(30));
        let later = vcpu.sync(soon()).await?;
        assert!(later.registers.rbx > first);
        assert_eq!(vcpu.run_state(&later), RunState::Running);
        Ok(())
    })
}

fn dropping_a_machine_ends_its_threads() -> Result<(), Failed> {
    let threads = |name: &str| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|comm| comm.starts_with(name))
            .count()
    };
    for (name, code) in [("end-spin", SPIN), ("end-hlt", &[0xf4, 0xeb, 0xfd]), ("end-ud2", &[0x0f, 0x0b])] {
        let (machine, vcpu) = guest_with(name, code, ",cpus=2");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(threads(name), 2, "{name}");
        let start = Instant::now();
        drop(vcpu);
        drop(machine);
        let took = start.elapsed();
        assert_eq!(threads(name), 0, "{name}");
        assert!(took < Duration::from_secs(1), "{name}: {took:?}");
    }
    Ok(())
}
