//! Keys of supervisor pages, shadow stacks and pointers with metadata, asked over gRPC by what a request lays over the vCPU.

use pagewalk_proto::v1;

use crate::bed::{Bed, access, fault, page, read, text};

/// A landmark of the demo machine: a page of the supervisor's that is not writable, and not dirty.
const GVA: u64 = 0xffff_8000_0001_0000;
const CR4: u64 = 0x6a0;
const CR4_CET: u64 = 1 << 23;
const CR4_PKS: u64 = 1 << 24;
const CR4_LAM_SUP: u64 = 1 << 28;
const INTEL: i32 = v1::Vendor::Intel as i32;

async fn ask(bed: &Bed, request: v1::TranslateRequest, cr4: u64) -> v1::TranslateResponse {
    let state = v1::WalkerOverride { cr4: Some(CR4 | cr4), vendor: Some(INTEL), ..Default::default() };
    bed.translate(v1::TranslateRequest { r#override: Some(state), explain: true, ..request }).await.unwrap()
}

#[tokio::test]
async fn supervisor_keys_are_the_requests_or_open() {
    let bed = Bed::plain().await;
    let with = |pkrs| {
        let mut request = read(GVA);
        request.access.as_mut().unwrap().pkrs = pkrs;
        request
    };
    let open = page(&ask(&bed, with(None), CR4_PKS).await).gpa;
    assert_eq!(page(&ask(&bed, with(Some(!3)), CR4_PKS).await).gpa, open);
    assert_eq!(page(&ask(&bed, with(Some(1)), 0).await).gpa, open);
    let answer = ask(&bed, with(Some(1)), CR4_PKS).await;
    let refused = fault(&answer);
    assert_eq!((refused.error_code, refused.bits), (Some(0x21), 0xf << 59));
    assert!(answer.explanation.contains("PKRS"), "{}", answer.explanation);
    bed.stop().await;
}

#[tokio::test]
async fn a_clean_page_is_no_shadow_stack() {
    let bed = Bed::plain().await;
    for (kind, code) in [(v1::AccessKind::ShadowStackRead, 0x41), (v1::AccessKind::ShadowStackWrite, 0x43)] {
        let request = v1::TranslateRequest { access: access(kind, v1::Privilege::Supervisor), ..read(GVA) };
        let answer = ask(&bed, request, CR4_CET).await;
        let refused = fault(&answer);
        assert_eq!(refused.error_code, Some(code));
        assert_eq!(refused.bits, 1 << 6, "D is clear: {refused:?}");
        for said in ["shadow-stack", "bit 6 clear", "SS"] {
            assert!(answer.explanation.contains(said), "{said}: {}", answer.explanation);
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_fault_seen_at_a_shadow_stack_is_explained() {
    use v1::explain_fault_request::Seen;
    let bed = Bed::plain().await;
    let explain = async |error_code, cr4: u64| {
        let seen = v1::PageFault { error_code, cr2: text(&format!("{GVA:#x}")) };
        let state = v1::WalkerOverride { cr4: Some(CR4 | cr4), ..Default::default() };
        let seen = Some(Seen::PageFault(seen));
        let request = v1::ExplainFaultRequest { seen, r#override: Some(state), ..Default::default() };
        bed.translation().explain_fault(request).await.unwrap().into_inner()
    };
    let answer = explain(0x41, CR4_CET).await;
    assert!(answer.matches && answer.would_fault_now, "{}", answer.explanation);
    let bit = answer.decoded.iter().find(|bit| bit.name == "SS").unwrap();
    assert!(bit.set && bit.bit == 6, "{bit:?}");
    // The guest has cleared CR4.CET since: the same access would be an ordinary read.
    assert!(!explain(0x41, 0).await.would_fault_now);
    bed.stop().await;
}

#[tokio::test]
async fn metadata_is_taken_from_a_pointer() {
    let bed = Bed::plain().await;
    let plain = page(&ask(&bed, read(GVA), 0).await).gpa;
    let tagged = GVA & !(0x2a << 57);
    assert_eq!(page(&ask(&bed, read(tagged), CR4_LAM_SUP).await).gpa, plain);
    let refused = fault(&ask(&bed, read(tagged), 0).await).clone();
    assert_eq!((refused.kind(), refused.address), (v1::FaultKind::GeneralProtection, tagged));
    // Bit 47 has to agree with bit 63 still; and CR2 has no metadata.
    let given = 0x8000_7fff_0000_0000;
    let refused = fault(&ask(&bed, read(given), CR4_LAM_SUP).await).clone();
    assert_eq!((refused.kind(), refused.address), (v1::FaultKind::GeneralProtection, given));
    let refused = fault(&ask(&bed, read(0x8000_ffff_0000_0000), CR4_LAM_SUP).await).clone();
    assert_eq!((refused.kind(), refused.address), (v1::FaultKind::PageFault, 0xffff_ffff_0000_0000));
    bed.stop().await;
}
