//! A vCPU's two walkers as one value, and the policy on accessed and dirty bits.

use core::hint::cold_path;

use crate::access::Access;
use crate::accessed_dirty::walk_and_set;
use crate::addr::Gva;
use crate::fault::{Fault, FaultKind};
use crate::lane::Lane;
use crate::memory::Memory;
use crate::nested::NgpaWalk;
use crate::trace::{NoTrace, Recorder, Trace};
use crate::translation::Translation;
use crate::walk::{PageWalk, translate};

/// What a walk does to accessed and dirty bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AdPolicy {
    /// Nothing in the guest changes.
    #[default]
    Observe,
    /// The bits that the access would set are set, after every dimension has allowed it.
    Set,
}

/// `gva_walk`, and `ngpa_walk` where L1 put EPT or NPT under L2.
///
/// ```
/// use core::sync::atomic::AtomicU64;
/// use pagewalk::*;
///
/// // One PML4E, PDPTE and PDE that map 2 MiB at GVA 0 to GPA 0x20_0000.
/// let mut words: Vec<AtomicU64> = (0..0x4000 / 8).map(|_| AtomicU64::new(0)).collect();
/// words[0x1000 / 8] = AtomicU64::new(0x2003);
/// words[0x2000 / 8] = AtomicU64::new(0x3003);
/// words[0x3000 / 8] = AtomicU64::new(0x20_0083);
///
/// let registers = ControlRegisters { cr0: 0x8000_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
/// let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
/// let walker = Walker::new(PageWalk::new(&registers, &cpu)?);
///
/// let read = Access::new(AccessKind::Read, Privilege::Supervisor);
/// let page = walker.translate(&Window::new(&words), Gva(0x1234), &read).unwrap();
/// assert_eq!((page.gpa, page.page_size()), (Gpa(0x20_1234), PageSize::Size2M));
///
/// let fault = walker.translate(&Window::new(&words), Gva(0x20_0000), &read).unwrap_err();
/// assert_eq!((fault.kind, fault.level), (FaultKind::PageFault { error_code: 0 }, 2));
/// # Ok::<(), StateError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Walker {
    lane: Lane,
    gva_walk: PageWalk,
    ngpa_walk: Option<NgpaWalk>,
}

impl Walker {
    /// A walker of one dimension.
    #[must_use]
    pub const fn new(gva_walk: PageWalk) -> Self {
        let lane = Lane::of(&gva_walk);
        Self { gva_walk, ngpa_walk: None, lane }
    }

    /// A walker of two dimensions: `gva_walk` is L2's, and all its addresses pass through `ngpa_walk`.
    #[must_use]
    pub const fn nested(gva_walk: PageWalk, ngpa_walk: NgpaWalk) -> Self {
        Self { gva_walk, ngpa_walk: Some(ngpa_walk), lane: Lane::CLOSED }
    }

    /// The CR3-rooted walk.
    #[must_use]
    pub fn gva_walk(&self) -> &PageWalk {
        &self.gva_walk
    }

    /// The second dimension, where there is one.
    #[must_use]
    pub fn ngpa_walk(&self) -> Option<&NgpaWalk> {
        self.ngpa_walk.as_ref()
    }

    /// What `gva` means for `access`, with nothing changed in the guest.
    ///
    /// # Errors
    /// The fault that the access would meet.
    #[inline]
    pub fn translate<M: Memory>(&self, memory: &M, gva: Gva, access: &Access) -> Result<Translation, Fault> {
        match self.lane.translate(&self.gva_walk, memory, gva.0, access) {
            Some(translation) => Ok(translation),
            None => {
                cold_path();
                self.observe(memory, gva, access, &mut NoTrace)
            }
        }
    }

    /// What `gva` means for `access`, under `policy`, with every step given to `recorder`.
    ///
    /// The recorder holds the steps of the last attempt.
    ///
    /// # Errors
    /// The fault that the access would meet; with [`AdPolicy::Set`] also [`FaultKind::Contended`].
    pub fn translate_with<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        gva: Gva,
        access: &Access,
        policy: AdPolicy,
        recorder: &mut R,
    ) -> Result<Translation, Fault> {
        recorder.clear();
        match policy {
            AdPolicy::Observe if !R::ENABLED => self.translate(memory, gva, access),
            AdPolicy::Observe => self.observe(memory, gva, access, recorder),
            AdPolicy::Set => {
                let mut trace = Trace::new();
                let outcome = self.set(memory, gva, access, &mut trace);
                for step in trace.steps() {
                    recorder.record(*step);
                }
                outcome
            }
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn observe<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        gva: Gva,
        access: &Access,
        recorder: &mut R,
    ) -> Result<Translation, Fault> {
        translate(&self.gva_walk, self.ngpa_walk.as_ref(), memory, gva.0, access, recorder)
    }

    fn set<M: Memory>(
        &self,
        memory: &M,
        gva: Gva,
        access: &Access,
        trace: &mut Trace,
    ) -> Result<Translation, Fault> {
        walk_and_set(memory, trace, |trace| self.observe(memory, gva, access, trace)).map_err(|fault| {
            match fault.kind {
                FaultKind::Contended => Fault { address: gva.0, ..fault },
                _ => fault,
            }
        })
    }
}
