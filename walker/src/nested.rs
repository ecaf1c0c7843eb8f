//! The second dimension: from an L2 guest-physical address to a GPA of the machine.
//!
//! AMD's NPT ([`NptWalk`]) or Intel's EPT ([`EptWalk`]), behind one out-of-line call, so that guest and host formats do not
//! multiply.

use crate::access::Access;
use crate::accessed_dirty::walk_and_set;
use crate::addr::{Gpa, NestedGpa};
use crate::ept::{EptCapabilities, EptControls, EptWalk};
use crate::fault::{Fault, FaultKind};
use crate::memory::Memory;
use crate::memory_type::EptMemoryType;
use crate::mode::{ControlRegisters, CpuProfile, StateError};
use crate::npt::{NptControls, NptWalk};
use crate::permission::{Rights, Shown};
use crate::trace::{Recorder, Trace};
use crate::translation::{NestedPage, Page, PageSize, Translation};
use crate::walk::PageWalk;
use crate::walker::AdPolicy;

/// `ngpa_walk`: the page walk that L1 put under L2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NgpaWalk {
    /// AMD nested paging, in the host format that L1's CR4 and EFER select.
    Npt(NptWalk),
    /// Intel extended page tables.
    Ept(EptWalk),
}

/// What an nGPA is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NestedPhase {
    /// It is the address of a guest's paging structure: EXITINFO1 bit 33.
    Table,
    /// It is the address of a PDPTE of PAE paging, which a CPU with EPT loads when CR3 is written. NPT knows no difference to
    /// [`Self::Table`].
    Pdpte,
    /// It is the final address of an access: EXITINFO1 bit 32.
    Final,
}

/// What is asked of the second dimension.
#[derive(Clone, Copy)]
pub(crate) struct Need<'a> {
    pub(crate) ngpa: NestedGpa,
    /// The access that the whole walk is for.
    pub(crate) access: &'a Access,
    pub(crate) phase: NestedPhase,
    /// What the guest's own paging grants, where the address is final.
    pub(crate) guest: Rights,
}

/// A page that the second dimension maps.
#[derive(Clone, Copy)]
pub(crate) struct NestedLeaf {
    pub(crate) gpa: Gpa,
    /// What the second dimension alone grants.
    pub(crate) rights: Rights,
    pub(crate) size: PageSize,
    pub(crate) ept_memory_type: Option<EptMemoryType>,
}

impl NestedLeaf {
    pub(crate) const fn page(&self, ngpa: NestedGpa) -> NestedPage {
        NestedPage { ngpa, page_size: self.size, ept_memory_type: self.ept_memory_type }
    }
}

/// The fault of writing to a guest's paging structure that was only read, where it may not be written: what becomes of the
/// walk if it has to set an accessed or dirty bit there.
pub(crate) type Update = Option<Fault>;

impl NgpaWalk {
    /// NPT with the root `ncr3`, in the host format that `host`'s CR0, CR4 and EFER select; `host.cr3` is not used.
    ///
    /// # Errors
    /// Names the register that no CPU would accept, or says that L1 does not page.
    pub fn npt(ncr3: u64, host: &ControlRegisters, cpu: &CpuProfile) -> Result<Self, StateError> {
        Self::npt_with(ncr3, host, &NptControls::default(), cpu)
    }

    /// [`Self::npt`], under these controls.
    ///
    /// # Errors
    /// As [`Self::npt`].
    pub fn npt_with(
        ncr3: u64,
        host: &ControlRegisters,
        controls: &NptControls,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        NptWalk::new(ncr3, host, controls, cpu).map(Self::Npt)
    }

    /// EPT with the root, walk length, accessed and dirty bits, and supervisor shadow-stack control that `eptp` selects, on
    /// a CPU with these capabilities.
    ///
    /// # Errors
    /// Names EPTP: a page-walk length or memory type that does not exist or that the CPU does not have, or reserved bits,
    /// among them those of features that the CPU does not have. Also if MAXPHYADDR is out of range.
    pub fn ept(
        eptp: u64,
        controls: &EptControls,
        capabilities: &EptCapabilities,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        EptWalk::new(eptp, controls, capabilities, cpu).map(Self::Ept)
    }

    /// The page walk itself: root and format.
    #[must_use]
    pub fn page_walk(&self) -> &PageWalk {
        match self {
            Self::Npt(npt) => npt.page_walk(),
            Self::Ept(ept) => ept.page_walk(),
        }
    }

