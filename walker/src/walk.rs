//! A page walk as a value, and a GVA's way through it.
//!
//! Intel SDM volume 3, "Paging". A GVA here is the linear address after segmentation: 32 bits wide outside long mode.

use crate::access::Access;
use crate::addr::{Gpa, NestedGpa, is_canonical};
use crate::descent::{Purpose, Stop, descend};
use crate::entry::{EntryLayout, LongMode, Pae, TwoLevel};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::masking::{CR3_LAM_U48, CR3_LAM_U57};
use crate::memory::Memory;
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError, Vendor, bits, reserved};
use crate::nested::NgpaWalk;
use crate::permission::{Rights, Shown};
use crate::reserved::ReservedBits;
use crate::trace::Recorder;
use crate::translation::{Page, PageSize, Translation};

/// A root and a page format: everything one dimension needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWalk {
    root: u64,
    /// The PDPTE registers of PAE paging, where they are known; otherwise the walk reads PDPTEs from memory.
    pdptes: Option<[u64; 4]>,
    format: PageFormat,
}

impl PageWalk {
    /// `gva_walk` under these registers. With PAE paging, PDPTEs are read from memory: [`Self::with_pdptes`] knows the
    /// registers.
    ///
    /// # Errors
    /// Names the register that no CPU would accept.
    pub fn new(registers: &ControlRegisters, cpu: &CpuProfile) -> Result<Self, StateError> {
        let format = PageFormat::guest(registers, cpu)?;
        let no_address = match format.mode() {
            // Intel SDM volume 3, "Use of CR3 with 32-Bit Paging", "Use of CR3 with PAE Paging": ignored.
            PagingMode::TwoLevel | PagingMode::Pae => bits(32, 63),
            mode if mode.is_long() && cpu.vendor == Vendor::Intel => CR3_LAM_U48 | CR3_LAM_U57,
            _ => 0,
        };
        Self::rooted(format, "CR3", registers.cr3 & !no_address, cpu)
    }

    /// `gva_walk` under PAE paging, with the PDPTE registers that the CPU loaded when CR3 was written (Intel SDM volume 3,
    /// "PDPTE Registers").
    ///
    /// # Errors
    /// As [`Self::new`]; also if the registers select another mode, or a present PDPTE has reserved bits set, which no CPU
    /// loads.
    pub fn with_pdptes(
        registers: &ControlRegisters,
        pdptes: [u64; 4],
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        let walk = Self::new(registers, cpu)?;
        if walk.format.mode() != PagingMode::Pae {
            return Err(StateError::Contradiction {
                register: "PDPTE",
                problem: "only PAE paging has PDPTE registers",
            });
        }
        for pdpte in pdptes {
            if pdpte & LongMode::PRESENT != 0 {
                reserved("PDPTE", pdpte, ReservedBits::pdpte(cpu))?;
            }
        }
        Ok(Self { pdptes: Some(pdptes), ..walk })
    }

    pub(crate) fn rooted(
        format: PageFormat,
        register: &'static str,
        root: u64,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        let (unused, frame) = match format.mode() {
            PagingMode::None => (0, u64::MAX),
            PagingMode::TwoLevel => (bits(32, 63), !0xfff),
            PagingMode::Pae => (bits(32, 63), !0x1f),
            PagingMode::FourLevel | PagingMode::FiveLevel => {
                (cpu.address_reserved(63), LongMode::FRAME & format.address_bits())
            }
        };
        reserved(register, root, unused)?;
        Ok(Self { root: root & frame, pdptes: None, format })
    }

    /// A walk from the table at `root`, which the caller has checked.
    pub(crate) const fn from_table(root: u64, format: PageFormat) -> Self {
        Self { root, pdptes: None, format }
    }

    /// Address of the root table, in the space that this dimension's tables live in. Meaningless without paging.
    #[must_use]
    pub const fn root(&self) -> u64 {
        self.root
    }

    /// The PDPTE registers of PAE paging, where they are known.
    #[must_use]
    pub fn pdptes(&self) -> Option<&[u64; 4]> {
        self.pdptes.as_ref()
    }

    /// The page format.
    #[must_use]
    pub const fn format(&self) -> &PageFormat {
        &self.format
    }

    /// The PDPTE register that stands in for the entry `number` of `level`.
    #[inline]
    pub(crate) fn pdpte_register(&self, level: u32, number: u64) -> Option<u64> {
        match &self.pdptes {
            Some(pdptes) if level == self.format.levels() => pdptes.get(number as usize & 3).copied(),
            _ => None,
        }
    }
}

/// Translates `gva` through the guest's tables, and where there is a second dimension, every address on the way through
/// that one.
pub(crate) fn translate<M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let as_data = access.as_data();
    let access = if walk.format.shadow_stacks() { access } else { &as_data };
    let format = &walk.format;
    let address = if format.mode().is_long() { format.masking().apply(gva, access) } else { gva & LINEAR_32 };
    if format.mode().is_long() && !is_canonical(address, format.linear_width()) {
        return Err(Refusal::without_entry(Reason::NonCanonical).in_guest(format, access, gva));
    }
    // The address that is translated is the one that a fault reports.
    linear(walk, second, memory, address, access, recorder)
}

/// Linear addresses wrap at 4 GiB outside long mode.
const LINEAR_32: u64 = 0xffff_ffff;

/// [`translate`] of a canonical address, from which nothing is masked. A shadow-stack access comes only where there are some.
pub(crate) fn linear<M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let page = match walk.format.mode() {
        PagingMode::None => Ok(unpaged(gva)),
        PagingMode::TwoLevel => paged::<TwoLevel, M, R>(walk, second, memory, gva, access, recorder),
        PagingMode::Pae => paged::<Pae, M, R>(walk, second, memory, gva, access, recorder),
        PagingMode::FourLevel | PagingMode::FiveLevel => {
            paged::<LongMode, M, R>(walk, second, memory, gva, access, recorder)
        }
    }?;
    let Some(second) = second else {
        return Ok(Translation { page: page.page.with_backing(memory.backing(page.gpa)), ..page });
    };
    let ngpa = NestedGpa(page.gpa.0);
    let nested = second
        .final_page(memory, ngpa, access, page.rights(), recorder)
        .map_err(|fault| Fault { address: gva, ..fault })?;
    Ok(Translation {
        gpa: nested.gpa,
        nested: Some(nested.page(ngpa)),
        page: page.page.with_rights(nested.rights).with_backing(memory.backing(nested.gpa)),
        ..page
    })
}

/// CR0.PG is clear: linear addresses are physical.
fn unpaged(gva: u64) -> Translation {
    Translation {
        gpa: Gpa(gva),
        entry: 0,
        nested: None,
        page: Page::new(PageSize::Unpaged, Shown::of(Rights::ALL)),
    }
}

/// The page that the guest's own tables give; what lies behind it is for the caller to see.
fn paged<E: EntryLayout, M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let format = &walk.format;
    let purpose = Purpose { dimension: Dimension::Guest, second, access, unwritable: None };
    match descend::<E, M, R>(walk, memory, gva, purpose, recorder) {
        Ok(leaf) => Ok(Translation {
            gpa: Gpa(leaf.output),
            entry: leaf.entry,
            nested: None,
            page: Page::new(leaf.size, Shown::of(leaf.rights)),
        }),
        Err(Stop::Refused(refusal)) => Err(refusal.in_guest(format, access, gva)),
        Err(Stop::Second(fault)) => Err(Fault { address: gva, ..fault }),
    }
}
