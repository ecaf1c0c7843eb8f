//! What holds for every walk nested in EPT, whatever is in its tables.
//!
//! No panic, no more loads than the levels allow, the same outcome from every way of asking, accessed and dirty bits where they
//! may be and nowhere else; EPT tables that allow everything change nothing, and a right that is taken away helps nobody.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{
    CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_LA57, CR4_PAE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE,
};
use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, CpuProfile, EptCapabilities, EptControls,
    ExchangeError, Fault, FaultKind, Gpa, Gva, MAX_ATTEMPTS, MAX_STEPS, Memory, NestedGpa, NestedPhase,
    NgpaWalk, NoTrace, PageWalk, Privilege, Reason, Trace, Translation, Vendor, Walker, Window,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Pages of the guest: each is a table of every level.
const GUEST: u64 = 8;
/// EPT's tables lie behind them: from the page table up to the PML5.
const EPT: u64 = GUEST;
const LEVELS: u64 = 5;
const WORDS: u64 = (GUEST + LEVELS) * 512;

const RIGHTS: u64 = 0x407;
const GUEST_ACCESSED_DIRTY: u64 = 0x60;
const EPT_ACCESSED_DIRTY: u64 = 0x300;

struct Counted {
    words: Vec<AtomicU64>,
    loads: Cell<usize>,
}

impl Counted {
    fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    fn put(&self, gpa: u64, entry: u64) {
        self.words[gpa as usize / 8].store(entry, Ordering::Relaxed);
    }
}

impl Memory for Counted {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        assert_eq!(gpa.0 % 8, 0, "an entry is loaded at its own address");
        self.loads.set(self.loads.get() + 1);
        Window::new(&self.words).load_u64(gpa)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        Window::new(&self.words).compare_exchange_u64(gpa, current, new)
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        Window::new(&self.words).backing(gpa)
    }
}

/// The tables of both dimensions. Where EPT is whole, it maps each of the guest's pages to itself and allows everything.
#[derive(Clone, Debug)]
struct Tables {
    guest: Vec<u64>,
    /// Of each page of the guest, its EPT PTE; then the one entry of each table above that leads there.
    ept: Vec<u64>,
}

impl Tables {
    fn memory(&self) -> Counted {
        let words = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        let memory = Counted { words, loads: Cell::new(0) };
        for (place, entry) in (0..).zip(&self.guest) {
            memory.put(place / GUEST * 4096 + place % GUEST * 8, *entry);
        }
        for (place, entry) in (0..).zip(&self.ept) {
            memory.put(ept_place(place), *entry);
        }
        memory
    }
}

fn ept_place(place: u64) -> u64 {
    if place < GUEST { EPT * 4096 + place * 8 } else { (EPT + 1 + place - GUEST) * 4096 }
}

/// The EPT entry that allows everything.
fn whole(place: u64) -> u64 {
    if place < GUEST { place << 12 | RIGHTS | 6 << 3 } else { (EPT + place - GUEST) << 12 | RIGHTS }
}

fn guest_entry() -> impl Strategy<Value = u64> {
    let page = 0..GUEST;
    let plain = (page.clone(), any::<u64>()).prop_map(|(page, noise)| page << 12 | 7 | noise & 0x60);
    let rights = (page, any::<u64>()).prop_map(|(page, noise)| page << 12 | 1 | noise & (1 << 63 | 0x66));
    let outside = (GUEST..GUEST + 3).prop_map(|page| page << 12 | 7);
    prop_oneof![40 => plain, 12 => rights, 2 => outside, 1 => any::<u64>(), 1 => Just(0), 1 => Just(0xe7)]
}

