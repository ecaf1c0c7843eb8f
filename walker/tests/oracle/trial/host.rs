//! The second dimension's tables: in each host format of NPT, and of EPT.

use fastrand::Rng;

use super::ground::Ground;
use super::path::{ACCESSED, BIT_7, BIT_8, DIRTY, NX, PAGE, PRESENT, SOUND, Shape, USER, WRITE};

/// EPT's bits 2:0 and bit 10.
pub(crate) const EPT_RIGHTS: u64 = 0x407;
/// EPT's accessed and dirty bits, and what it ignores, in a table entry and in a leaf.
const EPT_IGNORED: u64 = 0xfff0_0000_0000_0b00;

/// Whose format it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    Npt(Shape),
    /// With so many levels.
    Ept(u32),
}

impl Host {
    /// The shape that has the same levels and indices.
    pub(crate) fn shape(self) -> Shape {
        match self {
            Host::Npt(shape) => shape,
            Host::Ept(levels) => Shape(levels),
        }
    }

    pub(crate) fn levels(self) -> u32 {
        self.shape().0
    }

    pub(crate) fn entry_bytes(self) -> u64 {
        self.shape().entry_bytes()
    }

    /// A usable entry that grants everything and refers to no page yet.
    fn sound(self, level: u32, leaf: bool, rng: &mut Rng) -> u64 {
        match self {
            Host::Npt(shape) => shape.sound(level) | rng.u64(..) & shape.free(level),
            Host::Ept(_) => {
                let memory_type = [0, 1, 4, 5, 6][rng.usize(..5)] << 3 | rng.u64(..2) << 6;
                EPT_RIGHTS | rng.u64(..) & EPT_IGNORED | if leaf { memory_type } else { 0 }
            }
        }
    }
}

/// Nested tables under construction.
pub(crate) struct Building<'a> {
    pub(crate) ground: &'a mut Ground,
    pub(crate) host: Host,
    pub(crate) root: u64,
    /// The next page to take for a table.
    pub(crate) free: u64,
}

impl Building<'_> {
    /// Maps `address` to `page` and says where the entries for it lie, by level. Entries that another address already has are
    /// shared.
    pub(crate) fn map(&mut self, address: u64, page: u64, leaf: u32, rng: &mut Rng) -> [u64; 6] {
        let (host, shape) = (self.host, self.host.shape());
        let bytes = host.entry_bytes();
        let mut at = [0; 6];
        let mut table = self.root;
        for level in (1..=shape.0).rev() {
            let entry_address = table + bytes * shape.index(address, level);
            at[level as usize] = entry_address;
            let present = self.ground.entry(entry_address, bytes);
            if present & PRESENT != 0 {
                if level > 1 && present & BIT_7 != 0 {
                    return at;
                }
                table = present & 0x000f_ffff_ffff_f000 & shape.entry_mask();
                continue;
            }
            let drawn = host.sound(level, level == leaf, rng);
            if level == leaf {
                let size = if level > 1 { BIT_7 } else { 0 };
                let entry = drawn | size | shape.held(level, page);
                self.ground.place(entry_address, bytes, entry);
                return at;
            }
            table = self.free;
            self.free += PAGE;
            self.ground.place(entry_address, bytes, drawn | table);
        }
        at
    }
}

/// A sound nested entry with one thing changed; nothing, for the states that change something else.
pub(crate) fn defect(host: Host, entry: u64, state: u64, rng: &mut Rng) -> u64 {
    match host {
        Host::Npt(shape) => npt_defect(entry, state, rng) & shape.entry_mask(),
        Host::Ept(_) => ept_defect(entry, state, rng),
    }
}

/// How many states [`defect`] knows; the last one is another's business.
pub(crate) fn states(host: Host) -> u64 {
    match host {
        Host::Npt(_) => 14,
        Host::Ept(_) => 19,
    }
}

fn npt_defect(entry: u64, state: u64, rng: &mut Rng) -> u64 {
    match state {
        1 => 0,
        2 => rng.u64(..) & !PRESENT,
        3 => entry & !WRITE,
        4 => entry & !USER,
        5 => entry | NX,
        6 => entry | 1 << rng.u32(48..52) | 1 << 21,
        7 => entry ^ BIT_7,
        8 => entry | BIT_8,
        9 => entry | 1 << 46 | 1 << 30,
        10 => entry | 1 << 13,
        11 => entry & !(ACCESSED | DIRTY),
        12 if entry & SOUND == SOUND => entry | 0xf << 59,
        _ => entry,
    }
}

fn ept_defect(entry: u64, state: u64, rng: &mut Rng) -> u64 {
    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 2;
    const USER_EXECUTE: u64 = 1 << 10;
    const SHADOW_STACK: u64 = 1 << 60;
    match state {
        1 => 0,
        2 => rng.u64(..) & !EPT_RIGHTS,
        3 => entry & !WRITE,
        4 => entry & !(READ | WRITE),
        5 => entry & !EXECUTE,
        6 => entry & !USER_EXECUTE,
        7 => entry & !READ,
        8 => entry & !(READ | EXECUTE | USER_EXECUTE),
        9 => entry & !(EXECUTE | USER_EXECUTE),
        10 => entry & !(READ | WRITE | EXECUTE),
        11 => entry | 1 << rng.u32(48..52) | 1 << 21,
        12 => entry ^ BIT_7,
        13 => entry ^ 1 << rng.u32(3..7),
        14 => entry | 1 << 12,
        15 => entry & !(1 << 8 | 1 << 9),
        16 => entry & !WRITE | SHADOW_STACK,
        17 => entry | SHADOW_STACK,
        _ => entry,
    }
}

/// The rights of an EPT entry that is not misconfigured for them: bits 2:0 and 10, without W where there is no R.
pub(crate) const EPT_RIGHTS_ALLOWED: [u64; 12] = [0, 1, 3, 4, 5, 7, 0x400, 0x401, 0x403, 0x404, 0x405, 0x407];
