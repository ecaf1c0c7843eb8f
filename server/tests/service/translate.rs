//! `Translate`: every landmark, every option of the request.

use pagewalk::Gpa;
use pagewalk_proto::v1;
use pagewalk_proto::v1::walker_override::SecondDimension;
use pagewalk_proto::v1::{AccessKind, Dimension, FaultKind, PageSize, Privilege};
use pagewalkd::machine::demo;

use crate::bed::{Bed, access, fault, from_plain, nested_on, number, page, read, text};
use crate::demo_landmarks::{self, Outcome, Row};

const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;

fn outcome(answer: &v1::TranslateResponse) -> Outcome {
    match answer.outcome.as_ref().expect("always set") {
        v1::translate_response::Outcome::Translation(page) => Outcome::Gpa(page.gpa),
        v1::translate_response::Outcome::Fault(fault) => match fault.kind() {
            FaultKind::PageFault => Outcome::PageFault(fault.error_code.unwrap()),
            FaultKind::NestedPageFault => Outcome::NestedPageFault(fault.exit_info_1.unwrap()),
            FaultKind::GeneralProtection => Outcome::GeneralProtection,
            FaultKind::Unbacked => Outcome::Unbacked,
            other => panic!("{other:?}"),
        },
    }
}

/// The steps agree with each other, with the guest's memory and with the outcome.
fn check_steps(bed: &Bed, gva: u64, answer: &v1::TranslateResponse) {
    use pagewalk::Memory as _;
    let memory = &*bed.machine.source().memory();
    let steps = &answer.steps;
    assert!(steps.len() <= 35, "{}", steps.len());
    for step in steps {
        assert_eq!(step.entry_gpa, step.table_gpa + u64::from(step.index) * 8, "{step:?}");
        assert!((1..=4).contains(&step.level) && step.index < 512, "{step:?}");
        let shift = 12 + 9 * (step.level - 1);
        assert_eq!(u64::from(step.index), step.input.unwrap() >> shift & 511, "{step:?}");
        assert!(!step.verdict.is_empty());
        if let Some(entry) = memory.load_u64(Gpa(step.entry_gpa)) {
            assert_eq!(step.entry, entry, "{step:?}");
        } else {
            assert_eq!(step.entry, 0, "{step:?}");
        }
    }
    let guest: Vec<_> = steps.iter().filter(|step| step.dimension() == Dimension::Guest).collect();
    assert!(guest.iter().all(|step| step.input == Some(gva)));
    let levels: Vec<_> = guest.iter().map(|step| step.level).collect();
    assert!(levels.iter().rev().is_sorted() && levels.first().is_none_or(|&top| top == 4), "{levels:?}");
    match answer.outcome.as_ref().unwrap() {
        v1::translate_response::Outcome::Translation(page) => {
            let leaf = guest.last().unwrap();
            let level = match page.page_size() {
                PageSize::PageSize4k => 1,
                PageSize::PageSize2m => 2,
                PageSize::PageSize1g => 3,
                other => panic!("{other:?}"),
            };
            assert!(leaf.leaf && leaf.level == level, "{leaf:?}");
            let offset = (1_u64 << (12 + 9 * (level - 1))) - 1;
            let frame = leaf.entry & 0x000f_ffff_ffff_f000 & !offset;
            assert_eq!(page.nested_gpa.unwrap_or(page.gpa), frame | gva & offset, "{page:?}");
            assert_eq!(guest.iter().filter(|step| step.leaf).count(), 1);
        }
        v1::translate_response::Outcome::Fault(fault) => {
            assert_eq!(fault.address, gva);
            assert!(!fault.reason.is_empty());
            if fault.level == 0 {
                assert!(steps.is_empty(), "{fault:?}");
            } else {
                let refused = steps.iter().rfind(|step| {
                    (step.entry_gpa, step.level, step.dimension())
                        == (fault.entry_gpa, fault.level, fault.dimension())
                });
                assert_eq!(refused.unwrap().entry, fault.entry, "{fault:?}");
            }
        }
    }
}

