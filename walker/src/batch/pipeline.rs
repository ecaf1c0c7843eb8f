//! The lanes: walks of one dimension that wait for memory together, in every paging mode.
//!
//! A block is 64 addresses. Four blocks are in flight at a time, each one level further down than the one behind it: while
//! one block's PTEs are on their way from memory, the PDEs of the next are judged and its PTEs asked for. Levels whose
//! entry all addresses of a block share are walked once for the block, so that addresses near one another cost little more
//! than one load each. The last page table that a whole block shared is remembered within the batch: a block of addresses
//! that lead through it has its words at once, and waits for nothing, as long as the entries that lead there are what they were.
//!
//! A level is three loops over the lanes: entries are loaded, judged and asked for. Each is loaded in one atomic access,
//! eight at a time where the CPU can; judging has no branch and touches columns alone, so that the compiler makes vector instructions of it. A lane
//! that meets a large page has its word at once. One that meets anything it does not accept drops out: its address is
//! walked alone when its block is done, so that faults come in order. Either keeps loading meanwhile, to no effect.

use core::iter::repeat;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::access::Access;
use crate::addr::Gpa;
use crate::batch::admission::{Admission, State, TablePages};
use crate::batch::column::{BLOCK, Column, differing, lanes, mask, offset, shift};
use crate::batch::dispatch::Walks;
use crate::batch::gather::{Gather, WIDTH};
use crate::batch::ram::Ram;
use crate::batch::word::{PageWord, USER, WRITE, with_backing};
use crate::memory::Memory;
use crate::mode::PagingMode;
use crate::walk::PageWalk;

/// Blocks in flight: one for each of the lower four levels.
const FLIGHT: usize = 8;
/// How many turns after a block has entered it is judged at level 1.
const BEHIND: usize = 6;
/// Entries in a cache line.
const LINE: usize = 8;

/// What is the same for all walks of a batch. With 32-bit paging, entries are `SHORT`: two in a word.
pub(super) struct Lanes<'a, M, const SHORT: bool> {
    ram: Ram<'a, M>,
    admission: Admission,
    root: u64,
    levels: u32,
    /// PAE paging: the state behind each PDPTE; they are loaded once.
    pdptes: Option<[Option<State>; 4]>,
    /// An address is walked as it is, whatever pointer bits a CPU ignores, if its bits from this one on are all clear, or
    /// those of `sign`.
    linear_bits: u32,
    sign: u64,
}

/// A page table that some block of the batch has shared, and an address that leads through it.
struct KnownTable<'a> {
    gva: u64,
    state: State,
    path: Path,
    entries: &'a [AtomicU64; 512],
}

impl KnownTable<'_> {
    /// A guess by the first address: [`Lanes::at_once`] looks at all of them.
    #[inline(always)]
    fn leads(&self, gvas: &[u64]) -> bool {
        gvas.first().is_some_and(|gva| (gva ^ self.gva) >> shift(2) == 0)
    }
}

/// The words above level 1 that a walk went through, and where they lie; the first of them in all places that are left.
#[derive(Clone, Copy)]
struct Path([(State, u64); 4]);

impl Path {
    #[inline(always)]
    fn note(&mut self, level: u32, place: State, word: u64) {
        self.0[(level.wrapping_sub(2) & 3) as usize] = (place, word);
    }

    /// Whether the guest has left all of it as it was.
    #[inline(always)]
    fn holds<M: Memory>(&self, ram: &Ram<'_, M>) -> bool {
        self.0.iter().fold(0, |changes, (place, word)| changes | (ram.load(*place) ^ word)) == 0
    }
}

/// What stages work with and do not keep.
struct Columns {
    entries: Column,
    pages: Column,
}

/// Walks in flight.
struct Block {
    states: [State; BLOCK],
    /// Lanes that have their word.
    done: u64,
    /// Lanes whose address is to be walked alone.
    alone: u64,
    /// The first level that lanes walk on their own; 0 where nothing is left to walk.
    from: u32,
}

impl Block {
    const EMPTY: Self = Self { states: [0; BLOCK], done: 0, alone: 0, from: 0 };

    /// Lanes that are still on their way.
    fn walking(&self) -> u64 {
        !(self.done | self.alone)
    }
}

/// Lanes whose PTE is not accepted, and those whose page is not in the run of RAM.
#[derive(Clone, Copy)]
struct Verdict {
    refused: u64,
    elsewhere: u64,
}

