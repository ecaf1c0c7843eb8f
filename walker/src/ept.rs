//! EPT: Intel's extended page tables as the second dimension.
//!
//! Intel SDM volume 3, "The Extended Page Table Mechanism (EPT)", "Exit Qualification for EPT Violations" and "VM-Execution
//! Control Fields" of "Checks on VMX Controls".
//!
//! Guest paging structures are accessed as reads; as writes where bit 6 of EPTP enables EPT's own accessed and dirty bits;
//! and again as a write where the walk has to set an accessed or dirty bit in a guest entry. That write follows as soon as
//! the entry is known to be used: an upper entry when it refers to a table, the leaf when its page's rights allow the
//! access. PDPTEs of PAE paging are loaded by MOV to CR, as reads, and not on behalf of a linear address.
//!
//! KVM as an L1's hypervisor differs: it accesses all structures as writes ([`EptControls::tables_written`]).
//!
//! Not modelled: #VE, sub-page permissions, guest-paging verification, paging-write control.

use core::cell::Cell;

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::Gpa;
use crate::descent::{Lack, Leaf, Path, Purpose, Stop, alone, descend};
use crate::entry::{EntryLayout, Ept, LongMode};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::memory_type::EptMemoryType;
use crate::mode::{CpuProfile, StateError, bits, reserved};
use crate::nested::{Need, NestedLeaf, NestedPhase, Update};
use crate::permission::Rights;
use crate::trace::Recorder;
use crate::walk::PageWalk;

/// Exit qualification: the access was a data read.
pub const EPT_VIOLATION_READ: u64 = 1 << 0;
/// Exit qualification: the access was a data write.
pub const EPT_VIOLATION_WRITE: u64 = 1 << 1;
/// Exit qualification: the access was an instruction fetch.
pub const EPT_VIOLATION_FETCH: u64 = 1 << 2;
/// Exit qualification: all entries allow reads.
pub const EPT_VIOLATION_READABLE: u64 = 1 << 3;
/// Exit qualification: all entries allow writes.
pub const EPT_VIOLATION_WRITABLE: u64 = 1 << 4;
/// Exit qualification: all entries allow fetches; with mode-based execute control, by supervisor-mode linear addresses.
pub const EPT_VIOLATION_EXECUTABLE: u64 = 1 << 5;
/// Exit qualification: all entries allow fetches by user-mode linear addresses. Clear without mode-based execute control.
pub const EPT_VIOLATION_USER_EXECUTABLE: u64 = 1 << 6;
/// Exit qualification: the access was made on behalf of a linear address.
pub const EPT_VIOLATION_GVA_VALID: u64 = 1 << 7;
/// Exit qualification: the access was to the translation of a linear address, not to a paging structure.
pub const EPT_VIOLATION_GVA_TRANSLATED: u64 = 1 << 8;
/// Exit qualification, advanced information: a user-mode linear address.
pub const EPT_VIOLATION_USER_PAGE: u64 = 1 << 9;
/// Exit qualification, advanced information: the guest's paging maps the page for reads and writes.
pub const EPT_VIOLATION_WRITABLE_PAGE: u64 = 1 << 10;
/// Exit qualification, advanced information: the guest's paging forbids fetches from the page.
pub const EPT_VIOLATION_NO_EXECUTE_PAGE: u64 = 1 << 11;
/// Exit qualification: the access was to a shadow stack.
pub const EPT_VIOLATION_SHADOW_STACK: u64 = 1 << 13;
/// Exit qualification, with supervisor shadow-stack control: bit 60 of the leaf, where the walk met one.
pub const EPT_VIOLATION_SUPERVISOR_SHADOW_STACK: u64 = 1 << 14;