async fn check_row(bed: &Bed, (name, wanted): &Row) {
    let gva = bed.landmark(name);
    let privileges = [Privilege::Supervisor, Privilege::User];
    let accesses = privileges.iter().flat_map(|&p| KINDS.iter().map(move |&k| (k, p)));
    for (wanted, (kind, privilege)) in wanted.iter().zip(accesses) {
        let request = v1::TranslateRequest {
            address: number(gva),
            access: access(kind, privilege),
            trace: true,
            explain: true,
            validate: true,
            ..Default::default()
        };
        let answer = bed.translate(request.clone()).await.unwrap();
        assert_eq!(outcome(&answer), *wanted, "{name}: {kind:?} by {privilege:?}");
        check_steps(bed, gva, &answer);
        from_plain(answer.provenance.as_ref());
        let provenance = answer.provenance.as_ref().unwrap();
        assert!(provenance.validated && !provenance.torn);
        assert!(answer.explanation.contains(&format!("{gva:#x}")), "{}", answer.explanation);
        for step in &answer.steps {
            let entry = format!("{:#x}", step.entry);
            assert!(answer.explanation.contains(entry.trim_start_matches("0x")), "{}", answer.explanation);
        }
        // The plain walk has no recorder, and must come to the same.
        let plain = v1::TranslateRequest { trace: false, explain: false, validate: false, ..request };
        let plain = bed.translate(plain).await.unwrap();
        assert_eq!(plain.outcome, answer.outcome);
        assert!(plain.steps.is_empty() && plain.explanation.is_empty());
        assert!(!plain.provenance.unwrap().validated);
    }
}

#[tokio::test]
async fn landmarks_mean_what_they_promise() {
    let bed = Bed::plain().await;
    let mut rows = 0;
    for row in
        demo_landmarks::KERNEL.iter().copied().chain(demo_landmarks::user(0)).chain([demo_landmarks::GIB])
    {
        check_row(&bed, &row).await;
        rows += 1;
    }
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    for row in demo_landmarks::L2 {
        check_row(&bed, row).await;
        rows += 1;
    }
    // All but `remapped`, and the two that are registers.
    assert_eq!(rows, bed.machine.source().landmarks().len() - 3);
    bed.stop().await;
}

#[tokio::test]
async fn pages_are_described() {
    let bed = Bed::plain().await;
    let ask = async |name: &str| *page(&bed.translate(read(bed.landmark(name))).await.unwrap());
    let rights = |read, write, user, execute| Some(v1::Rights { read, write, user, execute });

    let text = ask("kernel-text").await;
    assert_eq!(text.effective, rights(true, false, false, true));
    assert_eq!((text.backing(), text.page_size()), (v1::Backing::Ram, PageSize::PageSize4k));
    assert_eq!((text.nested_gpa, text.nested_page_size), (None, None));
    assert!(text.global && !text.dirty);
    let mmio = ask("mmio").await;
    assert_eq!((mmio.backing(), mmio.pat_type()), (v1::Backing::None, v1::MemoryType::UcMinus));
    assert_eq!(ask("rom").await.backing(), v1::Backing::ReadOnly);
    assert_eq!(ask("read-only-table").await.effective, rights(true, false, true, false));
    assert_eq!(ask("user-bit-lost").await.effective, rights(true, true, false, false));
    assert_eq!(ask("huge-2m").await.page_size(), PageSize::PageSize2m);
    bed.stop().await;
}

#[tokio::test]
async fn addresses_come_as_numbers_and_as_text() {
    let bed = Bed::plain().await;
    let gva = bed.landmark("kernel-data") + 0x123;
    for address in [
        number(gva),
        text(&format!("{gva:#x}")),
        text(&format!("{gva}")),
        text("0xffff_8000_0001_1123"),
        text(" 0XFFFF800000011123 "),
    ] {
        let answer = bed.translate(v1::TranslateRequest { address, ..read(0) }).await.unwrap();
        assert_eq!(page(&answer).gpa, 0x1_1123);
    }
    bed.stop().await;
}

