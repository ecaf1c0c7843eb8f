//! One table, read whole: which entries are present, and which leaves continue each other.

use crate::addr::Gpa;
use crate::entry::{EntryLayout, Grants, LongMode};
use crate::format::PageFormat;
use crate::memory::Memory;

/// 8-byte words in a table.
pub(super) const WORDS: usize = 512;
/// Words looked at together.
const CHUNK: usize = 8;

/// How the entries of a table are had.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// All have been read.
    Read,
    /// The table is not wholly in memory: each is loaded when it is wanted.
    Memory,
    /// The first four are PDPTE registers.
    Registers,
}

pub(super) struct Table {
    words: [u64; WORDS],
    source: Source,
    gpa: Gpa,
    /// What the entries above grant.
    pub(super) grants: Grants,
}

impl Table {
    pub(super) const EMPTY: Self =
        Self { words: [0; WORDS], source: Source::Read, gpa: Gpa(0), grants: Grants::ALL };

    /// Reads the table at `gpa`, of which `wanted` entries count; whether it is wholly in memory.
    pub(super) fn read<E: EntryLayout, M: Memory>(
        &mut self,
        memory: &M,
        gpa: Gpa,
        wanted: usize,
        grants: Grants,
    ) -> bool {
        self.gpa = gpa;
        self.grants = grants;
        let whole = gpa.0 & 0xfff == 0 && wanted << E::SIZE_SHIFT == 0x1000;
        self.source =
            if whole && memory.load_table(gpa, &mut self.words) { Source::Read } else { Source::Memory };
        self.source == Source::Read || (!whole && self.load::<E, M>(memory, 0).is_some())
    }

    /// Takes PDPTE registers for a table.
    pub(super) fn registers(&mut self, pdptes: &[u64; 4]) {
        *self = Self { source: Source::Registers, ..Self::EMPTY };
        for (word, pdpte) in self.words.iter_mut().zip(pdptes) {
            *word = *pdpte;
        }
    }

    /// Where entry `number` lies; a register lies nowhere.
    pub(super) fn entry_gpa<E: EntryLayout>(&self, number: usize) -> Gpa {
        match self.source {
            Source::Registers => Gpa(0),
            _ => Gpa(self.gpa.0.wrapping_add((number as u64) << E::SIZE_SHIFT)),
        }
    }

    /// Entry `number`, or `None` where it is not in memory.
    #[inline(always)]
    pub(super) fn load<E: EntryLayout, M: Memory>(&self, memory: &M, number: usize) -> Option<u64> {
        match self.source {
            Source::Memory => E::load(memory, self.entry_gpa::<E>(number)),
            _ if E::SIZE_SHIFT == 2 => {
                Some(self.words[number / 2 % WORDS] >> (32 * (number & 1)) & 0xffff_ffff)
            }
            _ => Some(self.words[number % WORDS]),
        }
    }

    /// The first entry from `number` to `end`, which is included, that is present or not in memory.
    #[inline(always)]
    pub(super) fn present<E: EntryLayout>(&self, number: usize, end: usize) -> Option<usize> {
        if self.source == Source::Memory || E::SIZE_SHIFT == 2 {
            return Some(number);
        }
        let words = self.words.get(number..=end.min(WORDS - 1))?;
        if words.first()? & E::PRESENT != 0 {
            return Some(number);
        }
        let mut skipped = 0;
        for chunk in words.chunks(CHUNK) {
            if chunk.iter().fold(0, |any, entry| any | entry) & E::PRESENT != 0 {
                return Some(number + skipped + chunk.iter().position(|entry| entry & E::PRESENT != 0)?);
            }
            skipped += chunk.len();
        }
        None
    }

    /// How many leaves from `number` to `end`, which is included, continue the one at `number`, itself counted, and the
    /// bits that any of the others has. The leaf at `number` has been judged.
    #[inline(always)]
    pub(super) fn leaves<E: EntryLayout>(
        &self,
        format: &PageFormat,
        level: u32,
        number: usize,
        end: usize,
    ) -> (usize, u64) {
        if self.source == Source::Memory || E::SIZE_SHIFT == 2 {
            return (1, 0);
        }
        let words = self.words.get(number..=end.min(WORDS - 1)).unwrap_or_default();
        let Some(first) = words.first() else { return (1, 0) };
        let run = Run::<E>::after(format, level, *first);
        let words = words.get(..run.limit.min(words.len())).unwrap_or_default();
        run.length(words)
    }
}

