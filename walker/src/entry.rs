//! How the bits of a paging-structure entry are laid out: the type parameter of the one generic walk.
//!
//! Intel SDM volume 3, "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging" and "EPT Translation Mechanism", tables of entry formats. Levels count from 1 (PTE) to 5
//! (PML5E). What an entry *means* under a given [`PageFormat`](crate::PageFormat) is decided by [`step`], and nowhere else.

use crate::access::Access;
use crate::addr::Gpa;
use crate::descent::{self, Lack, Leaf, Path};
use crate::ept;
use crate::fault::Reason;
use crate::format::PageFormat;
use crate::memory::Memory;
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
    const fn through(self, entry: u64) -> Self {
        Self { withheld: self.withheld | entry ^ LongMode::GRANTING }
    }
}

/// The layout of one kind of paging-structure entry.
pub(crate) trait EntryLayout {
    /// Bytes of one entry, as a power of two.
    const SIZE_SHIFT: u32;
    /// Address bits that one level translates.
    const INDEX_BITS: u32;
    /// Bits of which at least one is set in an entry that is present.
    const PRESENT: u64 = 1;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const GLOBAL: u64 = 1 << 8;
    /// The protection key.
    const KEY: u64 = 0xf << 59;

    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64>;

    /// What the entries so far grant, once the walk has passed through `entry`, too.
    fn through(grants: Grants, level: u32, entry: u64) -> Grants;

    /// The rights that the entries seen so far grant together.
    fn rights(grants: Grants) -> Rights;

    /// Why a page is refused to `access`, which the permission words do not allow; `None` where more than rights decides, and
    /// allows it.
    fn lack(leaf: &Leaf, level: u32, format: &PageFormat, access: &Access, _: &Path) -> Option<Lack>
    where
        Self: Sized,
    {
        Some(descent::lack::<Self>(leaf.rights, level, format, access))
    }

    /// The bits of an entry that decide `right`.
    fn right_bits(right: Rights) -> u64 {
        let bit = |has: bool, bit: u64| if has { bit } else { 0 };
        bit(right.write(), READ_WRITE) | bit(right.user(), USER) | bit(right.execute(), NO_EXECUTE)
    }

    /// The table that `entry` refers to.
    fn table(entry: u64) -> u64;

    /// The page that `entry` maps: its lowest address, or higher within the page.
    fn page(level: u32, entry: u64) -> u64;

    /// The accessed and dirty bits that a walk sets in an entry: a page that is written becomes dirty.
    fn sets(_level: u32, dirties: bool) -> u64 {
        Self::ACCESSED | if dirties { Self::DIRTY } else { 0 }
    }

    /// Whether a present entry grants rights that do not go together, and the bits responsible: EPT only (Intel SDM
    /// volume 3, "EPT Misconfigurations").
    #[inline(always)]
    fn bad_rights(_: &PageFormat, _entry: u64) -> Option<(Reason, u64)> {
        None
    }

    /// Whether a leaf without fault otherwise has a memory type that does not exist, and the bits responsible: EPT only.
    #[inline(always)]
    fn bad_memory_type(_: &PageFormat, _entry: u64) -> Option<(Reason, u64)> {
        None
    }
}

/// The 64-bit entries of 4-level and 5-level paging, and of NPT in long-mode format.
pub(crate) enum LongMode {}

/// The 64-bit entries of PAE paging: like those of long mode, under four PDPTEs that grant and record nothing.
pub(crate) enum Pae {}

/// The 32-bit entries of 32-bit paging.
pub(crate) enum TwoLevel {}

/// The 64-bit entries of EPT, with or without mode-based execute control.
pub(crate) enum Ept<const MODE_BASED: bool> {}

const READ_WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;
/// Level of a PDPTE.
const PDPTE: u32 = 3;

impl LongMode {
    /// Present, and the rights that a set bit grants. All formats agree on these bits.
    pub(crate) const GRANTING: u64 = 1 | READ_WRITE | USER;
    pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;
    pub(crate) const PAGE_SIZE: u64 = 1 << 7;

