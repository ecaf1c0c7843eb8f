//! What cannot be is refused by a status that names the field, and everything is as before.

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::bed::Maker;
use crate::bed::judge::Judge;
use crate::daemon::Daemon;
use crate::guest::{self, L2_COUNTS, SECOND_ROOT};
use crate::running::{counts_on, on};
use crate::translate::off;
use crate::vmx::EPTP;

type Request = v1::SetNestedModeRequest;

fn with_npt(maker: Maker, npt: v1::Npt) -> Request {
    Request { mode: Some(Mode::Npt(npt)), ..on(maker, L2_COUNTS, None) }
}

fn with_ept(maker: Maker, ept: v1::Ept) -> Request {
    Request { mode: Some(Mode::Ept(ept)), ..on(maker, L2_COUNTS, None) }
}

fn with_l2(maker: Maker, l2: v1::Registers) -> Request {
    Request { l2: Some(l2), ..on(maker, L2_COUNTS, None) }
}

/// No L2's registers: for a request that may end in the walkers alone.
fn with_no_l2(request: Request) -> Request {
    Request { l2: None, ..request }
}

fn root(ncr3: u64) -> v1::Npt {
    v1::Npt { ncr3, ..Default::default() }
}

fn eptp(eptp: u64) -> v1::Ept {
    v1::Ept { eptp, ..Default::default() }
}

/// The field that a request is refused for.
fn refused(maker: Maker) -> Vec<(&'static str, Request)> {
    let place = match maker {
        Maker::Amd => "vmcb12",
        Maker::Intel => "vmcs12",
    };
    // The last are the daemon's own pages, which are not the machine's memory.
    let places = [guest::MEMORY, 1 << 52, 0xc_0008, u64::MAX, (1 << 36) - 0x1000];
    let mut all: Vec<_> = places.into_iter().map(|at| (place, on(maker, L2_COUNTS, Some(at)))).collect();
    let npt = |npt| with_npt(maker, npt);
    let ept = |bits: u64| with_ept(maker, eptp(bits));
    all.extend([
        ("ept.eptp", with_no_l2(ept(SECOND_ROOT | 2 << 3 | 6))),
        ("ept.eptp", with_no_l2(ept(SECOND_ROOT | 3 << 3 | 1))),
        ("ept.eptp", with_no_l2(ept(SECOND_ROOT | 3 << 3 | 7))),
        ("ept.eptp", with_no_l2(ept(SECOND_ROOT | 1 << 8 | 3 << 3 | 6))),
        ("ept.eptp", with_no_l2(ept(1 << 51 | 3 << 3 | 6))),
        ("npt.ncr3", npt(root(1 << 52))),
        ("npt.ncr3", npt(root(SECOND_ROOT | 1 << 63))),
    ]);
    if maker == Maker::Amd {
        all.extend([
            ("npt.host_cr0", npt(v1::Npt { host_cr0: Some(0x8001_0000), ..root(SECOND_ROOT) })),
            ("npt.host_efer", npt(v1::Npt { host_cr0: Some(0x10011), ..root(SECOND_ROOT) })),
            ("npt.host_cr4", npt(v1::Npt { host_cr4: Some(0), ..root(SECOND_ROOT) })),
        ]);
    }
    let l2 = |l2| with_l2(maker, l2);
    all.extend([
        ("l2.cr0", l2(v1::Registers { cr0: Some(1 << 31), ..Default::default() })),
        ("l2.cr0", l2(v1::Registers { cr0: Some(0x8001_0031 | 1 << 40), ..Default::default() })),
        ("l2.cr3", l2(v1::Registers { cr3: Some(1 << 52), ..Default::default() })),
        ("l2.cr4", l2(v1::Registers { cr4: Some(0x20 | 1 << 30), ..Default::default() })),
        ("l2.efer", l2(v1::Registers { efer: Some(0xd00 | 1 << 40), ..Default::default() })),
        ("l2.pat", l2(v1::Registers { pat: Some(2), ..Default::default() })),
    ]);
    if maker == Maker::Intel {
        // What VMX operation fixes on this CPU: LA57 to 0.
        all.push(("l2.cr4", l2(v1::Registers { cr4: Some(0x1020), ..Default::default() })));
        all.push(("l2.efer", l2(v1::Registers { efer: Some(0x1d00), ..Default::default() })));
    }
    all
}

