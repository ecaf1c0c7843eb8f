//! `TranslateNestedGpa`, and EPT as a second dimension that the request brings. The demo machine's NPT entries are EPT
//! entries as well: P, R/W and U/S stand where R, W and X do, and all other bits but PS are clear.

use pagewalk::Memory as _;
use pagewalk_proto::v1;
use pagewalk_proto::v1::translate_nested_gpa_response::Outcome;
use pagewalk_proto::v1::walker_override::SecondDimension;
use pagewalkd::machine::demo::{L2_CR3, NCR3};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::bed::{self, Bed, access, nested_on, number, read, refusal};

/// Walk length 4, write-back.
const EPTP: u64 = NCR3 | 0x1e;
const DATA: u64 = 0x1_1000;
const HOLE: u64 = 0x1_2000;
const READ_ONLY: u64 = 0x1_3000;

fn over(second: SecondDimension) -> v1::WalkerOverride {
    v1::WalkerOverride { second_dimension: Some(second), ..Default::default() }
}

fn ept(eptp: u64) -> v1::WalkerOverride {
    over(SecondDimension::Ept(v1::Ept { eptp, ..Default::default() }))
}

fn npt() -> v1::WalkerOverride {
    over(SecondDimension::Npt(v1::Npt { ncr3: NCR3, ..Default::default() }))
}

fn ask(
    address: u64,
    kind: v1::AccessKind,
    state: Option<v1::WalkerOverride>,
) -> v1::TranslateNestedGpaRequest {
    v1::TranslateNestedGpaRequest {
        address: number(address),
        access: access(kind, v1::Privilege::Supervisor),
        r#override: state,
        trace: true,
        ..Default::default()
    }
}

async fn asked(
    bed: &Bed,
    request: v1::TranslateNestedGpaRequest,
) -> Result<v1::TranslateNestedGpaResponse, Status> {
    Ok(bed.translation().translate_nested_gpa(request).await?.into_inner())
}

fn page(answer: &v1::TranslateNestedGpaResponse) -> &v1::Translation {
    match &answer.outcome {
        Some(Outcome::Translation(page)) => page,
        other => panic!("no translation: {other:?}"),
    }
}

fn fault(answer: &v1::TranslateNestedGpaResponse) -> &v1::Fault {
    match &answer.outcome {
        Some(Outcome::Fault(fault)) => fault,
        other => panic!("no fault: {other:?}"),
    }
}

#[tokio::test]
async fn without_a_second_dimension_it_is_a_flagged_identity() {
    let bed = Bed::plain().await;
    for (address, backing) in [(DATA, v1::Backing::Ram), (u64::MAX, v1::Backing::None)] {
        let request =
            v1::TranslateNestedGpaRequest { explain: true, ..ask(address, v1::AccessKind::Write, None) };
        let answer = asked(&bed, request).await.unwrap();
        assert!(answer.identity && answer.steps.is_empty());
        assert_eq!((page(&answer).gpa, page(&answer).nested_gpa), (address, None));
        assert_eq!(page(&answer).backing(), backing);
        assert!(answer.explanation.contains("no second dimension"), "{}", answer.explanation);
        bed::from_plain(answer.provenance.as_ref());
    }
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let answer = asked(&bed, ask(DATA, v1::AccessKind::Write, None)).await.unwrap();
    assert!(!answer.identity);
    assert_eq!((page(&answer).gpa, page(&answer).nested_gpa), (0x61_1000, Some(DATA)));
    let none = over(SecondDimension::None(true));
    assert!(asked(&bed, ask(DATA, v1::AccessKind::Read, Some(none))).await.unwrap().identity);
    bed.stop().await;
}

