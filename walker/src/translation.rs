//! What a walk that ends well says.

use core::fmt;

use crate::addr::{Gpa, NestedGpa};
use crate::entry::{EntryLayout, LongMode};
use crate::memory::Backing;
use crate::memory_type::EptMemoryType;
use crate::permission::{Rights, Shown};

/// Size of the page that a leaf maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 4 MiB.
    Size4M,
    /// 1 GiB.
    Size1G,
    /// Paging is off: no page at all.
    Unpaged,
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
    pub(crate) page: Page,
}

/// What there is to say of a page in a few bits, as one word: a walk makes it in a register and stores it once. It is 0 but
/// for the bits that the levels show, where the page has 4 KiB and is RAM.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Page(u32);

impl Page {
    /// The bits of [`Shown`].
    const SHOWN: u32 = 0xf;
    const SIZE: u32 = 4;
    const BACKING: u32 = 8;
    const AD_SKIPPED: u32 = 1 << 12;

    /// A page in RAM.
    #[inline(always)]
    pub(crate) const fn new(size: PageSize, shown: Shown) -> Self {
        Self((size as u32) << Self::SIZE | shown.bits())
    }

    #[inline(always)]
    pub(crate) const fn with_backing(self, backing: Backing) -> Self {
        Self(self.0 & !(0xf << Self::BACKING) | (backing as u32) << Self::BACKING)
    }

    pub(crate) const fn with_rights(self, rights: Rights) -> Self {
        Self(self.0 & !Self::SHOWN | Shown::of(rights).bits())
    }

    const fn rights(self) -> Rights {
        Shown::of_bits(self.0).rights()
    }

    const fn size(self) -> PageSize {
        match self.0 >> Self::SIZE & 0xf {
            0 => PageSize::Size4K,
            1 => PageSize::Size2M,
            2 => PageSize::Size4M,
            3 => PageSize::Size1G,
            _ => PageSize::Unpaged,
        }
    }

    const fn backing(self) -> Backing {
        match self.0 >> Self::BACKING & 0xf {
            0 => Backing::Ram,
            1 => Backing::None,
            _ => Backing::ReadOnly,
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page")
            .field("size", &self.size())
            .field("rights", &self.rights())
            .field("backing", &self.backing())
            .field("ad_skipped", &(self.0 & Self::AD_SKIPPED != 0))
            .finish()
    }
}

impl Translation {
    /// Size of the guest's page.
    #[must_use]
    #[inline]
    pub const fn page_size(&self) -> PageSize {
        self.page.size()
    }

    /// What every level of every dimension grants.
    #[must_use]
    #[inline]
    pub const fn rights(&self) -> Rights {
        self.page.rights()
    }

    /// What lies behind the final address.
    #[must_use]
    #[inline]
    pub const fn backing(&self) -> Backing {
        self.page.backing()
    }

    /// Whether policy `Set` met entries in read-only memory and left their accessed and dirty bits alone.
    #[must_use]
    pub const fn ad_skipped(&self) -> bool {
        self.page.0 & Page::AD_SKIPPED != 0
    }

    /// The same translation with this answer to [`Self::ad_skipped`].
    #[must_use]
    pub const fn with_ad_skipped(self, skipped: bool) -> Self {
        let page = self.page.0 & !Page::AD_SKIPPED | if skipped { Page::AD_SKIPPED } else { 0 };
        Self { page: Page(page), ..self }
    }

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
        match self.page_size() {
            PageSize::Unpaged => None,
            PageSize::Size4K => Some(LongMode::pat_index(self.entry, false)),
            _ => Some(LongMode::pat_index(self.entry, true)),
        }
    }
}
