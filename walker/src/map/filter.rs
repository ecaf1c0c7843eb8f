//! Which pages a map is about.

use crate::addr::Gpa;
use crate::permission::Rights;
use crate::translation::{PageSize, Translation};

/// A set of page sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageSizes(u8);

impl PageSizes {
    /// No size.
    pub const NONE: Self = Self(0);
    /// Every size, and no page at all where paging is off.
    pub const ALL: Self = Self(u8::MAX);

    /// The set with `size` in it.
    #[must_use]
    pub const fn with(self, size: PageSize) -> Self {
        Self(self.0 | 1 << size as u8)
    }

    /// Whether `size` is in the set.
    #[must_use]
    #[inline]
    pub const fn contains(self, size: PageSize) -> bool {
        self.0 & 1 << size as u8 != 0
    }
}

/// Which pages a [`Map`](super::Map) is about. Faults that are reported pass every filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    /// Rights that a page has to have.
    pub required: Rights,
    /// Rights that a page must not have.
    pub forbidden: Rights,
    /// Sizes of the guest's pages.
    pub page_sizes: PageSizes,
    /// First and last address of the memory that a page has to lie in: it is cut to what does.
    pub gpas: (Gpa, Gpa),
}

impl Filter {
    /// Every page.
    pub const ALL: Self = Self {
        required: Rights::NONE,
        forbidden: Rights::NONE,
        page_sizes: PageSizes::ALL,
        gpas: (Gpa(0), Gpa(u64::MAX)),
    };

    /// Whether there may be pages of interest where the entries so far grant `rights`: further entries, and the second
    /// dimension, only take away.
    #[inline(always)]
    pub(super) const fn may_hold(&self, rights: Rights) -> bool {
        self.required.without(rights).bits() == 0
    }

    /// Whether pages with these rights, of this size, are of interest.
    #[inline(always)]
    pub(super) fn has(&self, rights: Rights, size: PageSize) -> bool {
        self.may_hold(rights) && rights.and(self.forbidden) == Rights::NONE && self.page_sizes.contains(size)
    }

    /// Whether a page that begins, as far as it is looked at, with `page` is of interest.
    #[inline(always)]
    pub(super) fn takes(&self, page: &Translation) -> bool {
        let (first, last) = self.gpas;
        self.has(page.rights(), page.page_size()) && first <= page.gpa && page.gpa <= last
    }

    /// How many bytes from `gpa` on are all in the memory of interest, or all outside of it.
    #[inline(always)]
    pub(super) fn reach(&self, gpa: Gpa) -> u64 {
        let (first, last) = self.gpas;
        if gpa < first {
            first.0 - gpa.0
        } else if gpa <= last {
            (last.0 - gpa.0).saturating_add(1)
        } else {
            u64::MAX
        }
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self::ALL
    }
}
