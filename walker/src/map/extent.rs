//! A stretch of addresses with one meaning.

use crate::addr::{Gva, NestedGpa};
use crate::fault::Fault;
use crate::translation::{NestedPage, PageSize, Translation};

/// A stretch of guest virtual addresses that mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Its first address.
    pub start: Gva,
    /// Its length in bytes.
    pub bytes: u64,
    /// What its first address means; its other addresses mean as much further on. All pages have this size and these rights,
    /// and their leaves select the same memory type and key; the entry is that of the first one, with the accessed and
    /// the dirty bit set where any page's are.
    ///
    /// A fault is that of the first address. All others have a fault of the same kind and reason.
    pub outcome: Result<Translation, Fault>,
}

impl Extent {
    /// Takes up the `bytes` of pages from `start` on, if they continue this extent.
    #[inline(always)]
    pub(super) fn absorb_page(&mut self, start: Gva, bytes: u64, next: &Translation) -> bool {
        if self.start.0.wrapping_add(self.bytes) != start.0 {
            return false;
        }
        let Ok(page) = &mut self.outcome else { return false };
        let continues = absorb(page, self.bytes, next);
        if continues {
            self.bytes += bytes;
        }
        continues
    }

    /// Takes up a fault that continues this one.
    pub(super) fn absorb_fault(&mut self, other: &Self) -> bool {
        let (Err(fault), Err(next)) = (&self.outcome, &other.outcome) else { return false };
        let continues = self.start.0.wrapping_add(self.bytes) == other.start.0
            && (fault.kind, fault.reason, fault.dimension) == (next.kind, next.reason, next.dimension);
        if continues {
            self.bytes += other.bytes;
        }
        continues
    }
}

#[inline(always)]
fn absorb(page: &mut Translation, bytes: u64, next: &Translation) -> bool {
    let continues = page.gpa.0.wrapping_add(bytes) == next.gpa.0
        && (page.entry ^ next.entry) & shown(page.page_size()) == 0
        && page.page == next.page
        && match (page.nested, next.nested) {
            (None, None) => true,
            (Some(nested), Some(next)) => further(nested, bytes) == next,
            _ => false,
        };
    if continues {
        page.entry |= next.entry & USED;
    }
    continues
}

#[inline(always)]
fn further(nested: NestedPage, bytes: u64) -> NestedPage {
    NestedPage { ngpa: NestedGpa(nested.ngpa.0.wrapping_add(bytes)), ..nested }
}

/// The accessed and the dirty bit of a leaf.
const USED: u64 = 0x60;

/// What a leaf shows beside its rights: PWT, PCD and PAT, the global bit, and the protection key.
#[inline(always)]
const fn shown(size: PageSize) -> u64 {
    let pat = match size {
        PageSize::Unpaged => 0,
        PageSize::Size4K => 1 << 7,
        _ => 1 << 12,
    };
    pat | 3 << 3 | 1 << 8 | 0xf << 59
}