/// What each dimension makes of the same tables: EPT's fetches need bit 2, which is NPT's U/S.
#[tokio::test]
async fn the_intended_access_decides() {
    use v1::AccessKind::{Fetch, Read, Write};
    let bed = Bed::plain().await;
    for (second, write_code, hole_code) in
        [(npt(), Err(0x1_0000_0007), Err(0x1_0000_0004)), (ept(EPTP), Ok(0x182 | 0x28 | 0x400), Ok(0x581))]
    {
        let ask = |address, kind| ask(address, kind, Some(second.clone()));
        let read = asked(&bed, ask(READ_ONLY, Read)).await.unwrap();
        assert_eq!((page(&read).gpa, read.steps.len(), read.identity), (0x61_3000, 4, false));
        assert_eq!(page(&read).page_size(), v1::PageSize::Unpaged);
        assert_eq!(page(&read).nested_page_size(), v1::PageSize::PageSize4k);
        assert_eq!(page(&read).pat_type(), v1::MemoryType::Unspecified);
        assert!(!page(&read).effective.unwrap().write);
        assert!(asked(&bed, ask(READ_ONLY, Fetch)).await.unwrap().outcome.is_some());

        let codes = |fault: &v1::Fault| fault.exit_qualification.ok_or(fault.exit_info_1.unwrap_or(0));
        let written = asked(&bed, ask(READ_ONLY, Write)).await.unwrap();
        let refused = fault(&written);
        assert_eq!((codes(refused), refused.level, refused.bits), (write_code, 1, 2), "{refused:?}");
        assert_eq!((refused.address, refused.nested_gpa), (0, READ_ONLY));
        assert_eq!(refused.dimension(), v1::Dimension::Nested);
        let hole = asked(&bed, ask(HOLE, Read)).await.unwrap();
        assert_eq!((codes(fault(&hole)), fault(&hole).entry), (hole_code, 0));
        // Wider than the walk: a fault, not an error.
        let wide = asked(&bed, ask(1 << 48, Read)).await.unwrap();
        assert_eq!((fault(&wide).level, fault(&wide).nested_gpa), (0, 1 << 48));
    }
    bed.stop().await;
}

#[tokio::test]
async fn the_phase_decides() {
    use v1::NestedPhase::{Pdpte, Table};
    let bed = Bed::plain().await;
    let ask = |second, phase: v1::NestedPhase| v1::TranslateNestedGpaRequest {
        phase: phase.into(),
        ..ask(READ_ONLY, v1::AccessKind::Read, Some(second))
    };
    // NPT writes guest tables; EPT does with accessed and dirty bits, and never the PDPTEs.
    let by_npt = asked(&bed, ask(npt(), Table)).await.unwrap();
    assert_eq!(fault(&by_npt).exit_info_1, Some(0x2_0000_0007));
    let read = asked(&bed, ask(ept(EPTP), Table)).await.unwrap();
    assert_eq!(page(&read).gpa, 0x61_3000);
    let with_bits = asked(&bed, ask(ept(EPTP | 1 << 6), Table)).await.unwrap();
    assert_eq!(fault(&with_bits).exit_qualification, Some(0xab), "read and write, r-x, of a linear address");
    let pdpte = asked(&bed, ask(ept(EPTP | 1 << 6), Pdpte)).await.unwrap();
    assert_eq!(page(&pdpte).gpa, 0x61_3000);
    let written =
        over(SecondDimension::Ept(v1::Ept { eptp: EPTP, tables_written: true, ..Default::default() }));
    let as_kvm = asked(&bed, ask(written, Table)).await.unwrap();
    assert_eq!(fault(&as_kvm).exit_qualification, Some(0xab));
    bed.stop().await;
}

