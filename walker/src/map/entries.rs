//! The entries of a table, read at once: which are present, and which leaves continue each other.
//!
//! Entries are looked at in groups of 64. Most groups are all absent, or all of one run, which is found without a branch an
//! entry; of the others, bit `n` of a mask tells of entry `n`. These loops become vector instructions. While a table is loaded, the
//! one that probably comes next is asked for.

use core::sync::atomic::AtomicU64;

use crate::addr::Gpa;
use crate::batch::Instructions;
use crate::batch::dispatch::{self, Work};
use crate::batch::gather::Gather;
use crate::entry::{EntryLayout, LongMode};
use crate::format::PageFormat;
use crate::memory::Memory;

/// 8-byte entries in a table.
pub(super) const WORDS: usize = 512;
/// Words before the first entry, so that each entry has one before it.
const BEFORE: usize = 8;
/// Words in a cache line.
pub(super) const LINE: usize = 8;
/// Entries looked at together.
pub(super) const GROUP: usize = 64;
const GROUPS: usize = WORDS / GROUP;

/// What makes a leaf continue the one before.
#[derive(Clone, Copy)]
pub(super) struct Alike {
    /// Bits of which one is set in an entry that is present.
    present: u64,
    /// The bits that have a meaning, accessed and dirty apart.
    meant: u64,
    /// Number of address bits below the frame.
    shift: u32,
    /// The low bits of the frame, of which the next bit is no address bit: they count, and do not carry.
    counter: u64,
}

impl Alike {
    #[inline(always)]
    pub(super) fn of<E: EntryLayout>(format: &PageFormat, level: u32) -> Self {
        let shift = (12 + E::INDEX_BITS * level.wrapping_sub(1)) & 63;
        let frame = LongMode::FRAME & format.address_bits() & !format.reserved_leaf_at(level);
        let ones = (frame >> shift).trailing_ones() & 63;
        Self {
            present: E::PRESENT,
            meant: meant::<E>(format, level),
            shift,
            counter: ((1 << ones) - 1) << shift,
        }
    }

    /// Whether `entry` says what `before` says, a frame further on.
    #[inline(always)]
    fn continues(&self, before: u64, entry: u64) -> bool {
        let further = (before & self.meant).wrapping_add(1 << (self.shift & 63));
        entry & self.meant == further && entry & self.counter != 0
    }
}

/// Which bits of a leaf have a meaning, accessed and dirty apart. Whatever else differs, two leaves mean the same.
#[inline(always)]
fn meant<E: EntryLayout>(format: &PageFormat, level: u32) -> u64 {
    const WRITE_USER_PWT_PCD: u64 = 0x1e;
    const NO_EXECUTE: u64 = 1 << 63;
    E::PRESENT
        | WRITE_USER_PWT_PCD
        | LongMode::PAGE_SIZE
        | E::GLOBAL
        | E::KEY
        | NO_EXECUTE
        | LongMode::FRAME & format.address_bits()
        | format.reserved_leaf_at(level)
}

/// The memory that pages have to lie in to be of interest.
#[derive(Clone, Copy)]
pub(super) struct Sought {
    pub(super) first: Gpa,
    pub(super) last: Gpa,
}

/// How a table is looked at.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    pub(super) instructions: Instructions,
    pub(super) format: &'a PageFormat,
    pub(super) level: u32,
    /// `None` where all pages are.
    pub(super) sought: Option<Sought>,
    /// Where the table lies that probably comes next.
    pub(super) ahead: Option<Gpa>,
}

/// Which leaves of a page table lie elsewhere than what is sought.
#[derive(Clone, Copy)]
struct Elsewhere {
    /// What has to be 0 in an entry that maps a page, its P bit turned.
    refused: u64,
    frame: u64,
    /// The first frame, and how far the last one is from there.
    first: u64,
    span: u64,
}

impl Elsewhere {
    #[inline(always)]
    fn of<E: EntryLayout>(format: &PageFormat, sought: Sought) -> Self {
        let first = sought.first.0 & !0xfff;
        Self {
            refused: E::PRESENT | format.reserved_leaf_at(1),
            frame: LongMode::FRAME & format.address_bits(),
            first,
            span: sought.last.0.saturating_sub(first),
        }
    }

