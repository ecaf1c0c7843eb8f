//! EPT as the second dimension, by worked examples from the manual, and GMET for NPT.
//!
//! Intel SDM volume 3, "The Extended Page Table Mechanism (EPT)" and "Exit Qualification for EPT Violations"; AMD APM volume
//! 2, "Guest Mode Execute Trap".

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{
    CR0_CD, CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_PAE, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE,
};
use pagewalk::*;

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
/// Length 4, write-back, at 0x8000.
const EPTP: u64 = 0x8000 | 3 << 3 | 6;
const ACCESSED_DIRTY: u64 = 1 << 6;
const MBEC: EptControls = EptControls { mode_based_execute: true, tables_written: false };
const PLAIN: EptControls = EptControls { mode_based_execute: false, tables_written: false };

#[test]
fn capabilities_are_bits_of_their_msr() {
    for bit in 0..64 {
        let capabilities = EptCapabilities::from_msr(1 << bit);
        let known = [0, 6, 7, 8, 14, 16, 17, 21, 22, 23].contains(&bit);
        assert_eq!(capabilities.msr(), u64::from(known) << bit);
    }
    assert_eq!(EptCapabilities::from_msr(EptCapabilities::all().msr()), EptCapabilities::all());
}

const R: u64 = 1;
const W: u64 = 2;
const X: u64 = 4;
const XU: u64 = 1 << 10;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const WB: u64 = 6 << 3;
const IPAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const RWX: u64 = R | W | X;

/// 256 KiB of memory. The guest's tables are at nGPA 0x1000 (PML4) to 0x4000 (PT), EPT's at 0x8000 to 0xb000; EPT's PT maps nGPA
/// n to n + 0x10000, for the first 32 pages.
struct Memory {
    words: Vec<AtomicU64>,
}

/// Where the guest's page lies, nGPA.
const PAGE: u64 = 0x5000;
/// Where EPT's entries lie.
const EPT: [u64; 4] = [0xb000, 0xa000, 0x9000, 0x8000];

impl Memory {
    /// Guest tables of user pages with accessed and dirty bits set; EPT tables that allow everything.
    fn new() -> Self {
        let memory = Self { words: (0..0x40000 / 8).map(|_| AtomicU64::new(0)).collect() };
        for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, PAGE)] {
            memory.set(table + 0x10000, next | 0x67);
        }
        for (table, next) in [(0x8000, 0x9000), (0x9000, 0xa000), (0xa000, 0xb000)] {
            memory.set(table, next | RWX | XU);
        }
        for page in 0..32 {
            memory.ept(page << 12, ((page << 12) + 0x10000) | RWX | XU | WB);
        }
        memory
    }

    fn set(&self, gpa: u64, value: u64) {
        self.words[gpa as usize / 8].store(value, Ordering::Relaxed);
    }

    fn get(&self, gpa: u64) -> u64 {
        self.words[gpa as usize / 8].load(Ordering::Relaxed)
    }

    /// Sets the EPT PTE of the page at `ngpa`.
    fn ept(&self, ngpa: u64, entry: u64) {
        self.set(0xb000 + (ngpa >> 12) * 8, entry);
    }

    fn ept_pte(&self, ngpa: u64) -> u64 {
        self.get(0xb000 + (ngpa >> 12) * 8)
    }

    /// Takes bits away from the EPT PTE of the page at `ngpa`.
    fn forbid(&self, ngpa: u64, bits: u64) {
        self.ept(ngpa, self.ept_pte(ngpa) & !bits);
    }

    fn window(&self) -> Window<'_> {
        Window::new(&self.words)
    }
}

fn ept(eptp: u64, controls: EptControls) -> NgpaWalk {
    NgpaWalk::ept(eptp, &controls, &EptCapabilities::all(), &CPU).unwrap()
}

fn long_mode() -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: 0x1000,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    }
}

fn walker(eptp: u64, controls: EptControls) -> Walker {
    Walker::nested(PageWalk::new(&long_mode(), &CPU).unwrap(), ept(eptp, controls))
}

fn access(kind: AccessKind) -> Access {
    Access::new(kind, Privilege::User)
}

fn translate(memory: &Memory, walker: &Walker, access: &Access) -> Result<Translation, Fault> {
    let observed = walker.translate(&memory.window(), Gva(0x123), access);
    let mut trace = Trace::new();
    let traced = walker.translate_with(&memory.window(), Gva(0x123), access, AdPolicy::Observe, &mut trace);
    assert_eq!(observed, traced);
    observed
}

fn qualification(outcome: Result<Translation, Fault>) -> u64 {
    match outcome.unwrap_err() {
        Fault {
            kind: FaultKind::EptViolation { exit_qualification }, dimension: Dimension::Nested, ..
        } => exit_qualification,
        other => panic!("{other:?}"),
    }
}

