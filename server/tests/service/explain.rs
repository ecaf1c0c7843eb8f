//! `ExplainFault`.

use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalk_proto::v1::walker_override::SecondDimension;
use pagewalkd::machine::demo;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::bed::{Bed, from_plain, nested_off, nested_on, number};

fn page_fault(error_code: u32, cr2: u64) -> v1::ExplainFaultRequest {
    let seen = Seen::PageFault(v1::PageFault { error_code, cr2: number(cr2) });
    v1::ExplainFaultRequest { seen: Some(seen), ..Default::default() }
}

async fn explain(bed: &Bed, request: v1::ExplainFaultRequest) -> v1::ExplainFaultResponse {
    let answer = bed.translation().explain_fault(request).await.unwrap().into_inner();
    from_plain(answer.provenance.as_ref());
    assert!(!answer.explanation.is_empty());
    assert_eq!(answer.would_fault_now, answer.fault.is_some());
    assert_ne!(answer.fault.is_some(), answer.translation.is_some(), "one or the other");
    assert!(answer.decoded.is_sorted_by_key(|bit| bit.bit));
    assert!(answer.decoded.iter().all(|bit| !bit.meaning.is_empty()));
    answer
}

fn set(answer: &v1::ExplainFaultResponse) -> Vec<&str> {
    answer.decoded.iter().filter(|bit| bit.set).map(|bit| bit.name.as_str()).collect()
}

#[tokio::test]
async fn the_same_fault_again() {
    let bed = Bed::plain().await;
    for (name, code, level, bits, names) in [
        ("read-only", 3, 1, 2, vec!["P", "W/R"]),
        ("no-execute", 0x11, 1, 1 << 63, vec!["P", "I/D"]),
        ("not-present", 0, 1, 1, vec![]),
        ("reserved-bit", 9, 2, 1 << 13, vec!["P", "RSVD"]),
        ("supervisor-page", 7, 1, 4, vec!["P", "W/R", "U/S"]),
        ("read-only-table", 7, 2, 2, vec!["P", "W/R", "U/S"]),
        ("user-bit-lost", 5, 2, 4, vec!["P", "U/S"]),
    ] {
        let answer = explain(&bed, page_fault(code, bed.landmark(name))).await;
        assert!(answer.matches && answer.would_fault_now, "{name}: {answer:?}");
        let fault = answer.fault.as_ref().unwrap();
        assert_eq!(fault.error_code, Some(code), "{name}");
        assert_eq!((fault.level, fault.bits), (level, bits), "{name}: {fault:?}");
        assert_eq!(set(&answer), names, "{name}");
        assert_eq!(answer.decoded.len(), 7, "every bit that the manuals define");
        assert!(answer.steps.iter().any(|step| step.entry_gpa == fault.entry_gpa));
    }
    bed.stop().await;
}

#[tokio::test]
async fn another_fault_and_none() {
    let bed = Bed::plain().await;
    let answer = explain(&bed, page_fault(2, bed.landmark("read-only"))).await;
    assert!(answer.would_fault_now && !answer.matches);
    assert_eq!(answer.fault.unwrap().error_code, Some(3));

    let answer = explain(&bed, page_fault(2, bed.landmark("kernel-data"))).await;
    assert!(!answer.would_fault_now && !answer.matches);
    assert_eq!(answer.translation.unwrap().gpa, 0x1_1000);

    // In the other address space.
    let request = v1::ExplainFaultRequest {
        cr3: Some(demo::ADDRESS_SPACES[1]),
        ..page_fault(6, bed.landmark("user-data"))
    };
    let answer = explain(&bed, request).await;
    assert_eq!(answer.translation.unwrap().gpa, demo::USER_DATA_FRAMES[1]);
    bed.stop().await;
}

