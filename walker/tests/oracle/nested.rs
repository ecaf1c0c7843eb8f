//! The second dimension under AMD's nested paging.
//!
//! AMD APM volume 2, "Nested Paging": "Nested Paging and VMRUN/#VMEXIT" (the host's CR4 and EFER choose the format),
//! "Nested Table Walk", "Nested versus Guest Page Faults, Fault Ordering" (EXITINFO1).

use super::structures::{Mapped, View};
use super::{By, Cause, Dimension, Event, Granted, Kind, Physical, Refusal, Second, Walk, bits};

/// What a nested physical address is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The entry of a guest paging structure.
    Table,
    /// What the access is about.
    Final,
}

impl<P: Physical> Walk<'_, P> {
    /// Translates `address` of the guest's physical space.
    pub(super) fn through_second(&mut self, address: u64, purpose: Purpose) -> Result<Mapped, Refusal> {
        match self.system.second {
            Some(Second::Npt { ncr3, host, cpu }) => {
                // "Nested Table Walk": the walk for a guest's table is a data write, whatever the guest's access is.
                let writes = purpose == Purpose::Table || self.request.kind == Kind::Write;
                let view = View {
                    dimension: Dimension::Nested,
                    registers: host,
                    cpu,
                    input: address,
                    purpose,
                    writes,
                    first_visit: self.visits.len(),
                };
                self.npt(&view, ncr3)
            }
            None => unreachable!("asked only where there is a second dimension"),
        }
    }

    fn npt(&mut self, view: &View, ncr3: u64) -> Result<Mapped, Refusal> {
        let long = view.registers.efer_lma();
        // A guest physical address is no linear address and need not be canonical; what the structures cannot translate is
        // not present.
        let width = match (long, view.registers.cr4_la57()) {
            (true, true) => 57,
            (true, false) => 48,
            (false, _) => 32,
        };
        if bits(view.input, 63, width) != 0 {
            return Err(Refusal {
                event: Event::NestedPageFault(self.about_the_nested_access(view)),
                cause: Cause::TooWide,
                linear: self.request.linear,
                dimension: Dimension::Nested,
                level: 0,
                at: 0,
                entry: 0,
                bits: 0,
                nested: Some(view.input),
            });
        }
        let root = bits(ncr3, 51, 12);
        let mapped = match (long, view.registers.cr4_pae()) {
            (true, _) if view.registers.cr4_la57() => self.five_level(view, root)?,
            (true, _) => self.four_level(view, root)?,
            (false, true) => self.pae(view, ncr3)?,
            (false, false) => self.two_level(view, ncr3)?,
        };
        self.nested_access_allowed(view, mapped.granted)?;
        Ok(mapped)
    }

    /// The nested walk is a user access: U/S and, whatever the host's CR0.WP, R/W count in every entry. SMEP, SMAP and
    /// protection keys are about supervisor accesses and linear addresses, and do not apply.
    fn nested_access_allowed(&self, view: &View, granted: Granted) -> Result<(), Refusal> {
        if self.request.by == By::Exempt {
            return Ok(());
        }
        let fetches = view.purpose == Purpose::Final && self.request.kind == Kind::Fetch;
        let cause = if !granted.user {
            Cause::SupervisorPage
        } else if fetches && !granted.execute {
            Cause::NoExecute
        } else if view.writes && !granted.write {
            Cause::ReadOnly
        } else {
            return Ok(());
        };
        let event = Event::NestedPageFault(self.about_the_nested_access(view) | 1 << 0);
        Err(self.blame_nearest_to_the_leaf(view, cause, event))
    }

    /// EXITINFO1 but for P and RSV: bit 1 for a write (always, for a guest's table), bit 2 for a user access (always), bit 4 for
    /// a code read, bit 32 where the final address was being translated, bit 33 where a guest's table was.
    pub(super) fn about_the_nested_access(&self, view: &View) -> u64 {
        let mut info = 1 << 2;
        if view.writes {
            info |= 1 << 1;
        }
        let fetches = view.purpose == Purpose::Final && self.request.kind == Kind::Fetch;
        // "Page-Fault Error Code": I/D is defined only where no-execute is enabled, here by the host.
        if fetches && view.registers.cr4_pae() && view.registers.efer_nxe() {
            info |= 1 << 4;
        }
        match view.purpose {
            Purpose::Final => info | 1 << 32,
            Purpose::Table => info | 1 << 33,
        }
    }
}
