//! Which accesses a translated linear address allows, and the page-fault error code.
//!
//! Intel SDM volume 3, "Access Rights" ("Determination of Access Rights", "Protection Keys") and "Page-Fault Exceptions".

use super::structures::{Mapped, View};
use super::{By, Cause, Dimension, Event, Kind, Physical, Refusal, Visit, Walk, bit, number};

impl<P: Physical> Walk<'_, P> {
    /// The bits of an error code that describe the access, whatever refused it: W/R (1), U/S (2), I/D (4).
    pub(super) fn about_the_access(&self, view: &View) -> u32 {
        let mut code = 0;
        if self.request.kind == Kind::Write {
            code |= 1 << 1;
        }
        // An implicit supervisor-mode access is one even at CPL 3. An exempt access counts as the supervisor's.
        if self.request.by == By::User {
            code |= 1 << 2;
        }
        // I/D: a fetch, and either CR4.SMEP = 1, or CR4.PAE = 1 and EFER.NXE = 1.
        let reported = view.registers.cr4_smep() || (view.registers.cr4_pae() && view.registers.efer_nxe());
        if self.request.kind == Kind::Fetch && reported {
            code |= 1 << 4;
        }
        code
    }

    /// "Determination of Access Rights", one condition after the other. The first one in the order of the walker's `Reason`
    /// is the cause; the error code tells of protection keys even where something else refuses as well.
    pub(super) fn linear_access_allowed(&self, view: &View, mapped: &Mapped) -> Result<(), Refusal> {
        let Walk { request, .. } = self;
        let user_address = mapped.granted.user;
        let writable = mapped.granted.write;
        let executable = mapped.granted.execute;

        // Privilege::Exempt: no rights are checked.
        if request.by == By::Exempt {
            return Ok(());
        }
        let user_access = request.by == By::User;
        let explicit = request.by != By::ImplicitSupervisor;
        let data = request.kind != Kind::Fetch;

        let mut causes: Vec<Cause> = Vec::new();

        // User-mode accesses reach user-mode addresses only: U/S is 1 in every entry.
        if user_access && !user_address {
            causes.push(Cause::SupervisorPage);
        }
        // Instruction fetches, in either mode: XD is 0 in every entry.
        if request.kind == Kind::Fetch && !executable {
            causes.push(Cause::NoExecute);
        }
        // Supervisor-mode fetches from user-mode addresses: not if CR4.SMEP = 1.
        if request.kind == Kind::Fetch && !user_access && user_address && view.registers.cr4_smep() {
            causes.push(Cause::Smep);
        }
        // Supervisor-mode data accesses to user-mode addresses: not if CR4.SMAP = 1, unless EFLAGS.AC = 1 and the access is
        // explicit.
        if data && !user_access && user_address && view.registers.cr4_smap() && !(request.ac && explicit) {
            causes.push(Cause::Smap);
        }
        // Writes: R/W is 1 in every entry. Supervisor-mode writes need that only with CR0.WP = 1.
        if request.kind == Kind::Write && !writable && (user_access || view.registers.cr0_wp()) {
            causes.push(Cause::ReadOnly);
        }
        if self.key_refuses(view, mapped) {
            causes.push(Cause::ProtectionKey);
        }

        let Some(&cause) = causes.first() else { return Ok(()) };
        // P is 1: there was a translation. PK is 1 if a key refused, alone or not.
        let mut code = self.about_the_access(view) | 1 << 0;
        if causes.contains(&Cause::ProtectionKey) {
            code |= 1 << 5;
        }
        Err(self.blame_nearest_to_the_leaf(view, cause, Event::PageFault(code)))
    }

    /// "Protection Keys": with CR4.PKE = 1 in 4-level and 5-level paging, PKRU guards data accesses to user-mode addresses, by
    /// any mode. AD of the page's key refuses all of them; WD refuses user writes, and supervisor writes with CR0.WP = 1.
    fn key_refuses(&self, view: &View, mapped: &Mapped) -> bool {
        if !view.registers.cr4_pke() || !view.registers.efer_lma() {
            return false;
        }
        if self.request.kind == Kind::Fetch || !mapped.granted.user {
            return false;
        }
        let key = number(mapped.entry, 62, 59) as u32;
        let access_disable = bit(u64::from(self.request.pkru), 2 * key);
        let write_disable = bit(u64::from(self.request.pkru), 2 * key + 1);
        let obeys_write_disable = self.request.by == By::User || view.registers.cr0_wp();
        access_disable || (write_disable && self.request.kind == Kind::Write && obeys_write_disable)
    }

    /// The project's own rule (`Fault`): of the entries that withhold the right, the one nearest to the leaf. SMEP, SMAP and
    /// keys are about what the leaf maps.
    pub(super) fn blame_nearest_to_the_leaf(&self, view: &View, cause: Cause, event: Event) -> Refusal {
        let withholds = |entry: u64| -> u64 {
            match cause {
                Cause::SupervisorPage if !bit(entry, 2) => 1 << 2,
                Cause::ReadOnly if !bit(entry, 1) => 1 << 1,
                Cause::NoExecute if bit(entry, 63) => 1 << 63,
                Cause::Smep | Cause::Smap => 1 << 2,
                Cause::ProtectionKey => 0b1111 << 59,
                _ => 0,
            }
        };
        let of_this_walk = |visit: &&Visit| visit.dimension == view.dimension;
        let blamed = self.visits[view.first_visit..]
            .iter()
            .rev()
            .filter(of_this_walk)
            .find(|visit| withholds(visit.entry) != 0)
            .expect("a right is withheld by some entry");
        Refusal {
            event,
            cause,
            linear: self.request.linear,
            dimension: view.dimension,
            level: blamed.level,
            at: blamed.address,
            entry: blamed.entry,
            bits: withholds(blamed.entry),
            nested: (view.dimension == Dimension::Nested).then_some(view.input),
        }
    }
}
