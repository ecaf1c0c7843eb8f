//! The second dimension: from an L2 guest-physical address to a GPA of the machine.
//!
//! AMD APM volume 2, "Nested Paging". Every access under NPT is a user access. Guest paging structures are accessed as
//! writes, because the CPU may set their accessed and dirty bits; the final page is accessed as the instruction does.

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::{Gpa, NestedGpa};
use crate::entry::LongMode;
use crate::fault::{Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError};
use crate::permission::Rights;
use crate::trace::{Recorder, Trace};
use crate::walk::{PageSize, PageWalk, Purpose, Stop, descend};

/// `ngpa_walk`: the page walk that L1 put under L2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NgpaWalk {
    /// AMD nested paging, in the host format that L1's CR4 and EFER select.
    Npt(PageWalk),
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
    /// Names the register that no CPU would accept, or the mode that is not supported yet.
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

    /// Where the guest's paging-structure entry at `ngpa` lies.
    #[inline(never)]
    pub(crate) fn table_entry<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        exempt: bool,
        recorder: &mut R,
    ) -> Result<Gpa, Fault> {
        let privilege = if exempt { Privilege::Exempt } else { Privilege::User };
        let access = Access::new(AccessKind::Write, privilege);
        self.translate(memory, ngpa, &access, EXIT_INFO_1_TABLE, recorder).map(|page| page.gpa)
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
        self.translate(memory, ngpa, &Access::new(access.kind(), privilege), EXIT_INFO_1_FINAL, recorder)
    }

    fn translate<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: u64,
        recorder: &mut R,
    ) -> Result<NestedPage, Fault> {
        let Self::Npt(walk) = self;
        let format = walk.format();
        if ngpa.0 >> (format.linear_width() & 63) != 0 {
            return Err(Refusal::without_entry(Reason::TooWide).in_npt(format, access, ngpa, phase));
        }
        let purpose = Purpose {
            dimension: Dimension::Nested,
            second: None,
            writes: access.is_write(),
            exempt: access.is_exempt(),
        };
        let leaf = match format.mode() {
            PagingMode::FiveLevel => descend::<LongMode, M, R, 5>(walk, memory, ngpa.0, purpose, recorder),
            _ => descend::<LongMode, M, R, 4>(walk, memory, ngpa.0, purpose, recorder),
        };
        let leaf = match leaf {
            Ok(leaf) => leaf,
            Err(Stop::Refused(refusal)) => return Err(refusal.in_npt(format, access, ngpa, phase)),
            Err(Stop::Second(fault)) => return Err(fault),
        };
        if !leaf.permit::<LongMode>(format, access).granted() {
            let blame = leaf.blame::<LongMode, R>(format, access, (Dimension::Nested, ngpa.0), recorder);
            return match blame {
                Some(refusal) => Err(refusal.in_npt(format, access, ngpa, phase)),
                None => self.translate(memory, ngpa, access, phase, &mut Trace::new()),
            };
        }
        Ok(NestedPage {
            gpa: Gpa(leaf.output),
            rights: leaf.rights,
            size: PageSize::of_long_mode(leaf.level),
        })
    }
}
