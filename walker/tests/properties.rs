//! What holds for every walk, whatever a guest puts into its memory and registers.
//!
//! No panic, no more loads than the number of levels allows, nothing changed by policy `Observe`, the same outcome from
//! every way of asking. Besides, the rules that no machine judges here: canonicality in 57 bits, five levels, and a
//! nested walk over NPT tables that change nothing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, CpuProfile, ExchangeError, Fault, FaultKind,
    Gpa, Gva, MAX_ATTEMPTS, Memory, NgpaWalk, NoTrace, PageWalk, PagingMode, Privilege, Reason, Trace,
    Translation, Vendor, Walker, Window,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

const PAGES: u64 = 16;
const WORDS: usize = PAGES as usize * 512;
const ACCESSED_DIRTY: u64 = 0x60;

const CR0: u64 = 0x8000_0001;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LONG: u64 = 0x500;
const NXE: u64 = 1 << 11;
const WP: u64 = 1 << 16;
const CET: u64 = 1 << 23;
const PKS: u64 = 1 << 24;

/// Guest memory that counts how often it is read.
struct Counted {
    words: Vec<AtomicU64>,
    loads: Cell<usize>,
}

impl Counted {
    fn new(entries: &[(usize, u64)]) -> Counted {
        let words: Vec<AtomicU64> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        for (word, entry) in entries {
            words[word % WORDS].store(*entry, Ordering::Relaxed);
        }
        Counted { words, loads: Cell::new(0) }
    }

    fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
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

/// Indices that tables are filled at and addresses are made of, so that walks get somewhere.
/// The first ones are those of the addresses that tables have, which nested walks translate.
fn filled() -> Vec<u64> {
    (0..PAGES).chain([255, 256, 511]).collect()
}

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![40 => prop::sample::select(filled()), 1 => 0..512_u64]
}

/// `plain_ones` entries to about twenty that are not.
fn entry(plain_ones: u32) -> impl Strategy<Value = u64> {
    let plain = (0..PAGES, any::<u64>()).prop_map(|(page, noise)| page << 12 | 0x7 | noise & ACCESSED_DIRTY);
    let outside = (PAGES..PAGES + 3).prop_map(|page| page << 12 | 0x7);
    let frame =
        prop_oneof![3 => Just(0), 1 => Just(1 << 30), 1 => (0..1_u64 << 24).prop_map(|frame| frame << 21)];
    let large = (frame, any::<u64>()).prop_map(|(frame, noise)| frame | noise & 0x66 | 0x81);
    let rights = (0..PAGES, any::<u64>()).prop_map(|(page, noise)| page << 12 | 1 | noise & (1 << 63 | 0x66));
    prop_oneof![plain_ones => plain, 6 => rights, 5 => large, 8 => outside, 1 => any::<u64>(), 1 => Just(0)]
}

/// Tables all over memory: every page is a table of every level.
fn entries() -> impl Strategy<Value = Vec<(usize, u64)>> {
    let places: Vec<usize> = (0..PAGES)
        .flat_map(|page| filled().into_iter().map(move |index| (page * 512 + index) as usize))
        .collect();
    prop_oneof![Just(50), Just(400)].prop_flat_map(move |plain_ones| {
        let places = places.clone();
        prop::collection::vec(entry(plain_ones), places.len())
            .prop_map(move |entries| places.iter().copied().zip(entries).collect())
    })
}

fn address() -> impl Strategy<Value = u64> {
    let made = (prop::array::uniform5(index()), 0..4096_u64).prop_map(|(indices, offset)| {
        let gva = indices.iter().fold(0, |gva, index| gva << 9 | index) << 12 | offset;
        ((gva << 7) as i64 >> 7) as u64
    });
    let four_level = made.prop_map(|gva| ((gva << 16) as i64 >> 16) as u64);
    prop_oneof![6 => four_level, 3 => (any::<u64>(), 0..64_u32).prop_map(|(gva, by)| gva >> by), 1 => any::<u64>()]
}

/// Registers that select 4-level or 5-level paging; everything else of them is free.
fn registers() -> impl Strategy<Value = ControlRegisters> {
    (0..PAGES, any::<u64>()).prop_map(|(root, free)| ControlRegisters {
        cr0: CR0 | free & WP,
        cr3: root << 12 | free & 0x18,
        cr4: PAE | free & (LA57 | 0x70_0000 | PKS | if free & WP == 0 { 0 } else { CET }),
        efer: LONG | free & NXE,
        ..ControlRegisters::default()
    })
}