#[tokio::test]
async fn a_nested_page_fault() {
    let bed = Bed::plain().await;
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let seen = |exit_info_1, ngpa| {
        let seen = v1::NestedPageFault { exit_info_1, nested_gpa: number(ngpa) };
        v1::ExplainFaultRequest { seen: Some(Seen::NestedPageFault(seen)), ..Default::default() }
    };
    for (info, ngpa, level, names) in [
        (0x1_0000_0004_u64, 0x1_2000_u64, 1_u32, vec!["U/S", "FINAL"]),
        (0x1_0000_0006, 0x1_2000, 1, vec!["W/R", "U/S", "FINAL"]),
        (0x1_0000_0007, 0x1_3000, 1, vec!["P", "W/R", "U/S", "FINAL"]),
        (0x2_0000_0006, 0x2_0000, 1, vec!["W/R", "U/S", "TABLE"]),
    ] {
        let answer = explain(&bed, seen(info, ngpa)).await;
        assert!(answer.matches && answer.would_fault_now, "{info:#x}: {answer:?}");
        let fault = answer.fault.as_ref().unwrap();
        assert_eq!((fault.kind(), fault.exit_info_1), (v1::FaultKind::NestedPageFault, Some(info)));
        assert_eq!((fault.level, fault.nested_gpa), (level, ngpa), "{fault:?}");
        assert_eq!(set(&answer), names, "{info:#x}");
        assert_eq!(answer.steps.len(), 4);
    }
    let answer = explain(&bed, seen(0x1_0000_0006, 0x1_1000)).await;
    assert!(!answer.would_fault_now && !answer.matches);
    assert_eq!(answer.translation.unwrap().gpa, 0x61_1000);

    // What L2 itself refuses is a page fault, also now.
    let answer = explain(&bed, page_fault(3, bed.landmark("l2-code"))).await;
    assert!(answer.matches);
    bed.stop().await;
}

