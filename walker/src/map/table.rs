//! One table, read whole: which entries are present, and which leaves continue each other.

use super::entries::{Entries, Look};
use crate::addr::Gpa;
use crate::entry::{EntryLayout, Grants};
use crate::memory::Memory;

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
    entries: Entries,
    source: Source,
    gpa: Gpa,
    /// What the entries above grant.
    pub(super) grants: Grants,
}

impl Table {
    pub(super) const EMPTY: Self =
        Self { entries: Entries::NONE, source: Source::Read, gpa: Gpa(0), grants: Grants::ALL };

    /// Reads the table at `gpa`, of which `wanted` entries count; whether it is wholly in memory.
    #[inline(always)]
    pub(super) fn read<E: EntryLayout, M: Memory>(
        &mut self,
        memory: &M,
        gpa: Gpa,
        wanted: usize,
        grants: Grants,
        look: &Look<'_>,
    ) -> bool {
        self.gpa = gpa;
        self.grants = grants;
        let whole = gpa.0 & 0xfff == 0 && wanted << E::SIZE_SHIFT == 0x1000;
        let read = whole
            && match E::SIZE_SHIFT {
                2 => self.entries.load(memory, gpa),
                _ => self.entries.read::<E, M>(memory, gpa, look),
            };
        self.source = if read { Source::Read } else { Source::Memory };
        read || (!whole && self.load::<E, M>(memory, 0).is_some())
    }

    /// Takes PDPTE registers for a table.
    pub(super) fn registers(&mut self, pdptes: &[u64; 4]) {
        *self = Self { source: Source::Registers, ..Self::EMPTY };
        self.entries.set(pdptes);
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
                Some(self.entries.word(number / 2) >> (32 * (number & 1)) & 0xffff_ffff)
            }
            _ => Some(self.entries.word(number)),
        }
    }

    /// All entries, if they were read and are not those of 32-bit paging.
    #[inline(always)]
    pub(super) fn entries<E: EntryLayout>(&self) -> Option<&Entries> {
        (self.source == Source::Read && E::SIZE_SHIFT == 3).then_some(&self.entries)
    }

    /// The first entry from `number` to `end`, which is included, that is present or not in memory.
    #[inline(always)]
    pub(super) fn present<E: EntryLayout>(&self, number: usize, end: usize) -> Option<usize> {
        match self.entries::<E>() {
            Some(entries) => entries.present(number, end),
            None => Some(number),
        }
    }

    /// How many leaves from `number` to `end`, which is included, continue the one at `number`, itself counted. That one has been
    /// judged.
    #[inline(always)]
    pub(super) fn leaves<E: EntryLayout>(&self, number: usize, end: usize) -> usize {
        self.entries::<E>().map_or(1, |entries| entries.length(number, end))
    }

    /// The accessed and dirty bits that any of `length` leaves has, of which `leaf` at `number` is the first.
    #[inline(always)]
    pub(super) fn any<E: EntryLayout>(&self, leaf: u64, number: usize, length: usize) -> u64 {
        let used = E::ACCESSED | E::DIRTY;
        if length <= 1 || leaf & used == used {
            return leaf & used;
        }
        self.entries.any(number, length) & used
    }
}