/// A GVA of the L2 through EPT: a misconfigured entry, memory types, the ladder.
#[tokio::test]
async fn translate_under_ept() {
    let bed = Bed::plain().await;
    let state = |second| v1::WalkerOverride { cr3: Some(L2_CR3), ..second };
    let request = v1::TranslateRequest {
        trace: true,
        explain: true,
        r#override: Some(state(ept(EPTP))),
        ..read(bed.landmark("l2-data"))
    };
    let answer = bed.translate(request.clone()).await.unwrap();
    let found = bed::page(&answer);
    assert_eq!((found.gpa, found.nested_gpa), (0x61_1000, Some(DATA)));
    let said = found.ept_type.expect("the leaf's type");
    assert_eq!((said.memory_type(), said.ignore_pat), (v1::MemoryType::Uc, false));
    assert_eq!((found.pat_type(), found.effective_type()), (v1::MemoryType::Wb, v1::MemoryType::Uc));
    assert_eq!(answer.steps.len(), 24);
    let of_ept = answer.steps.iter().filter(|step| step.mode() == v1::PagingMode::EptFourLevel).count();
    assert_eq!(of_ept, 20);
    assert!(answer.steps.iter().all(|step| {
        (step.mode() == v1::PagingMode::FourLevel) == (step.dimension() == v1::Dimension::Guest)
    }));
    for words in ["under 4-level EPT, EPTP 0x5001e", "EPT PTE", "R W X type 0", "UC (PAT WB, EPT UC)"] {
        assert!(answer.explanation.contains(words), "{words}: {}", answer.explanation);
    }

    // A PML4E maps no page: with bit 7 set it is misconfigured.
    bed.machine.source().memory().write(pagewalk::Gpa(NCR3), &(NCR3 + 0x1087).to_le_bytes()).unwrap();
    let answer = bed.translate(request).await.unwrap();
    let refused = bed::fault(&answer);
    assert_eq!(refused.kind(), v1::FaultKind::EptMisconfiguration);
    assert_eq!((refused.level, refused.entry_gpa, refused.bits), (4, NCR3, 1 << 7));
    assert_eq!((refused.exit_qualification, refused.error_code), (None, None));
    bed.stop().await;
}