/// What entries have to look like that continue a leaf.
struct Run<E> {
    /// The bits that have a meaning, accessed and dirty apart.
    meant: u64,
    /// These bits of the next entry, or of entry 0 of the run.
    first: u64,
    step: u64,
    /// Entries until the frame would carry into a bit that is no address bit.
    limit: usize,
    layout: core::marker::PhantomData<E>,
}

impl<E: EntryLayout> Run<E> {
    #[inline(always)]
    fn after(format: &PageFormat, level: u32, leaf: u64) -> Self {
        let shift = (12 + E::INDEX_BITS * level.wrapping_sub(1)) & 63;
        let meant = meant::<E>(format, level);
        let frame = LongMode::FRAME & format.address_bits() & !format.reserved_leaf_at(level);
        let room = 1_u64 << ((frame >> shift).trailing_ones() & 63);
        let limit = room.wrapping_sub(leaf >> shift & room.wrapping_sub(1));
        Self {
            meant,
            first: leaf & meant,
            step: 1 << shift,
            limit: limit.min(WORDS as u64) as usize,
            layout: core::marker::PhantomData,
        }
    }

    /// How many of `words`, whose first begins the run, belong to it, and all bits that any of these has.
    #[inline(always)]
    fn length(&self, words: &[u64]) -> (usize, u64) {
        let continues = |number: usize, entry: u64| {
            entry & self.meant == self.first.wrapping_add(self.step.wrapping_mul(number as u64))
        };
        let mut any = words.first().copied().unwrap_or(0);
        // Where frames are scattered, most runs end here.
        if !words.get(1).is_some_and(|entry| continues(1, *entry)) {
            return (1, any);
        }
        let mut length = 0;
        let mut expected = self.first;
        // Products are computed once: vectors of 64-bit words have no multiplication everywhere.
        let further: [u64; CHUNK] = core::array::from_fn(|number| self.step.wrapping_mul(number as u64));
        let (chunks, _) = words.as_chunks::<CHUNK>();
        for chunk in chunks {
            let (mut differs, mut all) = (0, any);
            for (entry, further) in chunk.iter().zip(&further) {
                differs |= (entry & self.meant) ^ expected.wrapping_add(*further);
                all |= entry;
            }
            if differs != 0 {
                break;
            }
            any = all;
            length += CHUNK;
            expected = expected.wrapping_add(self.step.wrapping_mul(CHUNK as u64));
        }
        for entry in words.get(length..).unwrap_or_default() {
            if !continues(length, *entry) {
                break;
            }
            any |= entry;
            length += 1;
        }
        (length.max(1), any)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Meaning, Pae, step};
    use crate::mode::{
        CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };

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
            maxphyaddr: [36, 40, 47, 52][(choice >> 4 & 3) as usize],
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

    /// Every length that is possible, whatever ends the run, and never over a frame's carry.
    #[test]
    fn a_run_ends_where_the_frames_do() {
        let mut rng = fastrand::Rng::with_seed(2);
        for choice in (0..1 << 8).filter(|choice| choice & 1 != 0) {
            let format = format(choice);
            for length in 1..60_usize {
                let (number, level) = (rng.usize(0..400), rng.u32(1..3));
                let shift = 12 + 9 * (level - 1);
                let base = rng.u64(0..1 << 10) << shift | if level == 1 { 3 } else { 0x83 };
                let mut table = Table::EMPTY;
                for (at, word) in table.words.iter_mut().skip(number).take(length).enumerate() {
                    *word = (base + ((at as u64) << shift)) | rng.u64(..) & 0x60;
                }
                let any = table.words.iter().skip(number).fold(0, |any, word| any | word) & 0x60;
                let (leaves, used) = table.leaves::<LongMode>(&format, level, number, 511);
                assert_eq!((leaves, used & 0x60), (length, any));
                let cut = rng.usize(0..length);
                assert_eq!(table.leaves::<LongMode>(&format, level, number, number + cut).0, cut + 1);

                // Up to the last frame that there is.
                let carry = u32::from(format.maxphyaddr()).min(if choice >> 7 & 1 != 0 { 47 } else { 52 });
                let last = (1 << carry) - (length as u64) * (1 << shift);
                for (at, word) in table.words.iter_mut().skip(number).take(length + 5).enumerate() {
                    *word = (last + ((at as u64) << shift)) | base & 0xfff;
                }
                assert_eq!(table.leaves::<LongMode>(&format, level, number, 511).0, length);
            }
        }
    }
}
