//! A batch is as many single walks: the same answers, element by element, whatever a guest puts into its memory.
//!
//! Every paging mode, every second dimension, hostile tables: setups are made of bytes as the fuzz targets make them, from
//! seeds that are fixed and one that is drawn anew (`PAGEWALK_SEED` repeats a run).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a test, and what it takes from the fuzz targets"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{
    Access, AccessKind, Backing, ControlRegisters, CpuProfile, ExchangeError, Fault, Gpa, Gva, Instructions,
    Memory, NgpaWalk, PageSize, PageWalk, PageWord, PagingMode, Privilege, Vendor, Walker, Window,
};

#[allow(dead_code, reason = "the fuzz targets need more")]
#[path = "../fuzz/src/input.rs"]
mod input;
mod memory {
    /// Pages of memory.
    pub const PAGES: u64 = 16;
}
#[path = "../fuzz/src/setup.rs"]
mod setup;

use input::Input;
use memory::PAGES;

/// Seeds of every run.
const KEPT: [u64; 3] = [1, 2, 3];
/// Indices that entries are put at and addresses are made of.
const INDICES: [u64; 20] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 256, 510, 511];

/// Memory that can be asked for a word and no more; its last page is read-only.
struct Plain<'a>(&'a [AtomicU64]);

impl Memory for Plain<'_> {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        assert_eq!(gpa.0 % 8, 0, "an entry is loaded at its own address");
        self.0.get(usize::try_from(gpa.0 / 8).unwrap()).map(|word| word.load(Ordering::Relaxed))
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        panic!("a batch changes nothing");
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        match gpa.0 >> 12 {
            page if page < PAGES - 1 => Backing::Ram,
            page if page < PAGES => Backing::ReadOnly,
            _ => Backing::None,
        }
    }
}

/// The same memory, of which a run in the middle is shown as it is.
struct Parted<'a>(&'a [AtomicU64]);

impl Parted<'_> {
    const FIRST: u64 = 4;
    const PAGES: u64 = 6;
}

impl Memory for Parted<'_> {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        Plain(self.0).load_u64(gpa)
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        panic!("a batch changes nothing");
    }

    fn ram(&self) -> (Gpa, u64) {
        (Gpa(Self::FIRST << 12), Self::PAGES << 12)
    }

    fn words(&self) -> &[AtomicU64] {
        &self.0[Self::FIRST as usize * 512..][..Self::PAGES as usize * 512]
    }

    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        let first = (table.0 >> 12).checked_sub(Self::FIRST)?;
        self.words().as_chunks().0.get(usize::try_from(first).ok()?)
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        Plain(self.0).backing(gpa)
    }
}

/// Walks `gvas` as a batch, and one by one, and compares.
fn compare<M: Memory>(walker: &Walker, memory: &M, access: &Access, gvas: &[u64]) -> Vec<Result<u64, Fault>> {
    const UNTOUCHED: u64 = 0x5555;
    let mut batches = Instructions::ALL.into_iter().filter(|set| set.available()).map(|set| {
        let mut words = vec![UNTOUCHED; gvas.len() + 1];
        let mut faults = Vec::new();
        let mut fault = |at, fault| faults.push((at, fault));
        walker.translate_batch_by(set, memory, access, gvas, &mut words, &mut fault);
        assert_eq!(words.pop(), Some(UNTOUCHED), "a word too many");
        (words, faults)
    });
    let (words, faults) = batches.next().unwrap();
    for other in batches {
        assert_eq!((&words, &faults), (&other.0, &other.1), "instructions differ");
    }
    let mut faults = faults.into_iter();
    let answers = gvas.iter().zip(&words).enumerate().map(|(at, (gva, word))| {
        let single = walker.translate(memory, Gva(*gva), access);
        match single {
            Ok(page) => {
                let batched = PageWord::from_bits(*word);
                assert_eq!(
                    batched,
                    PageWord::of(&page),
                    "element {at} of {}: GVA {gva:#x}, {page:?}, {access:?}, {walker:?}",
                    gvas.len()
                );
                assert_eq!(batched.gpa(*gva), Some(page.gpa));
                Ok(*word)
            }
            Err(fault) => {
                assert_eq!(*word, 0, "element {at}: GVA {gva:#x}, {fault:?}, {access:?}, {walker:?}");
                assert_eq!(faults.next(), Some((at, fault)), "GVA {gva:#x}, {access:?}, {walker:?}");
                Err(fault)
            }
        }
    });
    let answers = answers.collect();
    assert_eq!(faults.next(), None, "a fault too many");
    answers
}

