//! A vCPU that really runs: an L2 that a request has it enter, and one that its guest enters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::nested_mode::SecondDimension;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::translate_response::Outcome;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use tonic::{Code, Status};

use crate::bed::Maker;
use crate::bed::judge::Judge;
use crate::daemon::Daemon;
use crate::guest::{
    self, EXITS, GO, L2_COUNTS, L2_CR3, L2_CRASHES, L2_DATA, L2_DATA_GPA, L2_DATA_NGPA, SECOND_ROOT,
};
use crate::translate::off;
use crate::vmx::EPTP;

const PATIENCE: Duration = Duration::from_secs(30);

/// An L2 that starts at `rip`, with its VMCB12 or VMCS12 at `place`.
pub(crate) fn on(maker: Maker, rip: u64, place: Option<u64>) -> v1::SetNestedModeRequest {
    let (mode, vmcb12, vmcs12) = match maker {
        Maker::Amd => (Mode::Npt(v1::Npt { ncr3: SECOND_ROOT, ..Default::default() }), place, None),
        Maker::Intel => (Mode::Ept(v1::Ept { eptp: EPTP, ..Default::default() }), None, place),
    };
    v1::SetNestedModeRequest {
        mode: Some(mode),
        l2: Some(v1::Registers { cr3: Some(L2_CR3), rip: Some(rip), ..Default::default() }),
        vmcb12,
        vmcs12,
        ..Default::default()
    }
}

fn read_data() -> v1::TranslateRequest {
    v1::TranslateRequest {
        address: Some(v1::Address { value: Some(v1::address::Value::Number(L2_DATA)) }),
        access: Some(v1::Access {
            kind: v1::AccessKind::Read.into(),
            privilege: v1::Privilege::Supervisor.into(),
            ..Default::default()
        }),
        trace: true,
        ..Default::default()
    }
}

/// What an answer about [`L2_DATA`] says of the vCPU: that it runs L2, or L1. Anything else is a mix.
fn in_l2(answer: &v1::TranslateResponse) -> Result<bool, String> {
    match &answer.outcome {
        Some(Outcome::Translation(page))
            if (page.gpa, page.nested_gpa) == (L2_DATA_GPA, Some(L2_DATA_NGPA))
                && answer.steps.len() == 4 * (4 + 1) + 4 =>
        {
            Ok(true)
        }
        Some(Outcome::Fault(fault))
            if fault.kind() == v1::FaultKind::PageFault
                && fault.dimension() == v1::Dimension::Guest
                && answer.steps.iter().all(|step| step.dimension() == v1::Dimension::Guest) =>
        {
            Ok(false)
        }
        other => Err(format!("{other:?}")),
    }
}

