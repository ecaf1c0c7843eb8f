//! The outcome of a refused walk.
//!
//! Intel SDM volume 3, "Page-Fault Exceptions"; AMD APM volume 2, "Page-Fault Exception" and "Nested Paging" (EXITINFO1
//! of a nested page fault). A fault is an answer, bit for bit what the CPU would report, together with the one entry and
//! the bits of it that are responsible.

use core::fmt;

use crate::access::Access;
use crate::addr::{Gpa, NestedGpa};
use crate::format::PageFormat;
use crate::permission::Rights;

/// Error code: the page was present, a protection was violated.
pub const PFEC_PRESENT: u32 = 1 << 0;
/// Error code: the access was a write.
pub const PFEC_WRITE: u32 = 1 << 1;
/// Error code: the access was a user-mode access.
pub const PFEC_USER: u32 = 1 << 2;
/// Error code: a reserved bit was set.
pub const PFEC_RESERVED: u32 = 1 << 3;
/// Error code: the access was an instruction fetch.
pub const PFEC_FETCH: u32 = 1 << 4;
/// Error code: a protection key refused the access.
pub const PFEC_KEY: u32 = 1 << 5;
/// Error code: the access was to a shadow stack.
pub const PFEC_SHADOW_STACK: u32 = 1 << 6;
/// EXITINFO1: the final guest-physical address was being translated.
pub const EXIT_INFO_1_FINAL: u64 = 1 << 32;
/// EXITINFO1: the address of a guest paging structure was being translated.
pub const EXIT_INFO_1_TABLE: u64 = 1 << 33;

/// Which of the two page walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// `gva_walk`: the guest's own tables.
    Guest,
    /// `ngpa_walk`: L1's NPT or EPT.
    Nested,
}

/// What the CPU raises, or why there is no architectural outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// #PF.
    PageFault {
        /// The error code, bit for bit.
        error_code: u32,
    },
    /// #GP(0): the address is not canonical.
    GeneralProtection,
    /// #SS(0): the address of a stack access is not canonical.
    StackFault,
    /// #VMEXIT(NPF).
    NestedPageFault {
        /// EXITINFO1, bit for bit. EXITINFO2 is the fault's nGPA.
        exit_info_1: u64,
    },
    /// EPT violation: a VM exit.
    EptViolation {
        /// The exit qualification, bit for bit.
        exit_qualification: u64,
    },
    /// EPT misconfiguration: a VM exit that tells no more than the guest-physical address.
    EptMisconfiguration,
    /// A paging structure lies outside memory. A CPU would read whatever the bus answers; KVM reports a not-present #PF.
    Unbacked,
    /// Policy `Set` only: entries kept changing under the walk until the re-walks were used up.
    Contended,
}

/// Why the walk was refused. Where several reasons hold, the first in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The GVA is not canonical for the width of the paging mode.
    NonCanonical,
    /// The nGPA has bits above the width of the second dimension.
    TooWide,
    /// The table that should hold the entry is outside memory.
    TableUnbacked,
    /// The entry is not present.
    NotPresent,
    /// EPT: the entry lets its page be written and not read.
    WriteWithoutRead,
    /// EPT: the entry lets its page be executed and not read, which this CPU does not know.
    ExecuteOnly,
    /// The entry has reserved bits set.
    ReservedBits,
    /// A user access to a page whose U/S is clear in this entry.
    SupervisorPage,
    /// A fetch from a page that this entry makes no-execute.
    NoExecute,
    /// SMEP: a supervisor fetch from a user page.
    Smep,
    /// SMAP: a supervisor data access to a user page.
    Smap,
    /// A write to a page whose R/W is clear in this entry.
    ReadOnly,
    /// A supervisor access to a shadow stack in a user page.
    UserShadowStack,
    /// A shadow-stack access to a page that is none: R/W is set in the leaf, or D is clear in it, or R/W is clear in an entry
    /// above it. Under EPT, a supervisor shadow-stack access to a page whose leaf has bit 60 clear.
    NotShadowStack,
    /// EPT: a read of a page whose read bit is clear in this entry.
    NotReadable,
    /// EPT: the memory type in the leaf does not exist.
    MemoryType,
    /// GMET: a supervisor fetch from a page that is a user page for NPT.
    GuestModeExecuteTrap,
    /// PKRU, or PKRS for a supervisor page, disables access to, or writes to, the page's protection key.
    ProtectionKey,
    /// The entry changed on every attempt to set its accessed or dirty bit.
    Changing,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NonCanonical => "the address is not canonical",
            Self::TooWide => "the nGPA has bits above the width of the second dimension",
            Self::TableUnbacked => "the table that should hold the entry is outside memory",
            Self::NotPresent => "the entry is not present",
            Self::ReservedBits => "the entry has reserved bits set",
            Self::SupervisorPage => "user access, and U/S is clear in the entry",
            Self::NoExecute => "instruction fetch, and the entry forbids execution",
            Self::Smep => "supervisor fetch from a user page under CR4.SMEP",
            Self::Smap => "supervisor access to a user page under CR4.SMAP without RFLAGS.AC",
            Self::ReadOnly => "write, and R/W is clear in the entry",
            Self::UserShadowStack => "supervisor access to a shadow stack, and the page is the user's",
            Self::NotShadowStack => "shadow-stack access, and the page is no shadow stack",
            Self::NotReadable => "read, and the entry forbids reading",
            Self::WriteWithoutRead => "the entry lets its page be written and not read",
            Self::ExecuteOnly => {
                "the entry lets its page be executed and not read, which this CPU does not know"
            }
            Self::MemoryType => "the memory type in the entry does not exist",
            Self::GuestModeExecuteTrap => {
                "supervisor fetch from a page that is a user page for NPT, under GMET"
            }
            Self::ProtectionKey => "PKRU or PKRS refuses the page's protection key",
            Self::Changing => "the entry kept changing while its accessed or dirty bit was to be set",
        })
    }
}

