//! The second dimension: from an L2 guest-physical address to a GPA of the machine.
//!
//! AMD APM volume 2, "Nested Paging". Every access under NPT is a user access. Guest paging structures are accessed as
//! writes, because the CPU may set their accessed and dirty bits; the final page is accessed as the instruction does.

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::{Gpa, NestedGpa};
use crate::descent::{Purpose, Stop, descend};
use crate::entry::{LongMode, Pae, TwoLevel};
use crate::fault::{Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError};
use crate::permission::Rights;
use crate::trace::Recorder;
use crate::translation::{PageSize, Translation};
use crate::walk::PageWalk;

/// `ngpa_walk`: the page walk that L1 put under L2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NgpaWalk {
    /// AMD nested paging, in the host format that L1's CR4 and EFER select.
    Npt(PageWalk),
}

/// What an nGPA is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NestedPhase {
    /// It is the address of a guest's paging structure: EXITINFO1 bit 33.
    Table,
    /// It is the final address of an access: EXITINFO1 bit 32.
    Final,
}

impl NestedPhase {
    const fn exit_info_1(self) -> u64 {
        match self {
            Self::Table => EXIT_INFO_1_TABLE,
            Self::Final => EXIT_INFO_1_FINAL,
        }
    }
}

/// A page that the second dimension maps.
pub(crate) struct NestedPage {
    pub(crate) gpa: Gpa,
    pub(crate) rights: Rights,
    pub(crate) size: PageSize,
}

impl NgpaWalk {
    /// NPT with the root `ncr3`, in the host format that `host`'s CR0, CR4 and EFER select; `host.cr3` is not used.
    ///
    /// # Errors
    /// Names the register that no CPU would accept, or says that L1 does not page.
    pub fn npt(ncr3: u64, host: &ControlRegisters, cpu: &CpuProfile) -> Result<Self, StateError> {
        let format = PageFormat::npt(host, cpu)?;
        Ok(Self::Npt(PageWalk::rooted(format, "nCR3", ncr3, cpu)?))
    }

    /// The page walk itself: root and format.
    #[must_use]
    pub fn page_walk(&self) -> &PageWalk {
        match self {
            Self::Npt(walk) => walk,
        }
    }

    /// Walks the second dimension alone: what `ngpa` means for an access of L2, or of the CPU on L2's behalf.
    ///
    /// `access` decides read, write or fetch of a final address; a paging structure is always written. Under NPT every access
    /// that is not exempt is a user access. The answer has no guest page: its page size is [`PageSize::Unpaged`].
    ///
    /// # Errors
    /// The fault that L1 would see. Its `address` is 0: no GVA is known.
    pub fn translate<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: NestedPhase,
        recorder: &mut R,
    ) -> Result<Translation, Fault> {
        recorder.clear();
        let privilege = if access.is_exempt() { Privilege::Exempt } else { Privilege::User };
        let kind = match phase {
            NestedPhase::Table => AccessKind::Write,
            NestedPhase::Final => access.kind(),
        };
        let page = self.page(memory, ngpa, &Access::new(kind, privilege), phase, recorder)?;
        Ok(Translation {
            gpa: page.gpa,
            entry: 0,
            nested_gpa: Some(ngpa),
            nested_page_size: Some(page.size),
            page_size: PageSize::Unpaged,
            rights: page.rights,
            backing: memory.backing(page.gpa),
            ad_skipped: false,
        })
    }

    /// Where the guest's paging-structure entry at `ngpa` lies.
    #[inline(never)]
    pub(crate) fn table_entry<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        walking_for: &Access,
        recorder: &mut R,
    ) -> Result<Gpa, Fault> {
        let privilege = if walking_for.is_exempt() { Privilege::Exempt } else { Privilege::User };
        let access = Access::new(AccessKind::Write, privilege);
        self.page(memory, ngpa, &access, NestedPhase::Table, recorder).map(|page| page.gpa)
    }

    /// The page behind the final address `ngpa` of an access.
    #[inline(never)]
    pub(crate) fn final_page<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        recorder: &mut R,
    ) -> Result<NestedPage, Fault> {
        let privilege = if access.is_exempt() { Privilege::Exempt } else { Privilege::User };
        self.page(memory, ngpa, &Access::new(access.kind(), privilege), NestedPhase::Final, recorder)
    }

    fn page<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: NestedPhase,
        recorder: &mut R,
    ) -> Result<NestedPage, Fault> {
        let Self::Npt(walk) = self;
        let exit_info_1 = phase.exit_info_1();
        let format = walk.format();
        if ngpa.0 >> (format.linear_width() & 63) != 0 {
            return Err(Refusal::without_entry(Reason::TooWide).in_npt(format, access, ngpa, exit_info_1));
        }
        let purpose = Purpose { dimension: Dimension::Nested, second: None, access };
        let leaf = match format.mode() {
            PagingMode::TwoLevel => descend::<TwoLevel, M, R>(walk, memory, ngpa.0, purpose, recorder),
            PagingMode::Pae => descend::<Pae, M, R>(walk, memory, ngpa.0, purpose, recorder),
            _ => descend::<LongMode, M, R>(walk, memory, ngpa.0, purpose, recorder),
        };
        let leaf = match leaf {
            Ok(leaf) => leaf,
            Err(Stop::Refused(refusal)) => return Err(refusal.in_npt(format, access, ngpa, exit_info_1)),
            Err(Stop::Second(fault)) => return Err(fault),
        };
        Ok(NestedPage { gpa: Gpa(leaf.output), rights: leaf.rights, size: leaf.size })
    }
}