/// Waits until the L2 has counted on.
pub(crate) fn counts_on(daemon: &Daemon) -> Result<(), Failed> {
    let (started, before) = (Instant::now(), daemon.read_u64(L2_DATA_GPA)?);
    while daemon.read_u64(L2_DATA_GPA)? == before {
        if started.elapsed() > PATIENCE {
            return Err(format!("L2 does not run: {:?}", daemon.state()?).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// An L2 runs and is taken away: L1's registers and memory are what they were, bit for bit.
pub(crate) fn restored(name: &'static str, maker: Maker) -> Result<(), Failed> {
    const ROUNDS: u64 = 60;
    let daemon = Daemon::serve(&guest::write(name, guest::COUNTS)?)?;
    guest::install_l2(maker, |gpa, bytes| daemon.write(gpa, bytes))?;
    let mut judge = Judge::new(name)?;
    let mut rng = Rng::with_seed(judge.seed());
    for _ in 0..ROUNDS {
        daemon.pause()?;
        daemon.set_registers(v1::Registers {
            rax: Some(rng.u64(..)),
            rbx: Some(rng.u64(..)),
            rsi: Some(rng.u64(..)),
            r8: Some(rng.u64(..)),
            cr2: Some(rng.u64(..)),
            rflags: Some(2 | rng.u64(..) & 0x8d5),
            pat: Some(0x0007_0406_0007_0406 ^ (rng.u64(0..2) << 8)),
            ..Default::default()
        })?;
        let place = rng.bool().then_some(0xc_0000);
        let mut page: Vec<u8> = (0..4096).map(|_| rng.u8(..)).collect();
        daemon.write(0xc_0000, &page)?;
        let (registers, state) = (daemon.registers()?, daemon.state()?);

        let entered = daemon.set_nested(on(maker, L2_COUNTS, place))?;
        let kind = entered.effect.unwrap_or_default().kind();
        if kind != v1::NestedEffectKind::RealVcpu {
            return Err(format!("the vCPU did not enter L2: {kind:?}").into());
        }
        let held = daemon.registers()?;
        if (held.rip, held.cr3) != (Some(L2_COUNTS), Some(L2_CR3)) {
            judge.disagree(|| format!("L2 holds {held:x?}"));
        }
        let mut there = vec![0; 4096];
        daemon.read(0xc_0000, &mut there)?;
        judge.count_if("VMCB12 or VMCS12 in the guest's memory", place.is_some() && there != page);
        daemon.resume()?;
        counts_on(&daemon)?;
        let running = rng.bool();
        if !running {
            daemon.pause()?;
        }
        judge.count(if running { "left while running" } else { "left while paused" }, 0);
        let left = daemon.set_nested(off())?;
        let kind = left.effect.unwrap_or_default().kind();
        judge.case();
        if kind != v1::NestedEffectKind::RealVcpu {
            judge.disagree(|| format!("off: {kind:?}"));
        }
        if running {
            daemon.wait_for("L1 counts on", |now| now.rax != registers.rax)?;
        }
        let paused = daemon.pause()?;
        judge.count_if("paused afterwards", paused.run_state() == v1::RunState::Paused);
        let (mut after, mut wanted) = (daemon.registers()?, registers);
        if running {
            let counted = after.rax.unwrap_or_default().wrapping_sub(wanted.rax.unwrap_or_default());
            if counted > 1 << 40 {
                judge.disagree(|| format!("L1's RAX went on by {counted:#x}"));
            }
            for registers in [&mut after, &mut wanted] {
                (registers.rax, registers.rip, registers.rflags) = (None, None, None);
            }
        }
        if after != wanted {
            judge.disagree(|| format!("registers were {wanted:x?}, are {after:x?}"));
        }
        daemon.read(0xc_0000, &mut there)?;
        if there != page {
            judge.disagree(|| "the page that VMCB12 or VMCS12 lay in has changed".to_owned());
        }
        page.clear();
        let now = daemon.state()?;
        if (&now.gva_walk, &now.ngpa_walk, &now.nested) != (&state.gva_walk, &state.ngpa_walk, &state.nested)
        {
            judge.disagree(|| format!("the walkers were {state:?}, are {now:?}"));
        }
        daemon.resume()?;
    }
    judge.finish(&[
        ("VMCB12 or VMCS12 in the guest's memory", None, 1),
        ("left while running", None, 1),
        ("left while paused", None, 1),
    ])
}

/// The real vCPU enters and leaves L2 a thousand times (fewer in a slow bed), running all the while, and four clients never see
/// a mix.
pub(crate) fn toggled(name: &'static str, maker: Maker) -> Result<(), Failed> {
    // The other bed is slow.
    let toggles = if maker == Maker::Amd { 1_000 } else { 500 };
    let daemon = Daemon::serve(&guest::write(name, guest::COUNTS)?)?;
    guest::install_l2(maker, |gpa, bytes| daemon.write(gpa, bytes))?;
    let mut judge = Judge::new(name)?;
    let first = daemon.state()?.provenance.unwrap_or_default().generation;
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (channel, over) = (daemon.channel.clone(), Arc::clone(&over));
            daemon.spawn(async move {
                let mut client = TranslationServiceClient::new(channel);
                let (mut seen, mut last) = ([0_u64; 2], 0);
                while !over.load(Ordering::Acquire) {
                    let request = v1::TranslateRequest { validate: true, ..read_data() };
                    let answer = client.translate(request).await.map_err(|status| status.to_string())?;
                    let answer = answer.into_inner();
                    let provenance = answer.provenance.clone().unwrap_or_default();
                    let inside = in_l2(&answer)?;
                    let generation = provenance.generation;
                    if generation < last || provenance.torn || inside != ((generation - first) % 2 == 1) {
                        return Err(format!("in L2: {inside}, {provenance:?}, after generation {last}"));
                    }
                    last = generation;
                    seen[usize::from(inside)] += 1;
                }
                Ok(seen)
            })
        })
        .collect();
    for toggle in 0..toggles {
        let request = if toggle % 2 == 0 { on(maker, L2_COUNTS, None) } else { off() };
        let answer = daemon.set_nested(request)?;
        judge.case();
        let (effect, state) = (answer.effect.unwrap_or_default(), answer.state.unwrap_or_default());
        let generation = state.provenance.unwrap_or_default().generation;
        if effect.kind() != v1::NestedEffectKind::RealVcpu || generation != first + toggle + 1 {
            judge.disagree(|| format!("toggle {toggle}: {effect:?}, generation {generation} from {first}"));
        }
        if toggle % 100 == 0 {
            counts_on(&daemon)?;
        }
    }
    over.store(true, Ordering::Release);
    for client in clients {
        match daemon.block_on(client)? {
            Ok([outside, inside]) => {
                for (class, count) in [("answers about L1", outside), ("answers about L2", inside)] {
                    for _ in 0..count {
                        judge.case();
                        judge.count(class, 0);
                    }
                }
            }
            Err(mix) => judge.disagree(|| mix),
        }
    }
    judge.finish(&[("answers about L1", None, 10_000), ("answers about L2", None, 10_000)])
}

/// The guest is a hypervisor and enters its L2 itself: each answer is about the one or the other, and says which.
pub(crate) fn observed(name: &'static str, maker: Maker) -> Result<(), Failed> {
    const CASES: u64 = 1_000;
    let daemon = Daemon::serve(&guest::write(name, &guest::hypervisor(maker))?)?;
    guest::install_l2(maker, |gpa, bytes| daemon.write(gpa, bytes))?;
    let mut judge = Judge::new(name)?;
    // An overlay ends when the vCPU really enters an L2.
    let overlay = v1::SetNestedModeRequest {
        walker_only: true,
        l2: Some(v1::Registers { cr3: Some(L2_CR3), ..Default::default() }),
        ..on(maker, L2_COUNTS, None)
    };
    daemon.set_nested(overlay)?;
    let laid = daemon.state()?.nested.unwrap_or_default().kind();
    daemon.write(GO, &1_u64.to_le_bytes())?;
    counts_on(&daemon)?;
    if laid != v1::NestedModeKind::WalkerOnly {
        judge.disagree(|| format!("an overlay is {laid:?}"));
    }
    let mut shown = false;
    let mut kinds = [0_u64; 2];
    while judge.cases() < CASES {
        let sync = v1::Freshness::Sync.into();
        let answer =
            daemon.translate(v1::TranslateRequest { freshness: sync, explain: true, ..read_data() })?;
        judge.case();
        match in_l2(&answer) {
            Ok(inside) => {
                judge.count(if inside { "Translate: in L2" } else { "Translate: in L1" }, 0);
                if inside && !shown {
                    println!("\nA running L2, which its L1 entered by itself:\n{}", answer.explanation);
                    shown = true;
                }
            }
            Err(mix) => judge.disagree(|| mix),
        }
        let state = daemon.state()?;
        let nested = state.nested.clone().unwrap_or_default();
        judge.case();
        let consistent = match nested.kind() {
            v1::NestedModeKind::Observed => {
                kinds[1] += 1;
                judge.count("GetWalkerState: in L2", 0);
                let roots = (state.gva_walk.map(|walk| walk.root), state.ngpa_walk.map(|walk| walk.root));
                let second = match &nested.second_dimension {
                    Some(SecondDimension::Npt(npt)) => npt.ncr3 == SECOND_ROOT,
                    Some(SecondDimension::Ept(ept)) => ept.eptp == EPTP,
                    None => false,
                };
                roots == (Some(L2_CR3), Some(SECOND_ROOT)) && second
            }
            v1::NestedModeKind::Off => {
                kinds[0] += 1;
                judge.count("GetWalkerState: in L1", 0);
                state.ngpa_walk.is_none() && state.gva_walk.is_some_and(|walk| walk.root == 0x2000)
            }
            _ => false,
        };
        if !consistent {
            judge.disagree(|| format!("{nested:?}"));
        }
    }
    let exits = daemon.read_u64(EXITS)?;
    println!("  {:<44} {exits:>10}", "exits that L1 counted");
    show_with_grpcurl(&daemon)?;
    // Nobody but the guest ends what the guest began.
    while daemon.pause()?.nested.unwrap_or_default().kind() != v1::NestedModeKind::Observed {
        daemon.resume()?;
    }
    for request in [off(), on(maker, L2_COUNTS, None)] {
        let refused = daemon.set_nested(request);
        let code = refused.as_ref().err().map(Status::code);
        judge.case();
        if code != Some(Code::FailedPrecondition) {
            judge.disagree(|| format!("while the guest's L2 runs: {refused:?}"));
        }
    }
    daemon.resume()?;
    counts_on(&daemon)?;
    // Between its L2's runs, L1 can be given another, and goes on with its own afterwards.
    while daemon.pause()?.nested.unwrap_or_default().kind() != v1::NestedModeKind::Off {
        daemon.resume()?;
    }
    let exits = daemon.read_u64(EXITS)?;
    for request in [on(maker, L2_COUNTS, None), off()] {
        let given = matches!(request.mode, Some(Mode::Npt(_) | Mode::Ept(_)));
        let effect = daemon.set_nested(request)?.effect.unwrap_or_default();
        daemon.resume()?;
        counts_on(&daemon)?;
        let goes_on = daemon.read_u64(EXITS)? != exits;
        judge.case();
        judge.count_if("another L2 between L1's own", given && !goes_on);
        if effect.kind() != v1::NestedEffectKind::RealVcpu {
            judge.disagree(|| format!("between L1's own entries: {effect:?}"));
        }
        if !given {
            wait_for_exit(&daemon, exits)?;
        }
        daemon.pause()?;
    }
    judge.finish(&[
        ("another L2 between L1's own", None, 1),
        ("Translate: in L1", None, 4_000),
        ("Translate: in L2", None, 4_000),
        ("GetWalkerState: in L1", None, 4_000),
        ("GetWalkerState: in L2", None, 4_000),
    ])
}

/// Waits until L1 has counted more than these exits of its own L2.
fn wait_for_exit(daemon: &Daemon, exits: u64) -> Result<(), Failed> {
    let started = Instant::now();
    while daemon.read_u64(EXITS)? == exits {
        if started.elapsed() > PATIENCE {
            return Err(format!("L1 does not go on: {:?}", daemon.state()?).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The same as a person at grpcurl sees it, where the bed was given that program.
fn show_with_grpcurl(daemon: &Daemon) -> Result<(), Failed> {
    const GRPCURL: &str = "/grpcurl";
    if !std::path::Path::new(GRPCURL).exists() {
        return Ok(());
    }
    while daemon.pause()?.nested.unwrap_or_default().kind() != v1::NestedModeKind::Observed {
        daemon.resume()?;
    }
    let request = format!(
        r#"{{"address": {{"text": "{L2_DATA:#x}"}}, "access": {{"kind": "ACCESS_KIND_READ"}}, "explain": true}}"#
    );
    for (method, request) in [
        ("pagewalk.v1.WalkerService/GetWalkerState", "{}"),
        ("pagewalk.v1.TranslationService/Translate", request.as_str()),
    ] {
        println!("\n$ grpcurl -plaintext -d '{request}' {} {method}", daemon.address);
        let output = std::process::Command::new(GRPCURL)
            .args(["-plaintext", "-d", request, &daemon.address, method])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).replace("\\n", "\n");
        println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    }
    daemon.resume()?;
    Ok(())
}

/// An L2 that crashes is its L1's business: the vCPU is L1 again, and says how it came to that.
pub(crate) fn crashed(name: &'static str, maker: Maker) -> Result<(), Failed> {
    const ROUNDS: u64 = 20;
    let exit = match maker {
        Maker::Amd => "VM exit 0x7f (shutdown: a triple fault)",
        Maker::Intel => "VM exit 0x2 (a triple fault)",
    };
    let daemon = Daemon::serve(&guest::write(name, guest::COUNTS)?)?;
    guest::install_l2(maker, |gpa, bytes| daemon.write(gpa, bytes))?;
    let mut judge = Judge::new(name)?;
    for round in 0..ROUNDS {
        let rip = if round % 2 == 0 { L2_CRASHES } else { 0x7fff_0000 };
        daemon.set_nested(on(maker, rip, (round % 4 < 2).then_some(0xc_0000)))?;
        let started = Instant::now();
        let nested = loop {
            let nested = daemon.state()?.nested.unwrap_or_default();
            if nested.kind() == v1::NestedModeKind::Off || started.elapsed() > PATIENCE {
                break nested;
            }
        };
        judge.case();
        judge.count_if("left by a triple fault", nested.reason.contains(exit));
        if nested.kind() != v1::NestedModeKind::Off || !nested.reason.contains(exit) {
            judge.disagree(|| format!("{nested:?}"));
        }
        let before = daemon.registers()?;
        daemon.wait_for("L1 goes on", |registers| registers.rax != before.rax)?;
    }
    judge.finish(&[("left by a triple fault", None, 1)])
}