    /// Whether `entry` is anything but a leaf whose page lies elsewhere.
    #[inline(always)]
    fn counts(&self, entry: u64, present: u64) -> bool {
        (entry ^ present) & self.refused != 0 || (entry & self.frame).wrapping_sub(self.first) <= self.span
    }
}

/// The entries of a table, and what is known of them.
#[repr(align(64))]
pub(super) struct Entries {
    words: [u64; BEFORE + WORDS],
    /// Entries that are present, and not known to lie elsewhere than what is sought.
    present: [u64; GROUPS],
    /// Entries that say what the one before says, a frame further on.
    continues: [u64; GROUPS],
    /// The bits that any entry of a group has.
    any: [u64; GROUPS],
}

impl Entries {
    pub(super) const NONE: Self =
        Self { words: [0; BEFORE + WORDS], present: [0; GROUPS], continues: [0; GROUPS], any: [0; GROUPS] };

    /// Loads the table at `gpa` without looking at it; whether it is wholly in memory.
    pub(super) fn load<M: Memory>(&mut self, memory: &M, gpa: Gpa) -> bool {
        self.words_mut().is_some_and(|words| memory.load_table(gpa, words))
    }

    /// Loads the table at `gpa` and looks at it; whether it is wholly in memory.
    #[inline(always)]
    pub(super) fn read<E: EntryLayout, M: Memory>(&mut self, memory: &M, gpa: Gpa, look: &Look<'_>) -> bool {
        let Look { instructions, format, level, sought, ahead } = *look;
        let source = memory.table(gpa);
        if source.is_none() && !self.load(memory, gpa) {
            return false;
        }
        let alike = Alike::of::<E>(format, level);
        let elsewhere = sought.filter(|_| level == 1).map(|sought| Elsewhere::of::<E>(format, sought));
        dispatch::run(instructions, Find { memory, source, ahead, alike, elsewhere, entries: self });
        true
    }

    fn words_mut(&mut self) -> Option<&mut [u64; WORDS]> {
        self.words.last_chunk_mut()
    }

    /// Entries that were not loaded from a table.
    pub(super) fn set(&mut self, words: &[u64]) {
        for (own, word) in self.words.iter_mut().skip(BEFORE).zip(words) {
            *own = *word;
        }
    }

    /// 8-byte entry `number`.
    #[inline(always)]
    pub(super) fn word(&self, number: usize) -> u64 {
        self.words[BEFORE + number % WORDS]
    }

    /// The first entry from `number` to `end`, which is included, that is present.
    #[inline(always)]
    pub(super) fn present(&self, number: usize, end: usize) -> Option<usize> {
        let found = first_set(&self.present, number, 0);
        (found <= end && found < WORDS).then_some(found)
    }

    /// Entry `number`, and the entries after it in its group that are present and do not continue the one before, if these are
    /// present.
    #[inline(always)]
    pub(super) fn heads(&self, number: usize) -> u64 {
        let group = number / GROUP % GROUPS;
        let from = number % GROUP;
        self.present[group] & (!self.continues[group] | 1 << from) & u64::MAX << from
    }

    /// Whether no entry continues entry `number`.
    #[inline(always)]
    pub(super) fn is_alone(&self, number: usize) -> bool {
        let next = number + 1;
        next >= WORDS || self.continues[next / GROUP % GROUPS] >> (next % GROUP) & 1 == 0
    }

    /// How many leaves from `number` to `end`, which is included, continue the one at `number`, itself counted.
    #[inline(always)]
    pub(super) fn length(&self, number: usize, end: usize) -> usize {
        first_set(&self.continues, number + 1, u64::MAX).min(end + 1) - number
    }

    /// All bits that any of the `length` entries from `number` on has.
    #[inline(always)]
    pub(super) fn any(&self, number: usize, length: usize) -> u64 {
        let mut any = 0;
        let (mut at, end) = (number, (number + length).min(WORDS));
        while at < end {
            if at % GROUP == 0 && end - at >= GROUP {
                any |= self.any[at / GROUP % GROUPS];
                at += GROUP;
            } else {
                any |= self.word(at);
                at += 1;
            }
        }
        any
    }
}

