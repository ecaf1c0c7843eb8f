//! EPT: addresses taken apart by hand, and exit qualifications put together by hand.

use super::*;
use crate::oracle::{EptControls, EptOffers};

const EVERYTHING: EptOffers =
    EptOffers { execute_only: true, pages_2_mib: true, pages_1_gib: true, advanced_information: false };
/// 4 levels, write-back, no accessed and dirty flags.
const EPTP: u64 = 0x8000 | 3 << 3 | 6;
const ACCESSED_DIRTY: u64 = 1 << 6;
const SHADOW_STACK: u64 = 1 << 7;
/// Readable, writable, executable, write-back, and a page.
const LARGE: u64 = 0xb7;
const LINEAR_VALID: u64 = 1 << 7;
const TRANSLATED: u64 = 1 << 8;

fn over(guest: System, eptp: u64, offers: EptOffers, mode_based_execute: bool) -> System {
    let controls = EptControls { mode_based_execute, tables_written: false };
    System { second: Some(Second::Ept { eptp, controls, offers, cpu: CPU }), ..guest }
}

/// A guest that does not page.
fn unpaged() -> System {
    let mut guest = system(0, 0, 0);
    guest.registers.cr0 = 1;
    guest
}

/// 0x4060_4abc is EPT PML4E 0, PDPTE 1, PDE 3, PTE 4, offset 0xabc.
pub(super) fn every_page_size() {
    let to = |pdpte, pde, pte| {
        let words = [(0x8000, 0x9007), (0x9008, pdpte), (0xa018, pde), (0xb020, pte)];
        let system = over(unpaged(), EPTP, EVERYTHING, false);
        let page = page(&ask(&system, &words, Kind::Read, By::Supervisor, 0x4060_4abc));
        (page.physical, page.nested)
    };
    assert_eq!(to(0xa007, 0xb007, 0x9_8765_4037), (0x9_8765_4abc, Some((0x4060_4abc, Size::FourKib))));
    assert_eq!(to(0xa007, 0x9_8760_00b7, 0), (0x9_8760_4abc, Some((0x4060_4abc, Size::TwoMib))));
    assert_eq!(to(0x9_8000_00b7, 0, 0), (0x9_8060_4abc, Some((0x4060_4abc, Size::OneGib))));
}

/// 1 << 48 has no place in 4 levels, and is PML5E 1 of 5.
pub(super) fn as_wide_as_its_levels() {
    let guest = |cr3| {
        let mut system = system(cr3, PAE, LME_LMA);
        system.cpu.maxphyaddr = 52;
        system
    };
    let four = over(guest(1 << 48), EPTP, EVERYTHING, false);
    let refused = refused(&ask(&four, &[(0x8000, 0x9007)], Kind::Read, By::User, 0));
    assert_eq!((refused.event, refused.cause), (Event::EptViolation(0x81), Cause::TooWide));
    assert_eq!((refused.nested, refused.level), (Some(1 << 48), 0));
    let five = over(guest(1 << 48), EPTP | 1 << 5, EVERYTHING, false);
    // Bits 5:3 are 7 here: no CPU has eight levels.
    assert_eq!(EPTP | 1 << 5, 0x803e);
    let _ = five;
    let five = over(guest(1 << 48), 0x8000 | 4 << 3 | 6, EVERYTHING, false);
    let words = [(0x8008, 0x9007), (0x9000, 0xa007), (0xa000, LARGE), (0, 0x87)];
    let unbacked = ask(&five, &words, Kind::Read, By::User, 0).outcome.unwrap_err();
    // The guest's PML4E at nGPA 1 << 48 is read at 0, and refers to a table at 0; PS in a PML4E is reserved.
    assert_eq!((unbacked.event, unbacked.bits), (Event::PageFault(0xd), 0x80));
}

