//! The lanes of nested walks: guests in 4-level and 5-level paging over EPT, or over NPT in a long-mode format.
//!
//! A block is 64 addresses, and all of its walks are at the same place: for each level of the guest, the second dimension
//! finds where all their entries lie, level by level, and then the entries are loaded and judged. Every address is asked for
//! ahead of time, so that the walks wait for memory together. Whatever all walks of a block share, an entry of the guest's or
//! one of the second dimension's, is walked once for the block; large pages end a walk early in either dimension.
//!
//! As in one dimension, lanes only ever accept. They ask more of EPT than a CPU does, so that a word has no unusual rights to
//! tell: that pages are readable, that those of paging structures are writable, and that memory is WB or UC.

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::is_canonical;
use crate::batch::admission::{ADDRESS, Admission, State};
use crate::batch::column::{BLOCK, Column, differing, lanes, mask, offset, shift};
use crate::batch::dispatch::Walks;
use crate::batch::gather::Gather;
use crate::batch::ram::Ram;
use crate::batch::word::{NO_EXECUTE, PageWord, USER, WRITE, nested_size_of, with_backing};
use crate::memory::Memory;
use crate::nested::NgpaWalk;
use crate::walk::PageWalk;

/// What is the same for all walks of a batch.
pub(super) struct NestedLanes<'a, M, const EPT: bool> {
    ram: Ram<'a, M>,
    guest: Admission,
    /// An nGPA.
    root: u64,
    levels: u32,
    /// Addresses that are canonical by this width are walked as they are, whatever pointer bits a CPU ignores.
    width: u32,
    /// Finds the guest's entries.
    tables: Second<EPT>,
    /// Finds the page.
    page: Second<EPT>,
}

/// The second dimension, for one purpose. Entries of EPT are turned into entries of long mode that mean the same: X into NX, and
/// all are user pages.
struct Second<const EPT: bool> {
    admission: Admission,
    root: u64,
    levels: u32,
    /// Bits of an nGPA.
    width: u32,
}

impl<const EPT: bool> Second<EPT> {
    /// What the guest's entries, and what the access's page are found by; `None` where lanes do not know this dimension, or
    /// the access.
    fn both(second: &NgpaWalk, access: &Access) -> Option<[Self; 2]> {
        let walk = second.page_walk();
        let format = walk.format();
        if !format.mode().is_long() {
            return None;
        }
        let by = |kind| {
            let admission = match second {
                NgpaWalk::Npt(npt) if !EPT && !npt.controls().guest_mode_execute_trap => {
                    let privilege = if access.is_exempt() { Privilege::Exempt } else { Privilege::User };
                    Admission::new(format, &Access::new(kind, privilege))?
                }
                NgpaWalk::Ept(ept) if EPT && !ept.controls().mode_based_execute => {
                    Admission::of_ept(format, kind)
                }
                _ => return None,
            };
            Some(Self { admission, root: walk.root(), levels: format.levels(), width: format.linear_width() })
        };
        Some([by(AccessKind::Write)?, by(access.kind())?])
    }