    /// Walks the second dimension alone: what `ngpa` means for an access of L2, or of the CPU on L2's behalf.
    ///
    /// `access` decides read, write or fetch of a final address. The answer has no guest page: its page size is
    /// [`PageSize::Unpaged`].
    ///
    /// Under NPT a paging structure is always written, and every access that is not exempt is a user access, except that
    /// GMET distinguishes final ones. Under EPT a paging structure is read, or written where EPT has accessed and dirty bits,
    /// or where `access` writes: to set the guest's own. The access's privilege stands for that of the linear address, whose
    /// page is taken to allow everything.
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
        self.observe(memory, ngpa, access, phase, recorder)
    }

    /// [`Self::translate`], under `policy`: [`AdPolicy::Set`] sets the accessed and dirty bits that this dimension keeps. The
    /// recorder holds the steps of the last attempt.
    ///
    /// # Errors
    /// As [`Self::translate`]; with [`AdPolicy::Set`] also [`FaultKind::Contended`].
    pub fn translate_with<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: NestedPhase,
        policy: AdPolicy,
        recorder: &mut R,
    ) -> Result<Translation, Fault> {
        recorder.clear();
        match policy {
            AdPolicy::Observe => self.observe(memory, ngpa, access, phase, recorder),
            AdPolicy::Set => {
                let mut trace = Trace::new();
                let walk = |trace: &mut Trace| self.observe(memory, ngpa, access, phase, trace);
                let outcome = walk_and_set(memory, &mut trace, walk);
                for step in trace.steps() {
                    recorder.record(*step);
                }
                outcome.map_err(|fault| match fault.kind {
                    FaultKind::Contended => Fault { nested_gpa: Some(ngpa), ..fault },
                    _ => fault,
                })
            }
        }
    }

    fn observe<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: NestedPhase,
        recorder: &mut R,
    ) -> Result<Translation, Fault> {
        let answer = |page: NestedLeaf, rights| Translation {
            gpa: page.gpa,
            entry: 0,
            nested: Some(page.page(ngpa)),
            page: Page::new(PageSize::Unpaged, Shown::of(rights)).with_backing(memory.backing(page.gpa)),
        };
        match self {
            Self::Npt(npt) => {
                let need = Need { ngpa, access, phase, guest: Rights::ALL };
                npt.page(memory, &need, recorder).map(|page| answer(page, page.rights))
            }
            Self::Ept(ept) => {
                let guest = if access.is_user() { Rights::ALL } else { Rights::ALL.without(Rights::USER) };
                let mut update = None;
                let page = ept.page(memory, &Need { ngpa, access, phase, guest }, &mut update, recorder)?;
                match update {
                    Some(fault) if access.is_write() => Err(fault),
                    _ => Ok(answer(page, ept.combined(guest, page.rights).or(Rights::USER))),
                }
            }
        }
    }

    /// Where the guest's paging-structure entry at `ngpa` lies. `pdpte`: it is one of PAE paging. `update` learns why it may not be
    /// written.
    #[inline(never)]
    pub(crate) fn table_entry<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        pdpte: bool,
        access: &Access,
        update: &mut Update,
        recorder: &mut R,
    ) -> Result<Gpa, Fault> {
        let phase = if pdpte { NestedPhase::Pdpte } else { NestedPhase::Table };
        let need = Need { ngpa, access, phase, guest: Rights::NONE };
        match self {
            Self::Npt(npt) => npt.page(memory, &need, recorder),
            Self::Ept(ept) => ept.page(memory, &need, update, recorder),
        }
        .map(|page| page.gpa)
    }

    /// The page behind the final address `ngpa` of an access, with the rights of both dimensions; `guest` is what the
    /// guest's own paging grants.
    #[inline(never)]
    pub(crate) fn final_page<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        guest: Rights,
        recorder: &mut R,
    ) -> Result<NestedLeaf, Fault> {
        let need = Need { ngpa, access, phase: NestedPhase::Final, guest };
        match self {
            Self::Npt(npt) => {
                let mut page = npt.page(memory, &need, recorder);
                if let Ok(page) = &mut page {
                    page.rights = npt.combined(guest, page.rights);
                }
                page
            }
            Self::Ept(ept) => {
                let mut page = ept.page(memory, &need, &mut None, recorder);
                if let Ok(page) = &mut page {
                    page.rights = ept.combined(guest, page.rights);
                }
                page
            }
        }
    }
}