pub(super) fn misconfigurations() {
    let refusal = |offers, mode_based_execute, pdpte, pde, pte| {
        let words = [(0x8000, 0x9007), (0x9000, pdpte), (0xa000, pde), (0xb000, pte)];
        let system = over(unpaged(), EPTP, offers, mode_based_execute);
        let refused = refused(&ask(&system, &words, Kind::Read, By::Supervisor, 0x123));
        assert_eq!(refused.nested, Some(0x123));
        assert_eq!(refused.event, Event::EptMisconfiguration, "{refused:x?}");
        (refused.cause, refused.level, refused.bits)
    };
    let all = EVERYTHING;
    // Writable without being readable.
    assert_eq!(refusal(all, false, 0xa002, 0, 0), (Cause::WriteWithoutRead, 3, 2));
    assert_eq!(refusal(all, false, 0xa007, 0xb007, 0x36), (Cause::WriteWithoutRead, 1, 2));
    // Executable without being readable, on a CPU that does not offer it; bit 10 counts with mode-based execute control.
    let none = EptOffers { execute_only: false, ..all };
    assert_eq!(refusal(none, false, 0xa007, 0xb004, 0), (Cause::ExecuteOnly, 2, 4));
    assert_eq!(refusal(none, true, 0xa007, 0xb400, 0), (Cause::ExecuteOnly, 2, 0x400));
    // Memory types 2, 3 and 7.
    for wrong in [2, 3, 7] {
        let leaf = 7 | wrong << 3;
        assert_eq!(refusal(all, false, 0xa007, 0xb007, leaf), (Cause::MemoryType, 1, 0x38 & leaf));
    }
    // Bits 6:3 of an entry that refers to a table; low address bits of a large page; what lies above MAXPHYADDR.
    for bit in 3..7 {
        assert_eq!(refusal(all, false, 0xa007 | 1 << bit, 0, 0), (Cause::ReservedBits, 3, 1 << bit));
    }
    assert_eq!(refusal(all, false, LARGE | 1 << 12, 0, 0), (Cause::ReservedBits, 3, 1 << 12));
    assert_eq!(refusal(all, false, 0xa007, LARGE | 1 << 20, 0), (Cause::ReservedBits, 2, 1 << 20));
    assert_eq!(refusal(all, false, 0xa007, 0xb007, 0x37 | 1 << 36), (Cause::ReservedBits, 1, 1 << 36));
    // Large pages that the CPU does not offer.
    let small = EptOffers { pages_1_gib: false, pages_2_mib: false, ..all };
    assert_eq!(refusal(small, false, LARGE, 0, 0).0, Cause::ReservedBits);
    assert_eq!(refusal(small, false, 0xa007, LARGE, 0).0, Cause::ReservedBits);
}

fn violation(system: &System, words: &[(u64, u64)], kind: Kind, by: By, linear: u64) -> u64 {
    match refused(&ask(system, words, kind, by, linear)).event {
        Event::EptViolation(qualification) => qualification,
        other => panic!("{other:x?}"),
    }
}

pub(super) fn violations_of_the_final_address() {
    let system = over(unpaged(), EPTP, EVERYTHING, false);
    let of =
        |pml4e, pdpte, kind| violation(&system, &[(0x8000, pml4e), (0x9000, pdpte)], kind, By::Supervisor, 0);
    let last = LINEAR_VALID | TRANSLATED;
    // Nothing there: bits 5:3 are clear, whatever the entries above grant.
    assert_eq!(of(0x9007, 0, Kind::Read), last | 1);
    assert_eq!(of(0x9007, 0, Kind::Write), last | 2);
    assert_eq!(of(0x9007, 0, Kind::Fetch), last | 4);
    // Read-only; not executable; execute-only. The rights of both entries count together.
    assert_eq!(of(0x9007, 0xb1, Kind::Write), last | 2 | 1 << 3);
    assert_eq!(of(0x9007, 0xb3, Kind::Fetch), last | 4 | 0b011 << 3);
    assert_eq!(of(0x9007, 0xb4, Kind::Read), last | 1 | 0b100 << 3);
    assert_eq!(of(0x9005, 0xb7, Kind::Write), last | 2 | 0b101 << 3);
}

/// The guest's PML4 lies in a page that EPT refuses.
pub(super) fn violations_of_a_table() {
    let of = |eptp, leaf, kind| {
        let system = over(system(0x1000, PAE, LME_LMA), eptp, EVERYTHING, false);
        violation(&system, &[(0x8000, 0x9007), (0x9000, leaf)], kind, By::User, 0)
    };
    for kind in [Kind::Read, Kind::Write, Kind::Fetch] {
        // A read; with accessed and dirty flags for EPT, a write as well.
        assert_eq!(of(EPTP, 0xb4, kind), LINEAR_VALID | 1 | 0b100 << 3);
        assert_eq!(of(EPTP | ACCESSED_DIRTY, 0xb4, kind), LINEAR_VALID | 3 | 0b100 << 3);
        assert_eq!(of(EPTP | ACCESSED_DIRTY, 0xb5, kind), LINEAR_VALID | 3 | 0b101 << 3);
    }
}

