//! What an access meets on a page of known rights: Intel SDM volume 3, "Determination of Access Rights" and "Page-Fault
//! Exceptions", as far as Linux's pages go. They have no reserved bits, and PKRU is taken to be 0.

use pagewalk::{Access, AccessKind, ControlRegisters, Privilege};

use crate::bed::{CR0_WP, CR4_PAE, CR4_SMAP, CR4_SMEP, EFER_NXE, when};

/// What all levels grant together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub(crate) user: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

/// One kind of access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Intent {
    kind: AccessKind,
    user: bool,
    ac: bool,
}

impl Intent {
    pub(crate) const ALL: [Intent; 8] = [
        Intent { kind: AccessKind::Read, user: true, ac: false },
        Intent { kind: AccessKind::Write, user: true, ac: false },
        Intent { kind: AccessKind::Fetch, user: true, ac: false },
        Intent { kind: AccessKind::Read, user: false, ac: false },
        Intent { kind: AccessKind::Write, user: false, ac: false },
        Intent { kind: AccessKind::Fetch, user: false, ac: false },
        Intent { kind: AccessKind::Read, user: false, ac: true },
        Intent { kind: AccessKind::Write, user: false, ac: true },
    ];

    pub(crate) fn access(self) -> Access {
        let privilege = if self.user { Privilege::User } else { Privilege::Supervisor };
        Access::new(self.kind, privilege).with_ac(self.ac)
    }
}

impl Expected {
    /// The error code of the #PF that the access raises, if it raises one.
    pub(crate) fn error_code(self, control: &ControlRegisters, intent: Intent) -> Option<u32> {
        let write = intent.kind == AccessKind::Write;
        let fetch = intent.kind == AccessKind::Fetch;
        let crosses = !intent.user && self.user;
        let refused = intent.user && !self.user
            || fetch && !self.execute
            || fetch && crosses && control.cr4 & CR4_SMEP != 0
            || !fetch && crosses && !intent.ac && control.cr4 & CR4_SMAP != 0
            || write && !self.write && (intent.user || control.cr0 & CR0_WP != 0);
        let no_execute = control.cr4 & CR4_PAE != 0 && control.efer & EFER_NXE != 0;
        let fetch_reported = fetch && (no_execute || control.cr4 & CR4_SMEP != 0);
        let code = 1 | when(write, 2) | when(intent.user, 4) | when(fetch_reported, 16);
        refused.then_some(code as u32)
    }
}
