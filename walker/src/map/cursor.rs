//! Where a map stands: all that outlives one call.

use crate::access::Access;
use crate::addr::Gva;
use crate::format::PageFormat;

use super::extent::Extent;
use super::filter::Filter;
use super::{Budget, EXEMPT, Report};

/// What a map met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Tally {
    /// Tables of the guest that were read, each as often as it was.
    pub tables: u64,
    /// Entries read, of both dimensions: a table counts whole.
    pub entries: u64,
    /// Extents.
    pub extents: u64,
    /// Bytes that these cover, without those that are faults.
    pub mapped: u64,
    /// Tables of the guest that lie outside memory, wholly or in part.
    pub unbacked: u64,
    /// Entries of the guest with reserved bits set.
    pub reserved: u64,
    /// Refusals of the second dimension, for a table of the guest or for a page.
    pub nested: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor {
    pub(super) first: u64,
    pub(super) last: u64,
    /// Everything before it is in an extent or left out for good.
    pub(super) next: u64,
    pub(super) filter: Filter,
    pub(super) access: Access,
    pub(super) report: Report,
    pub(super) budget: Budget,
    /// Held back: what comes next might continue it.
    pub(super) pending: Option<Extent>,
    pub(super) tally: Tally,
}

impl Cursor {
    pub(super) const fn new(last: u64) -> Self {
        Self {
            first: 0,
            last,
            next: 0,
            filter: Filter::ALL,
            access: EXEMPT,
            report: Report::Pages,
            budget: Budget::DEFAULT,
            pending: None,
            tally: Tally {
                tables: 0,
                entries: 0,
                extents: 0,
                mapped: 0,
                unbacked: 0,
                reserved: 0,
                nested: 0,
            },
        }
    }

    /// The address at `position`.
    #[inline(always)]
    pub(super) fn gva(&self, format: &PageFormat, position: u64) -> Gva {
        if format.mode().is_long() {
            let unused = 64u32.wrapping_sub(format.linear_width()) & 63;
            Gva(((position << unused) as i64 >> unused) as u64)
        } else {
            Gva(position)
        }
    }
}