fn address(rng: &mut fastrand::Rng) -> u64 {
    let made = (0..5).fold(0, |gva, _| gva << 9 | rng.choice(INDICES).unwrap()) << 12 | rng.u64(..4096);
    match rng.u32(..8) {
        0..=2 => ((made << 16) as i64 >> 16) as u64,
        3 => ((made << 7) as i64 >> 7) as u64,
        4 => made & 0xffff_ffff,
        5 => made & (PAGES << 12 | 0xffff),
        6 => rng.u64(..) >> rng.u32(..64),
        _ => rng.u64(..),
    }
}

/// Addresses one after the other, near one another, or all over.
fn column(rng: &mut fastrand::Rng) -> Vec<u64> {
    let longest = if rng.u8(..4) == 0 { 9 } else { 8 };
    let length = [0, 1, 3, 63, 64, 65, 200, 300, 900][rng.usize(..longest)];
    let base = address(rng);
    let near = [0, 0xf_ffff, 0xfff_ffff, 0x7f_ffff_ffff][rng.usize(..4)];
    let shape = rng.u32(..5);
    (0..length)
        .map(|at| match shape {
            0 => base.wrapping_add(at << 12),
            1 => base ^ (address(rng) & near),
            // Mostly through one table.
            2 if rng.u32(..100) > 0 => base & !0x1f_ffff | address(rng) & 0x1f_ffff,
            _ => address(rng),
        })
        .collect()
}

/// Any entry.
fn entry(rng: &mut fastrand::Rng) -> u64 {
    let word = rng.u64(..);
    let table = word & 0x0000_ffff_0000_ffff;
    match rng.u32(..9) {
        0 | 1 => table & 0xffff & !0x38 | 0x7,
        2 => table & 0xf700 | 0x7,
        3 => table & 0xffff & !0x38 | 0x37,
        4 => table | 7 << 32 | 7,
        5 => table & 0xffff & !0x1000 | 0x87,
        6 => table & 0xffff | word & 0xfff0_0000_0000_0000 | 1,
        // Wider than what 4 levels translate.
        7 => table & 0xf000 | 1 << (48 + word % 4) | 0x37,
        _ => word,
    }
}

/// Entries for every page: wild ones, or for most such as walks get somewhere with. A sound entry refers to a page as far from
/// its own as is even, so that the tables of two dimensions, whose formats may differ, can be told apart.
fn fill(rng: &mut fastrand::Rng, walker: &Walker, mut put: impl FnMut(usize, u64)) {
    let wild = [1, 2, 40, 200, 200, 20_000][rng.usize(..6)];
    // How seldom a right is missing, or a high bit set.
    let unusual = [20, 30, 5_000][rng.usize(..3)];
    let guest = walker.gva_walk();
    let second = walker.ngpa_walk().map(NgpaWalk::page_walk);
    let own = |walk: &PageWalk, page: u64| (walk.root() >> 12 ^ page) & 1 == 0;
    for page in 0..PAGES {
        let format = second.filter(|second| own(second, page)).map_or(guest.format(), PageWalk::format);
        for index in INDICES {
            let half = |rng: &mut fastrand::Rng| {
                let large = match rng.u32(..12) {
                    0 => 0x80,
                    _ => 0,
                };
                let used = if format.is_ept() { 0 } else { 0x60 };
                let right = if rng.u32(..unusual) == 0 { rng.u64(..8) } else { 7 };
                (rng.u64(..PAGES) & !1 | page & 1) << 12 | rng.u64(..) & used | right | large
            };
            let entry = match rng.u32(..wild) {
                0 => entry(rng),
                _ if format.mode() == PagingMode::TwoLevel => half(rng) << 32 | half(rng),
                _ if rng.u32(..unusual) == 0 => half(rng) | rng.u64(..) & 0xff80_0000_0000_0000,
                _ => half(rng),
            };
            // A PDPTE of PAE paging has no rights.
            let pdpte = |walk: &PageWalk| {
                let at = (page << 12 | index << 3).wrapping_sub(walk.root());
                walk.format().mode() == PagingMode::Pae && at < 32
            };
            let pdpte = pdpte(guest) || second.is_some_and(pdpte);
            put((page * 512 + index) as usize, if pdpte { entry & !0x1e6 } else { entry });
        }
    }
}