    /// Puts the word of each nGPA's page into `words`, and says for which lanes there is none.
    #[inline(always)]
    fn resolve<M: Memory>(
        &self,
        gather: impl Gather,
        ram: &Ram<'_, M>,
        ngpas: &[u64],
        words: &mut Column,
    ) -> u64 {
        let (differing, first) = (differing(ngpas), ngpas.first().copied().unwrap_or_default());
        let mut refused = 0;
        if (first | differing) >> self.width != 0 {
            refused = mask(ngpas.iter().map(|ngpa| ngpa >> self.width != 0));
        }
        let (mut state, mut level) = (self.root, self.levels);
        while differing >> shift(level) == 0 {
            let entry = Self::as_long_mode(ram.load(state | offset(first, level)));
            if level == 1 {
                let word = self.admission.pages().word(state, entry);
                words.iter_mut().take(ngpas.len()).for_each(|own| *own = word);
                return if self.wrong(state, entry) == 0 { refused } else { u64::MAX };
            }
            let tables = self.admission.tables(level);
            if tables.wrong(entry) != 0 {
                for (ngpa, word) in ngpas.iter().zip(words) {
                    let Some(page) = self.large_page(level, state, entry, *ngpa) else { return u64::MAX };
                    *word = page;
                }
                return refused;
            }
            state = tables.through(state, entry, 0);
            level -= 1;
        }

        let (mut states, mut entries) = ([0; BLOCK], [0; BLOCK]);
        for (own, ngpa) in states.iter_mut().zip(ngpas) {
            *own = state | offset(*ngpa, level);
            ram.prefetch(*own);
        }
        let mut done = 0;
        while level > 1 {
            Self::load_all(gather, ram, &states, ngpas.len(), &mut entries);
            let tables = self.admission.tables(level);
            if entries.iter().take(ngpas.len()).fold(0, |wrong, entry| wrong | tables.wrong(*entry)) != 0 {
                let wrong = mask(entries.iter().take(ngpas.len()).map(|entry| tables.wrong(*entry) != 0));
                self.drop_out(level, wrong, ngpas, &states, &mut entries, words, &mut done, &mut refused);
                if (done | refused).count_ones() as usize >= ngpas.len() {
                    return refused;
                }
            }
            level -= 1;
            for ((state, entry), ngpa) in states.iter_mut().zip(&entries).zip(ngpas) {
                *state = tables.through(*state, *entry, offset(*ngpa, level));
                ram.prefetch(*state);
            }
        }
        Self::load_all(gather, ram, &states, ngpas.len(), &mut entries);
        let pages = self.admission.pages();
        let judged = entries.iter().zip(&states).take(ngpas.len());
        let wrong = judged.clone().fold(0, |wrong, (entry, state)| wrong | self.wrong(*state, *entry));
        if wrong != 0 {
            refused |= mask(judged.clone().map(|(entry, state)| self.wrong(*state, *entry) != 0)) & !done;
        }
        if done == 0 {
            words
                .iter_mut()
                .zip(judged)
                .for_each(|(word, (entry, state))| *word = pages.word(*state, *entry));
        } else {
            for (lane, (word, (entry, state))) in words.iter_mut().zip(judged).enumerate() {
                *word = if done >> lane & 1 == 0 { pages.word(*state, *entry) } else { *word };
            }
        }
        refused
    }

    /// Lanes that have met something else than a table at `level`: a large page, or what lanes do not accept.
    #[expect(clippy::too_many_arguments, reason = "columns, and masks of lanes")]
    #[inline(never)]
    fn drop_out(
        &self,
        level: u32,
        which: u64,
        ngpas: &[u64],
        states: &Column,
        entries: &mut Column,
        words: &mut Column,
        done: &mut u64,
        refused: &mut u64,
    ) {
        for lane in lanes(which) {
            let (Some(ngpa), Some(state), Some(entry), Some(word)) =
                (ngpas.get(lane), states.get(lane), entries.get_mut(lane), words.get_mut(lane))
            else {
                return;
            };
            if (*done | *refused) >> lane & 1 == 0 {
                match self.large_page(level, *state, *entry, *ngpa) {
                    Some(page) => {
                        *word = page;
                        *done |= 1 << lane;
                    }
                    None => *refused |= 1 << lane,
                }
            }
            // What they load from now on had better be near.
            *entry = self.root;
        }
    }

    fn large_page(&self, level: u32, state: State, entry: u64, ngpa: u64) -> Option<u64> {
        if Self::unusual_type(entry) == 0 {
            self.admission.large_page(level, state, entry, ngpa)
        } else {
            None
        }
    }

    /// The bits that keep a PTE from mapping a page that the access may use.
    #[inline(always)]
    fn wrong(&self, state: State, entry: u64) -> u64 {
        self.admission.pages().wrong(state, entry) | Self::unusual_type(entry)
    }

