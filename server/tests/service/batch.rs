//! `BatchTranslate`: each word means what `Translate` answers.

use pagewalk::{Backing, PageSize, PageWord};
use pagewalk_proto::v1;
use pagewalk_proto::v1::walker_override::SecondDimension;
use prost::Message as _;
use tonic::{Code, Request};

use crate::bed::{Bed, access, from_plain, nested_off, nested_on, number, refusal};
use crate::raw;

pub(crate) const READ: v1::AccessKind = v1::AccessKind::Read;
const MOST: usize = 1 << 18;

/// A batch of supervisor reads.
pub(crate) fn batch(addresses: &[u64]) -> v1::BatchTranslateRequest {
    v1::BatchTranslateRequest {
        head: v1::BatchTranslateRequestHead {
            access: access(READ, v1::Privilege::Supervisor),
            ..Default::default()
        },
        column: addresses.into(),
    }
}

/// Landmarks, their neighbours, and addresses all over the place.
fn addresses(bed: &Bed) -> Vec<u64> {
    let landmarks = bed.machine.source().landmarks().iter().map(|landmark| landmark.address);
    let mut addresses: Vec<u64> = landmarks
        .flat_map(|at| [at, at + 7, at ^ 0x1000, at.wrapping_sub(0x20_0000), at ^ 1 << 60])
        .collect();
    let mut state = 1_u64;
    addresses.extend((0..60).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0xffff_8000_0000_0000 | state >> 40
    }));
    addresses
}

async fn judge(bed: &Bed, request: v1::BatchTranslateRequest) -> (usize, usize) {
    let head = request.head.clone();
    let addresses: Vec<u64> = request.column.iter().collect();
    let answer = bed.translation().batch_translate(request).await.unwrap().into_inner();
    let words: Vec<u64> = answer.column.iter().collect();
    assert_eq!(words.len(), addresses.len());
    let provenance = answer.head.provenance.unwrap();
    assert_eq!((provenance.validated, provenance.torn), (head.validate, false));
    let mut faults = answer.head.faults.iter();
    let mut refused = 0;
    for (at, (gva, word)) in addresses.iter().zip(words).enumerate() {
        let single = v1::TranslateRequest {
            address: number(*gva),
            access: head.access,
            r#override: head.r#override.clone(),
            ..Default::default()
        };
        match bed.translate(single).await.unwrap().outcome.unwrap() {
            v1::translate_response::Outcome::Translation(page) => {
                agree(*gva, &page, PageWord::from_bits(word));
            }
            v1::translate_response::Outcome::Fault(fault) => {
                refused += 1;
                let code = fault.error_code.map(u64::from).or(fault.exit_qualification).or(fault.exit_info_1);
                let nested = u64::from(fault.dimension() == v1::Dimension::Nested);
                assert_eq!(word & 1, 0, "{gva:#x}");
                assert_eq!(word >> 1 & 15, fault.kind as u64, "{gva:#x}");
                assert_eq!(word >> 5 & 7, u64::from(fault.level), "{gva:#x}");
                assert_eq!(word >> 8 & 0xff, nested, "{gva:#x}");
                assert_eq!(word >> 16, code.unwrap_or_default(), "{gva:#x}");
                let told = faults.next().expect("every fault is told");
                assert_eq!(told.index as usize, at);
                assert_eq!(told.fault, Some(v1::Fault { reason: String::new(), ..fault }));
            }
        }
    }
    assert_eq!(faults.next(), None);
    assert_eq!(answer.head.fault_count as usize, refused);
    (addresses.len() - refused, refused)
}