    /// Number of the PAT field that a leaf selects: PAT, PCD, PWT. All formats agree on these bits.
    #[inline(always)]
    pub(crate) const fn pat_index(entry: u64, large: bool) -> usize {
        let pat_bit = if large { 12 } else { 7 };
        ((entry >> 3) & 0b11 | ((entry >> pat_bit) & 1) << 2) as usize
    }

    /// The protection key of a leaf. Outside long mode its bits are reserved or absent, and so it is 0.
    #[inline(always)]
    pub(crate) const fn protection_key(entry: u64) -> u8 {
        (entry >> 59) as u8 & 0xf
    }
}

impl EntryLayout for LongMode {
    const SIZE_SHIFT: u32 = 3;
    const INDEX_BITS: u32 = 9;

    #[inline(always)]
    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64> {
        memory.load_u64(gpa)
    }

    #[inline(always)]
    fn through(grants: Grants, _: u32, entry: u64) -> Grants {
        grants.through(entry)
    }

    #[inline(always)]
    fn rights(grants: Grants) -> Rights {
        let execute = (grants.withheld >> 60) as u8 & Rights::EXECUTE.0;
        let withheld = execute | (grants.withheld & (READ_WRITE | USER)) as u8;
        Rights(withheld ^ Rights::ALL.0)
    }

    #[inline(always)]
    fn table(entry: u64) -> u64 {
        entry & Self::FRAME
    }

    #[inline(always)]
    fn page(_: u32, entry: u64) -> u64 {
        entry & Self::FRAME
    }
}

impl EntryLayout for Pae {
    const SIZE_SHIFT: u32 = LongMode::SIZE_SHIFT;
    const INDEX_BITS: u32 = LongMode::INDEX_BITS;

    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64> {
        memory.load_u64(gpa)
    }

    fn through(grants: Grants, level: u32, entry: u64) -> Grants {
        if level == PDPTE { grants } else { grants.through(entry) }
    }

    fn rights(grants: Grants) -> Rights {
        LongMode::rights(grants)
    }

    fn table(entry: u64) -> u64 {
        LongMode::table(entry)
    }

    fn page(level: u32, entry: u64) -> u64 {
        LongMode::page(level, entry)
    }

    fn sets(level: u32, dirties: bool) -> u64 {
        if level == PDPTE { 0 } else { LongMode::sets(level, dirties) }
    }
}

impl EntryLayout for TwoLevel {
    const SIZE_SHIFT: u32 = 2;
    const INDEX_BITS: u32 = 10;

    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64> {
        memory.load_u32(gpa).map(u64::from)
    }

    fn through(grants: Grants, _: u32, entry: u64) -> Grants {
        grants.through(entry)
    }

    fn rights(grants: Grants) -> Rights {
        LongMode::rights(grants)
    }

    fn table(entry: u64) -> u64 {
        entry & 0xffff_f000
    }

    /// A 4 MiB page keeps address bits 39:32 in bits 20:13 of its entry (PSE-36).
    fn page(level: u32, entry: u64) -> u64 {
        if level == 1 { entry & 0xffff_f000 } else { entry & 0xffc0_0000 | (entry & 0x001f_e000) << 19 }
    }
}

impl Ept<false> {
    pub(crate) const READ: u64 = 1 << 0;
    pub(crate) const WRITE: u64 = 1 << 1;
    /// Instructions may be fetched; with mode-based execute control, those of supervisor-mode linear addresses.
    pub(crate) const EXECUTE: u64 = 1 << 2;
    /// With mode-based execute control, instructions of user-mode linear addresses may be fetched.
    pub(crate) const USER_EXECUTE: u64 = 1 << 10;
    /// The memory type of a leaf.
    pub(crate) const MEMORY_TYPE: u64 = 7 << 3;
}