/// What the CPU's EPT can do: IA32_VMX_EPT_VPID_CAP (MSR 0x48c), as far as a walk depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EptCapabilities {
    /// Bit 0: pages may be executable without being readable.
    pub execute_only: bool,
    /// Bit 6: a page-walk length of 4.
    pub four_level: bool,
    /// Bit 7: a page-walk length of 5.
    pub five_level: bool,
    /// Bit 8: EPT paging structures may be uncacheable.
    pub uncacheable: bool,
    /// Bit 14: EPT paging structures may be write-back.
    pub write_back: bool,
    /// Bit 16: a PDE may map a 2 MiB page.
    pub pages_2m: bool,
    /// Bit 17: a PDPTE may map a 1 GiB page.
    pub pages_1g: bool,
    /// Bit 21: accessed and dirty bits.
    pub accessed_dirty: bool,
    /// Bit 22: advanced information in the exit qualification of EPT violations.
    pub advanced_information: bool,
    /// Bit 23: supervisor shadow-stack control.
    pub supervisor_shadow_stack: bool,
}

impl EptCapabilities {
    /// Everything.
    #[must_use]
    pub const fn all() -> Self {
        Self::from_msr(u64::MAX)
    }

    /// From the value of IA32_VMX_EPT_VPID_CAP. Bits that a walk does not depend on are ignored.
    #[must_use]
    pub const fn from_msr(value: u64) -> Self {
        Self {
            execute_only: value & 1 != 0,
            four_level: value >> 6 & 1 != 0,
            five_level: value >> 7 & 1 != 0,
            uncacheable: value >> 8 & 1 != 0,
            write_back: value >> 14 & 1 != 0,
            pages_2m: value >> 16 & 1 != 0,
            pages_1g: value >> 17 & 1 != 0,
            accessed_dirty: value >> 21 & 1 != 0,
            advanced_information: value >> 22 & 1 != 0,
            supervisor_shadow_stack: value >> 23 & 1 != 0,
        }
    }

    /// The bits of IA32_VMX_EPT_VPID_CAP that a walk depends on.
    #[must_use]
    pub const fn msr(&self) -> u64 {
        self.execute_only as u64
            | (self.four_level as u64) << 6
            | (self.five_level as u64) << 7
            | (self.uncacheable as u64) << 8
            | (self.write_back as u64) << 14
            | (self.pages_2m as u64) << 16
            | (self.pages_1g as u64) << 17
            | (self.accessed_dirty as u64) << 21
            | (self.advanced_information as u64) << 22
            | (self.supervisor_shadow_stack as u64) << 23
    }
}

/// What VMCS12 says about EPT beside EPTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct EptControls {
    /// Mode-based execute control for EPT (MBEC): bit 22 of the secondary processor-based VM-execution controls.
    pub mode_based_execute: bool,
    /// No control of a CPU: every access to a guest paging structure is a write, whether or not EPT has accessed and dirty
    /// bits. So KVM does for its L1s, and so is an L2 under KVM to be judged.
    pub tables_written: bool,
}

/// A walk through EPT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EptWalk {
    walk: PageWalk,
    eptp: u64,
    controls: EptControls,
    advanced_information: bool,
}

/// Bit 60 of a leaf, under supervisor shadow-stack control.
const SUPERVISOR_SHADOW_STACK: u64 = 1 << 60;

const EPTP: &str = "EPTP";
pub(crate) const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;
pub(crate) const EPTP_SUPERVISOR_SHADOW_STACK: u64 = 1 << 7;

impl EptWalk {
    pub(crate) fn new(
        eptp: u64,
        controls: &EptControls,
        capabilities: &EptCapabilities,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        cpu.check()?;
        let unless = |has: bool, bit: u64| if has { 0 } else { bit };
        let unknown = bits(8, 11)
            | cpu.address_reserved(63)
            | unless(capabilities.accessed_dirty, EPTP_ACCESSED_DIRTY)
            | unless(capabilities.supervisor_shadow_stack, EPTP_SUPERVISOR_SHADOW_STACK);
        reserved(EPTP, eptp, unknown)?;
        let contradiction = |problem| Err(StateError::Contradiction { register: EPTP, problem });
        match eptp & 7 {
            0 if capabilities.uncacheable => {}
            6 if capabilities.write_back => {}
            0 => return contradiction("the memory type is 0, and this CPU has no uncacheable EPT"),
            6 => return contradiction("the memory type is 6, and this CPU has no write-back EPT"),
            _ => return contradiction("the memory type (bits 2:0) is neither 0 nor 6"),
        }
        match eptp >> 3 & 7 {
            3 if capabilities.four_level => {}
            4 if capabilities.five_level => {}
            3 => return contradiction("the page-walk length is 4, and this CPU has no 4-level EPT"),
            4 => return contradiction("the page-walk length is 5, and this CPU has no 5-level EPT"),
            _ => return contradiction("the page-walk length, 1 more than bits 5:3, is neither 4 nor 5"),
        }
        let format = PageFormat::ept(eptp, controls, capabilities, cpu);
        Ok(Self {
            walk: PageWalk::from_table(eptp & LongMode::FRAME & format.address_bits(), format),
            eptp,
            controls: *controls,
            advanced_information: capabilities.advanced_information,
        })
    }

