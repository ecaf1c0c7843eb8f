//! Pages for VMCB12 and VMCS12 that are not the guest's.
//!
//! KVM writes VM exits into the control structure, which therefore has to lie in a memory slot. So that the guest's memory
//! is not changed behind its back, it is a slot of our own, above any memory that a machine has: the guest reaches it, as it
//! would reach a device there, and the walker, which knows the guest's memory only, calls it unbacked.

use std::fmt;
use std::sync::Arc;

use pagewalk::{Gpa, Memory as _};

use crate::machine::{GuestRam, MemoryError, PAGE, Region};

/// What a page holds.
pub(super) type Page = Box<[u8; 4096]>;

/// Pages of one vCPU: the control structure, the VMXON region, permission maps for MSRs (two) and I/O ports (three). Of
/// these, KVM reads those of the maps that the control structure names, and writes the first alone.
const PAGES: u64 = 8;
/// First address behind the pages: the least MAXPHYADDR is 36 bits.
const OWN_PAGES_END: u64 = 1 << 36;

/// Where the pages of `vcpus` vCPUs lie.
pub(crate) fn own_pages_region(vcpus: u32) -> Region {
    let size = u64::from(vcpus) * PAGES * PAGE;
    Region { start: Gpa(OWN_PAGES_END - size), size, read_only: false }
}

/// The pages of one vCPU.
#[derive(Clone)]
pub(crate) struct OwnPages {
    memory: Arc<GuestRam>,
    start: u64,
}

impl fmt::Debug for OwnPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnPages").field("start", &self.start).finish_non_exhaustive()
    }
}

impl OwnPages {
    /// Those of vCPU `index` in `memory`, which is an [`own_pages_region`].
    pub(crate) fn of(memory: &Arc<GuestRam>, index: u32) -> Self {
        let first = memory.regions().first().map_or(0, |region| region.start.0);
        Self { memory: Arc::clone(memory), start: first + u64::from(index) * PAGES * PAGE }
    }

    pub(super) fn control_structure(&self) -> u64 {
        self.start
    }

    pub(super) fn vmxon_region(&self) -> u64 {
        self.start + PAGE
    }

    pub(super) fn msr_permissions(&self) -> u64 {
        self.start + 2 * PAGE
    }

    pub(super) fn io_permissions(&self) -> u64 {
        self.start + 4 * PAGE
    }

    pub(super) fn memory(&self) -> &GuestRam {
        &self.memory
    }
}

/// Reads the page at `gpa`.
pub(super) fn read(memory: &GuestRam, gpa: u64) -> Option<Page> {
    let mut page = Box::new([0; 4096]);
    for (at, bytes) in (gpa..).step_by(8).zip(page.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&memory.load_u64(Gpa(at))?.to_le_bytes());
    }
    Some(page)
}

/// Writes the page at `gpa`.
pub(super) fn write(memory: &GuestRam, gpa: u64, page: &[u8; 4096]) -> Result<(), MemoryError> {
    memory.write(Gpa(gpa), page)
}
