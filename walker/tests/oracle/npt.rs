//! The second dimension under AMD's nested paging.
//!
//! AMD APM volume 2, "Nested Paging": "Nested Paging and VMRUN/#VMEXIT" (the host's CR4 and EFER choose the format),
//! "Nested Table Walk", "Nested versus Guest Page Faults, Fault Ordering" (EXITINFO1), "Guest Mode Execute Trap".

use super::structures::{Mapped, View};
use super::{By, Cause, Dimension, Event, Granted, Kind, Physical, Purpose, Refusal, Second, Walk, bits};

impl<P: Physical> Walk<'_, P> {
    pub(super) fn npt(&mut self, address: u64, purpose: Purpose) -> Result<Mapped, Refusal> {
        let Some(Second::Npt { ncr3, host, cpu, .. }) = self.system.second else {
            unreachable!("asked only under nested paging")
        };
        let view = &View {
            dimension: Dimension::Nested,
            registers: host,
            cpu,
            input: address,
            purpose,
            // "Nested Table Walk": the walk for a guest's table is a data write, whatever the guest's access is.
            writes: purpose != Purpose::Final || self.request.kind.writes(),
            first_visit: self.visits.len(),
        };
        let long = view.registers.efer_lma();
        // A guest physical address is no linear address and need not be canonical; what the structures cannot translate is
        // not present.
        let width = match (long, view.registers.cr4_la57()) {
            (true, true) => 57,
            (true, false) => 48,
            (false, _) => 32,
        };
        if bits(view.input, 63, width) != 0 {
            let event = Event::NestedPageFault(self.about_the_nested_access(view));
            return Err(view.nobody_to_blame(self.request.linear, event, Cause::TooWide));
        }
        let root = view.address(ncr3, 51, 12);
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
    ///
    /// "Guest Mode Execute Trap": with GMET, U/S means something else. Data may be accessed whatever it is; code at CPL 3 may be
    /// fetched whatever it is; code below CPL 3 may not be fetched from a page whose U/S is 1 in every entry.
    fn nested_access_allowed(&self, view: &View, granted: Granted) -> Result<(), Refusal> {
        if self.request.by == By::Exempt {
            return Ok(());
        }
        let fetches = view.purpose == Purpose::Final && self.request.kind == Kind::Fetch;
        let cause = if !self.gmet() && !granted.user {
            Cause::SupervisorPage
        } else if fetches && !granted.execute {
            Cause::NoExecute
        } else if fetches && self.gmet() && self.request.by != By::User && granted.user {
            Cause::Gmet
        } else if view.writes && !granted.write {
            Cause::ReadOnly
        } else {
            return Ok(());
        };
        let event = Event::NestedPageFault(self.about_the_nested_access(view) | 1 << 0);
        Err(self.blame_nearest_to_the_leaf(view, cause, event))
    }

    /// EXITINFO1 but for P and RSV: bit 1 for a write (always, for a guest's table), bit 2 for a user access (always; with GMET, a
    /// final access has the guest's CPL), bit 4 for a code read, bit 6 for a shadow-stack access, bit 32 where the final address was being translated, bit 33 where a
    /// guest's table was.
    pub(super) fn about_the_nested_access(&self, view: &View) -> u64 {
        let last = view.purpose == Purpose::Final;
        let mut info = 0;
        if view.writes {
            info |= 1 << 1;
        }
        if !(self.gmet() && last) || self.request.by == By::User {
            info |= 1 << 2;
        }
        let fetches = last && self.request.kind == Kind::Fetch;
        // "Page-Fault Error Code": I/D is defined only where no-execute is enabled, here by the host, or SMEP, here GMET.
        let no_execute = view.registers.cr4_pae() && view.registers.efer_nxe();
        if fetches && (no_execute || self.gmet()) {
            info |= 1 << 4;
        }
        if last && self.request.kind.of_a_shadow_stack() {
            info |= 1 << 6;
        }
        if last { info | 1 << 32 } else { info | 1 << 33 }
    }

    fn gmet(&self) -> bool {
        matches!(self.system.second, Some(Second::Npt { gmet: true, .. }))
    }
}