#[tokio::test]
async fn set_changes_accessed_and_dirty_bits_and_observe_does_not() {
    use pagewalk::Memory as _;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    let bed = Bed::plain().await;
    let memory = &*bed.machine.source().memory();
    let ask = async |policy: v1::AdPolicy, kind| {
        let request = v1::TranslateRequest {
            ad_policy: policy.into(),
            access: access(kind, Privilege::Supervisor),
            trace: true,
            ..read(bed.landmark("kernel-data"))
        };
        bed.translate(request).await.unwrap()
    };
    let bits = |answer: &v1::TranslateResponse| -> Vec<u64> {
        let now = answer.steps.iter().map(|step| memory.load_u64(Gpa(step.entry_gpa)).unwrap());
        now.map(|entry| entry & (ACCESSED | DIRTY)).collect()
    };

    let observed = ask(v1::AdPolicy::Observe, AccessKind::Write).await;
    assert_eq!(bits(&observed), [0; 4]);
    let unspecified = ask(v1::AdPolicy::Unspecified, AccessKind::Write).await;
    assert_eq!((bits(&unspecified), &unspecified.outcome), (vec![0; 4], &observed.outcome));

    let set = ask(v1::AdPolicy::Set, AccessKind::Read).await;
    assert_eq!(set.outcome, observed.outcome, "A and D are those that the walk found");
    assert_eq!(bits(&set), [ACCESSED; 4]);
    let set = ask(v1::AdPolicy::Set, AccessKind::Write).await;
    assert_eq!(bits(&set), [ACCESSED, ACCESSED, ACCESSED, ACCESSED | DIRTY]);
    let after = ask(v1::AdPolicy::Observe, AccessKind::Read).await;
    assert!(page(&after).accessed && page(&after).dirty && !page(&after).ad_skipped);

    // A refused access leaves no traces.
    let request = v1::TranslateRequest {
        ad_policy: v1::AdPolicy::Set.into(),
        access: access(AccessKind::Write, Privilege::User),
        trace: true,
        ..read(bed.landmark("user-read-only"))
    };
    let refused = bed.translate(request).await.unwrap();
    assert_eq!(fault(&refused).error_code, Some(7));
    assert_eq!(bits(&refused), [0; 4]);
    bed.stop().await;
}

