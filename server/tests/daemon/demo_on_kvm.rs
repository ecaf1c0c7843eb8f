//! The services over gRPC, on the demo machine as it really runs: and what a hostile client can do to it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::RunState;
use pagewalkd::machine::demo;
use tonic::{Code, Status};

use crate::bed::{Bed as Serving, SOON, config, nested_off, nested_on, page, read, refusal};
use crate::beds::{Bed, Test};
use crate::demo_landmarks::{KERNEL, L2, Outcome, user};
use crate::process::block_on;

pub(crate) const TESTS: &[Test] = &[
    ("kvm_watch_follows_cr3", &[Bed::Kvm], watch_follows_cr3),
    ("kvm_run_control", &[Bed::Kvm], run_control),
    ("kvm_landmarks_and_nested", &[Bed::Kvm], landmarks_and_nested),
    ("kvm_set_accessed_bits_under_a_running_guest", &[Bed::Kvm], set_under_a_running_guest),
    ("kvm_absurd_registers", &[Bed::Kvm], absurd_registers),
    ("kvm_everything_at_once", &[Bed::Kvm], everything_at_once),
];

async fn serve() -> Serving {
    Serving::with(config(), &["demo"]).await
}

async fn registers(bed: &Serving, freshness: v1::Freshness) -> v1::GetRegistersResponse {
    let request = v1::GetRegistersRequest { freshness: freshness.into(), ..Default::default() };
    bed.vcpu().get_registers(request).await.unwrap().into_inner()
}

async fn write(bed: &Serving, registers: v1::Registers) -> Result<v1::Registers, Status> {
    let request = v1::SetRegistersRequest { registers: Some(registers), ..Default::default() };
    Ok(bed.vcpu().set_registers(request).await?.into_inner().registers.unwrap())
}

async fn pause(bed: &Serving) -> v1::VcpuInfo {
    bed.vcpu().pause_vcpu(v1::PauseVcpuRequest::default()).await.unwrap().into_inner().vcpu.unwrap()
}

async fn resume(bed: &Serving) -> v1::VcpuInfo {
    bed.vcpu().resume_vcpu(v1::ResumeVcpuRequest::default()).await.unwrap().into_inner().vcpu.unwrap()
}

fn watch_follows_cr3() -> Result<(), Failed> {
    block_on(async {
        let bed = serve().await;
        let request = v1::WatchWalkerStateRequest { max_updates: Some(6), ..Default::default() };
        let mut updates = bed.walker().watch_walker_state(request).await?.into_inner();
        let (mut roots, mut generations) = (Vec::new(), Vec::new());
        while let Some(state) = tokio::time::timeout(SOON, updates.message()).await?? {
            roots.push(state.gva_walk.unwrap().root);
            let provenance = state.provenance.unwrap();
            assert!(provenance.assumed.is_empty() && provenance.source == "demo", "{provenance:?}");
            generations.push(provenance.generation);
        }
        assert_eq!(roots.len(), 6);
        assert_eq!(BTreeSet::from_iter(roots), BTreeSet::from(demo::ADDRESS_SPACES));
        assert!(generations.is_sorted_by(|a, b| a < b), "{generations:?}");
        bed.stop().await;
        Ok(())
    })
}