#[test]
fn eptp_is_checked() {
    let all = EptCapabilities::all();
    let new = |eptp, capabilities| NgpaWalk::ept(eptp, &PLAIN, &capabilities, &CPU);
    let levels = |walk: NgpaWalk| walk.page_walk().format().levels();
    assert_eq!(new(0x8000 | 3 << 3 | 6, all).map(levels), Ok(4));
    assert_eq!(new(0x8000 | 4 << 3, all).map(levels), Ok(5));
    assert_eq!(new(0x8000 | 4 << 3 | 0xc6, all).map(levels), Ok(5));
    let reserved = |bits| Err(StateError::ReservedBits { register: "EPTP", bits });
    for bit in (8..12).chain(40..64) {
        assert_eq!(new(EPTP | 1 << bit, all).map(levels), reserved(1 << bit));
    }
    let without = EptCapabilities { accessed_dirty: false, supervisor_shadow_stack: false, ..all };
    assert_eq!(new(EPTP | 0xc0, without).map(levels), reserved(0xc0));
    let refused = |eptp, capabilities| {
        matches!(new(eptp, capabilities), Err(StateError::Contradiction { register: "EPTP", .. }))
    };
    for length in [0, 1, 2, 5, 6, 7] {
        assert!(refused(0x8000 | length << 3 | 6, all), "{length}");
    }
    for memory_type in [1, 2, 3, 4, 5, 7] {
        assert!(refused(0x8000 | 3 << 3 | memory_type, all), "{memory_type}");
    }
    assert!(refused(EPTP, EptCapabilities { four_level: false, ..all }));
    assert!(refused(0x8000 | 4 << 3 | 6, EptCapabilities { five_level: false, ..all }));
    assert!(refused(EPTP, EptCapabilities { write_back: false, ..all }));
    assert!(refused(0x8000 | 3 << 3, EptCapabilities { uncacheable: false, ..all }));
    let cpu = CpuProfile { maxphyaddr: 53, ..CPU };
    assert_eq!(NgpaWalk::ept(EPTP, &PLAIN, &all, &cpu), Err(StateError::MaxPhyAddr(53)));
}

#[test]
fn capabilities_are_the_bits_of_the_msr() {
    let none = EptCapabilities::from_msr(0);
    assert_eq!(EptCapabilities::from_msr(!0x00e3_41c1), none);
    assert_eq!(
        EptCapabilities::from_msr(1 << 6 | 1 << 14),
        EptCapabilities { four_level: true, write_back: true, ..none }
    );
    assert_eq!(EptCapabilities::from_msr(1 << 22), EptCapabilities { advanced_information: true, ..none });
}

#[test]
fn the_mask_of_memory_types_and_rights() {
    let mask = |execute_only, controls| {
        let capabilities = EptCapabilities { execute_only, ..EptCapabilities::all() };
        let walk = NgpaWalk::ept(EPTP, &controls, &capabilities, &CPU).unwrap();
        walk.page_walk().format().bad_memory_type_xwr()
    };
    for bits in 0..64_u64 {
        let (memory_type, xwr) = (bits >> 3, bits & 7);
        let always = [2, 3, 7].contains(&memory_type) || xwr & 3 == 2;
        let bad = |mask: u64| mask >> bits & 1 != 0;
        assert_eq!(bad(mask(true, PLAIN)), always, "{bits:#x}");
        assert_eq!(bad(mask(true, MBEC)), always, "{bits:#x}");
        assert_eq!(bad(mask(false, PLAIN)), always || xwr == 4, "{bits:#x}");
        assert_eq!(bad(mask(false, MBEC)), always || xwr == 4 || xwr == 0, "{bits:#x}");
    }
}

#[test]
fn a_page_is_found_through_both_dimensions() {
    let page = translate(&Memory::new(), &walker(EPTP, PLAIN), &access(AccessKind::Write)).unwrap();
    let nested = page.nested.expect("a nested page");
    assert_eq!((page.gpa, nested.ngpa), (Gpa(0x15123), NestedGpa(0x5123)));
    assert_eq!((page.page_size(), nested.page_size), (PageSize::Size4K, PageSize::Size4K));
    assert_eq!(page.rights(), Rights::ALL);
    let write_back = EptMemoryType { memory_type: MemoryType::WriteBack, ignore_pat: false };
    assert_eq!(nested.ept_memory_type, Some(write_back));
}

#[test]
fn large_pages_need_the_capability() {
    let memory = Memory::new();
    let read = access(AccessKind::Read);
    let walk = |capabilities: EptCapabilities, ngpa| {
        let walk = NgpaWalk::ept(EPTP, &PLAIN, &capabilities, &CPU).unwrap();
        walk.translate(&memory.window(), NestedGpa(ngpa), &read, NestedPhase::Final, &mut NoTrace)
    };
    let all = EptCapabilities::all();
    memory.set(0xa008, 0x20_0000 | RWX | LARGE | WB);
    let page = walk(all, 0x20_1234).unwrap();
    assert_eq!(
        (page.gpa, page.nested.map(|nested| nested.page_size)),
        (Gpa(0x20_1234), Some(PageSize::Size2M))
    );
    let fault = walk(EptCapabilities { pages_2m: false, ..all }, 0x20_1234).unwrap_err();
    assert_eq!((fault.kind, fault.level, fault.bits), (FaultKind::EptMisconfiguration, 2, 0xb0));
    memory.set(0x9008, 0x4000_0000 | RWX | LARGE | WB);
    let page = walk(all, 0x4765_4321).unwrap();
    assert_eq!(
        (page.gpa, page.nested.map(|nested| nested.page_size)),
        (Gpa(0x4765_4321), Some(PageSize::Size1G))
    );
    let fault = walk(EptCapabilities { pages_1g: false, ..all }, 0x4765_4321).unwrap_err();
    assert_eq!((fault.kind, fault.level, fault.bits), (FaultKind::EptMisconfiguration, 3, 0xb0));
}