/// A refused walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The architectural outcome.
    pub kind: FaultKind,
    /// The GVA whose translation failed: CR2 of a #PF. Where linear-address masking or upper address ignore applied, without
    /// the bits that were ignored (of those that upper address ignore ignores, AMD promises nothing), unless the address
    /// was not canonical.
    pub address: u64,
    /// The dimension that refused.
    pub dimension: Dimension,
    /// Level of the entry that refused, 1 to 5; 0 where no entry did.
    pub level: u32,
    /// Where that entry lies: a GPA of the machine's memory. 0 where no entry did.
    pub entry_gpa: Gpa,
    /// The entry as the walk loaded it; 0 where it could not be.
    pub entry: u64,
    /// The bits of the entry that are responsible; for an absent entry, the present bit, or under EPT those of which one
    /// would make it present.
    pub bits: u64,
    /// The nGPA whose translation failed, where the second dimension refused: EXITINFO2 of an NPF.
    pub nested_gpa: Option<NestedGpa>,
    /// Why.
    pub reason: Reason,
}

/// One dimension's refusal, before it is known how the CPU reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) level: u32,
    pub(crate) entry_gpa: Gpa,
    pub(crate) entry: u64,
    pub(crate) bits: u64,
    /// A protection key refuses too: it is reported even where another check refused first.
    pub(crate) key: bool,
    /// What all entries grant together, where the walk met a leaf.
    pub(crate) rights: Rights,
    /// That leaf; 0 where the walk met none.
    pub(crate) leaf: u64,
}

impl Refusal {
    pub(crate) const fn without_entry(reason: Reason) -> Self {
        Self::at(reason, 0, Gpa(0), 0, 0)
    }

    /// By an entry above the leaf, or by a leaf that maps nothing.
    pub(crate) const fn at(reason: Reason, level: u32, entry_gpa: Gpa, entry: u64, bits: u64) -> Self {
        Self { reason, level, entry_gpa, entry, bits, key: false, rights: Rights::NONE, leaf: 0 }
    }

    /// The low bits that #PF and NPF share.
    fn error_code(&self, format: &PageFormat, access: &Access) -> u32 {
        let cause = match self.reason {
            Reason::NotPresent | Reason::TooWide | Reason::TableUnbacked => 0,
            Reason::ReservedBits => PFEC_PRESENT | PFEC_RESERVED,
            _ => PFEC_PRESENT,
        };
        let mut code = cause;
        if access.is_write() {
            code |= PFEC_WRITE;
        }
        if access.is_user() {
            code |= PFEC_USER;
        }
        if access.is_fetch() && format.fetch_reported() {
            code |= PFEC_FETCH;
        }
        if self.key {
            code |= PFEC_KEY;
        }
        if access.is_shadow_stack() {
            code |= PFEC_SHADOW_STACK;
        }
        code
    }

    fn into_fault(self, kind: FaultKind, dimension: Dimension, address: u64) -> Fault {
        let kind = if self.reason == Reason::TableUnbacked { FaultKind::Unbacked } else { kind };
        Fault {
            kind,
            address,
            dimension,
            level: self.level,
            entry_gpa: self.entry_gpa,
            entry: self.entry,
            bits: self.bits,
            nested_gpa: None,
            reason: self.reason,
        }
    }

    /// How `gva_walk` reports this refusal.
    #[cold]
    pub(crate) fn in_guest(self, format: &PageFormat, access: &Access, gva: u64) -> Fault {
        let kind = match self.reason {
            Reason::NonCanonical if access.is_stack() => FaultKind::StackFault,
            Reason::NonCanonical => FaultKind::GeneralProtection,
            _ => FaultKind::PageFault { error_code: self.error_code(format, access) },
        };
        self.into_fault(kind, Dimension::Guest, gva)
    }

    /// How NPT reports this refusal, with `phase` the bit of EXITINFO1 that says what the nGPA was for.
    #[cold]
    pub(crate) fn in_npt(self, format: &PageFormat, access: &Access, ngpa: NestedGpa, phase: u64) -> Fault {
        let exit_info_1 = u64::from(self.error_code(format, access)) | phase;
        let fault = self.into_fault(FaultKind::NestedPageFault { exit_info_1 }, Dimension::Nested, 0);
        Fault { nested_gpa: Some(ngpa), ..fault }
    }

    /// How EPT reports this refusal.
    #[cold]
    pub(crate) fn in_ept(self, ngpa: NestedGpa, exit_qualification: u64) -> Fault {
        let kind = match self.reason {
            Reason::ReservedBits | Reason::WriteWithoutRead | Reason::ExecuteOnly | Reason::MemoryType => {
                FaultKind::EptMisconfiguration
            }
            _ => FaultKind::EptViolation { exit_qualification },
        };
        Fault { nested_gpa: Some(ngpa), ..self.into_fault(kind, Dimension::Nested, 0) }
    }
}