fn run_control() -> Result<(), Failed> {
    const TF: u64 = 1 << 8;
    block_on(async {
        let bed = serve().await;
        // Twice: stopping a stopped vCPU changes nothing.
        for _ in 0..2 {
            assert_eq!(pause(&bed).await.run_state(), RunState::Paused);
        }
        let stopped = registers(&bed, v1::Freshness::Sync).await;
        assert_eq!(stopped.provenance.as_ref().unwrap().run_state(), RunState::Paused);
        let later = registers(&bed, v1::Freshness::Sync).await;
        assert_eq!(stopped.registers, later.registers, "nothing runs");

        let wanted = v1::Registers { r15: Some(0x1234), fs_base: Some(0x5000), ..Default::default() };
        let set = write(&bed, wanted).await.unwrap();
        let expected =
            v1::Registers { r15: Some(0x1234), fs_base: Some(0x5000), ..stopped.registers.unwrap() };
        assert_eq!(set, expected);

        // A whole round and more: each step is one instruction, and leaves no trace of itself.
        let mut rips = BTreeSet::new();
        let mut last = set.rip.unwrap();
        for _ in 0..40 {
            let answer = bed.vcpu().step_vcpu(v1::StepVcpuRequest::default()).await?.into_inner();
            let vcpu = answer.vcpu.unwrap();
            assert_eq!(vcpu.run_state(), RunState::Paused);
            let now = answer.registers.unwrap();
            assert_eq!(now.rflags.unwrap() & TF, 0);
            let rip = now.rip.unwrap();
            assert!(rip != last && (0xffff_8000_0001_0000..0xffff_8000_0001_1000).contains(&rip), "{rip:#x}");
            assert_eq!(now.r15, Some(0x1234));
            last = rip;
            rips.insert(rip);
        }
        assert!((15..40).contains(&rips.len()), "a round comes back to where it began: {}", rips.len());
        assert_ne!(resume(&bed).await.run_state(), RunState::Paused);
        assert_ne!(resume(&bed).await.run_state(), RunState::Paused);

        // A step of a running vCPU stops it.
        let answer = bed.vcpu().step_vcpu(v1::StepVcpuRequest::default()).await?.into_inner();
        assert_eq!(answer.provenance.unwrap().run_state(), RunState::Paused);
        resume(&bed).await;
        let generation = async || registers(&bed, v1::Freshness::Latest).await.provenance.unwrap().generation;
        let (before, end) = (generation().await, Instant::now() + SOON);
        while generation().await < before + 2 {
            assert!(Instant::now() < end, "it does not run on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(registers(&bed, v1::Freshness::Sync).await.registers.unwrap().rflags.unwrap() & TF, 0);
        bed.stop().await;
        Ok(())
    })
}

fn landmarks_and_nested() -> Result<(), Failed> {
    block_on(async {
        let bed = serve().await;
        pause(&bed).await;
        let cr3 = registers(&bed, v1::Freshness::Latest).await.registers.unwrap().cr3.unwrap();
        let space = demo::ADDRESS_SPACES.iter().position(|&root| root == cr3).unwrap();
        let check = async |rows: &[crate::demo_landmarks::Row]| {
            for (name, [wanted, ..]) in rows {
                let answer = bed.translate(read(bed.landmark(name))).await.unwrap();
                match answer.outcome.unwrap() {
                    v1::translate_response::Outcome::Translation(page) => {
                        assert_eq!(Outcome::Gpa(page.gpa), *wanted, "{name}");
                    }
                    v1::translate_response::Outcome::Fault(fault) => match *wanted {
                        Outcome::PageFault(code) => assert_eq!(fault.error_code, Some(code), "{name}"),
                        Outcome::NestedPageFault(info) => assert_eq!(fault.exit_info_1, Some(info), "{name}"),
                        Outcome::GeneralProtection | Outcome::Unbacked => assert!(fault.error_code.is_none()),
                        Outcome::Gpa(_) => panic!("{name}: {fault:?}"),
                    },
                }
            }
        };
        check(KERNEL).await;
        check(&user(space)).await;
        let state = async || {
            let request = v1::GetWalkerStateRequest::default();
            let state = bed.walker().get_walker_state(request).await.unwrap().into_inner();
            (state.gva_walk, state.ngpa_walk, state.nested)
        };
        let before = state().await;
        let on = bed.walker().set_nested_mode(nested_on()).await?.into_inner();
        let effect = on.effect.unwrap();
        assert_eq!(effect.kind(), v1::NestedEffectKind::WalkerOnly);
        assert!(
            effect.reason.contains("KVM_CAP_NESTED_STATE") || effect.reason.contains("nested"),
            "{effect:?}"
        );
        assert_eq!(on.state.unwrap().provenance.unwrap().run_state(), RunState::Paused);
        check(L2).await;
        bed.walker().set_nested_mode(nested_off()).await?;
        assert_eq!(state().await, before);

        // A running vCPU runs on, and L2's registers stay L2's.
        resume(&bed).await;
        bed.walker().set_nested_mode(nested_on()).await?;
        let (end, mut roots) = (Instant::now() + SOON, BTreeSet::new());
        while roots.len() < 2 {
            let sync = registers(&bed, v1::Freshness::Sync).await;
            assert_ne!(sync.provenance.unwrap().run_state(), RunState::Paused);
            roots.insert(sync.registers.unwrap().cr3.unwrap());
            assert_eq!(page(&bed.translate(read(bed.landmark("l2-data"))).await?).gpa, 0x61_1000);
            assert!(Instant::now() < end, "it does not run on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bed.stop().await;
        Ok(())
    })
}

/// The guest rewrites the entry of `remapped` in each round, while we set bits in it.
fn set_under_a_running_guest() -> Result<(), Failed> {
    block_on(async {
        let bed = serve().await;
        let request = v1::TranslateRequest {
            ad_policy: v1::AdPolicy::Set.into(),
            access: crate::bed::access(v1::AccessKind::Write, v1::Privilege::Supervisor),
            ..read(bed.landmark("remapped"))
        };
        let (mut frames, mut asked, end) = (BTreeSet::new(), 0, Instant::now() + SOON);
        while frames.len() < 2 || asked < 2000 {
            match bed.translate(request.clone()).await?.outcome.unwrap() {
                v1::translate_response::Outcome::Translation(page) => {
                    assert!(demo::REMAPPED_FRAMES.contains(&page.gpa), "{page:?}");
                    frames.insert(page.gpa);
                }
                v1::translate_response::Outcome::Fault(fault) => {
                    assert_eq!(fault.kind(), v1::FaultKind::Contended, "{fault:?}");
                }
            }
            asked += 1;
            assert!(Instant::now() < end, "{frames:?} after {asked}");
        }
        let state = registers(&bed, v1::Freshness::Sync).await.provenance.unwrap().run_state();
        assert!(matches!(state, RunState::Running | RunState::Halted), "{state:?}");
        bed.stop().await;
        Ok(())
    })
}

/// Whatever is written, the daemon answers, and says what became of the vCPU.
fn absurd_registers() -> Result<(), Failed> {
    let absurd: &[(&str, v1::Registers)] = &[
        ("RIP outside", v1::Registers { rip: Some(0), ..Default::default() }),
        ("RIP not canonical", v1::Registers { rip: Some(1 << 63), ..Default::default() }),
        ("RFLAGS", v1::Registers { rflags: Some(u64::MAX), ..Default::default() }),
        ("TF", v1::Registers { rflags: Some(0x102), ..Default::default() }),
        ("VM", v1::Registers { rflags: Some(0x2_0002), ..Default::default() }),
        ("CR3 outside", v1::Registers { cr3: Some(0x7000_0000_0000), ..Default::default() }),
        ("CR3 of zeroes", v1::Registers { cr3: Some(0x7f_f000), ..Default::default() }),
        ("RSP", v1::Registers { rsp: Some(1 << 63), rip: Some(0xffff_8000_0040_0000), ..Default::default() }),
        ("no paging", v1::Registers { cr0: Some(0x11), efer: Some(0), ..Default::default() }),
        ("PAT", v1::Registers { pat: Some(u64::MAX), ..Default::default() }),
        ("CR8", v1::Registers { cr8: Some(u64::MAX), ..Default::default() }),
        ("FS", v1::Registers { fs_base: Some(1 << 63), ..Default::default() }),
        ("everything", {
            let all = Some(u64::MAX);
            v1::Registers { rax: all, rbx: all, rcx: all, rsp: all, rip: all, cr2: all, ..Default::default() }
        }),
    ];
    let mut taken = 0;
    for (what, registers_wanted) in absurd {
        block_on(async {
            let bed = serve().await;
            match write(&bed, *registers_wanted).await {
                Ok(_) => taken += 1,
                Err(status) => {
                    let (code, reason) = refusal(Err::<(), _>(status));
                    assert!(
                        matches!(code, Code::InvalidArgument | Code::FailedPrecondition),
                        "{what}: {code:?} {reason}"
                    );
                }
            }
            // It rests in HLT, maybe: stop it there, and have it go on with what was written.
            for (ask, answer) in [
                ("pause", bed.vcpu().pause_vcpu(v1::PauseVcpuRequest::default()).await.map(drop)),
                ("step", bed.vcpu().step_vcpu(v1::StepVcpuRequest::default()).await.map(drop)),
                ("step", bed.vcpu().step_vcpu(v1::StepVcpuRequest::default()).await.map(drop)),
                ("resume", bed.vcpu().resume_vcpu(v1::ResumeVcpuRequest::default()).await.map(drop)),
            ] {
                if let Err(status) = answer {
                    let (code, reason) = refusal(Err::<(), _>(status));
                    assert_eq!(
                        (code, reason.as_str()),
                        (Code::FailedPrecondition, "VCPU_STOPPED"),
                        "{what}: {ask}"
                    );
                }
            }
            // It runs on, or says that it does not; either way within the bound.
            let answer = registers(&bed, v1::Freshness::Sync).await.provenance.unwrap();
            let list = bed.vcpu().list_vcpus(v1::ListVcpusRequest::default()).await.unwrap().into_inner();
            println!("{what}: {:?} {}", answer.run_state(), list.vcpus[0].run_state_reason);
            assert_ne!(answer.run_state(), RunState::Unspecified);
            assert_ne!(answer.run_state(), RunState::Unresponsive, "{what}");
            if !list.vcpus[0].run_state_reason.is_empty() {
                assert!(matches!(answer.run_state(), RunState::Shutdown | RunState::InternalError), "{what}");
            }
            // Whatever its registers are, the demo's own address space can be asked about.
            let request = v1::TranslateRequest {
                r#override: Some(v1::WalkerOverride {
                    cr0: Some(0x8001_0033),
                    cr3: Some(demo::ADDRESS_SPACES[0]),
                    cr4: Some(0x6a0),
                    efer: Some(0xd00),
                    ..Default::default()
                }),
                ..read(bed.landmark("kernel-text"))
            };
            assert_eq!(page(&bed.translate(request).await.unwrap()).gpa, 0x1_0000, "{what}");
            bed.stop().await;
        });
    }
    assert!(taken > 3, "most of this is for the guest to suffer from");
    Ok(())
}

/// Toggles, pauses, steps, writes, watches and syncs, all at the same time: nothing waits for ever.
fn everything_at_once() -> Result<(), Failed> {
    const ROUNDS: usize = 150;
    block_on(async {
        let bed = std::sync::Arc::new(serve().await);
        let mut tasks = tokio::task::JoinSet::new();
        macro_rules! repeat {
            ($bed:ident => $($call:expr),+) => {{
                let $bed = std::sync::Arc::clone(&bed);
                tasks.spawn(async move {
                    for _ in 0..ROUNDS {
                        $($call.await.map(drop).unwrap();)+
                    }
                });
            }};
        }
        repeat!(b => b.walker().set_nested_mode(nested_on()), b.walker().set_nested_mode(nested_off()));
        repeat!(b => b.vcpu().pause_vcpu(v1::PauseVcpuRequest::default()),
            b.vcpu().resume_vcpu(v1::ResumeVcpuRequest::default()));
        repeat!(b => b.vcpu().step_vcpu(v1::StepVcpuRequest::default()),
            b.vcpu().resume_vcpu(v1::ResumeVcpuRequest::default()));
        repeat!(b => write(&b, v1::Registers { r14: Some(7), ..Default::default() }));
        repeat!(b => b.translate(v1::TranslateRequest { freshness: 2, ..read(b.landmark("kernel-text")) }));
        repeat!(b => b.walker().watch_walker_state(v1::WatchWalkerStateRequest {
            max_updates: Some(1), ..Default::default()
        }));
        let all = async { while tasks.join_next().await.map(Result::unwrap).is_some() {} };
        tokio::time::timeout(SOON * 2, all).await.expect("a deadlock");
        resume(&bed).await;
        let now = registers(&bed, v1::Freshness::Sync).await;
        let state = now.provenance.unwrap().run_state();
        assert!(matches!(state, RunState::Running | RunState::Halted), "{state:?}");
        assert_eq!(now.registers.unwrap().r14, Some(7));
        Ok(())
    })
}
