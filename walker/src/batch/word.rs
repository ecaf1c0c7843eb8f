//! A translation in 64 bits.

use crate::addr::Gpa;
use crate::entry::{EntryLayout, LongMode};
use crate::memory::{Backing, Memory};
use crate::permission::Rights;
use crate::translation::{PageSize, Translation};

/// What an address means, in one word: the PTE of 4-level paging that would map its 4 KiB, alone and with the same effect.
///
/// What a PTE has, the word has in the same place; what it has no place for lies in the bits that a CPU ignores there. So
/// it is readable by anything that knows page tables (Intel SDM volume 3, "4-Level Paging and 5-Level Paging"), in every
/// paging mode.
///
/// | bits | what |
/// |---|---|
/// | 0 | 1: a translation. 0: a fault; then all other bits are 0, too, and the fault is in the column beside |
/// | 1 | every level of every dimension allows writes (R/W) |
/// | 2 | a user page at every level of the guest (U/S); as [`Translation::rights`] in a nested walk |
/// | 3, 4, 7 | PWT, PCD and PAT of the guest's leaf, which select a memory type; 0 where paging is off |
/// | 5, 6, 8 | accessed, dirty and global bit of the guest's leaf, as the walk found them |
/// | 11:9 | size of the guest's page: 0 paging is off, 1 4 KiB, 2 2 MiB, 3 4 MiB, 4 1 GiB |
/// | 51:12 | the 4 KiB frame of the translated address, whatever the size of its page: `gpa = word & 0xf_ffff_ffff_f000 \| gva & 0xfff` |
/// | 53:52 | what lies behind the address: 0 guest RAM, 1 memory that the guest cannot write, 2 nothing (MMIO or a hole) |
/// | 56:54 | size of the second dimension's page, coded as in bits 11:9; 0 without second dimension |
/// | 57 | data cannot be read (EPT: an execute-only page) |
/// | 58 | 0 |
/// | 62:59 | protection key of the guest's leaf, whether or not keys are enabled; 0 outside long mode |
/// | 63 | some level of some dimension forbids execution (XD, NX) |
///
/// In a nested walk rights are those of both dimensions together, the bits of the leaf are the guest's, and both page sizes
/// are told: the translation holds for the smaller one. The nGPA in between, the second dimension's memory type and the
/// leaf's other bits are not: [`Walker::translate`](crate::Walker::translate) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PageWord(u64);

pub(super) const WRITE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
const PAT: u64 = 1 << 7;
pub(super) const SIZE: u32 = 9;
const BACKING: u32 = 52;
const NESTED_SIZE: u32 = 54;
const UNREADABLE: u64 = 1 << 57;
pub(super) const NO_EXECUTE: u64 = 1 << 63;

impl PageWord {
    /// No translation.
    pub const FAULT: Self = Self(0);
    /// The bits that hold the 4 KiB frame.
    pub const FRAME: u64 = LongMode::FRAME;

    /// The word of this translation.
    #[must_use]
    pub const fn of(page: &Translation) -> Self {
        const OF_LEAF: u64 = LongMode::ACCESSED | LongMode::DIRTY | LongMode::GLOBAL | LongMode::KEY;
        let pat = match page.pat_index() {
            Some(index) => (index as u64 & 3) << 3 | (index as u64 & 4) << 5,
            None => 0,
        };
        let rights = page.rights();
        let nested = match &page.nested {
            Some(nested) => size_code(nested.page_size),
            None => 0,
        };
        Self(
            LongMode::PRESENT
                | page.gpa.0 & Self::FRAME
                | page.entry & OF_LEAF
                | pat
                | when(rights.write(), WRITE)
                | when(rights.user(), USER)
                | when(!rights.read(), UNREADABLE)
                | when(!rights.execute(), NO_EXECUTE)
                | size_code(page.page_size()) << SIZE
                | backing_code(page.backing()) << BACKING
                | nested << NESTED_SIZE,
        )
    }