#[test]
fn misconfigurations() {
    let memory = Memory::new();
    let read = access(AccessKind::Read);
    let outcome = |controls, execute_only, ngpa| {
        let capabilities = EptCapabilities { execute_only, ..EptCapabilities::all() };
        let walk = NgpaWalk::ept(EPTP, &controls, &capabilities, &CPU).unwrap();
        walk.translate(&memory.window(), NestedGpa(ngpa), &read, NestedPhase::Final, &mut NoTrace)
    };
    let expect = |level: usize, entry: u64, controls, execute_only, expected: Option<(Reason, u64)>| {
        let at = EPT[level - 1] + if level == 1 { PAGE >> 9 } else { 0 };
        let before = memory.get(at);
        memory.set(at, entry);
        let found = outcome(controls, execute_only, PAGE);
        memory.set(at, before);
        match (found, expected) {
            (Err(fault), Some((reason, bits))) => {
                assert_eq!(fault.kind, FaultKind::EptMisconfiguration, "{entry:#x}");
                assert_eq!(
                    (fault.reason, fault.bits, fault.level),
                    (reason, bits, level as u32),
                    "{entry:#x}"
                );
                assert_eq!((fault.entry, fault.entry_gpa), (entry, Gpa(at)));
                assert_eq!((fault.nested_gpa, fault.address), (Some(NestedGpa(PAGE)), 0));
            }
            (found, None) => assert!(
                !matches!(found, Err(Fault { kind: FaultKind::EptMisconfiguration, .. })),
                "{entry:#x}: {found:?}"
            ),
            (found, expected) => panic!("{entry:#x}: {found:?} {expected:?}"),
        }
    };
    // Writing and executing need reading, at every level; execute-only is a capability.
    for level in 1..=4 {
        let next = memory.get(EPT[level - 1]) & !0xfff;
        for entry in [next | W, next | W | X] {
            expect(level, entry, PLAIN, true, Some((Reason::WriteWithoutRead, W)));
        }
        expect(level, next | X, PLAIN, true, None);
        expect(level, next | X, PLAIN, false, Some((Reason::ExecuteOnly, X)));
        expect(level, next | XU, PLAIN, false, None);
        expect(level, next | XU, MBEC, true, None);
        expect(level, next | XU, MBEC, false, Some((Reason::ExecuteOnly, XU)));
        expect(level, next | X | XU, MBEC, false, Some((Reason::ExecuteOnly, X | XU)));
        expect(level, next | R | XU, MBEC, false, None);
        // Addresses beyond MAXPHYADDR; bits 63:52 are ignored, and so is everything without bits 2:0.
        expect(level, next | RWX | 1 << 45, PLAIN, true, Some((Reason::ReservedBits, 1 << 45)));
        expect(level, next | RWX | 0xfff << 52, PLAIN, true, None);
        expect(level, 1 << 45 | 0xf8, PLAIN, false, None);
    }
    for level in 2..=4 {
        for bit in 3..7 {
            let entry = memory.get(EPT[level - 1]) | 1 << bit;
            expect(level, entry, PLAIN, true, Some((Reason::ReservedBits, 1 << bit)));
        }
    }
    expect(4, 0x9000 | RWX | LARGE, PLAIN, true, Some((Reason::ReservedBits, LARGE)));
    expect(2, 0x1000 | RWX | LARGE, PLAIN, true, Some((Reason::ReservedBits, 0x1000)));
    expect(2, 0x10_0000 | RWX | LARGE, PLAIN, true, Some((Reason::ReservedBits, 0x10_0000)));
    expect(3, 0x2000_0000 | RWX | LARGE, PLAIN, true, Some((Reason::ReservedBits, 0x2000_0000)));
    for memory_type in 0..8_u64 {
        let reserved = [2, 3, 7].contains(&memory_type);
        let expected = reserved.then_some((Reason::MemoryType, memory_type << 3));
        // Bit 7 of a PTE is ignored.
        expect(1, 0x15000 | RWX | LARGE | memory_type << 3, PLAIN, true, expected);
        expect(2, 0x20_0000 | RWX | LARGE | memory_type << 3, PLAIN, true, expected);
        expect(3, 0x4000_0000 | RWX | LARGE | memory_type << 3, PLAIN, true, expected);
    }
}