impl<'a, M: Memory, const SHORT: bool> Lanes<'a, M, SHORT> {
    /// `None` where lanes do not know the paging mode, or the access.
    pub(super) fn new(walk: &PageWalk, memory: &'a M, access: &Access) -> Option<Self> {
        let format = walk.format();
        let mode = format.mode();
        if SHORT != (mode == PagingMode::TwoLevel) {
            return None;
        }
        let (linear_bits, sign) =
            if mode.is_long() { (format.unchanged_width() - 1, u64::MAX) } else { (32, 0) };
        let lanes = Self {
            ram: Ram::new(memory),
            admission: Admission::new(format, access)?,
            root: walk.root(),
            levels: format.levels(),
            pdptes: None,
            linear_bits,
            sign,
        };
        Some(if mode == PagingMode::Pae { Self { pdptes: Some(lanes.pdptes(walk)), ..lanes } } else { lanes })
    }

    /// The states behind the PDPTEs that refer to a table.
    fn pdptes(&self, walk: &PageWalk) -> [Option<State>; 4] {
        // A PDPTE of PAE paging grants everything.
        const RIGHTS: u64 = WRITE | USER;
        let tables = self.admission.tables(self.levels);
        [0, 1, 2, 3].map(|number| {
            let register = walk.pdpte_register(self.levels, number);
            let pdpte = register.unwrap_or_else(|| self.ram.load(self.root | number << 3));
            (tables.wrong(pdpte) == 0).then(|| tables.through(0, pdpte | RIGHTS, 0))
        })
    }

    /// Whether the address is walked as it is.
    #[inline(always)]
    const fn is_plain(&self, gva: u64) -> bool {
        let above = (gva as i64 >> self.linear_bits) as u64;
        above == 0 || above == self.sign
    }

    /// Number of address bits below the index of `level`.
    #[inline(always)]
    const fn shift(level: u32) -> u32 {
        if SHORT { 12 + 10 * (level.wrapping_sub(1) & 1) } else { shift(level) }
    }

    /// The number of the word that holds the entry for `gva` in a table of `level`.
    #[inline(always)]
    const fn number(gva: u64, level: u32) -> u64 {
        gva >> (Self::shift(level) + SHORT as u32) & 511
    }

    /// Where that word lies in its table, in bytes.
    #[inline(always)]
    const fn offset(gva: u64, level: u32) -> u64 {
        Self::number(gva, level) << 3
    }

    /// The entry for `gva`, out of that word.
    #[inline(always)]
    const fn entry(word: u64, gva: u64, level: u32) -> u64 {
        if SHORT { word >> ((gva >> Self::shift(level) & 1) << 5) & 0xffff_ffff } else { word }
    }
}

impl<M: Memory, const SHORT: bool> Walks for Lanes<'_, M, SHORT> {
    #[inline(always)]
    fn run(
        &self,
        gather: impl Gather,
        gvas: &[u64],
        words: &mut [u64],
        alone: &mut dyn FnMut(usize, u64) -> u64,
    ) {
        let length = gvas.len().min(words.len());
        let (Some(gvas), Some(words)) = (gvas.get(..length), words.get_mut(..length)) else { return };
        let blocks = length.div_ceil(BLOCK);
        let mut flight = [Block::EMPTY; FLIGHT];
        let mut columns = Columns { entries: [0; BLOCK], pages: [0; BLOCK] };
        let mut known: Option<KnownTable<'_>> = None;
        // The turn from which on nothing is in flight.
        let mut clear = 0;
        let mut turn = 0;
        while turn < blocks + BEHIND {
            let mut entered = false;
            if let Some(known) = &known {
                while !entered
                    && let (Some(gvas), Some(words)) = (block(gvas, turn), block_mut(words, turn))
                    && known.leads(gvas)
                    && known.path.holds(&self.ram)
                    && self.at_once(gather, known, &mut columns.entries, gvas, words)
                {
                    entered = turn < clear;
                    turn += usize::from(!entered);
                }
            }
            for (behind, level) in [(BEHIND, 1), (4, 2), (2, 3), (0, 4)] {
                let number = turn.wrapping_sub(behind);
                let (Some(gvas), Some(words), Some(block)) =
                    (block(gvas, number), block_mut(words, number), flight.get_mut(number % FLIGHT))
                else {
                    continue;
                };
                match level {
                    4 if entered => {}
                    4 => {
                        self.enter(gather, block, &mut columns, &mut known, gvas, words);
                        clear = turn + BEHIND + 1;
                    }
                    3 => self.descend::<3>(gather, block, &mut columns, gvas, words),
                    2 => self.descend::<2>(gather, block, &mut columns, gvas, words),
                    _ => {
                        self.finish(gather, block, &mut columns, gvas, words);
                        for lane in lanes(block.alone) {
                            if let (Some(gva), Some(word)) = (gvas.get(lane), words.get_mut(lane)) {
                                *word = alone(number * BLOCK + lane, *gva);
                            }
                        }
                        block.alone = 0;
                        block.from = 0;
                    }
                }
            }
            turn += 1;
        }
    }
}