async fn over(bed: &Bed, gva: u64, state: v1::WalkerOverride) -> v1::TranslateResponse {
    bed.translate(v1::TranslateRequest { r#override: Some(state), trace: true, ..read(gva) }).await.unwrap()
}

#[tokio::test]
async fn another_address_space_is_one_field_away() {
    let bed = Bed::plain().await;
    let gva = bed.landmark("user-data");
    for (cr3, frame) in demo::ADDRESS_SPACES.into_iter().zip(demo::USER_DATA_FRAMES) {
        // PCID, PWT and PCD mean nothing to a walk.
        for cr3 in [cr3, cr3 | 0x18] {
            let state = v1::WalkerOverride { cr3: Some(cr3), ..Default::default() };
            assert_eq!(page(&over(&bed, gva, state).await).gpa, frame);
        }
    }
    // What a request brings is gone with it.
    assert_eq!(page(&bed.translate(read(gva)).await.unwrap()).gpa, demo::USER_DATA_FRAMES[0]);
    bed.stop().await;
}

#[tokio::test]
async fn a_second_dimension_is_one_field_away_and_so_is_none() {
    let bed = Bed::plain().await;
    let l2_data = bed.landmark("l2-data");
    let npt = SecondDimension::Npt(v1::Npt { ncr3: demo::NCR3, ..Default::default() });
    let l2 =
        v1::WalkerOverride { cr3: Some(demo::L2_CR3), second_dimension: Some(npt), ..Default::default() };
    let answer = over(&bed, l2_data, l2).await;
    assert_eq!((page(&answer).gpa, page(&answer).nested_gpa), (0x61_1000, Some(0x1_1000)));
    assert_eq!(answer.steps.len(), 4 * (4 + 1) + 4);

    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let own = v1::WalkerOverride {
        cr3: Some(demo::ADDRESS_SPACES[0]),
        second_dimension: Some(SecondDimension::None(true)),
        ..Default::default()
    };
    let answer = over(&bed, bed.landmark("kernel-text"), own).await;
    assert_eq!((page(&answer).gpa, page(&answer).nested_gpa, answer.steps.len()), (0x1_0000, None, 4));
    bed.stop().await;
}

#[tokio::test]
async fn the_cpu_is_the_callers_too() {
    use v1::WalkerOverride as Over;
    let bed = Bed::plain().await;
    // A root at 1 << 40 would be outside memory; a leaf there is no backing, and reserved with 40 bits.
    let memory = bed.machine.source().memory();
    let spare = 0x10_0000;
    memory.write_u64(Gpa(spare), (spare + 0x1000) | 3).unwrap();
    memory.write_u64(Gpa(spare + 0x1000), (spare + 0x2000) | 3).unwrap();
    memory.write_u64(Gpa(spare + 0x1000 + 8), 1 << 30 | 0x83).unwrap();
    memory.write_u64(Gpa(spare + 0x2000), (spare + 0x3000) | 3).unwrap();
    memory.write_u64(Gpa(spare + 0x3000), 1 << 40 | 3).unwrap();
    // The level above, for LA57.
    memory.write_u64(Gpa(spare + 0x4000 + 8), spare | 3).unwrap();

    let wide = Over { cr3: Some(spare), maxphyaddr: Some(41), ..Default::default() };
    let answer = over(&bed, 0x123, wide).await;
    assert_eq!((page(&answer).gpa, page(&answer).backing()), (1 << 40 | 0x123, v1::Backing::None));
    let narrow = Over { maxphyaddr: Some(40), ..wide_of(spare) };
    let answer = over(&bed, 0x123, narrow).await;
    assert_eq!((fault(&answer).error_code, fault(&answer).bits), (Some(9), 1 << 40));

    let with = Over { gib_pages: Some(true), ..wide_of(spare) };
    assert_eq!(page(&over(&bed, 1 << 30, with).await).page_size(), PageSize::PageSize1g);
    let without = Over { gib_pages: Some(false), ..wide_of(spare) };
    let answer = over(&bed, 1 << 30, without).await;
    assert_eq!((fault(&answer).error_code, fault(&answer).bits), (Some(9), 1 << 7));

    // AMD reserves bit 8 of a PML4E, and Intel does not.
    memory.write_u64(Gpa(spare), (spare + 0x1000) | 0x103).unwrap();
    for (vendor, mapped) in
        [(v1::Vendor::Intel, true), (v1::Vendor::Amd, false), (v1::Vendor::Unspecified, false)]
    {
        let state = Over { vendor: Some(vendor.into()), ..wide_of(spare) };
        let answer = over(&bed, 0, state).await;
        let found = matches!(answer.outcome, Some(v1::translate_response::Outcome::Translation(_)));
        assert_eq!(found, mapped, "{vendor:?}: {answer:?}");
    }
    memory.write_u64(Gpa(spare), (spare + 0x1000) | 3).unwrap();

    let la57 = Over { cr3: Some(spare + 0x4000), cr4: Some(CR4_PAE | CR4_LA57), ..wide_of(spare) };
    let answer = over(&bed, 1 << 48 | 0x123, la57.clone()).await;
    assert_eq!(page(&answer).gpa, 1 << 40 | 0x123);
    let levels: Vec<_> = answer.steps.iter().map(|step| step.level).collect();
    assert_eq!(levels, [5, 4, 3, 2, 1]);
    // 48 bits say that this address is not canonical.
    assert_eq!(
        fault(&over(&bed, 1 << 48 | 0x123, wide_of(spare)).await).kind(),
        FaultKind::GeneralProtection
    );
    assert_eq!(fault(&over(&bed, 1 << 57, la57).await).kind(), FaultKind::GeneralProtection);
    bed.stop().await;
}

fn wide_of(cr3: u64) -> v1::WalkerOverride {
    v1::WalkerOverride { cr3: Some(cr3), maxphyaddr: Some(41), ..Default::default() }
}

#[tokio::test]
async fn without_paging_an_address_is_itself() {
    let bed = Bed::plain().await;
    let unpaged = v1::WalkerOverride { cr0: Some(0x11), ..Default::default() };
    for (gva, backing) in [(0x1_2345, v1::Backing::Ram), (0xffff_f000, v1::Backing::None)] {
        let answer = over(&bed, gva, unpaged.clone()).await;
        let found = page(&answer);
        assert_eq!((found.gpa, found.page_size(), found.backing()), (gva, PageSize::Unpaged, backing));
        assert!(answer.steps.is_empty());
    }
    let wide = v1::TranslateRequest { r#override: Some(unpaged), ..read(1 << 32) };
    assert_eq!(
        crate::bed::refusal(bed.translate(wide).await),
        (tonic::Code::InvalidArgument, "INVALID_FIELD".to_owned())
    );
    bed.stop().await;
}

#[tokio::test]
async fn freshness_and_privilege_have_defaults() {
    let bed = Bed::plain().await;
    let gva = bed.landmark("kernel-text");
    for freshness in [v1::Freshness::Unspecified, v1::Freshness::Latest, v1::Freshness::Sync] {
        let request = v1::TranslateRequest { freshness: freshness.into(), ..read(gva) };
        let answer = bed.translate(request).await.unwrap();
        assert_eq!(page(&answer).gpa, 0x1_0000);
        if freshness == v1::Freshness::Sync {
            let age = answer.provenance.unwrap().snapshot_age.unwrap();
            assert_eq!(age.seconds, 0, "a snapshot taken after the call began");
        }
    }
    // The vCPU's CPL is 0; a stack access that is not canonical is #SS; exempt accesses meet no rights.
    let by = async |privilege, stack, gva| {
        let access = v1::Access {
            kind: AccessKind::Write.into(),
            privilege: i32::from(privilege),
            stack,
            ..Default::default()
        };
        bed.translate(v1::TranslateRequest { access: Some(access), ..read(gva) }).await.unwrap()
    };
    let data = bed.landmark("kernel-data");
    for privilege in [Privilege::Unspecified, Privilege::AsCpl, Privilege::ImplicitSupervisor] {
        assert_eq!(page(&by(privilege, false, data).await).gpa, 0x1_1000);
    }
    assert_eq!(page(&by(Privilege::Exempt, false, gva).await).gpa, 0x1_0000);
    let non_canonical = bed.landmark("non-canonical");
    assert_eq!(fault(&by(Privilege::AsCpl, true, non_canonical).await).kind(), FaultKind::StackFault);
    bed.stop().await;
}

/// The caller's own 32-bit and PAE walks, over tables written into the demo's spare memory.
#[tokio::test]
async fn overrides_select_legacy_paging() {
    use v1::WalkerOverride as Over;
    let bed = Bed::plain().await;
    let memory = bed.machine.source().memory();
    let spare = 0x70_0000;
    // 2-level: PDE 1 maps 4 MiB at 0. PAE: PDPTE 0, PDE 2 maps 2 MiB at 0.
    memory.write_u64(Gpa(spare), 0x83 << 32).unwrap();
    memory.write_u64(Gpa(spare + 0x1000), (spare + 0x2000) | 1).unwrap();
    memory.write_u64(Gpa(spare + 0x2010), 0x83).unwrap();

    let legacy = |cr3, cr4| Over { cr3: Some(cr3), cr4: Some(cr4), efer: Some(0), ..Over::default() };
    let two_level = over(&bed, 0x40_1234, legacy(spare, 0x10)).await;
    assert_eq!((page(&two_level).gpa, page(&two_level).page_size()), (0x1234, v1::PageSize::PageSize4m));
    let pae = over(&bed, 0x40_1234, legacy(spare + 0x1000, CR4_PAE)).await;
    assert_eq!((page(&pae).gpa, page(&pae).page_size()), (0x1234, v1::PageSize::PageSize2m));
    assert_eq!(pae.steps.iter().map(|step| step.level).collect::<Vec<_>>(), [3, 2]);
    let registers = Over { pdptrs: vec![0, 0, 0, (spare + 0x2000) | 1], ..legacy(0, CR4_PAE) };
    let cached = over(&bed, 0xc040_1234, registers).await;
    assert_eq!((page(&cached).gpa, cached.steps[0].entry_gpa), (0x1234, 0));
    bed.stop().await;
}