#[test]
fn qualifications_of_the_final_access() {
    let walker = walker(EPTP, PLAIN);
    // Bits 8:7: a linear address and its translation. Bits 11:9: a user page, writable, executable.
    let told = 0x780;
    for (kind, bit) in [(AccessKind::Read, 1), (AccessKind::Write, 2), (AccessKind::Fetch, 4)] {
        let memory = Memory::new();
        memory.forbid(PAGE, RWX);
        let fault = translate(&memory, &walker, &access(kind)).unwrap_err();
        assert_eq!((fault.address, fault.nested_gpa), (0x123, Some(NestedGpa(0x5123))));
        assert_eq!((fault.reason, fault.level, fault.bits), (Reason::NotPresent, 1, 7));
        assert_eq!(qualification(Err(fault)), bit | told);
    }
    // What the page's entry leaves, and what bits 5:3 tell of it.
    for (kind, bit, left, rights, missing) in [
        (AccessKind::Read, 1, X, 0x20, R),
        (AccessKind::Write, 2, R, 0x08, W),
        (AccessKind::Write, 2, R | X, 0x28, W),
        (AccessKind::Fetch, 4, R, 0x08, X),
        (AccessKind::Fetch, 4, R | W, 0x18, X),
    ] {
        let memory = Memory::new();
        memory.forbid(PAGE, RWX & !left);
        let fault = translate(&memory, &walker, &access(kind)).unwrap_err();
        assert_eq!((fault.level, fault.bits), (1, missing));
        assert_eq!(qualification(Err(fault)), bit | rights | told);
    }
    // The rights of all levels count together, and the entry nearest to the leaf is to blame.
    let memory = Memory::new();
    memory.set(EPT[2], 0xa000 | R);
    memory.set(EPT[3], 0x9000 | R | W);
    let fetch = access(AccessKind::Fetch);
    let walk = walker.ngpa_walk().unwrap();
    let fault = walk
        .translate(&memory.window(), NestedGpa(PAGE), &fetch, NestedPhase::Final, &mut NoTrace)
        .unwrap_err();
    assert_eq!((fault.level, fault.entry_gpa, fault.bits), (3, Gpa(EPT[2]), X));
    assert_eq!(qualification(Err(fault)), 0x4 | 0x08 | told);
}

#[test]
fn addresses_above_the_width_are_violations() {
    let memory = Memory::new();
    let walk = |eptp, ngpa| {
        ept(eptp, PLAIN).translate(
            &memory.window(),
            NestedGpa(ngpa),
            &access(AccessKind::Read),
            NestedPhase::Final,
            &mut NoTrace,
        )
    };
    let fault = walk(EPTP, 1 << 48 | PAGE).unwrap_err();
    assert_eq!(
        (fault.reason, fault.level, fault.nested_gpa),
        (Reason::TooWide, 0, Some(NestedGpa(1 << 48 | PAGE)))
    );
    assert_eq!(qualification(Err(fault)), 0x781);
    // Five levels: 0x7000 holds the PML5 table, whose entry 1 is for bit 48.
    memory.set(0x7008, 0x8000 | RWX);
    let five = 0x7000 | 4 << 3 | 6;
    assert_eq!(walk(five, 1 << 48 | PAGE).unwrap().gpa, Gpa(0x15000));
    assert_eq!(walk(five, 1 << 57 | PAGE).unwrap_err().reason, Reason::TooWide);
    assert_eq!(walk(five, PAGE).unwrap_err().level, 5);
}

/// The guest's accessed and dirty bits are set: its tables are only read, unless EPT has such bits itself.
#[test]
fn tables_are_read_or_written() {
    let memory = Memory::new();
    memory.forbid(0x3000, W);
    let read = access(AccessKind::Read);
    assert_eq!(translate(&memory, &walker(EPTP, PLAIN), &read).unwrap().gpa, Gpa(0x15123));
    let fault = translate(&memory, &walker(EPTP | ACCESSED_DIRTY, PLAIN), &read).unwrap_err();
    assert_eq!((fault.nested_gpa, fault.level, fault.bits), (Some(NestedGpa(0x3000)), 1, W));
    assert_eq!((fault.reason, fault.entry_gpa), (Reason::ReadOnly, Gpa(0xb018)));
    assert_eq!(qualification(Err(fault)), 0x0ab);
    let as_kvm = EptControls { tables_written: true, ..PLAIN };
    assert_eq!(qualification(translate(&memory, &walker(EPTP, as_kvm), &read)), 0x0ab);

    memory.forbid(0x3000, R);
    assert_eq!(qualification(translate(&memory, &walker(EPTP, PLAIN), &read)), 0x0a1);
    memory.forbid(0x3000, X);
    assert_eq!(qualification(translate(&memory, &walker(EPTP, PLAIN), &read)), 0x081);
}

#[test]
fn setting_the_guests_bits_is_a_write() {
    let walker = walker(EPTP, PLAIN);
    let (read, write) = (access(AccessKind::Read), access(AccessKind::Write));
    for table in [0x1000, 0x2000, 0x3000, 0x4000] {
        let memory = Memory::new();
        memory.forbid(table, W);
        memory.set(table + 0x10000, memory.get(table + 0x10000) & !0x20);
        let fault = translate(&memory, &walker, &read).unwrap_err();
        assert_eq!((fault.nested_gpa, fault.reason), (Some(NestedGpa(table)), Reason::ReadOnly));
        assert_eq!(qualification(Err(fault)), 0x0ab, "{table:#x}");
        // Set gives the same outcome, and sets nothing.
        let mut trace = Trace::new();
        let set = walker.translate_with(&memory.window(), Gva(0x123), &read, AdPolicy::Set, &mut trace);
        assert_eq!(set, Err(fault));
        assert_eq!(memory.get(table + 0x10000) & 0x20, 0);
        // An access that checks no rights is not hindered.
        let exempt = Access::new(AccessKind::Read, Privilege::Exempt);
        assert_eq!(translate(&memory, &walker, &exempt).unwrap().gpa, Gpa(0x15123));
    }
    // A dirty bit counts for writes, in the leaf.
    let memory = Memory::new();
    for table in [0x1000, 0x2000, 0x3000, 0x4000] {
        memory.forbid(table, W);
        memory.set(table + 0x10000, memory.get(table + 0x10000) & !0x40);
    }
    assert!(translate(&memory, &walker, &read).is_ok());
    let fault = translate(&memory, &walker, &write).unwrap_err();
    assert_eq!(fault.nested_gpa, Some(NestedGpa(0x4000)));
}