/// Which of the four PDPTEs of PAE paging an address goes through.
#[inline(always)]
const fn pdpte_number(gva: u64) -> usize {
    (gva >> 30 & 3) as usize
}

/// Block `number` of a column; the last one may be shorter than the others.
#[inline(always)]
fn block(column: &[u64], number: usize) -> Option<&[u64]> {
    let rest = column.get(number.wrapping_mul(BLOCK)..).filter(|rest| !rest.is_empty())?;
    rest.get(..BLOCK).or(Some(rest))
}

/// As [`block`].
#[inline(always)]
fn block_mut(column: &mut [u64], number: usize) -> Option<&mut [u64]> {
    let rest = column.get_mut(number.wrapping_mul(BLOCK)..).filter(|rest| !rest.is_empty())?;
    let length = rest.len().min(BLOCK);
    rest.get_mut(..length)
}

impl<'a, M: Memory, const SHORT: bool> Lanes<'a, M, SHORT> {
    /// Walks the levels that all addresses share, and those above level 3 that they do not.
    #[inline(always)]
    fn enter(
        &self,
        gather: impl Gather,
        block: &mut Block,
        columns: &mut Columns,
        known: &mut Option<KnownTable<'a>>,
        gvas: &[u64],
        words: &mut [u64],
    ) {
        let first = gvas.first().copied().unwrap_or_default();
        block.done = 0;
        block.alone = 0;
        block.from = 0;
        let differing = differing(gvas);
        if differing >> self.linear_bits != 0 {
            block.alone = mask(gvas.iter().map(|gva| !self.is_plain(*gva)));
        } else if !self.is_plain(first) {
            block.alone = u64::MAX;
            return;
        }

        let (mut state, mut level) = (self.root, self.levels);
        let mut path = None;
        if let Some(pdptes) = &self.pdptes {
            if differing >> shift(level) != 0 {
                self.enter_pae(block, pdptes, gvas);
                return;
            }
            let Some(behind) = pdptes[pdpte_number(first)] else {
                block.alone = u64::MAX;
                return;
            };
            state = behind;
            level -= 1;
        }
        while level > 1 && differing >> Self::shift(level) == 0 {
            let place = state | Self::offset(first, level);
            let word = self.ram.load(place);
            path.get_or_insert(Path([(place, word); 4])).note(level, place, word);
            let entry = Self::entry(word, first, level);
            let tables = self.admission.tables(level);
            if tables.wrong(entry) != 0 {
                block.states = [state; BLOCK];
                columns.entries = [entry; BLOCK];
                self.drop_out(block, level, u64::MAX, &mut columns.entries, gvas, words);
                return;
            }
            state = tables.through(state, entry, 0);
            level -= 1;
        }
        block.from = level;
        if level == 1 {
            // They share the table, and are perhaps neighbours.
            block.states[0] = state;
            *known = path.and_then(|path| self.known(first, state, path));
            gvas.iter().step_by(LINE).for_each(|gva| self.ram.prefetch(state | Self::offset(*gva, 1)));
            return;
        }
        for (own, gva) in block.states.iter_mut().zip(gvas) {
            *own = state | Self::offset(*gva, level);
        }
        if level > 3 {
            self.descend::<5>(gather, block, columns, gvas, words);
            self.descend::<4>(gather, block, columns, gvas, words);
        } else {
            block.states.iter().take(gvas.len()).for_each(|state| self.ram.prefetch(*state));
        }
    }

    /// Walks of PAE paging that go through several PDPTEs.
    fn enter_pae(&self, block: &mut Block, pdptes: &[Option<State>; 4], gvas: &[u64]) {
        const PDE: u32 = 2;
        for (lane, (own, gva)) in block.states.iter_mut().zip(gvas).enumerate() {
            if let Some(behind) = pdptes[pdpte_number(*gva)] {
                *own = behind | offset(*gva, PDE);
                self.ram.prefetch(*own);
            } else {
                *own = self.root;
                block.alone |= 1 << lane;
            }
        }
        block.from = PDE;
    }

