//! NPT: AMD's nested page tables as the second dimension.
//!
//! AMD APM volume 2, "Nested Paging". Every access under NPT is a user access. Guest paging structures are accessed as
//! writes, because the CPU may set their accessed and dirty bits; the final page is accessed as the instruction does.
//!
//! Guest Mode Execute Trap (AMD APM volume 2, "Guest Mode Execute Trap") turns NPT's U/S into a right to execute: a fetch
//! below CPL 3 from a page that is a user page at every level is refused, and U/S keeps nobody out otherwise. The final
//! access is then reported with the privilege that it has in the guest, a paging structure's still as a user's. How U/S is
//! reported, and that a supervisor page is open to users, is as Linux's KVM models it.

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::Gpa;
use crate::descent::{Purpose, Stop, descend};
use crate::entry::{LongMode, Pae, TwoLevel};
use crate::fault::{Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, PFEC_USER, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError};
use crate::nested::{Need, NestedLeaf, NestedPhase};
use crate::permission::Rights;
use crate::trace::Recorder;
use crate::walk::PageWalk;

/// What VMCB12 says about NPT beside nCR3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct NptControls {
    /// Guest Mode Execute Trap (GMET): bit 3 of the VMCB's nested-paging control.
    pub guest_mode_execute_trap: bool,
}

/// A walk through NPT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NptWalk {
    walk: PageWalk,
    controls: NptControls,
}

impl NptWalk {
    pub(crate) fn new(
        ncr3: u64,
        host: &ControlRegisters,
        controls: &NptControls,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        let format = PageFormat::npt(host, controls, cpu)?;
        Ok(Self { walk: PageWalk::rooted(format, "nCR3", ncr3, cpu)?, controls: *controls })
    }

    /// The root and the format.
    #[must_use]
    pub fn page_walk(&self) -> &PageWalk {
        &self.walk
    }

    /// What the walk depends on beside its format.
    #[must_use]
    pub fn controls(&self) -> &NptControls {
        &self.controls
    }

    /// What both dimensions grant together.
    pub(crate) fn combined(&self, guest: Rights, nested: Rights) -> Rights {
        if !self.controls.guest_mode_execute_trap {
            return guest.and(nested);
        }
        let trapped = !guest.user() && nested.user();
        let all = guest.and(nested.or(Rights::USER));
        if trapped { all.without(Rights::EXECUTE) } else { all }
    }

    #[inline(always)]
    pub(crate) fn page<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        need: &Need<'_>,
        recorder: &mut R,
    ) -> Result<NestedLeaf, Fault> {
        let Need { ngpa, access, .. } = *need;
        let table = need.phase != NestedPhase::Final;
        let gmet = self.controls.guest_mode_execute_trap;
        let privilege = match access.privilege() {
            Privilege::Exempt => Privilege::Exempt,
            Privilege::Supervisor | Privilege::ImplicitSupervisor if gmet && !table => Privilege::Supervisor,
            _ => Privilege::User,
        };
        let access = &Access::new(if table { AccessKind::Write } else { access.kind() }, privilege);
        let reported = |refusal: Refusal| {
            let phase = if table { EXIT_INFO_1_TABLE } else { EXIT_INFO_1_FINAL };
            let user = if gmet && !table { 0 } else { u64::from(PFEC_USER) };
            let reason =
                if refusal.reason == Reason::Smep { Reason::GuestModeExecuteTrap } else { refusal.reason };
            Refusal { reason, ..refusal }.in_npt(self.walk.format(), access, ngpa, phase | user)
        };
        let walk = &self.walk;
        let format = walk.format();
        if ngpa.0 >> (format.linear_width() & 63) != 0 {
            return Err(reported(Refusal::without_entry(Reason::TooWide)));
        }
        let purpose = Purpose { dimension: Dimension::Nested, second: None, access, unwritable: None };
        let leaf = match format.mode() {
            PagingMode::TwoLevel => descend::<TwoLevel, M, R>(walk, memory, ngpa.0, purpose, recorder),
            PagingMode::Pae => descend::<Pae, M, R>(walk, memory, ngpa.0, purpose, recorder),
            _ => descend::<LongMode, M, R>(walk, memory, ngpa.0, purpose, recorder),
        };
        match leaf {
            Ok(leaf) => Ok(NestedLeaf {
                gpa: Gpa(leaf.output),
                rights: leaf.rights,
                size: leaf.size,
                ept_memory_type: None,
            }),
            Err(Stop::Refused(refusal)) => Err(reported(refusal)),
            Err(Stop::Second(fault)) => Err(fault),
        }
    }
}