/// Policy `Set` for an nGPA: EPT's own bits, where it has any, by what the address is for; the guest's entries stay.
#[test]
fn set_on_an_ngpa_marks_the_second_dimension_alone() {
    for (eptp, kind, phase, upper, leaf) in [
        (EPTP | ACCESSED_DIRTY, AccessKind::Read, NestedPhase::Final, A, A),
        (EPTP | ACCESSED_DIRTY, AccessKind::Write, NestedPhase::Final, A, A | D),
        (EPTP | ACCESSED_DIRTY, AccessKind::Read, NestedPhase::Table, A, A | D),
        (EPTP | ACCESSED_DIRTY, AccessKind::Write, NestedPhase::Pdpte, A, A),
        (EPTP, AccessKind::Write, NestedPhase::Final, 0, 0),
    ] {
        let memory = Memory::new();
        memory.set(0x14000, PAGE | 7);
        let walk = NgpaWalk::ept(eptp, &PLAIN, &EptCapabilities::all(), &CPU).unwrap();
        let before: Vec<u64> =
            EPT.iter().map(|table| memory.get(table + if *table == 0xb000 { 0x20 } else { 0 })).collect();
        let ask = |policy, trace: &mut Trace| {
            walk.translate_with(&memory.window(), NestedGpa(0x4000), &access(kind), phase, policy, trace)
        };
        let (mut observed, mut set) = (Trace::new(), Trace::new());
        let outcome = ask(AdPolicy::Observe, &mut observed);
        assert_eq!(ask(AdPolicy::Set, &mut set), outcome);
        assert_eq!((set.steps(), outcome.unwrap().gpa), (observed.steps(), Gpa(0x14000)));
        for (table, before) in EPT.iter().zip(before) {
            let (at, bits) = if *table == 0xb000 { (table + 0x20, leaf) } else { (*table, upper) };
            assert_eq!(memory.get(at), before | bits, "{kind:?} {phase:?} {at:#x}");
        }
        assert_eq!(memory.get(0x14000), PAGE | 7);
        // The same as traced by nobody.
        let again = walk.translate_with(
            &memory.window(),
            NestedGpa(0x4000),
            &access(kind),
            phase,
            AdPolicy::Set,
            &mut NoTrace,
        );
        assert_eq!(again, outcome);
    }
    // A fault marks nothing.
    let memory = Memory::new();
    memory.forbid(0x4000, W);
    let walk = NgpaWalk::ept(EPTP | ACCESSED_DIRTY, &PLAIN, &EptCapabilities::all(), &CPU).unwrap();
    let write = access(AccessKind::Write);
    let fault = walk
        .translate_with(
            &memory.window(),
            NestedGpa(0x4000),
            &write,
            NestedPhase::Final,
            AdPolicy::Set,
            &mut NoTrace,
        )
        .unwrap_err();
    assert_eq!(fault.reason, Reason::ReadOnly);
    assert!([0x8000, 0x9000, 0xa000, 0xb020].iter().all(|at| memory.get(*at) & (A | D) == 0));
}

/// The guest's own refusal comes first: an entry that is not used is not marked.
#[test]
fn a_refused_leaf_is_not_written() {
    let memory = Memory::new();
    memory.forbid(0x4000, W);
    memory.set(0x14000, PAGE | 1);
    let fault = translate(&memory, &walker(EPTP, PLAIN), &access(AccessKind::Read)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::PageFault { error_code: 5 });
    memory.set(0x14000, PAGE | 6);
    let fault = translate(&memory, &walker(EPTP, PLAIN), &access(AccessKind::Read)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::PageFault { error_code: 4 });
}

#[test]
fn ept_has_accessed_and_dirty_bits_only_if_enabled() {
    for (eptp, table, page, upper) in [(EPTP, 0, 0, 0), (EPTP | ACCESSED_DIRTY, A | D, A, A)] {
        let memory = Memory::new();
        let mut trace = Trace::new();
        let read = access(AccessKind::Read);
        let walker = walker(eptp, PLAIN);
        walker.translate_with(&memory.window(), Gva(0), &read, AdPolicy::Set, &mut trace).unwrap();
        for ngpa in [0x1000, 0x2000, 0x3000, 0x4000] {
            assert_eq!(memory.ept_pte(ngpa) & (A | D), table, "{ngpa:#x}");
        }
        assert_eq!(memory.ept_pte(PAGE) & (A | D), page);
        assert_eq!(memory.ept_pte(0x6000) & (A | D), 0);
        for level in 2..=4 {
            assert_eq!(memory.get(EPT[level - 1]) & (A | D), upper);
        }
        let write = access(AccessKind::Write);
        walker.translate_with(&memory.window(), Gva(0), &write, AdPolicy::Set, &mut trace).unwrap();
        assert_eq!(memory.ept_pte(PAGE) & (A | D), if eptp == EPTP { 0 } else { A | D });
    }
}