/// The first place from `from` on whose bit, once those of `flipped` are turned, is set; at least [`WORDS`] where there is
/// none.
#[inline(always)]
fn first_set(masks: &[u64; GROUPS], from: usize, flipped: u64) -> usize {
    let mut group = from / GROUP;
    let mut wanted = u64::MAX << (from % GROUP);
    while let Some(mask) = masks.get(group) {
        let found = (mask ^ flipped) & wanted;
        if found != 0 {
            return group * GROUP + found.trailing_zeros() as usize;
        }
        wanted = u64::MAX;
        group += 1;
    }
    WORDS
}

/// Loading a table, if it has not been, and looking at it.
struct Find<'a, M> {
    memory: &'a M,
    source: Option<&'a [AtomicU64; WORDS]>,
    ahead: Option<Gpa>,
    alike: Alike,
    elsewhere: Option<Elsewhere>,
    entries: &'a mut Entries,
}

impl<M: Memory> Work for Find<'_, M> {
    #[inline(always)]
    fn run(self, gather: impl Gather) {
        let Self { memory, source, ahead, alike, elsewhere, entries } = self;
        let further: [u64; GROUP] = core::array::from_fn(|number| (number as u64) << (alike.shift & 63));
        // One after the other: a vector cannot be loaded while the stores of its parts are still on their way.
        if let Some(source) = source {
            entries.load_lines(memory, gather, source, ahead);
        }
        for group in 0..GROUPS {
            entries.find(group, &alike, elsewhere.as_ref(), &further);
        }
    }
}

impl Entries {
    /// Loads all entries, and asks for those of the table at `ahead`.
    #[inline(always)]
    fn load_lines<M: Memory>(
        &mut self,
        memory: &M,
        gather: impl Gather,
        source: &[AtomicU64; WORDS],
        ahead: Option<Gpa>,
    ) {
        let Some(words) = self.words_mut() else { return };
        let lines = words.as_chunks_mut::<LINE>().0.iter_mut().zip(source.as_chunks::<LINE>().0);
        let Some(ahead) = ahead else {
            lines.for_each(|(own, line)| gather.line(line, own));
            return;
        };
        for ((own, line), offset) in lines.zip((0..).step_by(LINE * 8)) {
            memory.prefetch(Gpa(ahead.0.wrapping_add(offset)));
            gather.line(line, own);
        }
    }

    #[inline(always)]
    fn find(&mut self, group: usize, alike: &Alike, elsewhere: Option<&Elsewhere>, further: &[u64; GROUP]) {
        let Alike { present, meant, counter, .. } = *alike;
        let group = group % GROUPS;
        let start = BEFORE + group * GROUP;
        let (Some(before), Some(entries)) =
            (self.words[start - 1..].first_chunk::<GROUP>(), self.words[start..].first_chunk::<GROUP>())
        else {
            return;
        };
        let first = entries[0] & meant;
        let (mut differs, mut any) = (0, 0);
        for (entry, further) in entries.iter().zip(further) {
            differs |= (entry & meant) ^ first.wrapping_add(*further);
            any |= entry;
        }
        let last = (first & counter).wrapping_add(further[GROUP - 1]);
        let (is_present, continues) = if any & present == 0 {
            (0, 0)
        } else if let Some(elsewhere) = elsewhere {
            masks(
                before,
                entries,
                |entry| entry & present != 0 && elsewhere.counts(entry, present),
                |before, entry| elsewhere.counts(before, present) && alike.continues(before, entry),
            )
        } else if differs == 0 && last <= counter {
            // All are present: that, too, is one of the bits in which they agree.
            (u64::MAX, u64::MAX << 1 | u64::from(alike.continues(before[0], entries[0])))
        } else {
            masks(
                before,
                entries,
                |entry| entry & present != 0,
                |before, entry| alike.continues(before, entry),
            )
        };
        self.any[group] = any;
        self.present[group] = is_present;
        self.continues[group] = continues;
    }
}