/// Bits 9 to 11 tell what the guest's paging makes of the address: user, writable, no-execute.
pub(super) fn advanced_information() {
    let offers = EptOffers { advanced_information: true, ..EVERYTHING };
    let of = |guest_leaf, linear| {
        let system = over(system(0x1000, PAE, LME_LMA | NXE), EPTP, offers, false);
        let words = [(0x8000, 0x9007), (0x9000, LARGE), (0x1000, 0x2007), (0x2000, guest_leaf)];
        violation(&system, &words, Kind::Read, By::Supervisor, linear)
    };
    let last = LINEAR_VALID | TRANSLATED | 1;
    let leaf = 0x4000_0081;
    assert_eq!(of(leaf, 0x5), last);
    assert_eq!(of(leaf | 1 << 2, 0x5), last | 1 << 9);
    assert_eq!(of(leaf | 1 << 1, 0x5), last | 1 << 10);
    assert_eq!(of(leaf | 1 << 63, 0x5), last | 1 << 11);
    // "If CR0.PG = 0", user, writable, executable.
    let system = over(unpaged(), EPTP, offers, false);
    assert_eq!(violation(&system, &[], Kind::Read, By::Supervisor, 0), last | 1 << 9 | 1 << 10);
}

/// Bit 2 for supervisor-mode linear addresses, bit 10 for user-mode ones: by the guest's U/S and not by the CPL.
pub(super) fn mode_based_execute() {
    let fetch = |guest_leaf, ept_leaf, by| {
        let system = over(system(0x1000, PAE, LME_LMA), EPTP, EVERYTHING, true);
        let guest = [(0x1000, 0x2007), (0x2000, guest_leaf)];
        let ept = [(0x8000, 0x9407), (0x9000, LARGE), (0x9008, ept_leaf)];
        ask(&system, &[&guest[..], &ept].concat(), Kind::Fetch, by, 0).outcome.err().map(|it| it.event)
    };
    let (user_page, kernel_page) = (0x4000_0085, 0x4000_0081);
    let last = LINEAR_VALID | TRANSLATED | 4;
    let for_supervisor = 0xb5;
    let for_user = 0x4b1;
    assert_eq!(fetch(kernel_page, for_supervisor, By::Supervisor), None);
    assert_eq!(fetch(user_page, for_user, By::User), None);
    assert_eq!(fetch(user_page, for_user, By::Supervisor), None);
    assert_eq!(
        fetch(kernel_page, for_user, By::Supervisor),
        Some(Event::EptViolation(last | 1 << 3 | 1 << 6))
    );
    assert_eq!(fetch(user_page, for_supervisor, By::User), Some(Event::EptViolation(last | 0b101 << 3)));
    // An entry with bit 10 alone is present.
    assert_eq!(fetch(user_page, 0x4b0, By::User), None);
}

/// Bit 60 of the leaf, and W everywhere but there.
pub(super) fn supervisor_shadow_stack() {
    const CET: u64 = 1 << 23;
    let write = |eptp, pml4e, leaf, by| {
        let guest_leaf = if by == By::User { 0x4000_00c5 } else { 0x4000_00c1 };
        let system = over(system(0x1000, PAE | CET, LME_LMA), eptp, EVERYTHING, false);
        let guest = [(0x1000, 0x2007), (0x2000, guest_leaf)];
        let ept = [(0x8000, pml4e), (0x9000, LARGE), (0x9008, leaf)];
        let words = [&guest[..], &ept].concat();
        ask(&system, &words, Kind::ShadowStackWrite, by, 0).outcome.err().map(|it| it.event)
    };
    let last = LINEAR_VALID | TRANSLATED | 1 << 13 | 2;
    let read_only = 0xb1;
    let marked = 1 << 60 | read_only;
    let kernel = By::Supervisor;
    assert_eq!(write(EPTP, 0x9007, LARGE, kernel), None);
    assert_eq!(write(EPTP, 0x9007, marked, kernel), Some(Event::EptViolation(last | 1 << 3)));
    let control = EPTP | SHADOW_STACK;
    assert_eq!(write(control, 0x9007, marked, kernel), None);
    assert_eq!(write(control, 0x9007, LARGE, kernel), Some(Event::EptViolation(last | 0b111 << 3)));
    // Bit 14 tells what bit 60 is. User shadow stacks are as before.
    let told = Event::EptViolation(last | 1 << 14 | 1 << 3);
    assert_eq!(write(control, 0x9007, marked, By::User), Some(told));
    assert_eq!(write(control, 0x9007, LARGE, By::User), None);
}