#[tokio::test]
async fn bad_second_dimensions_name_their_field() {
    let bed = Bed::plain().await;
    let with_capabilities = |eptp, capabilities| {
        over(SecondDimension::Ept(v1::Ept { eptp, capabilities: Some(capabilities), ..Default::default() }))
    };
    let bad_npt = |npt| over(SecondDimension::Npt(npt));
    for (state, field, words) in [
        (ept(0), "override.ept.eptp", "page-walk length"),
        (ept(NCR3 | 0x16), "override.ept.eptp", "page-walk length"),
        (ept(NCR3 | 0x2e), "override.ept.eptp", "page-walk length"),
        (ept(NCR3 | 0x19), "override.ept.eptp", "memory type"),
        (ept(EPTP | 1 << 8), "override.ept.eptp", "reserved"),
        (ept(EPTP | 1 << 48), "override.ept.eptp", "reserved"),
        (ept(EPTP | 1 << 63), "override.ept.eptp", "reserved"),
        (with_capabilities(EPTP, 0), "override.ept.eptp", "write-back"),
        (with_capabilities(EPTP, 1 << 14), "override.ept.eptp", "4-level"),
        (with_capabilities(EPTP | 1 << 6, 1 << 14 | 1 << 6), "override.ept.eptp", "reserved"),
        (bad_npt(v1::Npt { ncr3: 1 << 48, ..Default::default() }), "override.npt.ncr3", "nCR3"),
        (
            bad_npt(v1::Npt { ncr3: NCR3, host_cr4: Some(1 << 63), ..Default::default() }),
            "override.npt.host_cr4",
            "CR4",
        ),
    ] {
        let refused = asked(&bed, ask(DATA, v1::AccessKind::Read, Some(state.clone()))).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains(words), "{words}: {}", refused.message());
        let details = refused.get_details_bad_request().expect("the field");
        assert_eq!(details.field_violations[0].field, field);
        assert_eq!(refusal(Err::<(), _>(refused)), (Code::InvalidArgument, "INVALID_WALKER_STATE".into()));
        // `Translate` refuses the same.
        let request = v1::TranslateRequest { r#override: Some(state), ..read(0) };
        assert_eq!(bed.translate(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test]
async fn bad_requests_name_their_field() {
    let bed = Bed::plain().await;
    let good = ask(DATA, v1::AccessKind::Read, None);
    let access = |change: fn(&mut v1::Access)| {
        let mut request = good.clone();
        change(request.access.as_mut().unwrap());
        request
    };
    for (request, code, field) in [
        (v1::TranslateNestedGpaRequest { address: None, ..good.clone() }, Code::InvalidArgument, "address"),
        (v1::TranslateNestedGpaRequest { access: None, ..good.clone() }, Code::InvalidArgument, "access"),
        (v1::TranslateNestedGpaRequest { phase: 4, ..good.clone() }, Code::InvalidArgument, "phase"),
        (v1::TranslateNestedGpaRequest { ad_policy: 3, ..good.clone() }, Code::InvalidArgument, "ad_policy"),
        (access(|a| a.kind = 0), Code::InvalidArgument, "access.kind"),
        (access(|a| a.ac = Some(false)), Code::InvalidArgument, "access.ac"),
        (access(|a| a.pkru = Some(0)), Code::InvalidArgument, "access.pkru"),
        (access(|a| a.pkrs = Some(0)), Code::InvalidArgument, "access.pkrs"),
        (access(|a| a.stack = true), Code::InvalidArgument, "access.stack"),
    ] {
        let refused = asked(&bed, request).await.unwrap_err();
        assert_eq!(refused.code(), code, "{field}: {refused:?}");
        assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, field);
    }
    bed.unharmed().await;
    bed.stop().await;
}

/// What `Set` leaves in the second dimension's entries, and that `Observe` leaves nothing.
#[tokio::test]
async fn set_changes_accessed_and_dirty_bits_of_the_second_dimension() {
    use v1::AccessKind::{Read, Write};
    use v1::NestedPhase::{Final, Pdpte, Table};
    // NPT: bits 5 and 6; EPT: 8 and 9, where bit 6 of EPTP says so.
    let with_bits = ept(EPTP | 1 << 6);
    for (second, kind, phase, upper, leaf) in [
        (npt(), Read, Final, 1 << 5, 1 << 5),
        (npt(), Write, Final, 1 << 5, 3 << 5),
        (npt(), Read, Table, 1 << 5, 3 << 5),
        (with_bits.clone(), Read, Final, 1 << 8, 1 << 8),
        (with_bits.clone(), Write, Final, 1 << 8, 3 << 8),
        (with_bits.clone(), Read, Table, 1 << 8, 3 << 8),
        (with_bits, Read, Pdpte, 1 << 8, 1 << 8),
        (ept(EPTP), Write, Final, 0, 0),
    ] {
        let bed = Bed::plain().await;
        let request = v1::TranslateNestedGpaRequest { phase: phase.into(), ..ask(DATA, kind, Some(second)) };
        let observed = asked(&bed, request.clone()).await.unwrap();
        let memory = bed.machine.source().memory();
        let entry = |step: &v1::Step| memory.load_u64(pagewalk::Gpa(step.entry_gpa)).unwrap();
        assert!(observed.steps.iter().all(|step| entry(step) == step.entry));
        let set = v1::TranslateNestedGpaRequest { ad_policy: v1::AdPolicy::Set.into(), ..request.clone() };
        let answer = asked(&bed, set).await.unwrap();
        assert_eq!((&answer.outcome, &answer.steps), (&observed.outcome, &observed.steps));
        for step in &observed.steps {
            let wanted = if step.level == 1 { leaf } else { upper };
            assert_eq!(entry(step), step.entry | wanted, "{kind:?} {phase:?} {step:?}");
        }
        assert!(asked(&bed, request).await.unwrap().outcome.is_some());
        bed.stop().await;
    }
    // A fault sets nothing.
    let bed = Bed::plain().await;
    let request = v1::TranslateNestedGpaRequest {
        ad_policy: v1::AdPolicy::Set.into(),
        ..ask(READ_ONLY, Write, Some(npt()))
    };
    let answer = asked(&bed, request).await.unwrap();
    assert_eq!(fault(&answer).exit_info_1, Some(0x1_0000_0007));
    let memory = bed.machine.source().memory();
    assert!(answer.steps.iter().all(|step| {
        memory.load_u64(pagewalk::Gpa(step.entry_gpa)) == Some(step.entry) && step.entry & 3 << 5 == 0
    }));
    bed.stop().await;
}