fn ept_entry(place: u64) -> impl Strategy<Value = u64> {
    let rights = any::<u64>().prop_map(move |noise| whole(place) & !RIGHTS | noise & RIGHTS);
    let readable = any::<u64>().prop_map(move |noise| whole(place) & !RIGHTS | 1 | noise & RIGHTS);
    let ignored = any::<u64>().prop_map(move |noise| whole(place) | noise & 0xfff0_0000_0000_0b00);
    let flipped = (0..64_u32).prop_map(move |bit| whole(place) ^ 1 << bit);
    prop_oneof![40 => Just(whole(place)), 15 => ignored, 9 => readable, 2 => rights, 3 => flipped, 1 => any::<u64>()]
}

fn tables() -> impl Strategy<Value = Tables> {
    let guest = prop::collection::vec(guest_entry(), (GUEST * GUEST) as usize);
    let ept: Vec<_> = (0..GUEST + LEVELS - 1).map(|place| ept_entry(place).boxed()).collect();
    (guest, ept).prop_map(|(guest, ept)| Tables { guest, ept })
}

fn address() -> impl Strategy<Value = u64> {
    (prop::array::uniform4(0..GUEST), 0..4096_u64)
        .prop_map(|(indices, offset)| indices.iter().fold(0, |gva, index| gva << 9 | index) << 12 | offset)
}

fn access() -> impl Strategy<Value = Access> {
    let kind = prop::sample::select(vec![
        AccessKind::Read,
        AccessKind::Write,
        AccessKind::Fetch,
        AccessKind::ShadowStackRead,
        AccessKind::ShadowStackWrite,
    ]);
    let privilege = prop::sample::select(vec![
        Privilege::Exempt,
        Privilege::User,
        Privilege::Supervisor,
        Privilege::ImplicitSupervisor,
    ]);
    (kind, privilege, any::<bool>())
        .prop_map(|(kind, privilege, ac)| Access::new(kind, privilege).with_ac(ac))
}

fn guest() -> impl Strategy<Value = ControlRegisters> {
    (0..GUEST, any::<u64>()).prop_map(|(root, free)| ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root << 12,
        cr4: CR4_PAE | free & (CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_CET),
        efer: EFER_LME | EFER_LMA | free & EFER_NXE,
        ..ControlRegisters::default()
    })
}

#[derive(Clone, Copy, Debug)]
struct Second {
    five_level: bool,
    /// Bits 7:6 of EPTP.
    features: u64,
    controls: EptControls,
    capabilities: EptCapabilities,
}

impl Second {
    fn walk(&self) -> NgpaWalk {
        let (root, length) = if self.five_level { (EPT + 4, 4) } else { (EPT + 3, 3) };
        let eptp = root << 12 | length << 3 | 6 | self.features;
        NgpaWalk::ept(eptp, &self.controls, &self.capabilities, &CPU).unwrap()
    }

    fn accessed_dirty(&self) -> bool {
        self.features & 0x40 != 0
    }
}

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };

fn second() -> impl Strategy<Value = Second> {
    any::<[bool; 9]>().prop_map(|[five_level, ad, sss, mbec, written, only, pages_2m, pages_1g, advanced]| {
        Second {
            five_level,
            features: u64::from(ad) << 6 | u64::from(sss) << 7,
            controls: EptControls { mode_based_execute: mbec, tables_written: written },
            capabilities: EptCapabilities {
                execute_only: only,
                pages_2m,
                pages_1g,
                advanced_information: advanced,
                ..EptCapabilities::all()
            },
        }
    })
}

fn bound(walker: &Walker) -> usize {
    let guest = walker.gva_walk().format().levels() as usize;
    let nested = walker.ngpa_walk().map_or(0, |walk| walk.page_walk().format().levels() as usize);
    guest * (nested + 1) + nested
}

