//! What lies behind a page of the guest: the second dimension's page, and memory, each asked once for all that it covers.

use crate::addr::{Gpa, NestedGpa};
use crate::fault::Fault;
use crate::memory::{Backing, Memory};
use crate::nested::{NestedLeaf, NgpaWalk};
use crate::permission::Rights;
use crate::trace::NoTrace;
use crate::translation::Translation;

use super::EXEMPT;

/// The answers that came last.
pub(super) struct Behind {
    /// Lowest nGPA of the second dimension's page, its size, the guest's rights that it was asked for, and the page.
    nested: Option<(u64, u64, Rights, NestedLeaf)>,
    backing: (u64, u64, Backing),
}

impl Behind {
    pub(super) const NOTHING: Self = Self { nested: None, backing: (0, 0, Backing::None) };

    /// Whether `ngpa` needs a walk.
    #[inline(always)]
    pub(super) fn is_new(&self, ngpa: u64, guest: Rights) -> bool {
        !self
            .nested
            .is_some_and(|(start, bytes, rights, _)| ngpa.wrapping_sub(start) < bytes && rights == guest)
    }

    /// `page`, whose address is the guest's, with what the second dimension makes of it, and for how many bytes that holds.
    ///
    /// A fault holds as far as the entry that refused reaches.
    #[inline(never)]
    pub(super) fn second<M: Memory>(
        &mut self,
        second: &NgpaWalk,
        memory: &M,
        page: &Translation,
    ) -> (Result<Translation, Fault>, u64) {
        let ngpa = page.gpa.0;
        if self.is_new(ngpa, page.rights()) {
            match second.final_page(memory, NestedGpa(ngpa), &EXEMPT, page.rights(), &mut NoTrace) {
                Ok(leaf) => {
                    let bytes = leaf.size.bytes().unwrap_or(1);
                    let within = ngpa & bytes.wrapping_sub(1);
                    let first = NestedLeaf { gpa: Gpa(leaf.gpa.0.wrapping_sub(within)), ..leaf };
                    self.nested = Some((ngpa.wrapping_sub(within), bytes, page.rights(), first));
                }
                Err(fault) => {
                    let format = second.page_walk().format();
                    let below = match fault.level {
                        // No entry did: all that lies above is too wide as well.
                        0 => u64::MAX,
                        level => (1 << ((12 + format.index_bits() * level.wrapping_sub(1)) & 63)) - 1,
                    };
                    return (Err(fault), (below & !ngpa).saturating_add(1));
                }
            }
        }
        let Some((start, bytes, _, leaf)) = self.nested else { return (Ok(*page), 1) };
        let within = ngpa.wrapping_sub(start);
        let page = Translation {
            gpa: Gpa(leaf.gpa.0.wrapping_add(within)),
            nested: Some(leaf.page(NestedGpa(ngpa))),
            page: page.page.with_rights(leaf.rights),
            ..*page
        };
        (Ok(page), bytes.wrapping_sub(within))
    }

    /// What lies behind `gpa`, and for how many bytes.
    #[inline(always)]
    pub(super) fn backing<M: Memory>(&mut self, memory: &M, gpa: Gpa) -> (Backing, u64) {
        let (start, bytes, backing) = self.backing;
        let within = gpa.0.wrapping_sub(start);
        if within < bytes {
            return (backing, bytes.wrapping_sub(within));
        }
        let (backing, bytes) = memory.backing_run(gpa);
        let bytes = bytes.max(1);
        self.backing = (gpa.0, bytes, backing);
        (backing, bytes)
    }
}
