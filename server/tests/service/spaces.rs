//! Address spaces: those that were seen, and one address in many of them. The demo machine has two processes, whose top tables lie
//! next to each other as the two halves of one process would under page-table isolation, and are not.

use pagewalk_proto::v1;
use pagewalk_proto::v1::mapping_service_client::MappingServiceClient;
use pagewalk_proto::v1::space_translation::Outcome;
use pagewalk_proto::v1::translate_response::Outcome as One;
use tonic::Code;

use crate::bed::{Bed, access, nested_off, nested_on, number, refusal, text};

const ROOTS: [u64; 2] = [0x2_0000, 0x2_1000];

fn across(address: Option<v1::Address>, cr3s: &[u64]) -> v1::TranslateAcrossRequest {
    v1::TranslateAcrossRequest {
        address,
        access: access(v1::AccessKind::Read, v1::Privilege::User),
        cr3s: cr3s.to_vec(),
        ..Default::default()
    }
}

#[tokio::test]
async fn each_is_what_translate_says_of_it() {
    let bed = Bed::plain().await;
    for gva in
        [bed.landmark("user-text"), bed.landmark("user-read-only"), bed.landmark("kernel-text"), 0, 1 << 47]
    {
        let cr3s = [ROOTS[0], ROOTS[1], 0x1_0000, ROOTS[0]];
        let answer =
            bed.translation().translate_across(across(number(gva), &cr3s)).await.unwrap().into_inner();
        assert_eq!(answer.address, gva);
        assert_eq!(answer.spaces.iter().map(|space| space.cr3).collect::<Vec<_>>(), cr3s);
        for space in answer.spaces {
            let alone = v1::TranslateRequest {
                address: number(gva),
                access: access(v1::AccessKind::Read, v1::Privilege::User),
                r#override: Some(v1::WalkerOverride { cr3: Some(space.cr3), ..Default::default() }),
                ..Default::default()
            };
            let expected = match bed.translate(alone).await.unwrap().outcome.unwrap() {
                One::Translation(page) => Outcome::Translation(page),
                One::Fault(fault) => Outcome::Fault(fault),
            };
            assert_eq!(space.outcome, Some(expected), "{gva:#x} {:#x}", space.cr3);
        }
    }
    bed.stop().await;
}

#[tokio::test]
async fn what_was_seen_is_listed_and_is_the_default() {
    let bed = Bed::plain().await;
    let mut mapping = MappingServiceClient::new(bed.channel.clone());
    let list =
        mapping.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.left_out, 0);
    let tasks = list.task_list.as_ref().unwrap();
    assert_eq!((tasks.state(), tasks.count), (v1::TaskListState::Unknown, 0));
    assert!(tasks.reason.contains("symbols=FILE"), "{tasks:?}");
    let [space] = &list.spaces[..] else { panic!("{list:?}") };
    assert!(ROOTS.contains(&space.cr3) && space.sightings >= 1 && space.vcpu == 0, "{space:?}");
    assert_eq!((space.isolation_pair, space.user_half), (None, false));
    assert!(space.tasks.is_empty());
    let user = bed.landmark("user-text");
    let answer = bed.translation().translate_across(across(number(user), &[])).await.unwrap().into_inner();
    assert_eq!(answer.spaces.iter().map(|it| it.cr3).collect::<Vec<_>>(), [space.cr3]);
    bed.stop().await;
}

/// The CR3s that were seen are not those of an L2.
#[tokio::test]
async fn an_l2s_are_to_be_named() {
    let bed = Bed::plain().await;
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let unnamed = bed.translation().translate_across(across(number(0), &[])).await;
    assert_eq!(refusal(unnamed), (Code::FailedPrecondition, "PRECONDITION".to_owned()));
    let named = bed.translation().translate_across(across(number(0), &ROOTS)).await.unwrap().into_inner();
    assert_eq!(named.spaces.len(), ROOTS.len());
    bed.walker().set_nested_mode(nested_off()).await.unwrap();
    let npt = v1::walker_override::SecondDimension::Npt(v1::Npt::default());
    let state = Some(v1::WalkerOverride { second_dimension: Some(npt), ..Default::default() });
    let request = v1::TranslateAcrossRequest { r#override: state, ..across(number(0), &[]) };
    let unnamed = bed.translation().translate_across(request).await;
    assert_eq!(refusal(unnamed), (Code::FailedPrecondition, "PRECONDITION".to_owned()));
    bed.stop().await;
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let bed = Bed::plain().await;
    let state = v1::WalkerOverride { cr3: Some(ROOTS[0]), ..Default::default() };
    let many: Vec<u64> = (0..1025).map(|number| number << 12).collect();
    let access = access(v1::AccessKind::Unspecified, v1::Privilege::User);
    for (request, reason) in [
        (across(None, &ROOTS), "INVALID_FIELD"),
        (across(text("no_symbol"), &ROOTS), "INVALID_FIELD"),
        (across(number(0), &many), "INVALID_FIELD"),
        (across(number(0), &[u64::MAX]), "INVALID_WALKER_STATE"),
        (
            v1::TranslateAcrossRequest { r#override: Some(state), ..across(number(0), &ROOTS) },
            "INVALID_FIELD",
        ),
        (v1::TranslateAcrossRequest { access, ..across(number(0), &ROOTS) }, "INVALID_FIELD"),
    ] {
        let refused = bed.translation().translate_across(request).await;
        assert_eq!(refusal(refused), (Code::InvalidArgument, reason.to_owned()));
    }
    let mut mapping = MappingServiceClient::new(bed.channel.clone());
    let refused =
        mapping.list_address_spaces(v1::ListAddressSpacesRequest { machine: "nobody".into() }).await;
    assert_eq!(refusal(refused), (Code::NotFound, "MACHINE_NOT_FOUND".to_owned()));
    bed.stop().await;
}