    /// The next entries.
    #[inline(always)]
    fn load_all<M: Memory>(
        gather: impl Gather,
        ram: &Ram<'_, M>,
        states: &Column,
        count: usize,
        entries: &mut Column,
    ) {
        ram.load_all(gather, states, count, entries);
        if EPT {
            entries.iter_mut().for_each(|entry| *entry = Self::as_long_mode(*entry));
        }
    }

    #[inline(always)]
    const fn as_long_mode(entry: u64) -> u64 {
        if EPT { entry & !NO_EXECUTE | USER | !entry << 61 & NO_EXECUTE } else { entry }
    }

    /// 0 for a leaf of memory type 0 (UC) or 6 (WB): bit 3 is clear, and bits 4 and 5 are equal.
    #[inline(always)]
    const fn unusual_type(entry: u64) -> u64 {
        if EPT { entry & 1 << 3 | (entry ^ entry >> 1) & 1 << 4 } else { 0 }
    }
}

/// Walks in flight.
struct Block {
    states: Column,
    /// Where the guest's entries lie, in the words of their pages.
    homes: Column,
    entries: Column,
    /// The words of the guest's pages, with nGPAs.
    pages: Column,
    /// Lanes whose page of the guest is known.
    mapped: u64,
    /// Lanes whose address is to be walked alone.
    alone: u64,
}

impl Block {
    /// Lanes that are still on their way.
    fn walking(&self) -> u64 {
        !(self.mapped | self.alone)
    }
}

impl<'a, M: Memory, const EPT: bool> NestedLanes<'a, M, EPT> {
    /// `None` where lanes do not know one of the dimensions, or the access.
    pub(super) fn new(walk: &PageWalk, second: &NgpaWalk, memory: &'a M, access: &Access) -> Option<Self> {
        let format = walk.format();
        if access.is_shadow_stack() || !format.mode().is_long() {
            return None;
        }
        let guest = Admission::new(format, access)?;
        let [tables, page] = Second::both(second, access)?;
        Some(Self {
            ram: Ram::new(memory),
            guest,
            root: walk.root(),
            levels: format.levels(),
            width: format.unchanged_width(),
            tables,
            page,
        })
    }

    /// Takes the walks of a block to the guest's pages.
    #[inline(always)]
    fn descend(&self, gather: impl Gather, block: &mut Block, gvas: &[u64]) {
        let (differing, first) = (differing(gvas), gvas.first().copied().unwrap_or_default());
        block.mapped = 0;
        block.alone = 0;
        if differing >> (self.width - 1) != 0 {
            block.alone = mask(gvas.iter().map(|gva| !is_canonical(*gva, self.width)));
        } else if !is_canonical(first, self.width) {
            block.alone = u64::MAX;
            return;
        }
        let mut level = self.levels;
        // As long as one walk stands for all, there is but one.
        let mut walks = if differing >> shift(level) == 0 { 1 } else { gvas.len() };
        for (state, gva) in block.states.iter_mut().zip(gvas) {
            *state = self.root | offset(*gva, level);
        }
        loop {
            self.load_entries(gather, block, walks);
            if level == 1 {
                break;
            }
            let tables = self.guest.tables(level);
            let entries = block.entries.iter().take(walks);
            if entries.clone().fold(0, |wrong, entry| wrong | tables.wrong(*entry)) != 0 {
                if walks == 1 {
                    self.spread(block);
                    walks = gvas.len();
                }
                let wrong = mask(block.entries.iter().take(walks).map(|entry| tables.wrong(*entry) != 0));
                self.drop_out(block, level, wrong, gvas);
                if block.walking() & live(gvas.len()) == 0 {
                    return;
                }
            }
            level -= 1;
            if walks == 1 && differing >> shift(level) != 0 {
                self.spread(block);
                walks = gvas.len();
            }
            for ((state, entry), gva) in block.states.iter_mut().zip(&block.entries).zip(gvas).take(walks) {
                *state = tables.through(*state, *entry, offset(*gva, level));
            }
        }
        if walks == 1 {
            self.spread(block);
        }
        let pages = self.guest.pages();
        let judged = block.entries.iter().zip(&block.states).take(gvas.len());
        let wrong = mask(judged.clone().map(|(entry, state)| pages.wrong(*state, *entry) != 0));
        block.alone |= wrong & !block.mapped;
        for (lane, (page, (entry, state))) in block.pages.iter_mut().zip(judged).enumerate() {
            *page = if block.mapped >> lane & 1 == 0 { pages.word(*state, *entry) } else { *page };
        }
        block.mapped |= !block.alone;
    }