    /// The word with these bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether there is no translation.
    #[must_use]
    pub const fn is_fault(self) -> bool {
        self.0 & LongMode::PRESENT == 0
    }

    /// Where `gva` lies, whose word this is; `None` for a fault.
    #[must_use]
    pub const fn gpa(self, gva: u64) -> Option<Gpa> {
        if self.is_fault() { None } else { Some(Gpa(self.0 & Self::FRAME | gva & 0xfff)) }
    }

    /// Size of the guest's page.
    #[must_use]
    pub const fn page_size(self) -> PageSize {
        size(self.0 >> SIZE)
    }

    /// Size of the second dimension's page; `None` where there is no second dimension.
    #[must_use]
    pub const fn nested_page_size(self) -> Option<PageSize> {
        match size(self.0 >> NESTED_SIZE) {
            PageSize::Unpaged => None,
            size => Some(size),
        }
    }

    /// What every level of every dimension grants.
    #[must_use]
    pub const fn rights(self) -> Rights {
        let mut rights = Rights((self.0 & (WRITE | USER)) as u8);
        if self.0 & (UNREADABLE | LongMode::PRESENT) == LongMode::PRESENT {
            rights = rights.or(Rights::READ);
        }
        if self.0 & (NO_EXECUTE | LongMode::PRESENT) == LongMode::PRESENT {
            rights = rights.or(Rights::EXECUTE);
        }
        rights
    }

    /// What lies behind the address.
    #[must_use]
    pub const fn backing(self) -> Backing {
        match self.0 >> BACKING & 3 {
            0 => Backing::Ram,
            1 => Backing::ReadOnly,
            _ => Backing::None,
        }
    }

    /// The guest leaf's accessed bit.
    #[must_use]
    pub const fn accessed(self) -> bool {
        self.0 & LongMode::ACCESSED != 0
    }

    /// The guest leaf's dirty bit.
    #[must_use]
    pub const fn dirty(self) -> bool {
        self.0 & LongMode::DIRTY != 0
    }

    /// The guest leaf's global bit.
    #[must_use]
    pub const fn global(self) -> bool {
        self.0 & LongMode::GLOBAL != 0
    }

    /// Protection key of the page.
    #[must_use]
    pub const fn key(self) -> u8 {
        LongMode::protection_key(self.0)
    }

    /// Number of the PAT field that the guest's leaf selects; `None` where paging is off.
    #[must_use]
    pub const fn pat_index(self) -> Option<usize> {
        match self.page_size() {
            PageSize::Unpaged => None,
            _ => Some((self.0 >> 3 & 3 | (self.0 & PAT) >> 5) as usize),
        }
    }
}

const fn when(holds: bool, bit: u64) -> u64 {
    if holds { bit } else { 0 }
}

pub(super) const fn size_code(size: PageSize) -> u64 {
    match size {
        PageSize::Unpaged => 0,
        PageSize::Size4K => 1,
        PageSize::Size2M => 2,
        PageSize::Size4M => 3,
        PageSize::Size1G => 4,
    }
}

/// The word of `page` with what lies behind `gva` in it.
#[inline(always)]
pub(super) fn with_backing<M: Memory>(page: u64, gva: u64, memory: &M) -> u64 {
    page | backing_code(memory.backing(Gpa(page & PageWord::FRAME | gva & 0xfff))) << BACKING
}

/// The size of the page that `word` is of, as that of the second dimension's page.
#[inline(always)]
pub(super) const fn nested_size_of(word: u64) -> u64 {
    (word >> SIZE & 7) << NESTED_SIZE
}

const fn size(code: u64) -> PageSize {
    match code & 7 {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        3 => PageSize::Size4M,
        4 => PageSize::Size1G,
        _ => PageSize::Unpaged,
    }
}

#[inline(always)]
const fn backing_code(backing: Backing) -> u64 {
    match backing {
        Backing::Ram => 0,
        Backing::ReadOnly => 1,
        Backing::None => 2,
    }
}