/// What this CPU does not have, which is switched in the walkers alone, and why.
fn walkers_alone(maker: Maker) -> Vec<(&'static str, Request)> {
    let all = match maker {
        Maker::Amd => {
            let gmet = v1::Npt { guest_mode_execute_trap: true, ..root(SECOND_ROOT) };
            vec![
                ("no GMET", with_npt(maker, gmet)),
                ("EPT is VMX's", with_ept(maker, eptp(SECOND_ROOT | 3 << 3 | 6))),
            ]
        }
        Maker::Intel => vec![
            ("no mode-based execute", with_ept(maker, v1::Ept { mode_based_execute: true, ..eptp(EPTP) })),
            ("IA32_VMX_EPT_VPID_CAP", with_ept(maker, eptp(SECOND_ROOT | 4 << 3 | 6))),
            (
                "IA32_VMX_EPT_VPID_CAP",
                with_ept(
                    maker,
                    v1::Ept { capabilities: Some(1 << 6 | 1 << 14), ..eptp(SECOND_ROOT | 3 << 3 | 6) },
                ),
            ),
            ("NPT is SVM's", with_npt(maker, root(SECOND_ROOT))),
        ],
    };
    all.into_iter().map(|(why, request)| (why, with_no_l2(request))).collect()
}

pub(crate) fn judge(name: &'static str, maker: Maker) -> Result<(), Failed> {
    let daemon = Daemon::serve(&guest::write(name, guest::COUNTS)?)?;
    guest::install_l2(maker, |gpa, bytes| daemon.write(gpa, bytes))?;
    let mut judge = Judge::new(name)?;
    for inside in [false, true] {
        if inside {
            daemon.set_nested(on(maker, L2_COUNTS, Some(0xc_0000)))?;
        }
        let before = daemon.state()?;
        for (field, request) in refused(maker) {
            let asked = format!("{request:x?}");
            let answer = daemon.set_nested(request);
            judge.case();
            let named = answer.as_ref().err().and_then(Status::get_details_bad_request);
            let fields: Vec<String> =
                named.into_iter().flat_map(|named| named.field_violations).map(|it| it.field).collect();
            let code = answer.as_ref().err().map(Status::code);
            judge.count_if("refused while L2 runs", inside && code.is_some());
            judge.count_if("refused while L1 runs", !inside && code.is_some());
            if code != Some(Code::InvalidArgument) || fields != [field] {
                judge.disagree(|| format!("{field}: {answer:?}, names {fields:?}\n  {asked}"));
            }
            let after = daemon.state()?;
            if (&after.gva_walk, &after.ngpa_walk, &after.nested)
                != (&before.gva_walk, &before.ngpa_walk, &before.nested)
            {
                judge.disagree(|| format!("{field}: the previous mode did not stay: {after:?}\n  {asked}"));
            }
            if inside {
                counts_on(&daemon)?;
            } else {
                let before = daemon.registers()?;
                daemon.wait_for("L1 goes on", |registers| registers.rax != before.rax)?;
            }
        }
    }
    daemon.set_nested(off())?;
    for (why, request) in walkers_alone(maker) {
        let effect = daemon.set_nested(request)?.effect.unwrap_or_default();
        judge.case();
        judge.count("the walkers alone", 0);
        if effect.kind() != v1::NestedEffectKind::WalkerOnly || !effect.reason.contains(why) {
            judge.disagree(|| format!("{why}: {effect:?}"));
        }
        daemon.set_nested(off())?;
    }
    judge.finish(&[
        ("refused while L1 runs", None, 1),
        ("refused while L2 runs", None, 1),
        ("the walkers alone", None, 1),
    ])
}