fn agree(gva: u64, page: &v1::Translation, word: PageWord) {
    assert_eq!(word.gpa(gva).map(|gpa| gpa.0), Some(page.gpa), "{gva:#x}");
    let size = |size| match size {
        v1::PageSize::PageSize4k => PageSize::Size4K,
        v1::PageSize::PageSize2m => PageSize::Size2M,
        v1::PageSize::PageSize4m => PageSize::Size4M,
        v1::PageSize::PageSize1g => PageSize::Size1G,
        v1::PageSize::Unpaged | v1::PageSize::Unspecified => PageSize::Unpaged,
    };
    assert_eq!(word.page_size(), size(page.page_size()), "{gva:#x}");
    let nested = page.nested_page_size.map(|_| size(page.nested_page_size()));
    assert_eq!(word.nested_page_size(), nested, "{gva:#x}");
    let rights = page.effective.unwrap();
    let has = word.rights();
    assert_eq!(
        [has.read(), has.write(), has.user(), has.execute()],
        [rights.read, rights.write, rights.user, rights.execute],
        "{gva:#x}"
    );
    assert_eq!(u32::from(word.key()), page.protection_key, "{gva:#x}");
    assert_eq!((word.accessed(), word.dirty(), word.global()), (page.accessed, page.dirty, page.global));
    let backing = match page.backing() {
        v1::Backing::Ram => Backing::Ram,
        v1::Backing::ReadOnly => Backing::ReadOnly,
        v1::Backing::None | v1::Backing::Unspecified => Backing::None,
    };
    assert_eq!(word.backing(), backing, "{gva:#x}");
}

#[tokio::test]
async fn as_single_translations() {
    let bed = Bed::plain().await;
    let all = addresses(&bed);
    let mut seen = (0, 0);
    for kind in [v1::AccessKind::Read, v1::AccessKind::Write, v1::AccessKind::Fetch] {
        for privilege in [v1::Privilege::User, v1::Privilege::Supervisor, v1::Privilege::Exempt] {
            let mut request = batch(&all);
            request.head.access = access(kind, privilege);
            for validate in [false, true] {
                request.head.validate = validate;
                let met = judge(&bed, request.clone()).await;
                seen = (seen.0 + met.0, seen.1 + met.1);
            }
        }
    }
    assert!(seen.0 > 100 && seen.1 > 1000, "{seen:?}");
    bed.stop().await;
}

#[tokio::test]
async fn as_single_translations_of_an_l2() {
    let bed = Bed::plain().await;
    let all = addresses(&bed);
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let mut request = batch(&all);
    request.head.access = access(v1::AccessKind::Write, v1::Privilege::Supervisor);
    let met = judge(&bed, request.clone()).await;
    assert!(met.0 > 1 && met.1 > 50, "{met:?}");
    bed.walker().set_nested_mode(nested_off()).await.unwrap();
    // The same by EPT, which the request brings: its tables happen to be sound EPT entries.
    let ept = v1::Ept { eptp: pagewalkd::machine::demo::NCR3 | 0x1e, ..Default::default() };
    request.head.r#override = Some(v1::WalkerOverride {
        cr3: Some(pagewalkd::machine::demo::L2_CR3),
        second_dimension: Some(SecondDimension::Ept(ept)),
        ..Default::default()
    });
    let met = judge(&bed, request.clone()).await;
    assert!(met.0 > 1 && met.1 > 50, "{met:?}");
    request.head.validate = true;
    assert_eq!(judge(&bed, request).await, met);
    bed.stop().await;
}

#[tokio::test]
async fn faults_are_told_up_to_the_bound() {
    let bed = Bed::plain().await;
    let hole = vec![0x1000; 10_000];
    let ask = async |max_faults| {
        let mut request = batch(&hole);
        request.head.max_faults = max_faults;
        bed.translation().batch_translate(request).await.map(tonic::Response::into_inner)
    };
    for (asked, told) in [(None, 4096), (Some(0), 0), (Some(3), 3), (Some(65_536), 10_000)] {
        let answer = ask(asked).await.unwrap();
        assert_eq!((answer.head.fault_count, answer.head.faults.len()), (10_000, told));
        assert!(answer.head.faults.iter().enumerate().all(|(at, fault)| fault.index as usize == at));
        assert!(
            answer.column.iter().all(|word| word == answer.column.iter().next().unwrap() && word & 1 == 0)
        );
        from_plain(answer.head.provenance.as_ref());
    }
    assert_eq!(refusal(ask(Some(65_537)).await), (Code::InvalidArgument, "INVALID_FIELD".to_owned()));
    bed.stop().await;
}