fn class(outcome: &Result<Translation, Fault>) -> &'static str {
    match outcome.as_ref().map_err(|fault| fault.kind) {
        Ok(_) => "page",
        Err(FaultKind::PageFault { .. }) => "#PF",
        Err(FaultKind::GeneralProtection | FaultKind::StackFault) => "not canonical",
        Err(FaultKind::NestedPageFault { .. }) => "NPF",
        Err(FaultKind::EptViolation { .. }) => "EPT violation",
        Err(FaultKind::EptMisconfiguration) => "EPT misconfiguration",
        Err(FaultKind::Unbacked) => "unbacked",
        Err(FaultKind::Contended) => "contended",
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_way_of_asking_gives_one_outcome(
        tables in tables(), guest in guest(), second in second(), access in access(),
        gvas in prop::collection::vec(address(), 8),
    ) {
        let walker = Walker::nested(PageWalk::new(&guest, &CPU).unwrap(), second.walk());
        prop_assert!(bound(&walker) <= MAX_STEPS);
        for gva in gvas.into_iter().map(Gva) {
            let memory = tables.memory();
            let before = memory.snapshot();
            let observed = walker.translate(&memory, gva, &access);
            prop_assert!(memory.loads.replace(0) <= bound(&walker));
            let mut trace = Trace::new();
            let traced = walker.translate_with(&memory, gva, &access, AdPolicy::Observe, &mut trace);
            prop_assert_eq!(traced, observed);
            prop_assert_eq!(trace.steps().len(), memory.loads.replace(0));
            prop_assert_eq!(memory.snapshot(), &before[..], "Observe changed memory");

            // A word that is an entry of both dimensions says something else once either has marked it.
            let mut read_as = BTreeMap::new();
            if trace.steps().iter().any(|step| {
                *read_as.entry(step.entry_gpa.0).or_insert(step.dimension) != step.dimension
            }) {
                continue;
            }

            let set = walker.translate_with(&memory, gva, &access, AdPolicy::Set, &mut NoTrace);
            prop_assert_eq!(set, observed);
            prop_assert!(memory.loads.get() <= bound(&walker) * MAX_ATTEMPTS);
            let mut may = BTreeMap::new();
            for step in trace.steps().iter().filter(|_| set.is_ok()) {
                *may.entry(step.entry_gpa.0 / 8).or_insert(0) |= match step.dimension {
                    pagewalk::Dimension::Guest => GUEST_ACCESSED_DIRTY,
                    pagewalk::Dimension::Nested if second.accessed_dirty() => EPT_ACCESSED_DIRTY,
                    pagewalk::Dimension::Nested => 0,
                };
            }
            for (word, (was, is)) in (0..).zip(before.iter().zip(memory.snapshot())) {
                let allowed = may.get(&word).copied().unwrap_or(0);
                prop_assert_eq!((was ^ is) & !allowed, 0, "word {:#x}", word * 8);
                prop_assert_eq!(was & !is, 0, "Set cleared a bit of word {:#x}", word * 8);
            }
            if set.is_ok() {
                for step in trace.steps() {
                    let entry = memory.words[step.entry_gpa.0 as usize / 8].load(Ordering::Relaxed);
                    let accessed = match step.dimension {
                        pagewalk::Dimension::Guest => 0x20,
                        pagewalk::Dimension::Nested if second.accessed_dirty() => 0x100,
                        pagewalk::Dimension::Nested => 0,
                    };
                    prop_assert_eq!(entry & accessed, accessed, "{:?}", step);
                }
            }
        }
    }

    /// Whole tables: the answer is that of one dimension.
    #[test]
    fn ept_that_allows_everything_changes_nothing(
        tables in tables(), guest in guest(), second in second(), access in access(), gva in address(),
    ) {
        let ept = (0..GUEST + LEVELS - 1).map(|place| whole(place) | 1 << 60).collect();
        let memory = Tables { ept, ..tables }.memory();
        let gva_walk = PageWalk::new(&guest, &CPU).unwrap();
        let single = Walker::new(gva_walk.clone()).translate(&memory, Gva(gva), &access);
        let nested = Walker::nested(gva_walk, second.walk()).translate(&memory, Gva(gva), &access);
        match (single, nested) {
            (Ok(single), Ok(nested)) => {
                let through = nested.nested.unwrap();
                prop_assert_eq!(through.ngpa.0, single.gpa.0);
                let mut flat = nested;
                flat.nested = None;
                prop_assert_eq!(flat, single);
            }
            // EPT maps the guest's pages and no others.
            (_, Err(fault)) if fault.nested_gpa.is_some_and(|ngpa| ngpa.0 >= GUEST << 12) => {
                prop_assert!(matches!(fault.kind, FaultKind::EptViolation { .. }), "{:?}", fault);
                prop_assert!(matches!(fault.reason, Reason::NotPresent | Reason::TooWide), "{:?}", fault);
            }
            (single, nested) => prop_assert_eq!(single, nested),
        }
    }

    /// Of two tables that differ in one right, the one that grants it allows all that the other does, and the same.
    #[test]
    fn a_right_less_helps_nobody(
        tables in tables(), guest in guest(), second in second(), access in access(), gva in address(),
        place in 0..GUEST + LEVELS - 1, right in prop::sample::select(vec![1_u64, 2, 4, 0x400]),
    ) {
        let memory = tables.memory();
        let walker = Walker::nested(PageWalk::new(&guest, &CPU).unwrap(), second.walk());
        let entry = memory.snapshot()[ept_place(place) as usize / 8];
        memory.put(ept_place(place), entry | right);
        let with = walker.translate(&memory, Gva(gva), &access);
        memory.put(ept_place(place), entry & !right);
        let without = walker.translate(&memory, Gva(gva), &access);
        if let Ok(page) = without {
            // Unless granting it is what makes the entry misconfigured: writing without reading, or executing alone.
            let misconfigured = with.is_err_and(|fault| fault.kind == FaultKind::EptMisconfiguration);
            if !misconfigured {
                let granted = with.unwrap();
                prop_assert_eq!(granted.gpa, page.gpa);
                prop_assert_eq!(granted.rights().bits() & page.rights().bits(), page.rights().bits());
            }
        }
    }

    #[test]
    fn arbitrary_registers_and_tables(
        words in prop::collection::vec((0..WORDS as usize, any::<u64>()), 0..64), eptp in any::<u64>(),
        capabilities in any::<u64>(), mbec in any::<bool>(), ngpa in any::<u64>(), access in access(),
        plausible in any::<bool>(),
    ) {
        let memory = Tables { guest: Vec::new(), ept: Vec::new() }.memory();
        for (word, entry) in words {
            memory.put(word as u64 * 8, entry);
        }
        let eptp = if plausible { eptp & 0xf0d8 | 0x1e } else { eptp };
        let controls = EptControls { mode_based_execute: mbec, tables_written: false };
        let Ok(walk) = NgpaWalk::ept(eptp, &controls, &EptCapabilities::from_msr(capabilities), &CPU) else {
            return Ok(());
        };
        for phase in [NestedPhase::Table, NestedPhase::Pdpte, NestedPhase::Final] {
            memory.loads.set(0);
            let _ = walk.translate(&memory, NestedGpa(ngpa), &access, phase, &mut Trace::new());
            prop_assert!(memory.loads.get() <= 5);
        }
    }
}

/// The tests above say something only as far as their walks get somewhere.
#[test]
fn the_strategies_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let all = (tables(), guest(), second(), access(), prop::collection::vec(address(), 8));
    let mut reached: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..1_000 {
        let (tables, guest, second, access, gvas) = all.new_tree(&mut runner).unwrap().current();
        let walker = Walker::nested(PageWalk::new(&guest, &CPU).unwrap(), second.walk());
        let memory = tables.memory();
        for gva in gvas {
            *reached.entry(class(&walker.translate(&memory, Gva(gva), &access))).or_default() += 1;
        }
    }
    println!("{reached:?}");
    for outcome in ["page", "#PF", "EPT violation", "EPT misconfiguration"] {
        assert!(reached.get(outcome).is_some_and(|count| *count >= 200), "{outcome}: {reached:?}");
    }
}
