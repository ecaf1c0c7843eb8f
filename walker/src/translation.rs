//! What a walk that ends well says.

use crate::addr::{Gpa, NestedGpa};
use crate::entry::{EntryLayout, LongMode};
use crate::memory::Backing;
use crate::memory_type::EptMemoryType;
use crate::permission::Rights;

/// Size of the page that a leaf maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// Paging is off: no page at all.
    Unpaged,
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 4 MiB.
    Size4M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// Bytes, or `None` where paging is off.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        match self {
            Self::Unpaged => None,
            Self::Size4K => Some(1 << 12),
            Self::Size2M => Some(1 << 21),
            Self::Size4M => Some(1 << 22),
            Self::Size1G => Some(1 << 30),
        }
    }

    /// The size of a page with `bits` address bits.
    #[inline(always)]
    pub(crate) const fn of_bits(bits: u32) -> Self {
        match bits {
            12 => Self::Size4K,
            21 => Self::Size2M,
            22 => Self::Size4M,
            _ => Self::Size1G,
        }
    }
}

/// The way through the second dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NestedPage {
    /// The L2 guest-physical address in between.
    pub ngpa: NestedGpa,
    /// Size of the second dimension's page.
    pub page_size: PageSize,
    /// What the EPT leaf says of the memory type, where the second dimension is EPT.
    pub ept_memory_type: Option<EptMemoryType>,
}

/// What a GVA means right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation {
    /// The address in the machine's memory.
    pub gpa: Gpa,
    /// The guest's leaf, as the walk loaded it; 0 where paging is off.
    pub entry: u64,
    /// The page of the second dimension, in a nested walk.
    pub nested: Option<NestedPage>,
    /// Size of the guest's page.
    pub page_size: PageSize,
    /// What every level of every dimension grants.
    pub rights: Rights,
    /// What lies behind the final address.
    pub backing: Backing,
    /// Policy `Set` met entries in read-only memory and left their accessed and dirty bits alone.
    pub ad_skipped: bool,
}

impl Translation {
    /// The guest leaf's accessed bit, as the walk found it.
    #[must_use]
    pub const fn accessed(&self) -> bool {
        self.entry & LongMode::ACCESSED != 0
    }

    /// The guest leaf's dirty bit, as the walk found it.
    #[must_use]
    pub const fn dirty(&self) -> bool {
        self.entry & LongMode::DIRTY != 0
    }

    /// The guest leaf's global bit.
    #[must_use]
    pub const fn global(&self) -> bool {
        self.entry & LongMode::GLOBAL != 0
    }

    /// Protection key of the page, 0 to 15, whether or not keys are enabled.
    #[must_use]
    pub const fn key(&self) -> u8 {
        LongMode::protection_key(self.entry)
    }

    /// Number of the PAT field that the leaf selects, 0 to 7; `None` where paging is off.
    #[must_use]
    pub const fn pat_index(&self) -> Option<usize> {
        match self.page_size {
            PageSize::Unpaged => None,
            PageSize::Size4K => Some(LongMode::pat_index(self.entry, false)),
            _ => Some(LongMode::pat_index(self.entry, true)),
        }
    }
}