/// MOV to CR3 loads PDPTEs as reads, and on behalf of no linear address.
#[test]
fn pdptes_are_read() {
    let memory = Memory::new();
    let registers = ControlRegisters { cr4: CR4_PAE, efer: 0, ..long_mode() };
    memory.set(0x11000, 0x3001);
    let guest = PageWalk::new(&registers, &CPU).unwrap();
    let read = access(AccessKind::Read);
    let walker = Walker::nested(guest, ept(EPTP | ACCESSED_DIRTY, PLAIN));
    memory.forbid(0x1000, W | X);
    let mut trace = Trace::new();
    let page = walker.translate_with(&memory.window(), Gva(0x123), &read, AdPolicy::Set, &mut trace).unwrap();
    assert_eq!(page.gpa, Gpa(0x15123));
    assert_eq!(memory.ept_pte(0x1000) & (A | D), A);
    assert_eq!(memory.ept_pte(0x3000) & (A | D), A | D);
    memory.forbid(0x1000, R);
    assert_eq!(qualification(translate(&memory, &walker, &read)), 0x001);
}

#[test]
fn mode_based_execute_follows_the_page() {
    // What the page allows, who fetches; the guest's page is a user page in the one case, a supervisor page in the other.
    let outcome = |memory: &Memory, privilege| {
        translate(memory, &walker(EPTP, MBEC), &Access::new(AccessKind::Fetch, privilege))
    };
    for (user_page, right, other) in [(true, XU, X), (false, X, XU)] {
        let memory = Memory::new();
        if !user_page {
            memory.set(0x14000, PAGE | 0x63);
        }
        let privilege = if user_page { Privilege::User } else { Privilege::Supervisor };
        memory.forbid(PAGE, other);
        assert!(outcome(&memory, privilege).unwrap().rights().execute());
        memory.ept(PAGE, memory.ept_pte(PAGE) & !right | other);
        let fault = outcome(&memory, privilege).unwrap_err();
        assert_eq!((fault.reason, fault.bits), (Reason::NoExecute, right));
        let (allowed, user) = if user_page { (0x20, 0x200) } else { (0x40, 0) };
        assert_eq!(qualification(Err(fault)), 0x4 | 0x18 | allowed | 0x180 | 0x400 | user);
        let read =
            translate(&memory, &walker(EPTP, MBEC), &Access::new(AccessKind::Read, privilege)).unwrap();
        assert_eq!((read.rights().execute(), read.rights().user()), (false, user_page));
    }
    // A supervisor's fetch from a user page, without SMEP, is by a user-mode linear address.
    let memory = Memory::new();
    memory.forbid(PAGE, X);
    assert!(outcome(&memory, Privilege::Supervisor).is_ok());
    memory.ept(PAGE, memory.ept_pte(PAGE) & !XU | X);
    assert!(outcome(&memory, Privilege::Supervisor).is_err());
    // Without the control bit 10 is ignored, and not reported.
    memory.forbid(PAGE, X);
    memory.ept(PAGE, memory.ept_pte(PAGE) | XU);
    let fetch = access(AccessKind::Fetch);
    assert_eq!(qualification(translate(&memory, &walker(EPTP, PLAIN), &fetch)), 0x79c);
    // With it, an entry may be present by bit 10 alone.
    memory.ept(PAGE, 0x15000 | XU | WB);
    assert!(outcome(&memory, Privilege::User).is_ok());
    assert_eq!(translate(&memory, &walker(EPTP, PLAIN), &fetch).unwrap_err().reason, Reason::NotPresent);
    memory.forbid(PAGE, XU);
    let fault = outcome(&memory, Privilege::User).unwrap_err();
    assert_eq!((fault.reason, fault.bits), (Reason::NotPresent, 7 | XU));
}

#[test]
fn unpaged_addresses_are_user_mode() {
    let guest = PageWalk::new(&ControlRegisters::default(), &CPU).unwrap();
    let walker = Walker::nested(guest, ept(EPTP, MBEC));
    let memory = Memory::new();
    memory.ept(0, memory.ept_pte(0) & !X);
    let fetch = Access::new(AccessKind::Fetch, Privilege::Supervisor);
    assert_eq!(translate(&memory, &walker, &fetch).unwrap().gpa, Gpa(0x10123));
    memory.ept(0, memory.ept_pte(0) & !XU | X);
    assert_eq!(qualification(translate(&memory, &walker, &fetch)), 0x7bc);
}

