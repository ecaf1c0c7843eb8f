//! Requests that cannot be answered: each has its own code and reason, and the daemon is unharmed.

use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::walker_override::SecondDimension;
use pagewalkd::config::Config;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::bed::{Bed, SOON, config, nested_on, number, page, read, refusal, text};
use crate::raw;
use crate::stuck::{self, Gate, OpenAtEnd};

const GVA: u64 = 0xffff_8000_0001_0000;

fn with(state: v1::WalkerOverride) -> v1::TranslateRequest {
    v1::TranslateRequest { r#override: Some(state), ..read(GVA) }
}

fn access(change: impl FnOnce(&mut v1::Access)) -> v1::TranslateRequest {
    let mut request = read(GVA);
    change(request.access.as_mut().unwrap());
    request
}

#[tokio::test]
async fn translate() {
    use v1::WalkerOverride as Over;
    const FIELD: (Code, &str) = (Code::InvalidArgument, "INVALID_FIELD");
    const STATE: (Code, &str) = (Code::InvalidArgument, "INVALID_WALKER_STATE");
    const LATER: (Code, &str) = (Code::Unimplemented, "NOT_SERVED_YET");
    let vcpu = |machine: &str, vcpu| Some(v1::VcpuRef { machine: machine.into(), vcpu });
    let address = |address| v1::TranslateRequest { address, ..read(0) };
    let npt = |npt| Over { second_dimension: Some(SecondDimension::Npt(npt)), ..Over::default() };
    let bed = Bed::plain().await;
    let cases: Vec<(v1::TranslateRequest, (Code, &str), &str)> = vec![
        // Names.
        (
            v1::TranslateRequest { vcpu: vcpu("no", 0), ..read(0) },
            (Code::NotFound, "MACHINE_NOT_FOUND"),
            "`demo`",
        ),
        (v1::TranslateRequest { vcpu: vcpu("", 1), ..read(0) }, (Code::NotFound, "VCPU_NOT_FOUND"), "has 1"),
        (
            v1::TranslateRequest { vcpu: vcpu("demo", u32::MAX), ..read(0) },
            (Code::NotFound, "VCPU_NOT_FOUND"),
            "4294967295",
        ),
        // Enumerations.
        (access(|a| a.kind = 0), FIELD, "ACCESS_KIND_READ"),
        (access(|a| a.kind = 99), FIELD, "99"),
        (access(|a| a.kind = i32::MIN), FIELD, "access.kind"),
        (access(|a| a.kind = v1::AccessKind::ShadowStackRead.into()), FIELD, "CR4.CET"),
        (access(|a| a.kind = v1::AccessKind::ShadowStackWrite.into()), FIELD, "CR4.CET"),
        (access(|a| a.privilege = 6), FIELD, "access.privilege"),
        (v1::TranslateRequest { access: None, ..read(0) }, FIELD, "access"),
        (v1::TranslateRequest { access: Some(v1::Access::default()), ..read(0) }, FIELD, "access.kind"),
        (v1::TranslateRequest { ad_policy: 3, ..read(0) }, FIELD, "ad_policy"),
        (v1::TranslateRequest { freshness: -1, ..read(0) }, FIELD, "freshness"),
        (with(Over { vendor: Some(3), ..Over::default() }), FIELD, "override.vendor"),
        // Addresses.
        (address(None), FIELD, "address"),
        (address(Some(v1::Address { value: None })), FIELD, "address"),
        (address(text("0x10000000000000000")), FIELD, "does not fit 64 bits"),
        (address(text("18446744073709551616")), FIELD, "does not fit 64 bits"),
        (address(text("ffff800000010000")), FIELD, "0x in front"),
        (address(text("main+0x10")), FIELD, "has no symbols"),
        (address(text("")), FIELD, "empty"),
        (address(text("-1")), FIELD, "-1"),
        (address(text("0x\u{0}1")), FIELD, "neither a number"),
        (address(text("\u{1f600}")), FIELD, "neither a number"),
        (address(text(&"9".repeat(5000))), FIELD, "too long"),
        // Contradictions.
        (
            access(|a| {
                a.kind = v1::AccessKind::Fetch.into();
                a.stack = true;
            }),
            FIELD,
            "access.stack",
        ),
        (
            access(|a| {
                a.kind = v1::AccessKind::ShadowStackRead.into();
                a.stack = true;
            }),
            FIELD,
            "access.stack",
        ),
        (
            with(Over { second_dimension: Some(SecondDimension::None(false)), ..Over::default() }),
            FIELD,
            "override.none",
        ),
        (with(Over { maxphyaddr: Some(31), ..Over::default() }), FIELD, "31"),
        (with(Over { maxphyaddr: Some(53), ..Over::default() }), FIELD, "53"),
        (with(Over { maxphyaddr: Some(u32::MAX), ..Over::default() }), FIELD, "override.maxphyaddr"),
        (with(Over { pdptrs: vec![0; 4], ..Over::default() }), STATE, "PDPTE"),
        (with(Over { pdptrs: vec![0; 3], ..Over::default() }), FIELD, "override.pdptrs"),
        (with(Over { efer: Some(0x100), ..Over::default() }), STATE, "LMA"),
        // Reserved bits, and what no CPU does.
        (with(Over { cr0: Some(1 << 32 | 0x8000_0011), ..Over::default() }), STATE, "CR0"),
        (with(Over { cr0: Some(1 << 31), ..Over::default() }), STATE, "CR0"),
        (with(Over { cr3: Some(1 << 52), ..Over::default() }), STATE, "CR3"),
        (with(Over { cr3: Some(1 << 48), ..Over::default() }), STATE, "CR3"),
        (with(Over { cr4: Some(1 << 40 | 0x20), ..Over::default() }), STATE, "CR4"),
        (with(Over { cr4: Some(0), ..Over::default() }), STATE, "PAE"),
        // Shadow stacks want CR0.WP; masking is Intel's, and upper address ignore AMD's.
        (with(Over { cr0: Some(0x8000_0033), cr4: Some(1 << 23 | 0x20), ..Over::default() }), STATE, "CET"),
        (with(Over { cr4: Some(1 << 28 | 0x20), vendor: Some(2), ..Over::default() }), STATE, "CR4"),
        (with(Over { cr3: Some(1 << 62), vendor: Some(2), ..Over::default() }), STATE, "CR3"),
        (with(Over { efer: Some(1 << 20 | 0xd00), vendor: Some(1), ..Over::default() }), STATE, "EFER"),
        (with(Over { efer: Some(1 << 40 | 0xd00), ..Over::default() }), STATE, "EFER"),
        // PAE: a PDPTE with R/W set is in no register.
        (
            with(Over { efer: Some(0), cr4: Some(0x20), pdptrs: vec![0, 3, 0, 0], ..Over::default() }),
            STATE,
            "PDPTE",
        ),
        // The landmark's address has 64 bits.
        (with(Over { efer: Some(0), cr4: Some(0x20), ..Over::default() }), FIELD, "32 bits"),
        (with(npt(v1::Npt { ncr3: 1 << 48, ..Default::default() })), STATE, "nCR3"),
        (with(npt(v1::Npt { host_cr4: Some(1 << 63), ..Default::default() })), STATE, "CR4"),
        // Later.
        (
            with(Over {
                second_dimension: Some(SecondDimension::Ept(v1::Ept {
                    eptp: 0x5_0016,
                    ..Default::default()
                })),
                ..Over::default()
            }),
            STATE,
            "override.ept.eptp",
        ),
        (with(Over { cr4: Some(1 << 27 | 0x20), ..Over::default() }), LATER, "LASS"),
    ];
    for (request, (code, reason), said) in cases {
        let asked = format!("{request:?}");
        let status = bed.translate(request).await.expect_err(&asked);
        let message = status.message().to_owned();
        assert!(message.contains(said), "{asked}: {message}");
        assert_eq!(refusal(Err::<(), _>(status)), (code, reason.to_owned()), "{asked}: {message}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test]
async fn explain_fault() {
    const FIELD: (Code, &str) = (Code::InvalidArgument, "INVALID_FIELD");
    let bed = Bed::plain().await;
    let code = |error_code| v1::ExplainFaultRequest {
        seen: Some(Seen::PageFault(v1::PageFault { error_code, cr2: number(GVA) })),
        ..Default::default()
    };
    let npf = |exit_info_1| v1::ExplainFaultRequest {
        seen: Some(Seen::NestedPageFault(v1::NestedPageFault { exit_info_1, nested_gpa: number(0) })),
        ..Default::default()
    };
    let page_fault = v1::PageFault { error_code: 0, cr2: None };
    let twice = v1::WalkerOverride { cr3: Some(0), ..Default::default() };
    let mut cases = vec![
        (v1::ExplainFaultRequest::default(), FIELD, "seen"),
        (
            v1::ExplainFaultRequest { seen: Some(Seen::PageFault(page_fault)), ..Default::default() },
            FIELD,
            "page_fault.cr2",
        ),
        (v1::ExplainFaultRequest { cr3: Some(0), r#override: Some(twice), ..code(0) }, FIELD, "given twice"),
        (v1::ExplainFaultRequest { freshness: 7, ..code(0) }, FIELD, "freshness"),
        // The fault's code: RSVD without P; a write and a fetch; PK without P, with I/D, with RSVD; unknown bits.
        (code(0x8), FIELD, "RSVD"),
        (code(0x13), FIELD, "W/R"),
        (code(0x20), FIELD, "PK"),
        (code(0x31), FIELD, "PK"),
        (code(0x29), FIELD, "PK"),
        (code(0x8000_0000), FIELD, "error_code"),
        (code(!0), FIELD, "error_code"),
        (code(0x51), FIELD, "SS"),
        (npf(0x1_0000_0004), (Code::FailedPrecondition, "PRECONDITION"), "override.npt"),
    ];
    let second = SecondDimension::Npt(v1::Npt { ncr3: 0x5_0000, ..Default::default() });
    let nested = v1::WalkerOverride { second_dimension: Some(second), ..Default::default() };
    for info in [
        0x4,
        0x3_0000_0004,
        0x1_0000_0000,
        0x1_0000_0016,
        // RSVD without P, and bits that no manual defines.
        0x1_0000_000c,
        0x1_0000_0084,
        0x8000_0001_0000_0004,
        // A shadow-stack access that fetches, or reads a table; a protection key.
        0x1_0000_0054,
        0x2_0000_0044,
        0x1_0000_0025,
    ] {
        let request = v1::ExplainFaultRequest { r#override: Some(nested.clone()), ..npf(info) };
        cases.push((request, FIELD, "exit_info_1"));
    }
    for (request, (code, reason), said) in cases {
        let asked = format!("{request:?}");
        let status = bed.translation().explain_fault(request).await.expect_err(&asked);
        let message = status.message().to_owned();
        assert!(message.contains(said), "{asked}: {message}");
        assert_eq!(refusal(Err::<(), _>(status)), (code, reason.to_owned()), "{asked}: {message}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test]
async fn set_nested_mode() {
    let bed = Bed::plain().await;
    let npt = |npt| v1::SetNestedModeRequest { mode: Some(Mode::Npt(npt)), ..Default::default() };
    let l2 = |l2| v1::SetNestedModeRequest { l2: Some(l2), ..nested_on() };
    let off = |off| v1::SetNestedModeRequest { mode: Some(Mode::Off(off)), ..Default::default() };
    let ept = |eptp| v1::SetNestedModeRequest {
        mode: Some(Mode::Ept(v1::Ept { eptp, ..Default::default() })),
        ..Default::default()
    };
    let state = || {
        let mut walker = bed.walker();
        async move { walker.get_walker_state(v1::GetWalkerStateRequest::default()).await.unwrap().into_inner() }
    };
    let before = state().await;
    for (request, code, reason) in [
        (v1::SetNestedModeRequest::default(), Code::InvalidArgument, "INVALID_FIELD"),
        (off(false), Code::InvalidArgument, "INVALID_FIELD"),
        (
            v1::SetNestedModeRequest { l2: Some(v1::Registers::default()), ..off(true) },
            Code::InvalidArgument,
            "INVALID_FIELD",
        ),
        (l2(v1::Registers { rip: Some(0), ..Default::default() }), Code::InvalidArgument, "INVALID_FIELD"),
        (l2(v1::Registers { cpl: Some(0), ..Default::default() }), Code::InvalidArgument, "INVALID_FIELD"),
        (
            l2(v1::Registers { cr0: Some(1 << 31), ..Default::default() }),
            Code::InvalidArgument,
            "INVALID_WALKER_STATE",
        ),
        (
            l2(v1::Registers { cr3: Some(u64::MAX), ..Default::default() }),
            Code::InvalidArgument,
            "INVALID_WALKER_STATE",
        ),
        (
            npt(v1::Npt { ncr3: u64::MAX, ..Default::default() }),
            Code::InvalidArgument,
            "INVALID_WALKER_STATE",
        ),
        (
            l2(v1::Registers { cr4: Some(1 << 27 | 0x20), ..Default::default() }),
            Code::Unimplemented,
            "NOT_SERVED_YET",
        ),
        (
            v1::SetNestedModeRequest { mode: Some(Mode::Ept(v1::Ept::default())), ..Default::default() },
            Code::InvalidArgument,
            "INVALID_WALKER_STATE",
        ),
        (ept(2 << 3 | 6), Code::InvalidArgument, "INVALID_WALKER_STATE"),
        (ept(3 << 3 | 1), Code::InvalidArgument, "INVALID_WALKER_STATE"),
        (ept(1 << 51 | 3 << 3 | 6), Code::InvalidArgument, "INVALID_WALKER_STATE"),
        (v1::SetNestedModeRequest { vmcs12: Some(0), ..nested_on() }, Code::InvalidArgument, "INVALID_FIELD"),
        (v1::SetNestedModeRequest { vmcb12: Some(0), ..off(true) }, Code::InvalidArgument, "INVALID_FIELD"),
        // Nothing runs here, and a place for VMCB12 means something to a real vCPU alone.
        (v1::SetNestedModeRequest { vmcb12: Some(0), ..nested_on() }, Code::InvalidArgument, "INVALID_FIELD"),
    ] {
        let asked = format!("{request:?}");
        let status = bed.walker().set_nested_mode(request).await.expect_err(&asked);
        if reason == "INVALID_WALKER_STATE" {
            let named = status.get_details_bad_request().expect("a field").field_violations;
            assert!(named[0].field.contains('.'), "{asked}: {named:?}");
        }
        let answer = refusal(Err::<(), _>(status));
        assert_eq!(answer, (code, reason.to_owned()), "{asked}");
        let after = state().await;
        assert_eq!((&after.gva_walk, &after.nested), (&before.gva_walk, &before.nested), "{asked}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

/// What a client calls a machine goes back to it in a message, and a message travels in a header.
#[tokio::test]
async fn long_names_make_short_messages() {
    let bed = Bed::plain().await;
    for name in ["x".repeat(60_000), "\u{1f600}".repeat(15_000), "\n\r\0".repeat(1000)] {
        let request = v1::GetMachineRequest { machine: name };
        let status = bed.machines().get_machine(request).await.unwrap_err();
        assert!(status.message().len() < 1000, "{}", status.message().len());
        assert_eq!(refusal(Err::<(), _>(status)), (Code::NotFound, "MACHINE_NOT_FOUND".to_owned()));
    }
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test]
async fn a_message_over_the_limit_and_no_message_at_all() {
    let bed = Bed::plain().await;
    let request = v1::GetMachineRequest { machine: "x".repeat(65 << 10) };
    let status = bed.machines().get_machine(request).await.unwrap_err();
    let limits = "a batch has at most 262144 addresses, a write 32768 bytes, any other request 64 KiB: send it in parts";
    assert!(status.message().ends_with(limits), "{}", status.message());
    assert_eq!(refusal(Err::<(), _>(status)), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE".to_owned()));
    // Nor do the calls take so much that share their service with batches.
    let request = v1::TranslateRequest { address: text(&"9".repeat(65 << 10)), ..read(0) };
    let answer = refusal(bed.translate(request).await);
    assert_eq!(answer, (Code::ResourceExhausted, "MESSAGE_TOO_LARGE".to_owned()));
    // A string that is not UTF-8, a method that does not exist, and a service that does not.
    let malformed =
        raw::call_with(bed.address, "pagewalk.v1.MachineService/GetMachine", "5S", b"\x0a\x01\xff");
    let answer = refusal(Err::<(), _>(malformed.await));
    assert_eq!(answer, (Code::InvalidArgument, "MALFORMED_MESSAGE".to_owned()));
    for method in ["pagewalk.v1.MachineService/Nothing", "pagewalk.v2.MachineService/GetMachine"] {
        let answer = refusal(Err::<(), _>(raw::call_with(bed.address, method, "5S", b"").await));
        assert_eq!(answer, (Code::Unimplemented, "NO_SUCH_METHOD".to_owned()), "{method}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_passes() {
    let gate = Gate::default();
    let _end = OpenAtEnd(gate.clone());
    let bed = Bed::of(config(), vec![stuck::machine("stuck", &gate)]).await;
    let sync = || v1::TranslateRequest { freshness: v1::Freshness::Sync.into(), ..read(GVA) };
    for (timeout, bound) in [("200m", Duration::from_secs(4)), ("1n", Duration::from_secs(1))] {
        let start = Instant::now();
        let status = raw::call(bed.address, "TranslationService/Translate", timeout, &sync()).await;
        let (code, reason) = refusal(Err::<(), _>(status));
        assert_eq!(code, Code::DeadlineExceeded, "{timeout}: {reason}");
        assert!(["DEADLINE", "VCPU_UNRESPONSIVE"].contains(&reason.as_str()), "{timeout}: {reason}");
        assert!(start.elapsed() < bound, "{timeout}: {:?}", start.elapsed());
    }
    // The daemon's own bound, where the client sets none.
    let answer = refusal(bed.translate(sync()).await);
    assert_eq!(answer, (Code::DeadlineExceeded, "VCPU_UNRESPONSIVE".to_owned()));
    let late = raw::call(bed.address, "VcpuService/PauseVcpu", "50m", &v1::PauseVcpuRequest::default()).await;
    assert_eq!(refusal(Err::<(), _>(late)).0, Code::DeadlineExceeded);
    // Nobody waits for it to be read, and the answer says what it is.
    let answer = bed.translate(read(GVA)).await.unwrap();
    assert_eq!(page(&answer).gpa, 0x1_0000);
    assert_eq!(answer.provenance.unwrap().run_state(), v1::RunState::Unresponsive);

    gate.open();
    let answer = bed.translate(sync()).await.unwrap();
    assert_ne!(answer.provenance.unwrap().run_state(), v1::RunState::Unresponsive);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_calls_and_a_client_that_leaves() {
    let gate = Gate::default();
    let _end = OpenAtEnd(gate.clone());
    let bed = Bed::of(Config { max_calls: 1, ..config() }, vec![stuck::machine("stuck", &gate)]).await;
    let mut client = bed.translation();
    let slow = tokio::spawn(async move {
        loop {
            let sync = v1::TranslateRequest { freshness: v1::Freshness::Sync.into(), ..read(GVA) };
            let mut sync = Request::new(sync);
            sync.set_timeout(SOON);
            let answer = client.translate(sync).await;
            // One of those that are to be refused may have had the place.
            if answer.as_ref().err().map(Status::code) != Some(Code::ResourceExhausted) {
                return answer;
            }
        }
    });
    let end = Instant::now() + SOON;
    let refused = loop {
        match bed.translate(read(GVA)).await {
            Ok(_) => assert!(Instant::now() < end, "the slow call does not count"),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal(Err::<(), _>(refused)), (Code::ResourceExhausted, "BUSY".to_owned()));
    // The client goes away in the middle of its call: its place is free again, though the vCPU is stuck as before.
    slow.abort();
    while bed.translate(read(GVA)).await.is_err() {
        assert!(Instant::now() < end, "the place is never free again");
        tokio::task::yield_now().await;
    }
    gate.open();
    bed.stop().await;
}