impl<const MODE_BASED: bool> EntryLayout for Ept<MODE_BASED> {
    const SIZE_SHIFT: u32 = LongMode::SIZE_SHIFT;
    const INDEX_BITS: u32 = LongMode::INDEX_BITS;
    const PRESENT: u64 = 7 | if MODE_BASED { Ept::USER_EXECUTE } else { 0 };
    const ACCESSED: u64 = 1 << 8;
    const DIRTY: u64 = 1 << 9;
    const KEY: u64 = 0;

    fn load<M: Memory>(memory: &M, gpa: Gpa) -> Option<u64> {
        memory.load_u64(gpa)
    }

    fn through(grants: Grants, _: u32, entry: u64) -> Grants {
        Grants { withheld: grants.withheld | !entry }
    }

    /// Read, write and execute; and in the place of U/S, user-execute, which is execute where that is not told apart.
    fn rights(grants: Grants) -> Rights {
        let right = |bit: u64, right: Rights| if grants.withheld & bit == 0 { right } else { Rights::NONE };
        right(Ept::READ, Rights::READ)
            .or(right(Ept::WRITE, Rights::WRITE))
            .or(right(Ept::EXECUTE, Rights::EXECUTE))
            .or(right(Self::right_bits(Rights::USER), Rights::USER))
    }

    fn lack(leaf: &Leaf, level: u32, format: &PageFormat, access: &Access, path: &Path) -> Option<Lack> {
        ept::lack::<Self>(leaf, level, format, access, path)
    }

    fn right_bits(right: Rights) -> u64 {
        match right {
            Rights::READ => Ept::READ,
            Rights::WRITE => Ept::WRITE,
            Rights::USER if MODE_BASED => Ept::USER_EXECUTE,
            _ => Ept::EXECUTE,
        }
    }

    fn table(entry: u64) -> u64 {
        LongMode::table(entry)
    }

    fn page(level: u32, entry: u64) -> u64 {
        LongMode::page(level, entry)
    }

    fn bad_rights(format: &PageFormat, entry: u64) -> Option<(Reason, u64)> {
        if format.bad_memory_type_xwr() >> (entry & 7) & 1 == 0 {
            None
        } else if entry & Ept::WRITE != 0 {
            Some((Reason::WriteWithoutRead, Ept::WRITE))
        } else {
            Some((Reason::ExecuteOnly, entry & Self::PRESENT))
        }
    }

    fn bad_memory_type(format: &PageFormat, entry: u64) -> Option<(Reason, u64)> {
        match format.bad_memory_type_xwr() >> (entry & 0x3f) & 1 {
            0 => None,
            _ => Some((Reason::MemoryType, entry & Ept::MEMORY_TYPE)),
        }
    }
}

/// What one entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Not present.
    Absent,
    /// Present, with these reserved bits set.
    Reserved(u64),
    /// Present, and no CPU takes it, because of these bits: EPT only.
    Misconfigured(Reason, u64),
    /// Refers to the table of the next level down.
    Table,
    /// Maps a page.
    Leaf,
}

/// The one authority on what an entry at `level` (1 to 5) means. Rights are not its business: they accumulate.
pub(crate) fn step<E: EntryLayout>(format: &PageFormat, level: u32, entry: u64) -> Meaning {
    if entry & E::PRESENT == 0 {
        return Meaning::Absent;
    }
    if let Some((reason, bits)) = E::bad_rights(format, entry) {
        return Meaning::Misconfigured(reason, bits);
    }
    let leaf = level == 1 || entry & format.page_size_bit() != 0;
    let reserved =
        entry & if leaf { format.reserved_leaf_at(level) } else { format.reserved_table_at(level) };
    match (reserved, leaf) {
        (0, true) => match E::bad_memory_type(format, entry) {
            None => Meaning::Leaf,
            Some((reason, bits)) => Meaning::Misconfigured(reason, bits),
        },
        (0, false) => Meaning::Table,
        (bits, _) => Meaning::Reserved(bits),
    }
}