/// The same with bits of pointers ignored, as the vendor does it: LAM by CR3 and CR4.LAM_SUP, or UAI.
fn masking(registers: ControlRegisters, vendor: Vendor, free: u64) -> ControlRegisters {
    match vendor {
        Vendor::Intel => ControlRegisters {
            cr3: registers.cr3 | free & 3 << 61,
            cr4: registers.cr4 | free & 1 << 28,
            ..registers
        },
        Vendor::Amd => ControlRegisters { efer: registers.efer | free & 1 << 20, ..registers },
    }
}

fn cpu() -> impl Strategy<Value = CpuProfile> {
    let encryption_bit = prop::option::weighted(0.3, 47..52_u8);
    (any::<bool>(), 32..=52_u8, any::<bool>(), encryption_bit).prop_map(
        |(intel, maxphyaddr, gib_pages, encryption_bit)| CpuProfile {
            vendor: if intel { Vendor::Intel } else { Vendor::Amd },
            maxphyaddr,
            gib_pages,
            encryption_bit,
        },
    )
}

fn access() -> impl Strategy<Value = Access> {
    let kind = prop_oneof![
        Just(AccessKind::Read),
        Just(AccessKind::Write),
        Just(AccessKind::Fetch),
        prop::sample::select(vec![AccessKind::ShadowStackRead, AccessKind::ShadowStackWrite]),
    ];
    let privilege = prop::sample::select(vec![
        Privilege::Exempt,
        Privilege::User,
        Privilege::Supervisor,
        Privilege::ImplicitSupervisor,
    ]);
    (kind, privilege, any::<bool>(), any::<(u32, u32)>(), any::<bool>()).prop_map(
        |(kind, privilege, ac, (pkru, pkrs), stack)| {
            let access = Access::new(kind, privilege).with_ac(ac).through_stack(stack);
            access.with_pkru(pkru).with_pkrs(pkrs)
        },
    )
}

fn walker() -> impl Strategy<Value = Walker> {
    let nested = prop::option::of((registers(), 0..PAGES));
    (registers(), nested, cpu()).prop_map(|(guest, nested, cpu)| built(&guest, nested, &cpu))
}

/// As [`walker`], in one of two with bits of pointers ignored.
fn masking_walker() -> impl Strategy<Value = Walker> {
    let nested = prop::option::of((registers(), 0..PAGES));
    (registers(), nested, cpu(), prop_oneof![Just(0), any::<u64>()])
        .prop_map(|(guest, nested, cpu, free)| built(&masking(guest, cpu.vendor, free), nested, &cpu))
}

fn built(guest: &ControlRegisters, nested: Option<(ControlRegisters, u64)>, cpu: &CpuProfile) -> Walker {
    let gva_walk = PageWalk::new(guest, cpu).unwrap();
    match nested {
        None => Walker::new(gva_walk),
        Some((host, root)) => Walker::nested(gva_walk, NgpaWalk::npt(root << 12, &host, cpu).unwrap()),
    }
}

/// The most loads that one attempt may take: each guest level behind a nested walk, and one for the final address.
fn bound(walker: &Walker) -> usize {
    let guest = walker.gva_walk().format().levels() as usize;
    let nested = walker.ngpa_walk().map_or(0, |walk| walk.page_walk().format().levels() as usize);
    guest * (nested + 1) + nested
}

