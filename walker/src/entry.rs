//! How the bits of a paging-structure entry are laid out: the type parameter of the one generic walk.
//!
//! Intel SDM volume 3, "4-Level Paging and 5-Level Paging", tables of entry formats. Levels count from 1 (PTE) to 5
//! (PML5E). What an entry *means* under a given [`PageFormat`](crate::PageFormat) is decided by [`step`], and nowhere else.

use crate::addr::Gpa;
use crate::format::PageFormat;
use crate::memory::{ExchangeError, Memory};
use crate::permission::Rights;

/// The rights that the entries of all levels so far grant together, as the bits that some entry withholds them by: clear
/// where setting it would grant, or set where that withholds.
#[derive(Clone, Copy)]
pub(crate) struct Grants {
    withheld: u64,
}

impl Grants {
    pub(crate) const ALL: Self = Self { withheld: 0 };

    #[inline(always)]
    pub(crate) const fn through<E: EntryLayout>(self, entry: u64) -> Self {
        Self { withheld: self.withheld | entry ^ E::GRANTING }
    }
}

/// The layout of one kind of paging-structure entry.
pub(crate) trait EntryLayout {
    /// Bytes of one entry, as a power of two.
    const SIZE_SHIFT: u32;
    /// Address bits that one level translates.
    const INDEX_BITS: u32;
    /// Bits of which at least one is set in an entry that is present.
    const PRESENT: u64;
    /// Present, and the rights that a set bit grants.
    const GRANTING: u64;
    /// The bit that makes an entry above level 1 a leaf.
    const PAGE_SIZE: u64;
    const ACCESSED: u64;
    const DIRTY: u64;
    const GLOBAL: u64;
    /// The protection key.
    const KEY: u64;
    /// Bits 51:12, as far as the layout has them: reserved bits are refused before a frame is used.
    const FRAME: u64;

    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64>;

    fn compare_exchange<M: Memory>(memory: &M, gpa: Gpa, current: u64, new: u64)
    -> Result<(), ExchangeError>;

    /// The rights that the entries seen so far grant together.
    fn rights(grants: Grants) -> Rights;

    /// The bits of an entry that decide `right`.
    fn right_bits(right: Rights) -> u64;

    /// Number of the PAT field that a leaf selects: PAT, PCD, PWT.
    fn pat_index(entry: u64, level: u32) -> usize;

    fn protection_key(entry: u64) -> u8;
}

/// The 64-bit entries of 4-level and 5-level paging, and of NPT in long-mode format.
pub(crate) enum LongMode {}

const READ_WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;

impl EntryLayout for LongMode {
    const SIZE_SHIFT: u32 = 3;
    const INDEX_BITS: u32 = 9;
    const PRESENT: u64 = 1;
    const GRANTING: u64 = Self::PRESENT | READ_WRITE | USER;
    const PAGE_SIZE: u64 = 1 << 7;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const GLOBAL: u64 = 1 << 8;
    const KEY: u64 = 0xf << 59;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;

    #[inline(always)]
    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64> {
        memory.load_u64(gpa)
    }

    fn compare_exchange<M: Memory>(
        memory: &M,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<(), ExchangeError> {
        memory.compare_exchange_u64(gpa, current, new)
    }

    #[inline(always)]
    fn rights(grants: Grants) -> Rights {
        let execute = (grants.withheld >> 60) as u8 & Rights::EXECUTE.0;
        let withheld = execute | (grants.withheld & (READ_WRITE | USER)) as u8;
        Rights(withheld ^ Rights::ALL.0)
    }

    fn right_bits(right: Rights) -> u64 {
        let bit = |has: bool, bit: u64| if has { bit } else { 0 };
        bit(right.write(), READ_WRITE) | bit(right.user(), USER) | bit(right.execute(), NO_EXECUTE)
    }

    #[inline(always)]
    fn pat_index(entry: u64, level: u32) -> usize {
        let pat_bit = if level == 1 { 7 } else { 12 };
        ((entry >> 3) & 0b11 | ((entry >> pat_bit) & 1) << 2) as usize
    }

    #[inline(always)]
    fn protection_key(entry: u64) -> u8 {
        (entry >> 59) as u8 & 0xf
    }
}

/// What one entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Not present.
    Absent,
    /// Present, with these reserved bits set.
    Reserved(u64),
    /// Refers to the table of the next level down.
    Table,
    /// Maps a page.
    Leaf,
}

/// The one authority on what an entry at `level` (1 to 5) means. Rights are not its business: they accumulate.
#[inline(never)]
pub(crate) fn step<E: EntryLayout>(format: &PageFormat, level: u32, entry: u64) -> Meaning {
    if entry & E::PRESENT == 0 {
        return Meaning::Absent;
    }
    let leaf = level == 1 || entry & E::PAGE_SIZE != 0;
    let reserved =
        entry & if leaf { format.reserved_leaf_at(level) } else { format.reserved_table_at(level) };
    match (reserved, leaf) {
        (0, true) => Meaning::Leaf,
        (0, false) => Meaning::Table,
        (bits, _) => Meaning::Reserved(bits),
    }
}
