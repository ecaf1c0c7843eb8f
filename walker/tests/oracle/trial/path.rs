//! The paging formats as shapes, and tables on the way to one address.

use fastrand::Rng;

use super::ground::{Ground, HIGH, LOW, STRETCHES, Stretch, TOP};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const BIT_7: u64 = 1 << 7;
pub(crate) const BIT_8: u64 = 1 << 8;
pub(crate) const NX: u64 = 1 << 63;
pub(crate) const SOUND: u64 = PRESENT | WRITE | USER;

/// A paging format by its number of levels: 2-level, PAE (3), 4-level, 5-level; 0 without paging.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape(pub(crate) u32);

impl Shape {
    pub(crate) fn entry_bytes(self) -> u64 {
        if self.0 == 2 { 4 } else { 8 }
    }

    /// Lowest bit of an address that selects an entry of this level.
    pub(crate) fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * if self.0 == 2 { 10 } else { 9 }
    }

    pub(crate) fn index(self, address: u64, level: u32) -> u64 {
        let entries = match (self.0, level) {
            (2, _) => 1024,
            (3, 3) => 4,
            _ => 512,
        };
        (address >> self.shift(level)) % entries
    }

    /// The highest level that may hold a leaf.
    pub(crate) fn largest_leaf(self) -> u32 {
        if self.0 < 4 { 2 } else { 3 }
    }

    /// What an entry of this level holds to be usable and to grant everything.
    pub(crate) fn sound(self, level: u32) -> u64 {
        if (self.0, level) == (3, 3) { PRESENT } else { SOUND }
    }

    /// PWT, PCD, A, D, the available bits and the key: what a present entry may hold without consequence for its meaning.
    pub(crate) fn free(self, level: u32) -> u64 {
        match (self.0, level) {
            (3, 3) => 0x0e18,
            (2 | 3, _) => 0x0e78,
            _ => 0x7ff0_0000_0000_0e78,
        }
    }

    /// All bits of an entry.
    pub(crate) fn entry_mask(self) -> u64 {
        if self.0 == 2 { 0xffff_ffff } else { u64::MAX }
    }

    /// An address that these tables can translate.
    pub(crate) fn linear(self, rng: &mut Rng) -> u64 {
        match self.0 {
            5 => canonical(rng, 57),
            4 => canonical(rng, 48),
            _ => rng.u64(..1 << 32),
        }
    }

    /// `frame` as a leaf of this level holds it: PSE-36 keeps bits 39:32 in bits 20:13.
    pub(crate) fn held(self, level: u32, frame: u64) -> u64 {
        match (self.0, level) {
            (2, 2) => frame & 0xffc0_0000 | (frame >> 32 & 0xff) << 13,
            (2, _) => frame & 0xffff_f000,
            (_, level) => frame & !((1 << self.shift(level)) - 1),
        }
    }

    /// A frame that a leaf of this level may hold: somewhere in memory, or in a hole.
    pub(crate) fn frame(self, level: u32, rng: &mut Rng) -> u64 {
        let frame = match (level, rng.usize(..5)) {
            (1, 4) => 0x40_0000 + PAGE * rng.u64(..64),
            (1, n) => STRETCHES[n].start + PAGE * rng.u64(..STRETCHES[n].pages),
            (_, n) => [LOW.start, HIGH.start, TOP.start, 7 << 30, LOW.start][n],
        };
        self.held(level, frame)
    }
}

/// An address whose bits 63 to `width - 1` are equal.
pub(crate) fn canonical(rng: &mut Rng, width: u32) -> u64 {
    let spare = 64 - width;
    ((rng.u64(..) << spare) as i64 >> spare) as u64
}

/// Tables on the way to one address: level `n`'s in page `n` of a stretch, entries of levels `leaf` and up.
pub(crate) struct Path {
    pub(crate) linear: u64,
    pub(crate) shape: Shape,
    pub(crate) leaf: u32,
    pub(crate) tables: [u64; 6],
    pub(crate) entries: [u64; 6],
}

impl Path {
    pub(crate) fn new(linear: u64, shape: Shape, leaf: u32, home: Stretch) -> Path {
        let mut path = Path { linear, shape, leaf, tables: [0; 6], entries: [0; 6] };
        for level in 1..=shape.0 {
            path.tables[level as usize] = table(home, level);
        }
        path.sound();
        path
    }

    /// Makes every entry usable with all rights; the leaf refers to frame 0.
    pub(crate) fn sound(&mut self) {
        for level in self.leaf..=self.shape.0 {
            let size = if level == self.leaf && level > 1 { BIT_7 } else { 0 };
            let to = if level == self.leaf { 0 } else { self.tables[level as usize - 1] };
            self.entries[level as usize] = self.shape.sound(level) | size | to;
        }
    }

    pub(crate) fn lay(&self, ground: &mut Ground) {
        let bytes = self.shape.entry_bytes();
        for level in self.leaf..=self.shape.0 {
            let address = self.tables[level as usize] + bytes * self.shape.index(self.linear, level);
            ground.place(address, bytes, self.entries[level as usize]);
        }
    }
}

/// Where a stretch has its table of a level.
pub(crate) fn table(home: Stretch, level: u32) -> u64 {
    home.start + u64::from(level) * PAGE
}
