//! What a paging mode makes of the ground: how many entries a case has of its own, how wide they are, and where they lie.

use pagewalk::PagingMode;

use super::ground::FRAMES;
use super::{PAGE, Ram};

/// The root table; under PAE paging, the four PDPTEs.
pub(crate) const ROOT: u64 = 0x1000;
/// The page directories of PAE paging, which all cases under one root share.
pub(crate) const PAE_DIRECTORIES: [u64; 4] = [0x6000, 0x7000, 0x8000, 0x9000];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) mode: PagingMode,
    /// Levels of which a case has an entry of its own, the highest of them in the root table. PDPTEs of PAE paging are
    /// registers, and every case's.
    pub(crate) levels: u32,
}

impl Shape {
    pub(crate) fn new(mode: PagingMode) -> Shape {
        let levels = match mode {
            PagingMode::None => 0,
            PagingMode::TwoLevel | PagingMode::Pae => 2,
            PagingMode::FourLevel => 4,
            PagingMode::FiveLevel => 5,
        };
        Shape { mode, levels }
    }

    /// The shape of tables that lie in memory to the last, as PDPTEs do under NPT.
    pub(crate) fn in_memory(mode: PagingMode) -> Shape {
        let levels = if mode == PagingMode::Pae { 3 } else { Shape::new(mode).levels };
        Shape { mode, levels }
    }

    pub(crate) fn is_long(self) -> bool {
        self.mode.is_long()
    }

    /// Width of a linear address.
    pub(crate) fn linear_width(self) -> u32 {
        match self.mode {
            PagingMode::FourLevel => 48,
            PagingMode::FiveLevel => 57,
            _ => 32,
        }
    }

    pub(crate) fn entry_bytes(self) -> u64 {
        if self.mode == PagingMode::TwoLevel { 4 } else { 8 }
    }

    pub(crate) fn index_bits(self) -> u32 {
        if self.mode == PagingMode::TwoLevel { 10 } else { 9 }
    }

    /// Address bits below those that `level` translates.
    pub(crate) fn shift(self, level: u32) -> u32 {
        12 + self.index_bits() * (level - 1)
    }

    /// Bytes of addresses that a case has for itself.
    pub(crate) fn span(self) -> u64 {
        if self.levels == 0 { 1 << 32 } else { 1 << self.shift(self.levels) }
    }

    /// The place in its table of the entry that `level` uses for `address`, in bytes.
    pub(crate) fn offset(self, level: u32, address: u64) -> u64 {
        (address >> self.shift(level) & ((1 << self.index_bits()) - 1)) * self.entry_bytes()
    }

    pub(crate) fn read(self, ram: Ram, gpa: u64) -> u64 {
        if self.entry_bytes() == 4 { ram.read_u32(gpa).into() } else { ram.read(gpa) }
    }

    pub(crate) fn write(self, ram: Ram, gpa: u64, entry: u64) {
        if self.entry_bytes() == 4 { ram.write_u32(gpa, entry as u32) } else { ram.write(gpa, entry) }
    }

    /// Cases that one root has room for. 4-level and 5-level paging leave out entry 256, below which lies no canonical
    /// address.
    pub(crate) fn cases_per_root(self) -> u64 {
        match self.mode {
            PagingMode::TwoLevel | PagingMode::Pae => 511,
            _ => 254,
        }
    }

    /// Where case `number`, from 0, has its highest entry, and the first address that this entry translates. The entry
    /// before it maps the stage.
    pub(crate) fn slot(self, number: u64) -> (u64, u64) {
        match self.mode {
            PagingMode::None => (0, FRAMES),
            PagingMode::TwoLevel => {
                let index = number * 2 + 2;
                (ROOT + index * 4, index << 22)
            }
            PagingMode::Pae => {
                // Never the first of a page directory: the stage has to lie under the same PDPTE.
                let index = number * 4 + 2;
                (PAE_DIRECTORIES[(index / 512) as usize] + index % 512 * 8, index << 21)
            }
            PagingMode::FourLevel | PagingMode::FiveLevel => {
                let index = number * 2 + if number < 127 { 2 } else { 4 };
                let unused = 64 - (12 + 9 * self.levels);
                (ROOT + index * 8, ((index << 55) as i64 >> unused) as u64)
            }
        }
    }

    /// Where the cases' tables begin, a page for each level below the highest.
    pub(crate) fn case_tables(self) -> u64 {
        if self.mode == PagingMode::TwoLevel { 0x20_0000 } else { 0x40_0000 }
    }

    /// The frame for large leaves of `level`. A 1 GiB page has all of memory in it.
    pub(crate) fn large_frame(self, level: u32) -> u64 {
        match (self.mode, level) {
            (PagingMode::TwoLevel, _) => 0x40_0000,
            (_, 2) => 0x20_0000,
            _ => 0,
        }
    }

    /// Bytes of the tables of `cases` cases.
    pub(crate) fn tables_bytes(self, cases: u64) -> u64 {
        cases * u64::from(self.levels.saturating_sub(1)) * PAGE
    }
}
