//! `ExplainFault`.

use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalkd::machine::demo;

use crate::bed::{Bed, from_plain, nested_on, number};

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