    /// Loads the entries that the states lead to, which lie at nGPAs.
    #[inline(always)]
    fn load_entries(&self, gather: impl Gather, block: &mut Block, walks: usize) {
        let Block { states, homes, entries, .. } = block;
        // Those that are not on their way any more stay where another one is.
        let resting = (block.mapped | block.alone) & live(walks);
        if resting != 0 {
            let elsewhere = states.get((!resting).trailing_zeros() as usize).copied().unwrap_or(self.root);
            for lane in lanes(resting) {
                if let Some(state) = states.get_mut(lane) {
                    *state = elsewhere;
                }
            }
        }
        let mut ngpas = [0; BLOCK];
        for (ngpa, state) in ngpas.iter_mut().zip(states.iter()).take(walks) {
            *ngpa = state & ADDRESS;
        }
        let Some(ngpas) = ngpas.get(..walks) else { return };
        block.alone |= self.tables.resolve(gather, &self.ram, ngpas, homes) & !block.mapped;
        for (home, ngpa) in homes.iter_mut().zip(ngpas) {
            *home = *home & PageWord::FRAME | ngpa & 0xfff;
            self.ram.prefetch(*home);
        }
        self.ram.load_all(gather, homes, walks, entries);
    }

    /// Lets the first walk be all walks.
    #[inline(always)]
    fn spread(&self, block: &mut Block) {
        let ([state, ..], [entry, ..]) = (block.states, block.entries);
        block.states = [state; BLOCK];
        block.entries = [entry; BLOCK];
        if block.alone & 1 != 0 {
            block.alone = u64::MAX;
        }
    }

    /// Lanes that have met something else than a table.
    #[inline(never)]
    fn drop_out(&self, block: &mut Block, level: u32, which: u64, gvas: &[u64]) {
        for lane in lanes(which & block.walking()) {
            let (Some(gva), Some(page), Some(entry), Some(state)) =
                (gvas.get(lane), block.pages.get_mut(lane), block.entries.get(lane), block.states.get(lane))
            else {
                return;
            };
            match self.guest.large_page(level, *state, *entry, *gva) {
                Some(word) => {
                    *page = word;
                    block.mapped |= 1 << lane;
                }
                None => block.alone |= 1 << lane,
            }
        }
    }

    /// Puts the guest's pages where the second dimension has them.
    #[inline(always)]
    fn finish(&self, gather: impl Gather, block: &mut Block, gvas: &[u64], words: &mut [u64]) {
        if block.mapped & live(gvas.len()) == 0 {
            return;
        }
        let mut ngpas = [0; BLOCK];
        let somewhere = block.pages.get(block.mapped.trailing_zeros() as usize).copied().unwrap_or_default();
        for (lane, (ngpa, page)) in ngpas.iter_mut().zip(&block.pages).take(gvas.len()).enumerate() {
            *ngpa = if block.mapped >> lane & 1 != 0 { *page } else { somewhere } & PageWord::FRAME;
        }
        let Some(ngpas) = ngpas.get(..gvas.len()) else { return };
        block.alone |= self.page.resolve(gather, &self.ram, ngpas, &mut block.homes);
        let columns = words.iter_mut().zip(&block.pages).zip(&block.homes).zip(gvas);
        for (((word, guest), nested), gva) in columns {
            const BOTH: u64 = WRITE | USER;
            let frame = nested & PageWord::FRAME;
            *word = guest & !(PageWord::FRAME | BOTH)
                | guest & nested & BOTH
                | nested & (PageWord::FRAME | NO_EXECUTE)
                | nested_size_of(*nested);
            if self.ram.outside(frame) >> 63 != 0 {
                *word = with_backing(*word, *gva, self.ram.memory);
            }
        }
    }
}