/// One walker over one memory, read through some kind of [`Memory`].
fn case(rng: &mut fastrand::Rng, words: &[AtomicU64], reached: &mut BTreeMap<String, u32>) {
    let bytes: Vec<u8> = (0..128).map(|_| rng.u8(..)).collect();
    let mut input = Input::new(&bytes);
    let Some(walker) = setup::walker(&mut input) else { return };
    let access = setup::access(&mut input);
    fill(rng, &walker, |at, entry| words[at].store(entry, Ordering::Relaxed));
    for _ in 0..4 {
        let gvas = column(rng);
        let answers = match rng.u8(..4) {
            0 => compare(&walker, &Plain(words), &access, &gvas),
            1 => compare(&walker, &Parted(words), &access, &gvas),
            2 => compare(&walker, &Window::new(words), &access, &gvas),
            _ => compare(&walker, &Window::new(&words[..words.len() - 700]), &access, &gvas),
        };
        for answer in answers {
            *reached.entry(class(&walker, answer)).or_default() += 1;
        }
    }
    words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
}

fn class(walker: &Walker, answer: Result<u64, Fault>) -> String {
    let second = match walker.ngpa_walk() {
        None => "",
        Some(NgpaWalk::Npt(_)) => " over NPT",
        Some(NgpaWalk::Ept(_)) => " over EPT",
    };
    let outcome = match answer.map(PageWord::from_bits) {
        Ok(word) if word.backing() == Backing::None => "page without backing".to_owned(),
        Ok(word) => format!("{:?}", word.page_size()),
        Err(fault) => format!("{:?}", fault.kind).split(' ').next().unwrap().to_owned(),
    };
    format!("{}{second}: {outcome}", walker.gva_walk().format().mode())
}

#[test]
fn a_batch_is_as_many_single_walks() {
    let drawn =
        std::env::var("PAGEWALK_SEED").ok().map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    let sets: Vec<_> = Instructions::ALL.into_iter().filter(|set| set.available()).collect();
    println!("seed {drawn}, instructions {sets:?}");
    let cases = if cfg!(miri) { 4 } else { 10_000 };
    let words: Vec<AtomicU64> = (0..PAGES as usize * 512).map(|_| AtomicU64::new(0)).collect();
    let mut reached = BTreeMap::new();
    for seed in KEPT.into_iter().chain([drawn]) {
        let mut rng = fastrand::Rng::with_seed(seed);
        // The seed that is drawn looks for more; what has to be reached, the kept ones reach in every run.
        let mut drawn = BTreeMap::new();
        let reached = if KEPT.contains(&seed) { &mut reached } else { &mut drawn };
        for _ in 0..cases {
            case(&mut rng, &words, reached);
        }
    }
    println!("{reached:#?}");
    if cfg!(miri) {
        return;
    }
    for mode in ["no paging", "2-level", "PAE", "4-level", "5-level"] {
        for second in ["", " over NPT", " over EPT"] {
            let pages: u32 = reached
                .iter()
                .filter(|(class, _)| {
                    class.starts_with(&format!("{mode}{second}: ")) && class.contains(": Size")
                })
                .map(|(_, count)| count)
                .sum();
            assert!(mode == "no paging" || pages >= 100, "{mode}{second}: {pages} pages");
        }
    }
}