#[test]
fn advanced_information_tells_of_the_guests_page() {
    let memory = Memory::new();
    memory.forbid(PAGE, RWX | XU);
    let read = Access::new(AccessKind::Read, Privilege::Supervisor);
    for (leaf, expected) in
        [(PAGE | 0x67, 0x781), (PAGE | 0x65, 0x381), (PAGE | 0x63, 0x581), (PAGE | 0x61 | 1 << 63, 0x981)]
    {
        memory.set(0x14000, leaf);
        assert_eq!(qualification(translate(&memory, &walker(EPTP, PLAIN), &read)), expected, "{leaf:#x}");
        let capabilities = EptCapabilities { advanced_information: false, ..EptCapabilities::all() };
        let second = NgpaWalk::ept(EPTP, &PLAIN, &capabilities, &CPU).unwrap();
        let walker = Walker::nested(PageWalk::new(&long_mode(), &CPU).unwrap(), second);
        assert_eq!(qualification(translate(&memory, &walker, &read)), 0x181);
    }
}

#[test]
fn rights_stay_the_guests_where_ept_has_none() {
    let memory = Memory::new();
    memory.forbid(PAGE, W | XU);
    let page = translate(&memory, &walker(EPTP, PLAIN), &access(AccessKind::Read)).unwrap();
    let rights = page.rights();
    assert_eq!((rights.read(), rights.write(), rights.user(), rights.execute()), (true, false, true, true));
}

/// A supervisor's shadow-stack access wants bit 60 of the leaf, reading at every level and writing above the leaf; a user's wants
/// what data accesses do.
#[test]
fn supervisor_shadow_stacks_are_marked_by_bit_60() {
    let memory = Memory::new();
    let cet = ControlRegisters { cr4: CR4_PAE | CR4_CET, ..long_mode() };
    let under = |eptp: u64| Walker::nested(PageWalk::new(&cet, &CPU).unwrap(), ept(eptp, PLAIN));
    let (with, without) = (under(EPTP | 1 << 7), under(EPTP));
    let (load, store) = (AccessKind::ShadowStackRead, AccessKind::ShadowStackWrite);
    let by = |kind, privilege| Access::new(kind, privilege);
    // The guest's page is a supervisor's shadow stack.
    memory.set(0x14000, PAGE | 0x61);
    let marked = 0x15000 | R | WB | 1 << 60;
    memory.ept(PAGE, marked);
    for kind in [load, store] {
        assert!(translate(&memory, &with, &by(kind, Privilege::Supervisor)).is_ok());
    }
    assert!(translate(&memory, &with, &access(AccessKind::Write)).is_err());
    let fault = translate(&memory, &without, &by(store, Privilege::Supervisor)).unwrap_err();
    assert_eq!((fault.reason, fault.bits), (Reason::ReadOnly, W));
    assert_eq!(qualification(Err(fault)), 0x218a);

    memory.ept(PAGE, marked & !(1 << 60) | W);
    let fault = translate(&memory, &with, &by(load, Privilege::Supervisor)).unwrap_err();
    assert_eq!((fault.reason, fault.level, fault.bits), (Reason::NotShadowStack, 1, 1 << 60));
    assert_eq!(qualification(Err(fault)), 0x2199);
    assert!(translate(&memory, &without, &by(store, Privilege::Supervisor)).is_ok());

    memory.ept(PAGE, marked);
    memory.set(EPT[2], 0xa000 | R | X);
    let fault = with.ngpa_walk().unwrap().translate(
        &memory.window(),
        NestedGpa(PAGE),
        &by(load, Privilege::Supervisor),
        NestedPhase::Final,
        &mut NoTrace,
    );
    let fault = fault.unwrap_err();
    assert_eq!((fault.reason, fault.level, fault.bits), (Reason::ReadOnly, 3, W));
    memory.set(EPT[2], 0xa000 | RWX);

    // A user's shadow stack.
    memory.set(0x14000, PAGE | 0x65);
    assert!(translate(&memory, &with, &by(load, Privilege::User)).is_ok());
    assert!(translate(&memory, &with, &by(store, Privilege::User)).is_err());
    memory.ept(PAGE, marked & !(1 << 60) | W);
    assert!(translate(&memory, &with, &by(store, Privilege::User)).is_ok());
}

#[test]
fn bit_60_is_told_under_supervisor_shadow_stack_control() {
    let memory = Memory::new();
    memory.ept(PAGE, (0x15000 | R | WB | 1 << 60) & !X);
    let write = access(AccessKind::Write);
    assert_eq!(qualification(translate(&memory, &walker(EPTP | 1 << 7, PLAIN), &write)), 0x478a);
    assert_eq!(qualification(translate(&memory, &walker(EPTP, PLAIN), &write)), 0x078a);
}