    /// The root and the format.
    #[must_use]
    pub fn page_walk(&self) -> &PageWalk {
        &self.walk
    }

    /// EPTP as it was given.
    #[must_use]
    pub fn eptp(&self) -> u64 {
        self.eptp
    }

    /// What the walk depends on beside EPTP and the capabilities.
    #[must_use]
    pub fn controls(&self) -> &EptControls {
        &self.controls
    }

    /// What both dimensions grant together. EPT has no U/S; its right to execute is the one for such a page.
    pub(crate) fn combined(&self, guest: Rights, nested: Rights) -> Rights {
        let executable = if guest.user() { nested.user() } else { nested.execute() };
        let all = guest.and(nested.or(Rights::USER).or(Rights::EXECUTE));
        if executable { all } else { all.without(Rights::EXECUTE) }
    }

    /// The page that is needed. Where a paging structure is only read, `update` learns the fault of writing it.
    pub(crate) fn page<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        need: &Need<'_>,
        update: &mut Update,
        recorder: &mut R,
    ) -> Result<NestedLeaf, Fault> {
        let Need { ngpa, access, phase, guest } = *need;
        // Fetches go by the mode of the linear address, shadow-stack accesses by their own.
        let privilege = match access.privilege() {
            privilege if access.is_shadow_stack() => privilege,
            Privilege::Exempt => Privilege::Exempt,
            _ if guest.user() => Privilege::User,
            _ => Privilege::Supervisor,
        };
        let kind = match phase {
            NestedPhase::Final => access.kind(),
            NestedPhase::Pdpte => AccessKind::Read,
            NestedPhase::Table if self.writes_tables() => AccessKind::Write,
            NestedPhase::Table => AccessKind::Read,
        };
        let access = &Access::new(kind, privilege);
        let unwritable = Cell::new(None);
        let updates = phase == NestedPhase::Table && kind == AccessKind::Read;
        let purpose = Purpose {
            dimension: Dimension::Nested,
            second: None,
            access,
            unwritable: if updates { Some(&unwritable) } else { None },
        };
        let leaf = if ngpa.0 >> (self.walk.format().linear_width() & 63) != 0 {
            Err(Stop::Refused(Refusal::without_entry(Reason::TooWide)))
        } else if self.controls.mode_based_execute {
            descend::<Ept<true>, M, R>(&self.walk, memory, ngpa.0, purpose, recorder)
        } else {
            descend::<Ept<false>, M, R>(&self.walk, memory, ngpa.0, purpose, recorder)
        };
        if let Some(refusal) = unwritable.get() {
            *update = Some(self.report(refusal, AccessKind::Write, need));
        }
        match leaf {
            Ok(leaf) => Ok(NestedLeaf {
                gpa: Gpa(leaf.output),
                rights: leaf.rights,
                size: leaf.size,
                ept_memory_type: EptMemoryType::of_leaf(leaf.entry),
            }),
            Err(Stop::Refused(refusal)) => Err(self.report(refusal, kind, need)),
            Err(Stop::Second(fault)) => Err(fault),
        }
    }

    fn writes_tables(&self) -> bool {
        self.walk.format().has_accessed_dirty() || self.controls.tables_written
    }

    #[cold]
    fn report(&self, refusal: Refusal, kind: AccessKind, need: &Need<'_>) -> Fault {
        let Need { ngpa, phase, guest, .. } = *need;
        let when = |holds: bool, bit: u64| if holds { bit } else { 0 };
        let access = match kind {
            AccessKind::Read => EPT_VIOLATION_READ,
            AccessKind::Fetch => EPT_VIOLATION_FETCH,
            AccessKind::ShadowStackRead => EPT_VIOLATION_READ | EPT_VIOLATION_SHADOW_STACK,
            AccessKind::ShadowStackWrite => EPT_VIOLATION_WRITE | EPT_VIOLATION_SHADOW_STACK,
            // A guest paging structure that is written is read, too.
            AccessKind::Write if phase != NestedPhase::Final => EPT_VIOLATION_READ | EPT_VIOLATION_WRITE,
            AccessKind::Write => EPT_VIOLATION_WRITE,
        };
        let rights = refusal.rights;
        let granted = when(rights.read(), EPT_VIOLATION_READABLE)
            | when(rights.write(), EPT_VIOLATION_WRITABLE)
            | when(rights.execute(), EPT_VIOLATION_EXECUTABLE)
            | when(rights.user() && self.controls.mode_based_execute, EPT_VIOLATION_USER_EXECUTABLE);
        let linear = match phase {
            NestedPhase::Pdpte => 0,
            NestedPhase::Table => EPT_VIOLATION_GVA_VALID,
            NestedPhase::Final => EPT_VIOLATION_GVA_VALID | EPT_VIOLATION_GVA_TRANSLATED,
        };
        let page = if self.advanced_information && phase == NestedPhase::Final {
            when(guest.user(), EPT_VIOLATION_USER_PAGE)
                | when(guest.write(), EPT_VIOLATION_WRITABLE_PAGE)
                | when(!guest.execute(), EPT_VIOLATION_NO_EXECUTE_PAGE)
        } else {
            0
        };
        let shadow_stack = self.eptp & EPTP_SUPERVISOR_SHADOW_STACK != 0 && refusal.leaf >> 60 & 1 != 0;
        let shadow_stack = when(shadow_stack, EPT_VIOLATION_SUPERVISOR_SHADOW_STACK);
        refusal.in_ept(ngpa, access | granted | linear | page | shadow_stack)
    }
}