/// Blocks that go through one page table, but for some address or other.
#[test]
fn a_remembered_table_serves_the_addresses_that_lead_through_it() {
    let words: Vec<AtomicU64> = (0..PAGES as usize * 512).map(|_| AtomicU64::new(0)).collect();
    let put = |page: u64, index: u64, entry: u64| {
        words[(page * 512 + index) as usize].store(entry, Ordering::Relaxed);
    };
    // Tables of levels 4, 3, 2 in pages 1 to 3, and of level 1 in pages 4 to 7, which grant different rights.
    (0..4).for_each(|index| put(1, index, 2 << 12 | 7));
    (0..4).for_each(|index| put(2, index, 3 << 12 | 7));
    (0..4).for_each(|index| put(3, index, (4 + index) << 12 | if index == 3 { 5 } else { 7 }));
    for (table, index) in (4..8).flat_map(|table| (0..512).map(move |index| (table, index))) {
        put(table, index, (8 + (table + index) % 8) << 12 | 0x67);
    }
    let registers = ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: 1 << 12,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..ControlRegisters::default()
    };
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
    let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
    let mut rng = fastrand::Rng::with_seed(5);
    for round in 0..2_000 {
        let kind = [AccessKind::Read, AccessKind::Write][round % 2];
        let access = Access::new(kind, [Privilege::User, Privilege::Supervisor][round / 2 % 2]);
        let table = rng.u64(..4) << 21;
        let mut gvas: Vec<u64> = (0..640).map(|_| table | rng.u64(..512) << 12 | 0x123).collect();
        // Behind the first blocks, with or without others in flight.
        for _ in 0..rng.usize(..3) {
            let bit = [21, 22, 30, 39, 48, 63][rng.usize(..6)];
            gvas[rng.usize(64..640)] ^= 1 << bit;
        }
        compare(&walker, &Window::new(&words), &access, &gvas);
        compare(&walker, &Parted(&words), &access, &gvas);
    }
}

/// A guest that leads its addresses through another table while a batch is under way is followed.
#[test]
fn a_remembered_table_that_is_taken_out_serves_no_more() {
    const BLOCK: usize = 64;
    let registers = ControlRegisters {
        cr0: CR0_PE | CR0_PG,
        cr3: 1 << 12,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..ControlRegisters::default()
    };
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
    let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let gva = |at: usize| (at as u64 * 7 % 512) << 12;
    let mut gvas: Vec<u64> = (0..32 * BLOCK).map(gva).collect();
    gvas[2 * BLOCK] |= 1 << 39;
    // From the entry that leads to it on, every table has a counterpart three pages further on.
    for (set, changed) in Instructions::ALL.into_iter().flat_map(|set| (1..4).map(move |page| (set, page))) {
        let words: Vec<AtomicU64> = (0..PAGES as usize * 512).map(|_| AtomicU64::new(0)).collect();
        let put = |page: usize, index: usize, entry: u64| {
            words[page * 512 + index].store(entry, Ordering::Relaxed);
        };
        for page in [1, 2, 3, 5, 6] {
            put(page, 0, (page as u64 + 1) << 12 | 7);
        }
        (0..512).for_each(|index| put(4, index, 8 << 12 | 7));
        (0..512).for_each(|index| put(7, index, 9 << 12 | 7));
        let mut answers = vec![0; gvas.len()];
        let mut fault = |_, _| put(changed, 0, (changed as u64 + 4) << 12 | 7);
        walker.translate_batch_by(set, &Window::new(&words), &access, &gvas, &mut answers, &mut fault);
        let frame = |word: &u64| PageWord::from_bits(*word).gpa(0).map(|gpa| gpa.0 >> 12);
        assert!(answers[..2 * BLOCK].iter().all(|word| frame(word) == Some(8)), "{set:?}");
        let last = &answers[31 * BLOCK..];
        assert!(last.iter().all(|word| frame(word) == Some(9)), "{set:?}: the table of page {changed}");
    }
}