/// The page-directory-pointer table lies in a page that EPT makes read-only.
pub(super) fn loads_pdptes_as_reads() {
    let system = |eptp| over(system(0x10e0, PAE, 0), eptp, EVERYTHING, false);
    let words = [(0x8000, 0x9107), (0x9000, 0x3b1), (0x10e0, 0x2001)];
    let eptp = EPTP | ACCESSED_DIRTY;
    // The PDPTE is read; the PDE in the same page is not, as that would be a write.
    let refused = refused(&ask(&system(eptp), &words, Kind::Read, By::User, 0));
    assert_eq!(refused.nested, Some(0x2000));
    assert_eq!(refused.event, Event::EptViolation(LINEAR_VALID | 3 | 1 << 3));
    // Where it cannot be read, no linear address is told of.
    let words = [(0x8000, 0x9007), (0x9000, 0xb4)];
    assert_eq!(violation(&system(eptp), &words, Kind::Write, By::User, 0), 1 | 0b100 << 3);
}

/// Bits 8 and 9, with EPTP bit 6 alone; a guest's table dirties its EPT leaf.
pub(super) fn accessed_and_dirty() {
    let written = |eptp, kind| {
        let system = over(system(0x1000, PAE, LME_LMA), eptp, EVERYTHING, false);
        let words =
            [(0x8000, 0x9007), (0x9000, LARGE), (0x9008, LARGE), (0x1000, 0x2007), (0x2000, 0x4000_0087)];
        ask(&system, &words, kind, By::User, 0x123).written
    };
    let word = |address, entry| Written { address, entry, bytes: 8 };
    let guest = [word(0x1000, 0x2027), word(0x2000, 0x4000_00a7)];
    assert_eq!(written(EPTP, Kind::Read), guest);
    let with_flags = written(EPTP | ACCESSED_DIRTY, Kind::Read);
    let ept = [word(0x8000, 0x9107), word(0x9000, LARGE | 0x300), word(0x9008, LARGE | 0x100)];
    assert!(ept.iter().chain(&guest).all(|it| with_flags.contains(it)), "{with_flags:x?}");
    assert_eq!(with_flags.len(), 5);
    let by_write = written(EPTP | ACCESSED_DIRTY, Kind::Write);
    assert!(by_write.contains(&word(0x9008, LARGE | 0x300)) && by_write.contains(&word(0x2000, 0x4000_00e7)));
}

/// Without EPTP bit 6 a table may lie in a page that EPT makes read-only, as long as nothing is to be set in it.
pub(super) fn guest_flags_need_a_writable_page() {
    let words =
        |pml4e, pdpte| [(0x8000, 0x9007), (0x9000, 0xb5), (0x9008, LARGE), (0x1000, pml4e), (0x2000, pdpte)];
    let refused = |pml4e, pdpte, kind| {
        let system = over(system(0x1000, PAE, LME_LMA), EPTP, EVERYTHING, false);
        let outcome = ask(&system, &words(pml4e, pdpte), kind, By::User, 0).outcome;
        outcome.err().map(|refused| (refused.event, refused.nested))
    };
    let update = Event::EptViolation(LINEAR_VALID | 3 | 0b101 << 3);
    assert_eq!(refused(0x2027, 0x4000_00a7, Kind::Read), None);
    assert_eq!(refused(0x2007, 0x4000_00a7, Kind::Read), Some((update, Some(0x1000))));
    assert_eq!(refused(0x2027, 0x4000_0087, Kind::Read), Some((update, Some(0x2000))));
    assert_eq!(refused(0x2027, 0x4000_00a7, Kind::Write), Some((update, Some(0x2000))));
    assert_eq!(refused(0x2027, 0x4000_00e7, Kind::Write), None);
    // The guest's paging refuses before the leaf is used.
    assert_eq!(refused(0x2027, 0x4000_0085, Kind::Write), Some((Event::PageFault(7), None)));
}