    fn known(&self, gva: u64, state: State, path: Path) -> Option<KnownTable<'a>> {
        Some(KnownTable { gva, state, path, entries: self.ram.memory.table(Gpa(state & PageWord::FRAME))? })
    }

    /// Gives a whole block its words, where all of its addresses lead through this page table to pages in RAM that the access
    /// may use. Otherwise what it has put into `words` does not count.
    #[inline(always)]
    fn at_once<G: Gather>(
        &self,
        gather: G,
        table: &KnownTable<'_>,
        entries: &mut Column,
        gvas: &[u64],
        words: &mut [u64],
    ) -> bool {
        let (Some(gvas), Some(words)) = (gvas.as_array::<BLOCK>(), words.as_mut_array::<BLOCK>()) else {
            return false;
        };
        let pages = self.admission.pages().under(table.state);
        if G::TOGETHER {
            return self.at_once_gathered(gather, table, pages, gvas, words);
        }
        for (entry, gva) in entries.iter_mut().zip(gvas) {
            let word = &table.entries[Self::number(*gva, 1) as usize];
            *entry = u64::from_le(word.load(Ordering::Relaxed));
        }
        Self::pick(entries, gvas, 1);
        let (mut differing, mut elsewhere, mut outside) = (0, 0, 0);
        for ((word, entry), gva) in words.iter_mut().zip(entries.iter()).zip(gvas) {
            let page = pages.word(*entry);
            differing |= pages.differing(*entry);
            elsewhere |= gva ^ table.gva;
            outside |= self.ram.outside(page & PageWord::FRAME);
            *word = page;
        }
        Self::all_accepted(pages, differing, elsewhere, outside)
    }

    /// The same, with entries that stay in the registers into which they are gathered.
    #[inline(always)]
    fn at_once_gathered(
        &self,
        gather: impl Gather,
        table: &KnownTable<'_>,
        pages: TablePages,
        gvas: &Column,
        words: &mut Column,
    ) -> bool {
        // By lane until the end: what is folded meanwhile leaves the vectors.
        let mut found = [[0; WIDTH]; 3];
        let [differing, elsewhere, outside] = &mut found;
        for (words, gvas) in words.as_chunks_mut::<WIDTH>().0.iter_mut().zip(gvas.as_chunks::<WIDTH>().0) {
            let entries = gather.gather(table.entries, &gvas.map(|gva| Self::number(gva, 1)));
            for lane in 0..WIDTH {
                let entry = Self::entry(entries[lane], gvas[lane], 1);
                let page = pages.word(entry);
                differing[lane] |= pages.differing(entry);
                elsewhere[lane] |= gvas[lane] ^ table.gva;
                outside[lane] |= self.ram.outside(page & PageWord::FRAME);
                words[lane] = page;
            }
        }
        let [differing, elsewhere, outside] = found.map(|lanes| lanes.iter().fold(0, |all, lane| all | lane));
        Self::all_accepted(pages, differing, elsewhere, outside)
    }

    /// Whether no entry of a table differs from those that map pages, no address leads elsewhere, and no page is outside the run.
    #[inline(always)]
    fn all_accepted(pages: TablePages, differing: u64, elsewhere: u64, outside: u64) -> bool {
        pages.accepts(differing) && elsewhere >> Self::shift(2) == 0 && outside >> 63 == 0
    }

    /// Leaves of each word the entry that is meant.
    #[inline(always)]
    fn pick(entries: &mut Column, gvas: &[u64], level: u32) {
        if SHORT {
            entries.iter_mut().zip(gvas).for_each(|(entry, gva)| *entry = Self::entry(*entry, *gva, level));
        }
    }

    /// Takes the lanes that are at `LEVEL` one level down.
    #[inline(always)]
    fn descend<const LEVEL: u32>(
        &self,
        gather: impl Gather,
        block: &mut Block,
        columns: &mut Columns,
        gvas: &[u64],
        words: &mut [u64],
    ) {
        if block.from < LEVEL {
            return;
        }
        let entries = &mut columns.entries;
        self.ram.load_all(gather, &block.states, gvas.len(), entries);
        Self::pick(entries, gvas, LEVEL);
        let tables = self.admission.tables(LEVEL);
        if entries.iter().fold(0, |wrong, entry| wrong | tables.wrong(*entry)) != 0 {
            let wrong = mask(entries.iter().map(|entry| tables.wrong(*entry) != 0));
            self.drop_out(block, LEVEL, wrong, entries, gvas, words);
        }
        for ((state, entry), gva) in block.states.iter_mut().zip(entries.iter()).zip(gvas) {
            *state = tables.through(*state, *entry, Self::offset(*gva, LEVEL - 1));
        }
        for state in block.states.iter().take(gvas.len()) {
            self.ram.prefetch(*state);
        }
    }

    /// Gives those of these lanes a word that have met a large page, and lets the others be walked alone.
    #[inline(never)]
    fn drop_out(
        &self,
        block: &mut Block,
        level: u32,
        which: u64,
        entries: &mut Column,
        gvas: &[u64],
        words: &mut [u64],
    ) {
        for lane in lanes(which & block.walking()) {
            let (Some(gva), Some(word), Some(entry), Some(state)) =
                (gvas.get(lane), words.get_mut(lane), entries.get(lane), block.states.get(lane))
            else {
                return;
            };
            match self.admission.large_page(level, *state, *entry, *gva) {
                Some(page) => {
                    *word = with_backing(page, *gva, self.ram.memory);
                    block.done |= 1 << lane;
                }
                None => block.alone |= 1 << lane,
            }
        }
        // What they load from now on had better be near.
        for lane in lanes(which) {
            if let Some(entry) = entries.get_mut(lane) {
                *entry = self.root;
            }
        }
    }

    /// Gives each lane that is still on its way its word.
    #[inline(always)]
    fn finish(
        &self,
        gather: impl Gather,
        block: &mut Block,
        columns: &mut Columns,
        gvas: &[u64],
        words: &mut [u64],
    ) {
        let [first, ..] = block.states;
        let Columns { entries, pages } = columns;
        let verdict = match block.from {
            0 => return,
            1 => {
                let table = Gpa(first & PageWord::FRAME);
                if let Some(words) = self.ram.memory.table(table) {
                    for (entry, gva) in entries.iter_mut().zip(gvas) {
                        let word = &words[Self::number(*gva, 1) as usize];
                        *entry = u64::from_le(word.load(Ordering::Relaxed));
                    }
                } else {
                    for (entry, gva) in entries.iter_mut().zip(gvas) {
                        *entry = self.ram.memory.load_in_table(table, Self::offset(*gva, 1)).unwrap_or(0);
                    }
                }
                Self::pick(entries, gvas, 1);
                self.judge(repeat(first), entries, pages)
            }
            _ => {
                self.ram.load_all(gather, &block.states, gvas.len(), entries);
                Self::pick(entries, gvas, 1);
                self.judge(block.states.iter().copied(), entries, pages)
            }
        };
        self.settle(block, verdict, gvas, pages);
        if block.done == 0 {
            words.iter_mut().zip(pages).for_each(|(word, page)| *word = *page);
        } else {
            for lane in lanes(block.walking()) {
                if let (Some(word), Some(page)) = (words.get_mut(lane), pages.get(lane)) {
                    *word = *page;
                }
            }
        }
    }

    /// Makes words of PTEs, as if all were accepted and mapped RAM.
    #[inline(always)]
    fn judge(
        &self,
        states: impl Iterator<Item = State> + Clone,
        entries: &Column,
        words: &mut Column,
    ) -> Verdict {
        let pages = self.admission.pages();
        let outside = |page: u64| self.ram.outside(page & PageWord::FRAME) & 1 << 63;
        let (mut wrong, mut elsewhere) = (0, 0);
        for ((entry, state), word) in entries.iter().zip(states.clone()).zip(words.iter_mut()) {
            let page = pages.word(state, *entry);
            wrong |= pages.wrong(state, *entry);
            elsewhere |= outside(page);
            *word = page;
        }
        let mut verdict = Verdict { refused: 0, elsewhere: 0 };
        if wrong != 0 {
            verdict.refused =
                mask(entries.iter().zip(states).map(|(entry, state)| pages.wrong(state, *entry) != 0));
        }
        if elsewhere != 0 {
            verdict.elsewhere = mask(words.iter().map(|page| outside(*page) != 0));
        }
        verdict
    }

    /// What lies behind the pages outside the run of RAM, and who is to be walked alone.
    #[inline(always)]
    fn settle(&self, block: &mut Block, verdict: Verdict, gvas: &[u64], words: &mut [u64]) {
        block.alone |= verdict.refused & !block.done;
        for lane in lanes(verdict.elsewhere & block.walking()) {
            if let (Some(page), Some(gva)) = (words.get_mut(lane), gvas.get(lane)) {
                *page = with_backing(*page, *gva, self.ram.memory);
            }
        }
    }
}