/// Every combination of the bits that matter in one entry of 32-bit and PAE paging, met by blocks that share it and by blocks
/// that do not.
#[test]
fn lanes_of_short_addresses_accept_what_single_walks_do() {
    // P, W, U, A, D, PS, G, bits that large frames reserve, an address bit, a bit above MAXPHYADDR, NX.
    const BITS: [u32; 12] = [0, 1, 2, 5, 6, 7, 8, 12, 13, 21, 40, 63];
    let words: Vec<AtomicU64> = (0..PAGES as usize * 512).map(|_| AtomicU64::new(0)).collect();
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 38, gib_pages: true, encryption_bit: None };
    let mut rng = fastrand::Rng::with_seed(6);
    let mut pages = 0;
    for (pae, enabled) in [(false, false), (false, true), (true, false), (true, true)] {
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG | if rng.bool() { CR0_WP } else { 0 },
            cr3: 1 << 12,
            cr4: if pae { CR4_PAE } else { u64::from(enabled) << 4 } | if rng.bool() { CR4_SMEP } else { 0 },
            efer: if pae && enabled { EFER_NXE } else { 0 },
            ..ControlRegisters::default()
        };
        let (levels, shifts) = if pae { (3, [12, 21, 30]) } else { (2, [12, 22, 32]) };
        for (varied, combination) in
            (1..=levels).flat_map(|level| (0..1 << BITS.len()).map(move |c| (level, c)))
        {
            // The table of a level lies in the page with number 4 - level, and all of its entries are plain but the second.
            let put = |level: u64, index: u64, entry: u64| {
                let at = (levels + 1 - level) * 512;
                if pae {
                    words[(at + index) as usize].store(entry, Ordering::Relaxed);
                } else {
                    let word = &words[(at + index / 2) as usize];
                    let shift = index % 2 * 32;
                    let others = word.load(Ordering::Relaxed) & !(0xffff_ffff << shift);
                    word.store(others | (entry & 0xffff_ffff) << shift, Ordering::Relaxed);
                }
            };
            let varied_entry: u64 = BITS
                .iter()
                .enumerate()
                .map(|(number, bit)| (u64::from(combination >> number & 1 != 0)) << bit)
                .sum();
            for level in 1..=levels {
                let below = if level > 1 { levels + 2 - level } else { 8 };
                let rights = if level == 3 { 1 } else { 7 };
                for index in 0..4 {
                    let special = level == varied && index == 1;
                    put(level, index, below << 12 | if special { varied_entry } else { rights });
                }
            }
            let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][rng.usize(..3)];
            let access = Access::new(kind, [Privilege::User, Privilege::Supervisor][rng.usize(..2)]);
            let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
            let own = 1 << shifts[varied as usize - 1];
            let shared = rng.bool();
            let gvas: Vec<u64> = (0..130)
                .map(|_| {
                    let others = if shared { 0 } else { rng.u64(..4) << shifts[1] };
                    let page = if shared && varied == 1 { 0 } else { rng.u64(..4) << 12 };
                    (own ^ others ^ page) | rng.u64(..4096)
                })
                .collect();
            for answer in compare(&walker, &Window::new(&words), &access, &gvas) {
                pages += u32::from(answer.is_ok());
            }
        }
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
    assert!(pages > 500_000, "{pages}");
}

/// What a word says is what the translation says.
#[test]
fn words_lose_nothing_they_promise() {
    let words: Vec<AtomicU64> = (0..PAGES as usize * 512).map(|_| AtomicU64::new(0)).collect();
    let mut rng = fastrand::Rng::with_seed(7);
    let mut seen = 0;
    while seen < if cfg!(miri) { 20 } else { 20_000 } {
        let bytes: Vec<u8> = (0..128).map(|_| rng.u8(..)).collect();
        let mut input = Input::new(&bytes);
        let Some(walker) = setup::walker(&mut input) else { continue };
        let access = setup::access(&mut input);
        fill(&mut rng, &walker, |at, entry| words[at].store(entry, Ordering::Relaxed));
        for _ in 0..20 {
            let gva = address(&mut rng);
            let Ok(page) = walker.translate(&Window::new(&words), Gva(gva), &access) else { continue };
            let word = PageWord::of(&page);
            assert!(!word.is_fault());
            assert_eq!(PageWord::from_bits(word.bits()), word);
            assert_eq!(word.gpa(gva), Some(page.gpa));
            assert_eq!(
                (word.page_size(), word.rights(), word.backing(), word.key()),
                (page.page_size(), page.rights(), page.backing(), page.key())
            );
            assert_eq!(word.nested_page_size(), page.nested.map(|nested| nested.page_size));
            assert_eq!(
                (word.accessed(), word.dirty(), word.global(), word.pat_index()),
                (page.accessed(), page.dirty(), page.global(), page.pat_index())
            );
            seen += 1;
        }
    }
    assert!(PageWord::FAULT.is_fault());
    assert_eq!(PageWord::FAULT.gpa(0x123), None::<Gpa>);
    assert_eq!(PageWord::FAULT.page_size(), PageSize::Unpaged);
}