/// Exits of EPT, over the demo machine's nested tables, which are sound EPT entries as well.
fn ept(seen: Seen, eptp: u64) -> v1::ExplainFaultRequest {
    let ept = v1::Ept { eptp, ..Default::default() };
    let second = Some(SecondDimension::Ept(ept));
    let state =
        v1::WalkerOverride { cr3: Some(demo::L2_CR3), second_dimension: second, ..Default::default() };
    v1::ExplainFaultRequest { seen: Some(seen), r#override: Some(state), ..Default::default() }
}

const EPTP: u64 = demo::NCR3 | 0x1e;

fn violation(exit_qualification: u64, ngpa: u64, gva: Option<u64>) -> Seen {
    let gva = gva.and_then(number);
    Seen::EptViolation(v1::EptViolation { exit_qualification, nested_gpa: number(ngpa), gva })
}

#[tokio::test]
async fn an_ept_violation() {
    let bed = Bed::plain().await;
    for (qualification, ngpa, level, bits, names) in [
        // A hole, read.
        (0x181_u64, 0x1_2000_u64, 1_u32, 7_u64, vec!["READ", "GVA", "FINAL"]),
        // A page that may not be written; also by an instruction that reads as well.
        (0x1aa, 0x1_3000, 1, 2, vec!["WRITE", "R", "X", "GVA", "FINAL"]),
        (0x1ab, 0x1_3000, 1, 2, vec!["READ", "WRITE", "R", "X", "GVA", "FINAL"]),
        // The same as a table of the guest whose accessed bit is to be set.
        (0xab, 0x1_3000, 1, 2, vec!["READ", "WRITE", "R", "X", "GVA"]),
        (0xaa, 0x1_3000, 1, 2, vec!["WRITE", "R", "X", "GVA"]),
        // What advanced information tells, and what the exit came with, is not compared.
        (
            0x1_1faa,
            0x1_3000,
            1,
            2,
            vec!["WRITE", "R", "X", "GVA", "FINAL", "USER", "RW", "XD", "IRET", "ASYNC"],
        ),
        // A PDPTE, loaded without a linear address.
        (0x01, 0x1_2000, 1, 7, vec!["READ"]),
        // Wider than EPT translates.
        (0x181, 1 << 48, 0, 0, vec!["READ", "GVA", "FINAL"]),
    ] {
        let answer = explain(&bed, ept(violation(qualification, ngpa, None), EPTP)).await;
        assert!(answer.matches && answer.would_fault_now, "{qualification:#x}: {answer:?}");
        let fault = answer.fault.as_ref().unwrap();
        assert_eq!(fault.kind(), v1::FaultKind::EptViolation);
        assert_eq!((fault.level, fault.bits, fault.nested_gpa), (level, bits, ngpa), "{fault:?}");
        assert_eq!(set(&answer), names, "{qualification:#x}");
        assert_eq!(answer.decoded.len(), 16, "every bit that the manual defines");
    }
    // Another violation, and none.
    let answer = explain(&bed, ept(violation(0x182, 0x1_3000, None), EPTP)).await;
    assert!(answer.would_fault_now && !answer.matches);
    let answer = explain(&bed, ept(violation(0x182, 0x1_1000, None), EPTP)).await;
    assert!(!answer.would_fault_now && !answer.matches);
    assert_eq!(answer.translation.unwrap().gpa, 0x61_1000);
    bed.stop().await;
}

/// With the guest-linear address, the explanation says where it leads now.
#[tokio::test]
async fn an_ept_violation_with_its_linear_address() {
    let bed = Bed::plain().await;
    let data = bed.landmark("l2-data");
    for (gva, ngpa, said) in [
        (data, 0x1_1000_u64, "leads to that nGPA now"),
        (data, 0x1_3000, "leads to nGPA 0x11000 now"),
        (0x1234_5000, 0x1_3000, "leads nowhere now"),
    ] {
        let answer = explain(&bed, ept(violation(0x1aa, ngpa, Some(gva)), EPTP)).await;
        let expected = format!("GVA {gva:#x} {said}");
        assert!(answer.explanation.contains(&expected), "{expected}: {}", answer.explanation);
        assert_eq!(answer.matches, ngpa == 0x1_3000);
    }
    bed.stop().await;
}

#[tokio::test]
async fn an_ept_misconfiguration() {
    let bed = Bed::plain().await;
    let seen = |ngpa| Seen::EptMisconfiguration(v1::EptMisconfiguration { nested_gpa: number(ngpa) });
    let answer = explain(&bed, ept(seen(0x1_1000), EPTP)).await;
    assert!(!answer.would_fault_now && !answer.matches && answer.decoded.is_empty());
    // A hole is a violation.
    let answer = explain(&bed, ept(seen(0x1_2000), EPTP)).await;
    assert!(answer.would_fault_now && !answer.matches);
    // The PML4E with bit 7 set.
    let memory = bed.machine.source().memory();
    memory.write(pagewalk::Gpa(demo::NCR3), &(demo::NCR3 + 0x1087).to_le_bytes()).unwrap();
    let answer = explain(&bed, ept(seen(0x1_1000), EPTP)).await;
    assert!(answer.would_fault_now && answer.matches);
    let fault = answer.fault.as_ref().unwrap();
    assert_eq!((fault.kind(), fault.level, fault.bits), (v1::FaultKind::EptMisconfiguration, 4, 1 << 7));
    assert_eq!(answer.steps.len(), 1);
    bed.stop().await;
}

#[tokio::test]
async fn exits_of_ept_that_make_no_sense() {
    let bed = Bed::plain().await;
    let field = "ept_violation.exit_qualification";
    for (seen, field) in [
        (violation(0x180, 0, None), field),
        (violation(0x185, 0, None), field),
        (violation(0x84, 0, None), field),
        (violation(0x2084 | 1, 0, None), field),
        (violation(0x2184, 0, None), field),
        (violation(0x181 | 1 << 15, 0, None), field),
        (violation(0x181 | 1 << 17, 0, None), field),
        (violation(0x181 | 1 << 63, 0, None), field),
        (violation(0x01, 0, Some(0)), "ept_violation.gva"),
        (
            Seen::EptViolation(v1::EptViolation { exit_qualification: 0x181, ..Default::default() }),
            "ept_violation.nested_gpa",
        ),
        (Seen::EptMisconfiguration(v1::EptMisconfiguration::default()), "ept_misconfiguration.nested_gpa"),
    ] {
        let said = format!("{seen:?}");
        let refused = bed.translation().explain_fault(ept(seen, EPTP)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{said}");
        assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, field, "{said}");
    }
    // There is no EPT: none at all, or NPT.
    let none = v1::ExplainFaultRequest { seen: Some(violation(0x181, 0, None)), ..Default::default() };
    for nested in [false, true] {
        if nested {
            bed.walker().set_nested_mode(nested_on()).await.unwrap();
        }
        let refused = bed.translation().explain_fault(none.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("override.ept"), "{refused:?}");
    }
    bed.walker().set_nested_mode(nested_off()).await.unwrap();
    bed.unharmed().await;
    bed.stop().await;
}