/// The lanes that so many walks take.
#[inline(always)]
const fn live(walks: usize) -> u64 {
    if walks >= BLOCK { u64::MAX } else { (1 << walks) - 1 }
}

impl<M: Memory, const EPT: bool> Walks for NestedLanes<'_, M, EPT> {
    #[inline(always)]
    fn run(
        &self,
        gather: impl Gather,
        gvas: &[u64],
        words: &mut [u64],
        alone: &mut dyn FnMut(usize, u64) -> u64,
    ) {
        let none = [0; BLOCK];
        let mut block = Block { states: none, homes: none, entries: none, pages: none, mapped: 0, alone: 0 };
        for (number, (gvas, words)) in gvas.chunks(BLOCK).zip(words.chunks_mut(BLOCK)).enumerate() {
            let gvas = gvas.get(..words.len()).unwrap_or(gvas);
            self.descend(gather, &mut block, gvas);
            self.finish(gather, &mut block, gvas, words);
            for lane in lanes(block.alone) {
                if let (Some(gva), Some(word)) = (gvas.get(lane), words.get_mut(lane)) {
                    *word = alone(number * BLOCK + lane, *gva);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::NestedGpa;
    use crate::batch::gather::OneByOne;
    use crate::ept::{EptCapabilities, EptControls};
    use crate::mode::{
        CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::nested::NestedPhase;
    use crate::single_path::{OUTSIDE, SinglePath};
    use crate::trace::NoTrace;

    /// P or R, W, U or X, three of the memory type, PS, A, D, user-execute, a bit that large frames reserve, an absent frame, one
    /// above MAXPHYADDR, NX.
    const BITS: [u64; 14] = [
        1,
        1 << 1,
        1 << 2,
        1 << 3,
        1 << 4,
        1 << 5,
        1 << 7,
        1 << 8,
        1 << 9,
        1 << 10,
        1 << 13,
        OUTSIDE,
        1 << 45,
        1 << 63,
    ];

    /// Second dimensions of both kinds and widths, with and without what entries may be refused for.
    fn seconds() -> impl Iterator<Item = NgpaWalk> {
        let cpu = |vendor, gib_pages| CpuProfile { vendor, maxphyaddr: 40, gib_pages, encryption_bit: None };
        let npt = (0..8_u64).map(move |format| {
            let when = |bit: u32, value: u64| if format >> bit & 1 != 0 { value } else { 0 };
            let host = ControlRegisters {
                cr0: CR0_PE | CR0_PG,
                cr4: CR4_PAE | when(0, CR4_LA57),
                efer: EFER_LME | EFER_LMA | when(1, EFER_NXE),
                ..ControlRegisters::default()
            };
            let levels = if format & 1 == 0 { 4 } else { 5 };
            NgpaWalk::npt(levels << 30, &host, &cpu(Vendor::Amd, format & 4 == 0))
        });
        let ept = (0..16_u64).map(move |format| {
            let levels = if format & 1 == 0 { 4 } else { 5 };
            let eptp = levels << 30 | (levels - 1) << 3 | 6 | (format >> 1 & 1) << 6;
            let capabilities = EptCapabilities {
                execute_only: format & 4 != 0,
                pages_2m: format & 8 != 0,
                pages_1g: format & 8 != 0,
                ..EptCapabilities::all()
            };
            NgpaWalk::ept(eptp, &EptControls::default(), &capabilities, &cpu(Vendor::Intel, true))
        });
        npt.chain(ept).map(|second| second.expect("these registers are valid"))
    }

    fn resolve<const EPT: bool>(
        second: &NgpaWalk,
        access: &Access,
        phase: NestedPhase,
        path: &SinglePath,
        column: &[u64],
        words: &mut Column,
    ) -> u64 {
        let [tables, page] = Second::<EPT>::both(second, access).expect("lanes know these");
        let by = if phase == NestedPhase::Table { tables } else { page };
        by.resolve(OneByOne, &Ram::new(path), column, words)
    }

    /// For every format, level and combination of the bits that matter: what lanes accept is what the second dimension answers, and
    /// what they leave of that are pages of EPT with rights or a memory type that are unusual.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn accepting_implies_agreement() {
        let mut rng = fastrand::Rng::with_seed(13);
        let (mut accepted, mut left, mut refused) = ([0; 5], 0, 0);
        for second in seconds() {
            let levels = second.page_walk().format().levels();
            let ept = second.page_walk().format().is_ept();
            for varied in 1..=levels as usize {
                for combination in 0..1_u32 << BITS.len() {
                    let mut path = SinglePath([0; 6]);
                    for (level, entry) in path.0.iter_mut().enumerate().skip(1) {
                        let memory_type = if ept && level == 1 { 6 << 3 } else { 0 };
                        *entry = (level as u64 - 1) << 30 | memory_type | 1;
                        *entry |= if rng.u8(..6) > 0 { 2 } else { 0 } | if rng.u8(..6) > 0 { 4 } else { 0 };
                        if level == varied {
                            *entry &= !0x3f;
                            for (number, bit) in BITS.iter().enumerate() {
                                *entry |= if combination >> number & 1 != 0 { *bit } else { 0 };
                            }
                        }
                    }
                    let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][rng.usize(..3)];
                    let privilege =
                        [Privilege::User, Privilege::Supervisor, Privilege::Exempt][rng.usize(..3)];
                    let access = Access::new(kind, privilege);
                    let ngpa = rng.u64(..) & 0xffff_ffff_f000;
                    // Alone, and beside one that shares no entry with it.
                    let column = [ngpa, ngpa ^ 1 << 47];
                    let column = if rng.bool() { &column[..1] } else { &column[..] };
                    for phase in [NestedPhase::Table, NestedPhase::Final] {
                        let mut words = [0; BLOCK];
                        let refused_lanes = if ept {
                            resolve::<true>(&second, &access, phase, &path, column, &mut words)
                        } else {
                            resolve::<false>(&second, &access, phase, &path, column, &mut words)
                        };
                        let without = refused_lanes & 1 != 0;
                        let general = second.translate(&path, NestedGpa(ngpa), &access, phase, &mut NoTrace);
                        let word = PageWord::from_bits(words[0]);
                        match general {
                            Ok(page) if !without => {
                                let nested = page.nested.expect("the second dimension's page");
                                assert_eq!(word.gpa(ngpa), Some(page.gpa), "{path:x?}", path = path.0);
                                assert_eq!(word.page_size(), nested.page_size);
                                if phase == NestedPhase::Final {
                                    assert_eq!(word.rights(), page.rights(), "{:x?} {second:?}", path.0);
                                }
                                accepted[nested.page_size as usize] += 1;
                            }
                            Ok(page) => {
                                let unusual = ept
                                    && (!page.rights().read()
                                        || phase == NestedPhase::Table && !page.rights().write()
                                        || path.0[varied] & 0x38 != 0x30
                                        || path.0.iter().skip(1).any(|entry| entry & 3 != 3));
                                assert!(unusual || privilege == Privilege::Exempt, "{page:?} {:x?}", path.0);
                                left += 1;
                            }
                            Err(fault) => {
                                assert!(without, "{fault:?} {access:?} {:x?} {second:?}", path.0);
                                refused += 1;
                            }
                        }
                    }
                }
            }
        }
        for size in [crate::PageSize::Size4K, crate::PageSize::Size2M, crate::PageSize::Size1G] {
            assert!(accepted[size as usize] > 1_000, "{size:?}: {accepted:?}");
        }
        let all: u32 = accepted.iter().sum();
        assert!(left < all, "{left} left, {all} accepted");
        assert!(refused > 1_000_000, "{refused}");
    }
}
