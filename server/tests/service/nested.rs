//! Nested mode under load: a reader sees the old state or the new, never a mix.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pagewalk_proto::v1;

use crate::bed::{Bed, fault, nested_off, nested_on, page, read};

#[tokio::test]
async fn the_same_address_in_two_dimensions_and_back() {
    let bed = Bed::plain().await;
    let request = v1::TranslateRequest { trace: true, ..read(bed.landmark("l2-data")) };
    let before = bed.translate(request.clone()).await.unwrap();
    assert_eq!(fault(&before).error_code, Some(0), "L1 maps nothing there");

    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let nested = bed.translate(request.clone()).await.unwrap();
    assert_eq!((page(&nested).gpa, page(&nested).nested_gpa), (0x61_1000, Some(0x1_1000)));
    // Four tables of L2, each through four levels of NPT and then read itself, and the page.
    assert_eq!(nested.steps.len(), 4 * (4 + 1) + 4);

    bed.walker().set_nested_mode(nested_off()).await.unwrap();
    let after = bed.translate(request).await.unwrap();
    assert_eq!((after.outcome, after.steps), (before.outcome, before.steps));
    bed.stop().await;
}

/// The address is mapped differently by L1 and by L2: CR3 0x1000 is no root for L1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn toggling_tears_no_answer() {
    const TOGGLES: usize = 500;
    let bed = Arc::new(Bed::plain().await);
    let request = v1::TranslateRequest { trace: true, validate: true, ..read(bed.landmark("l2-data")) };
    let off = bed.translate(request.clone()).await.unwrap();
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let on = bed.translate(request.clone()).await.unwrap();
    assert_ne!(off.outcome, on.outcome);

    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (bed, over, request) = (Arc::clone(&bed), Arc::clone(&over), request.clone());
            let (on, off) = (on.clone(), off.clone());
            tokio::spawn(async move {
                let channel = crate::bed::connect(bed.address).await;
                let mut client = v1::translation_service_client::TranslationServiceClient::new(channel);
                let (mut seen_on, mut seen_off, mut last) = (0_u64, 0_u64, 0);
                while !over.load(Ordering::Acquire) {
                    let answer = client.translate(request.clone()).await.unwrap().into_inner();
                    let provenance = answer.provenance.unwrap();
                    let generation = provenance.generation;
                    assert!(generation >= last, "generations go up");
                    last = generation;
                    // The second generation was the first with nested mode on.
                    let wanted = if generation % 2 == 0 { &on } else { &off };
                    assert_eq!((&answer.outcome, &answer.steps), (&wanted.outcome, &wanted.steps));
                    assert!(!provenance.torn);
                    *(if generation % 2 == 0 { &mut seen_on } else { &mut seen_off }) += 1;
                }
                (seen_on, seen_off)
            })
        })
        .collect();
    for toggle in 0..TOGGLES {
        let request = if toggle % 2 == 0 { nested_off() } else { nested_on() };
        let answer = bed.walker().set_nested_mode(request).await.unwrap().into_inner();
        assert_eq!(answer.effect.unwrap().kind(), v1::NestedEffectKind::WalkerOnly);
        let generation = answer.state.unwrap().provenance.unwrap().generation;
        assert_eq!(generation, 3 + toggle as u64);
    }
    over.store(true, Ordering::Release);
    let (mut seen_on, mut seen_off) = (0, 0);
    for client in clients {
        let (on, off) = client.await.unwrap();
        (seen_on, seen_off) = (seen_on + on, seen_off + off);
    }
    assert!(seen_on > 10 && seen_off > 10, "{seen_on} answers with nested mode, {seen_off} without");
}