/// Why a page is refused to `access`, which the permission words do not allow.
///
/// With supervisor shadow-stack control, a supervisor shadow-stack access, of either direction, is allowed to a page whose
/// leaf has bit 60 set, if every entry allows reads and every entry above the leaf writes. All other accesses need the right
/// that they name.
pub(crate) fn lack<E: EntryLayout>(
    leaf: &Leaf,
    level: u32,
    format: &PageFormat,
    access: &Access,
    path: &Path,
) -> Option<Lack> {
    let without =
        |reason, right, from| Some(Lack { reason, right: Some(right), from, bits: E::right_bits(right) });
    let above = level + 1;
    match access.kind() {
        AccessKind::ShadowStackRead | AccessKind::ShadowStackWrite if format.decided_by_leaf(access) => {
            if !(above..=format.levels()).all(|level| alone::<E>(level, path).write()) {
                without(Reason::ReadOnly, Rights::WRITE, above)
            } else if leaf.entry & SUPERVISOR_SHADOW_STACK == 0 {
                let bits = SUPERVISOR_SHADOW_STACK;
                Some(Lack { reason: Reason::NotShadowStack, right: None, from: level, bits })
            } else if !leaf.rights.read() {
                without(Reason::NotReadable, Rights::READ, level)
            } else {
                None
            }
        }
        AccessKind::Fetch if access.is_user() => without(Reason::NoExecute, Rights::USER, level),
        AccessKind::Fetch => without(Reason::NoExecute, Rights::EXECUTE, level),
        AccessKind::Write | AccessKind::ShadowStackWrite => without(Reason::ReadOnly, Rights::WRITE, level),
        AccessKind::Read | AccessKind::ShadowStackRead => without(Reason::NotReadable, Rights::READ, level),
    }
}