/// As many addresses as there can be, packed and, as is legal, not packed and in several pieces.
#[tokio::test]
async fn every_encoding_of_the_largest_batch() {
    let bed = Bed::plain().await;
    let text = bed.landmark("kernel-text");
    let column: Vec<u64> = (0..MOST as u64).map(|at| text + at % 0x1000).collect();
    let packed = batch(&column).encode_to_vec();
    let head = batch(&[]).encode_to_vec();
    let single: Vec<u8> =
        column.iter().flat_map(|gva| [&[6 << 3 | 1], &gva.to_le_bytes()[..]].concat()).collect();
    let unpacked = [head.clone(), single].concat();
    let pieces = [packed.clone(), batch(&column[..0]).encode_to_vec()].concat();
    let half = |half: &[u64]| batch(half).encode_to_vec();
    let halves = [half(&column[..MOST / 3]), half(&column[MOST / 3..])].concat();
    for request in [packed, unpacked, pieces, halves] {
        let answer: v1::BatchTranslateResponse =
            raw::answer(bed.address, "TranslationService/BatchTranslate", &request).await.unwrap();
        assert_eq!(answer.column.len(), Some(MOST));
        let gpas = answer.column.iter().zip(&column).map(|(word, gva)| PageWord::from_bits(word).gpa(*gva));
        assert!(gpas.zip(&column).all(|(gpa, gva)| gpa.unwrap().0 == 0x1_0000 + (gva & 0xfff)));
    }
    bed.stop().await;
}

#[tokio::test]
async fn refusals() {
    const FIELD: (Code, &str) = (Code::InvalidArgument, "INVALID_FIELD");
    let bed = Bed::plain().await;
    let with = |change: &dyn Fn(&mut v1::BatchTranslateRequestHead)| {
        let mut request = batch(&[0x1_0000_0000]);
        change(&mut request.head);
        request
    };
    let legacy = v1::WalkerOverride { efer: Some(0), cr4: Some(0x20), ..Default::default() };
    for (request, (code, reason), said) in [
        (batch(&[]), FIELD, "1 to 262144"),
        (batch(&vec![0; MOST + 1]), FIELD, "262145"),
        (batch(&vec![0; 2 * MOST]), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"), "262144"),
        (with(&|head| head.access = None), FIELD, "access"),
        (with(&|head| head.freshness = 9), FIELD, "freshness"),
        (with(&|head| head.max_faults = Some(u32::MAX)), FIELD, "65536"),
        (with(&|head| head.r#override = Some(legacy.clone())), FIELD, "32 bits"),
        (
            with(&|head| head.vcpu = Some(v1::VcpuRef { machine: "no".into(), vcpu: 0 })),
            (Code::NotFound, "MACHINE_NOT_FOUND"),
            "`demo`",
        ),
    ] {
        let status = bed.translation().batch_translate(request).await.unwrap_err();
        assert!(status.message().contains(said), "{status:?}");
        assert_eq!(refusal(Err::<(), _>(status)), (code, reason.to_owned()));
    }
    // Columns of odd length, a word that ends early, and a column that is none.
    let head = batch(&[]).encode_to_vec();
    for (column, reason) in [
        (&b"\x32\x03abc"[..], "INVALID_FIELD"),
        (b"\x32\x0d0123456789abc", "INVALID_FIELD"),
        (b"\x32\x08abc", "MALFORMED_MESSAGE"),
        (b"\x31abc", "MALFORMED_MESSAGE"),
        (b"\x32\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "MALFORMED_MESSAGE"),
        (b"\x30\x01", "MALFORMED_MESSAGE"),
    ] {
        let request = [&head, column].concat();
        let method = "pagewalk.v1.TranslationService/BatchTranslate";
        let status = raw::call_with(bed.address, method, "5S", &request).await;
        assert_eq!(refusal(Err::<(), _>(status)), (Code::InvalidArgument, reason.to_owned()), "{column:?}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

/// A client that leaves, or whose time is over, in the middle of a long batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_up() {
    let bed = Bed::plain().await;
    let hole = batch(&vec![0x1000; MOST]);
    for _ in 0..8 {
        let (mut client, request) = (bed.translation(), hole.clone());
        let call = tokio::spawn(async move { client.batch_translate(request).await });
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
        call.abort();
    }
    let mut late = Request::new(hole.clone());
    late.set_timeout(std::time::Duration::from_millis(4));
    let code = bed.translation().batch_translate(late).await.map_err(|status| status.code());
    assert!(matches!(code, Ok(_) | Err(Code::DeadlineExceeded | Code::Cancelled)), "{code:?}");
    bed.unharmed().await;
    bed.stop().await;
}
