//! Which accesses a translated linear address allows, and the page-fault error code.
//!
//! Intel SDM volume 3, "Access Rights" ("Determination of Access Rights", "Protection Keys") and "Page-Fault Exceptions".

use super::structures::{Mapped, View};
use super::{By, Cause, Dimension, Event, Found, Kind, Physical, Refusal, Visit, Walk, bit, bits, number};

impl<P: Physical> Walk<'_, P> {
    /// The bits of an error code that describe the access, whatever refused it: W/R (1), U/S (2), I/D (4), SS (6).
    pub(super) fn about_the_access(&self, view: &View) -> u32 {
        let mut code = 0;
        if self.request.kind.writes() {
            code |= 1 << 1;
        }
        if self.request.kind.of_a_shadow_stack() {
            code |= 1 << 6;
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
        let shadow_stack = request.kind.of_a_shadow_stack();
        let ordinary_data = request.kind == Kind::Read || request.kind == Kind::Write;

        let mut causes: Vec<Cause> = Vec::new();

        // User-mode accesses reach user-mode addresses only, shadow-stack accesses included: U/S is 1 in every entry.
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
        if ordinary_data
            && !user_access
            && user_address
            && view.registers.cr4_smap()
            && !(request.ac && explicit)
        {
            causes.push(Cause::Smap);
        }
        // Writes: R/W is 1 in every entry. Supervisor-mode writes need that only with CR0.WP = 1.
        if request.kind == Kind::Write && !writable && (user_access || view.registers.cr0_wp()) {
            causes.push(Cause::ReadOnly);
        }
        // Shadow-stack accesses reach shadow-stack addresses only, those of the supervisor supervisor-mode ones. Of what is said of
        // reads and writes, "only the items noted explicitly apply" to them: neither SMAP nor R/W does.
        if shadow_stack && !user_access && user_address {
            causes.push(Cause::UserShadowStack);
        }
        if shadow_stack && !self.is_shadow_stack(view) {
            causes.push(Cause::NotShadowStack);
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

    /// "A linear address is a shadow-stack address if" R/W is 0 and D is 1 in the entry that maps the page, and R/W is 1 in every
    /// other entry. A PDPTE of PAE paging has no R/W. This says which bits of an entry stand in the way.
    fn no_shadow_stack(&self, view: &View, visit: &Visit) -> u64 {
        let pae = view.registers.cr4_pae() && !view.registers.efer_lma();
        match visit.found {
            Found::Leaf => bits(visit.entry, 1, 1) | bits(!visit.entry, 6, 6),
            _ if pae && visit.level == 3 => 0,
            _ => bits(!visit.entry, 1, 1),
        }
    }

    fn is_shadow_stack(&self, view: &View) -> bool {
        self.entries_of(view).all(|visit| self.no_shadow_stack(view, visit) == 0)
    }

    /// "Protection Keys", in 4-level and 5-level paging. They are about data accesses, a shadow stack's included. With CR4.PKE = 1
    /// PKRU guards user-mode addresses, and with CR4.PKS = 1 IA32_PKRS guards supervisor-mode addresses, against accesses by any
    /// mode. AD of the page's key refuses all of them. WD refuses writes: of a user-mode address those by the user, and with
    /// CR0.WP = 1 those by the supervisor; of a supervisor-mode address those with CR0.WP = 1.
    fn key_refuses(&self, view: &View, mapped: &Mapped) -> bool {
        if !view.registers.efer_lma() || self.request.kind == Kind::Fetch {
            return false;
        }
        let user_address = mapped.granted.user;
        let (enabled, register) = match user_address {
            true => (view.registers.cr4_pke(), u64::from(self.request.pkru)),
            false => (view.registers.cr4_pks(), u64::from(self.request.pkrs)),
        };
        let key = number(mapped.entry, 62, 59) as u32;
        let access_disable = bit(register, 2 * key);
        let write_disable = bit(register, 2 * key + 1);
        let obeys_write_disable = view.registers.cr0_wp() || (user_address && self.request.by == By::User);
        enabled && (access_disable || (write_disable && self.request.kind.writes() && obeys_write_disable))
    }

    /// The project's own rule (`Fault`): of the entries that withhold the right, the one nearest to the leaf. SMEP, SMAP and
    /// keys are about what the leaf maps.
    pub(super) fn blame_nearest_to_the_leaf(&self, view: &View, cause: Cause, event: Event) -> Refusal {
        self.blame_the_lowest(view, cause, event, |visit| match cause {
            Cause::SupervisorPage => bits(!visit.entry, 2, 2),
            Cause::ReadOnly => bits(!visit.entry, 1, 1),
            Cause::NoExecute => bits(visit.entry, 63, 63),
            Cause::Smep | Cause::Smap | Cause::UserShadowStack | Cause::Gmet => 1 << 2,
            Cause::NotShadowStack => self.no_shadow_stack(view, visit),
            Cause::ProtectionKey => 0b1111 << 59,
            other => unreachable!("{other:?} is no missing right"),
        })
    }

    /// The lowest entry of this walk of which `withholds` names bits.
    pub(super) fn blame_the_lowest(
        &self,
        view: &View,
        cause: Cause,
        event: Event,
        withholds: impl Fn(&Visit) -> u64,
    ) -> Refusal {
        let blamed = self
            .entries_of(view)
            .filter(|visit| withholds(visit) != 0)
            .last()
            .expect("a right is withheld by some entry");
        Refusal {
            event,
            cause,
            linear: self.request.linear,
            dimension: view.dimension,
            level: blamed.level,
            at: blamed.address,
            entry: blamed.entry,
            bits: withholds(blamed),
            nested: (view.dimension == Dimension::Nested).then_some(view.input),
        }
    }

    /// The entries that this view's walk has read, from the root down.
    fn entries_of(&self, view: &View) -> impl Iterator<Item = &Visit> {
        let dimension = view.dimension;
        self.visits[view.first_visit..].iter().filter(move |visit| visit.dimension == dimension)
    }
}