fn without_skipped(outcome: Result<Translation, Fault>) -> Result<Translation, Fault> {
    outcome.map(|page| page.with_ad_skipped(false))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_way_of_asking_gives_one_outcome(
        entries in entries(), walker in masking_walker(), access in access(),
        gvas in prop::collection::vec(address(), 8),
    ) {
        for gva in gvas.into_iter().map(Gva) {
            let memory = Counted::new(&entries);
            let before = memory.snapshot();
            // What the fast lane leaves is walked again, and if rights are refused, once more, recorded, to find who
            // withholds them. It leaves every access to a shadow stack.
            let observed = walker.translate(&memory, gva, &access);
            let loads = memory.loads.replace(0);
            prop_assert!(loads <= 3 * bound(&walker), "{loads} loads, at most {} an attempt", bound(&walker));
            let walks = if access.is_shadow_stack() { 2 } else { 1 };
            prop_assert!(observed.is_err() || loads <= walks * bound(&walker));
            prop_assert!(bound(&walker) <= 35);

            let mut trace = Trace::new();
            prop_assert_eq!(walker.translate_with(&memory, gva, &access, AdPolicy::Observe, &mut trace), observed);
            // Each step is one load; a table outside memory is one that failed.
            prop_assert_eq!(trace.steps().len(), memory.loads.get());
            prop_assert!(memory.loads.get() <= bound(&walker));
            prop_assert_eq!(memory.snapshot(), &before[..], "Observe changed memory");

            memory.loads.set(0);
            let set = walker.translate_with(&memory, gva, &access, AdPolicy::Set, &mut NoTrace);
            prop_assert_eq!(without_skipped(set), observed);
            prop_assert!(memory.loads.get() <= bound(&walker) * MAX_ATTEMPTS);
            for (word, (was, is)) in before.iter().zip(memory.snapshot()).enumerate() {
                let allowed = if set.is_ok() { ACCESSED_DIRTY } else { 0 };
                prop_assert_eq!((was ^ is) & !allowed, 0, "word {:#x}", word * 8);
                prop_assert_eq!(was & !is, 0, "Set cleared a bit of word {:#x}", word * 8);
            }
            if let Ok(page) = set {
                prop_assert!(trace.steps().iter().all(|step| {
                    memory.words[step.entry_gpa.0 as usize / 8].load(Ordering::Relaxed) & 0x20 != 0
                }), "an accessed bit is missing");
                let again = walker.translate(&memory, gva, &access).unwrap();
                prop_assert_eq!((again.gpa, again.rights()), (page.gpa, page.rights()));
            }
        }
    }

    #[test]
    fn arbitrary_registers_and_memory(
        words in prop::collection::vec((0..WORDS, any::<u64>()), 0..64),
        raw in prop::array::uniform5(any::<u64>()), plausible in registers(), pick in any::<u8>(),
        ncr3 in any::<u64>(), maxphyaddr in any::<u8>(), gva in any::<u64>(), access in access(),
    ) {
        // Each register either arbitrary or plausible, so that some sets are accepted.
        let choose = |bit: u8, plausible: u64| if pick >> bit & 1 != 0 { raw[bit as usize] } else { plausible };
        let registers = ControlRegisters {
            cr0: choose(0, plausible.cr0),
            cr3: choose(1, plausible.cr3),
            cr4: choose(2, plausible.cr4),
            efer: choose(3, plausible.efer),
            pat: choose(4, plausible.pat),
        };
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr, gib_pages: pick & 0x80 != 0, encryption_bit: None };
        let memory = Counted::new(&words);
        let Ok(gva_walk) = PageWalk::new(&registers, &cpu) else { return Ok(()) };
        let nested = NgpaWalk::npt(ncr3, &registers, &cpu).ok();
        let walkers = [Some(Walker::new(gva_walk.clone())), nested.map(|second| Walker::nested(gva_walk, second))];
        for walker in walkers.iter().flatten() {
            memory.loads.set(0);
            let _ = walker.translate(&memory, Gva(gva), &access);
            prop_assert!(memory.loads.get() <= 2 * bound(walker));
            let _ = walker.translate_with(&memory, Gva(gva), &access, AdPolicy::Set, &mut Trace::new());
        }
    }

    #[test]
    fn an_address_is_refused_for_its_width_alone(
        entries in entries(), walker in walker(), access in access(), gva in address(), flip in 40..64_u32,
    ) {
        let memory = Counted::new(&entries);
        let width = match walker.gva_walk().format().mode() {
            PagingMode::FiveLevel => 57,
            _ => 48,
        };
        for gva in [gva, gva ^ 1 << flip] {
            // Bits 63 to width-1 are all equal.
            let upper = gva >> (width - 1);
            let canonical = upper == 0 || upper == u64::MAX >> (width - 1);
            memory.loads.set(0);
            let outcome = walker.translate(&memory, Gva(gva), &access);
            let reason = outcome.err().map(|fault| fault.reason);
            prop_assert_eq!(reason == Some(Reason::NonCanonical), !canonical);
            if !canonical {
                let kind = if access.is_stack() { FaultKind::StackFault } else { FaultKind::GeneralProtection };
                prop_assert_eq!(outcome.unwrap_err().kind, kind);
                prop_assert_eq!(memory.loads.get(), 0, "a non-canonical address reads nothing");
            }
        }
    }

    #[test]
    fn what_a_cpu_ignores_of_a_pointer_does_not_matter(
        entries in entries(), registers in registers(), cpu in cpu(), access in access(), gva in address(),
        free in any::<u64>(), tag in any::<u64>(),
    ) {
        let memory = Counted::new(&entries);
        let plain = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
        let registers = masking(registers, cpu.vendor, free);
        let masking = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
        let five_levels = registers.cr4 & LA57 != 0;
        // The manuals' tables: which bits of this pointer are metadata.
        let shadow_stack = access.is_shadow_stack() && registers.cr4 & CET != 0;
        let ds = !access.is_stack() && !shadow_stack && access.privilege() != Privilege::ImplicitSupervisor;
        let (high, low) = match (cpu.vendor, access.kind()) {
            (_, AccessKind::Fetch) => (0, 0),
            (Vendor::Amd, _) if registers.efer >> 20 & 1 != 0 && ds => (63, 57),
            (Vendor::Amd, _) => (0, 0),
            (Vendor::Intel, _) if gva >> 63 == 0 => match registers.cr3 >> 61 & 3 {
                0 => (0, 0),
                2 => (62, 48),
                _ => (62, 57),
            },
            (Vendor::Intel, _) if registers.cr4 >> 28 & 1 == 0 => (0, 0),
            (Vendor::Intel, _) => (62, if five_levels { 57 } else { 48 }),
        };
        let metadata = if high == 0 { 0 } else { u64::MAX >> (63 - high) & u64::MAX << low };
        let sign = if high == 0 { 0 } else { gva >> (low - 1) & 1 };
        let untagged = gva & !metadata | if sign == 1 { metadata } else { 0 };
        let expected = plain.translate(&memory, Gva(untagged), &access);
        for gva in [gva, gva ^ tag & metadata] {
            let outcome = masking.translate(&memory, Gva(gva), &access);
            let expected = match expected {
                // The pointer as it was given, where it leads nowhere.
                Err(fault) if fault.reason == Reason::NonCanonical => Err(Fault { address: gva, ..fault }),
                other => other,
            };
            prop_assert_eq!(outcome, expected);
        }
    }

    #[test]
    fn five_levels_are_four_below_a_pml5e(
        entries in entries(), registers in registers(), cpu in cpu(), access in access(),
        gva in address(), number in 0..512_u64,
    ) {
        // The PML5 is the last page, where only the PML5E in question points anywhere.
        let pml5 = (PAGES - 1) << 12;
        let four = ControlRegisters { cr4: registers.cr4 & !LA57, ..registers };
        let five = ControlRegisters { cr3: pml5, cr4: registers.cr4 | LA57, ..registers };
        let mut entries = entries;
        entries.retain(|(word, _)| (*word as u64) < pml5 / 8);
        entries.push(((pml5 / 8 + number) as usize, registers.cr3 & !0xfff | 0x7));
        let memory = Counted::new(&entries);

        let below = gva & 0xffff_ffff_ffff;
        let short = Gva(((below << 16) as i64 >> 16) as u64);
        let long = Gva((((number << 48 | below) << 7) as i64 >> 7) as u64);
        let walker = |registers| Walker::new(PageWalk::new(registers, &cpu).unwrap());
        let (mut short_trace, mut long_trace) = (Trace::new(), Trace::new());
        let short = walker(&four).translate_with(&memory, short, &access, AdPolicy::Observe, &mut short_trace);
        let long = walker(&five).translate_with(&memory, long, &access, AdPolicy::Observe, &mut long_trace);

        let first = long_trace.steps()[0];
        prop_assert_eq!((first.level, u64::from(first.index), first.table_gpa), (5, number, Gpa(pml5)));
        let steps = |trace: &Trace| trace.steps().iter().map(|step| (step.entry_gpa, step.entry)).collect::<Vec<_>>();
        prop_assert_eq!(&steps(&long_trace)[1..], &steps(&short_trace)[..]);
        match (short, long) {
            // The PML5E grants write and user, and never forbids execution.
            (Ok(short), Ok(long)) => prop_assert_eq!(short, long),
            (Err(short), Err(long)) => prop_assert_eq!((short.kind, short.level), (long.kind, long.level)),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn an_identity_in_the_second_dimension_changes_nothing(
        entries in entries(), registers in registers(), host in registers(), cpu in cpu(), access in access(), gva in address(),
    ) {
        // The last three pages are the NPT: 1 GiB onto itself.
        let cpu = CpuProfile { gib_pages: true, ..cpu };
        let npt = PAGES - 3;
        let levels = if host.cr4 & LA57 != 0 { 5 } else { 4 };
        let mut entries = entries;
        entries.retain(|(word, _)| (*word as u64) < npt * 512);
        for level in (4..=levels).rev() {
            let page = npt + levels - level;
            entries.push(((page * 512) as usize, (page + 1) << 12 | 0x7));
        }
        entries.push((((npt + levels - 3) * 512) as usize, 0x87));
        let memory = Counted::new(&entries);

        let gva_walk = PageWalk::new(&registers, &cpu).unwrap();
        let nested = Walker::nested(gva_walk.clone(), NgpaWalk::npt(npt << 12, &host, &cpu).unwrap());
        let single = Walker::new(gva_walk).translate(&memory, Gva(gva), &access);
        let nested = nested.translate(&memory, Gva(gva), &access);
        match (single, nested) {
            (Ok(single), Ok(nested)) => {
                prop_assert_eq!(nested.gpa, single.gpa);
                prop_assert_eq!(nested.nested.map(|page| page.ngpa.0), Some(single.gpa.0));
                prop_assert_eq!(
                    (nested.page_size(), nested.rights(), nested.backing()),
                    (single.page_size(), single.rights(), single.backing())
                );
            }
            // What lies above 1 GiB is outside the identity: a frame, or a table.
            (Ok(page), Err(fault)) => {
                prop_assert!(page.gpa.0 >= 1 << 30, "{page:?} {fault:?}");
                let nested = matches!(fault.kind, FaultKind::NestedPageFault { exit_info_1 } if exit_info_1 >> 32 == 1);
                prop_assert!(nested, "{fault:?}");
            }
            (Err(single), Err(nested)) if single.kind == FaultKind::Unbacked => {
                let table = matches!(nested.kind, FaultKind::NestedPageFault { exit_info_1 } if exit_info_1 >> 32 == 2);
                prop_assert!(table || nested.kind == FaultKind::Unbacked, "{nested:?}");
            }
            (Err(single), Err(nested)) => prop_assert_eq!(single, nested),
            (Err(fault), Ok(page)) => prop_assert!(false, "{fault:?} {page:?}"),
        }
    }
}

/// The tests above say something only as far as their walks get somewhere.
#[test]
fn the_strategies_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let all = (entries(), walker(), access(), prop::collection::vec(address(), 8));
    let mut reached: BTreeMap<(bool, &str), u32> = BTreeMap::new();
    for _ in 0..600 {
        let (entries, walker, access, gvas) = all.new_tree(&mut runner).unwrap().current();
        let memory = Counted::new(&entries);
        for gva in gvas {
            let outcome = match walker.translate(&memory, Gva(gva), &access).map_err(|fault| fault.kind) {
                Ok(page) if page.backing() == Backing::None => "unbacked page",
                Ok(_) => "page",
                Err(FaultKind::PageFault { .. }) => "#PF",
                Err(FaultKind::GeneralProtection | FaultKind::StackFault) => "not canonical",
                Err(FaultKind::NestedPageFault { .. }) => "NPF",
                Err(FaultKind::Unbacked) => "unbacked table",
                Err(FaultKind::EptViolation { .. } | FaultKind::EptMisconfiguration) => "EPT",
                Err(FaultKind::Contended) => "contended",
            };
            *reached.entry((walker.ngpa_walk().is_some(), outcome)).or_default() += 1;
        }
    }
    println!("{reached:?}");
    for nested in [false, true] {
        for outcome in ["page", "unbacked page", "#PF", "not canonical", "unbacked table"] {
            let count = reached.get(&(nested, outcome)).copied().unwrap_or_default();
            // Both dimensions must agree on an address and then nothing be there: rare, and enough.
            let least = if outcome == "unbacked page" { 3 } else { 20 };
            assert!(count >= least, "nested {nested}, {outcome}: {count} in {reached:?}");
        }
    }
    assert!(reached[&(true, "NPF")] >= 500, "{reached:?}");
}