/// Bit by bit, which entries are present, and which continue the one before.
#[inline(always)]
fn masks(
    before: &[u64; GROUP],
    entries: &[u64; GROUP],
    present: impl Fn(u64) -> bool,
    continues: impl Fn(u64, u64) -> bool,
) -> (u64, u64) {
    let mut masks = (0, 0);
    for (at, (entry, before)) in entries.iter().zip(before).enumerate() {
        masks.0 |= u64::from(present(*entry)) << at;
        masks.1 |= u64::from(continues(*before, *entry)) << at;
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Grants, Meaning, Pae, step};
    use crate::mode::{
        CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::window::Window;

    fn format(choice: u64) -> PageFormat {
        let when = |bit: u32, value: u64| if choice >> bit & 1 != 0 { value } else { 0 };
        let long = when(0, EFER_LME | EFER_LMA);
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG,
            cr4: CR4_PAE | if long != 0 { when(1, CR4_LA57) } else { 0 },
            efer: long | when(2, EFER_NXE),
            ..ControlRegisters::default()
        };
        let cpu = CpuProfile {
            vendor: if when(3, 1) != 0 { Vendor::Amd } else { Vendor::Intel },
            maxphyaddr: [32, 36, 47, 52][(choice >> 4 & 3) as usize],
            gib_pages: when(6, 1) != 0,
            encryption_bit: (when(7, 1) != 0).then_some(47),
        };
        PageFormat::guest(&registers, &cpu).expect("these registers are valid")
    }

    /// All that a leaf says to a map.
    fn said<E: EntryLayout>(format: &PageFormat, level: u32, entry: u64) -> (Meaning, [u64; 5]) {
        let shift = (12 + E::INDEX_BITS * (level - 1)) & 63;
        let frame = E::page(level, entry) & format.address_bits() & !((1 << shift) - 1);
        let rights = E::rights(E::through(Grants::ALL, level, entry));
        let pat = LongMode::pat_index(entry, level > 1);
        let key = LongMode::protection_key(entry);
        let said = [frame, u64::from(rights.bits()), pat as u64, u64::from(key), entry & E::GLOBAL];
        (step::<E>(format, level, entry), said)
    }

    /// What a run rests on: a bit that it does not compare changes nothing.
    fn compares_all_that_is_meant<E: EntryLayout>(rng: &mut fastrand::Rng, format: &PageFormat) -> u64 {
        let mut leaves = 0;
        for level in 1..=3 {
            for _ in 0..50 {
                let entry =
                    rng.u64(..) & !format.reserved_leaf_at(level) | 1 | if level > 1 { 0x80 } else { 0 };
                let before = said::<E>(format, level, entry);
                leaves += u64::from(before.0 == Meaning::Leaf);
                for bit in (0..64).map(|bit| 1 << bit).filter(|bit| meant::<E>(format, level) & bit == 0) {
                    assert_eq!(said::<E>(format, level, entry ^ bit), before, "{bit:#x} {level} {format:?}");
                }
            }
        }
        leaves
    }

    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn a_run_compares_every_bit_that_has_a_meaning() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut leaves = 0;
        for choice in 0..1 << 8 {
            let format = format(choice);
            leaves += if format.mode().is_long() {
                compares_all_that_is_meant::<LongMode>(&mut rng, &format)
            } else {
                compares_all_that_is_meant::<Pae>(&mut rng, &format)
            };
        }
        assert!(leaves > 10_000, "{leaves}");
    }

    /// Looks at a table by all instructions that there are, which agree.
    fn entries(words: &[u64], format: &PageFormat, level: u32) -> Entries {
        let words: std::vec::Vec<AtomicU64> = words.iter().map(|word| AtomicU64::new(*word)).collect();
        let memory = Window::new(&words);
        let [portable, others @ ..] = Instructions::ALL.map(|instructions| {
            let mut entries = Entries::NONE;
            let look = Look { instructions, format, level, sought: None, ahead: None };
            assert!(entries.read::<LongMode, _>(&memory, Gpa(0), &look));
            entries
        });
        for other in others {
            let masks = |all: &Entries| (all.present, all.any, all.continues.map(|mask| mask & !1));
            assert_eq!(masks(&other), masks(&portable));
            for number in 1..WORDS {
                assert_eq!(other.is_alone(number - 1), portable.is_alone(number - 1));
            }
        }
        portable
    }

    /// Every length that is possible, whatever ends the run, and never over a frame's carry.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn a_run_ends_where_the_frames_do() {
        let mut rng = fastrand::Rng::with_seed(2);
        for choice in (0..1 << 8).filter(|choice| choice & 1 != 0) {
            let format = format(choice);
            for length in 1..200_usize {
                let (number, level) = (rng.usize(0..300), rng.u32(1..4));
                let shift = 12 + 9 * (level - 1);
                let carry = u32::from(format.maxphyaddr()).min(if choice >> 7 & 1 != 0 { 47 } else { 52 });
                let frames = 1 << (carry - shift);
                let length = length.min(frames);
                let first = rng.u64(0..=(frames - length).min(1 << 10) as u64);
                let base = first << shift | if level == 1 { 3 } else { 0x83 };
                let mut words = [0; WORDS];
                for (at, word) in words.iter_mut().skip(number).take(length).enumerate() {
                    *word = (base + ((at as u64) << shift)) | rng.u64(..) & 0x60;
                }
                let found = entries(&words, &format, level);
                assert_eq!(found.length(number, 511), length);
                let any = words.iter().skip(number).fold(0, |any, word| any | word);
                assert_eq!(found.any(number, length), any);
                let cut = rng.usize(0..length);
                assert_eq!(found.length(number, number + cut), cut + 1);

                // Up to the last frame that there is.
                let last = (1 << carry) - (length as u64) * (1 << shift);
                for (at, word) in words.iter_mut().skip(number).take(length + 100).enumerate() {
                    *word = (last + ((at as u64) << shift)) | base & 0xfff;
                }
                assert_eq!(entries(&words, &format, level).length(number, 511), length);
            }
        }
    }

    /// Masks say of every entry what it says by itself.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn groups_are_what_their_entries_are() {
        let mut rng = fastrand::Rng::with_seed(3);
        let format = format(1);
        let alike = Alike::of::<LongMode>(&format, 1);
        // Frames of 24 bits: MAXPHYADDR is 36.
        let carry = 24;
        let (mut whole, mut mixed) = (0, 0);
        for _ in 0..2_000 {
            let mut words = [0; WORDS];
            let mut at = 0;
            while at < words.len() {
                let length = [1, 2, rng.usize(1..70), 64, 130][rng.usize(0..5)].min(words.len() - at);
                let (base, step) =
                    (rng.u64(..) & !(1 << 51), [0, 1 << 12, 1 << 12, 1 << 13][rng.usize(0..4)]);
                for (number, word) in words[at..at + length].iter_mut().enumerate() {
                    *word = base.wrapping_add(number as u64 * step)
                        ^ if rng.u8(..40) == 0 { 1 << rng.u8(0..64) } else { 0 };
                }
                at += length;
            }
            let found = entries(&words, &format, 1);
            let continues = |number: usize| {
                let [before, entry] = [number - 1, number].map(|number| words[number] & alike.meant);
                entry == before.wrapping_add(1 << 12) && entry >> 12 & ((1 << carry) - 1) != 0
            };
            let mut heads = 0;
            for (number, word) in words.iter().enumerate() {
                let present = word & 1 != 0;
                assert_eq!(found.present(number, 511) == Some(number), present);
                let head = present && (number % 64 == 0 || !continues(number));
                if number % 64 == 0 {
                    heads = found.heads(number);
                }
                if number % 64 == 0 && present && number > 0 && continues(number) {
                    whole += u32::from(heads == 1);
                }
                assert_eq!(heads >> (number % 64) & 1 != 0, head, "{number}");
                if !present {
                    continue;
                }
                assert_eq!(found.is_alone(number), number == 511 || !continues(number + 1));
                let end = rng.usize(number..WORDS);
                let mut length = 1;
                while number + length <= end && continues(number + length) {
                    length += 1;
                }
                assert_eq!(found.length(number, end), length);
                mixed += u32::from(length > 1);
            }
        }
        assert!(whole > 100 && mixed > 10_000, "{whole} {mixed}");
    }
}