#[test]
fn memory_types() {
    use MemoryType::{
        Uncacheable as Uc, UncacheableMinus as UcMinus, WriteBack as Wb, WriteCombining as Wc,
        WriteProtected as Wp, WriteThrough as Wt,
    };
    // Intel SDM volume 3, "Effective Page-Level Memory Types": rows are EPT's (the MTRR's) type, columns the PAT's.
    let pat = [Uc, UcMinus, Wc, Wt, Wb, Wp];
    for (ept, effective) in [
        (Uc, [Uc, Uc, Wc, Uc, Uc, Uc]),
        (Wc, [Uc, Wc, Wc, Uc, Wc, Uc]),
        (Wt, [Uc, Uc, Wc, Wt, Wt, Wp]),
        (Wb, [Uc, Uc, Wc, Wt, Wb, Wp]),
        (Wp, [Uc, Wc, Wc, Wt, Wp, Wp]),
    ] {
        for (pat, effective) in pat.into_iter().zip(effective) {
            let honours = EptMemoryType { memory_type: ept, ignore_pat: false };
            assert_eq!(honours.effective(pat), effective, "EPT {ept:?}, PAT {pat:?}");
            let ignores = EptMemoryType { memory_type: ept, ignore_pat: true };
            assert_eq!(ignores.effective(pat), ept);
        }
    }
    // The guest's PTE selects PAT field 3 (PCD and PWT), which is uncacheable after reset.
    let memory = Memory::new();
    memory.set(0x14000, PAGE | 0x7f);
    let read = access(AccessKind::Read);
    let found = |registers| {
        let guest = PageWalk::new(&registers, &CPU).unwrap();
        let walker = Walker::nested(guest.clone(), ept(EPTP, PLAIN));
        let page = translate(&memory, &walker, &read).unwrap();
        (guest.format().pat_type(&page), guest.format().effective_type(&page))
    };
    assert_eq!(found(long_mode()), (Uc, Some(Uc)));
    memory.ept(PAGE, memory.ept_pte(PAGE) | IPAT);
    assert_eq!(found(long_mode()), (Uc, Some(Wb)));
    assert_eq!(found(ControlRegisters { cr0: long_mode().cr0 | CR0_CD, ..long_mode() }), (Uc, Some(Uc)));
    // Without EPT, the effective type is not known.
    let guest = PageWalk::new(&ControlRegisters::default(), &CPU).unwrap();
    let page = translate(&memory, &Walker::new(guest.clone()), &read).unwrap();
    assert_eq!(guest.format().effective_type(&page), None);
}

#[test]
fn gmet_refuses_supervisor_fetches_from_user_pages() {
    let memory = Memory::new();
    // NPT in the place of EPT: the same tables with P, R/W and U/S.
    for at in (0x8000..0xc000).step_by(8) {
        let entry = memory.get(at);
        memory.set(at, if entry == 0 { 0 } else { entry & !0xfff | 7 });
    }
    let amd = CpuProfile { vendor: Vendor::Amd, ..CPU };
    let host = ControlRegisters { cr3: 0, ..long_mode() };
    let walker = |guest_mode_execute_trap, smep| {
        let controls = NptControls { guest_mode_execute_trap };
        let guest = ControlRegisters { cr4: CR4_PAE | if smep { CR4_SMEP } else { 0 }, ..long_mode() };
        let second = NgpaWalk::npt_with(0x8000, &host, &controls, &amd).unwrap();
        Walker::nested(PageWalk::new(&guest, &amd).unwrap(), second)
    };
    let npf = |outcome: Result<Translation, Fault>| match outcome.map_err(|fault| fault.kind) {
        Err(FaultKind::NestedPageFault { exit_info_1 }) => exit_info_1,
        other => panic!("{other:?}"),
    };
    let by = |kind, privilege| Access::new(kind, privilege);
    let (user, supervisor) = (Privilege::User, Privilege::Supervisor);
    let fetch = AccessKind::Fetch;
    // U=1: the supervisor may not fetch, reported by its CPL. Everything else goes.
    let fault = translate(&memory, &walker(true, false), &by(fetch, supervisor)).unwrap_err();
    assert_eq!((fault.reason, fault.bits), (Reason::GuestModeExecuteTrap, 4));
    assert_eq!(npf(Err(fault)), 0x1_0000_0011);
    assert!(translate(&memory, &walker(false, false), &by(fetch, supervisor)).is_ok());
    assert!(translate(&memory, &walker(true, false), &by(fetch, user)).is_ok());
    assert!(translate(&memory, &walker(true, false), &by(AccessKind::Write, supervisor)).is_ok());
    // The guest's own SMEP comes first.
    let fault = translate(&memory, &walker(true, true), &by(fetch, supervisor)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::PageFault { error_code: 0x11 });
    // U=0: open to all under GMET, to nobody without.
    memory.forbid(PAGE, 4);
    for privilege in [user, supervisor] {
        for kind in [AccessKind::Read, AccessKind::Write, fetch] {
            assert!(translate(&memory, &walker(true, false), &by(kind, privilege)).is_ok());
        }
        let fault = npf(translate(&memory, &walker(false, false), &by(AccessKind::Read, privilege)));
        assert_eq!(fault, 0x1_0000_0005);
    }
    // Under GMET a refused final access has the privilege it has in the guest; a table's is a user's.
    memory.forbid(PAGE, 2);
    assert_eq!(
        npf(translate(&memory, &walker(true, false), &by(AccessKind::Write, supervisor))),
        0x1_0000_0003
    );
    assert_eq!(npf(translate(&memory, &walker(true, false), &by(AccessKind::Write, user))), 0x1_0000_0007);
    memory.forbid(0x3000, 2);
    assert_eq!(
        npf(translate(&memory, &walker(true, false), &by(AccessKind::Read, supervisor))),
        0x2_0000_0007
    );
}
