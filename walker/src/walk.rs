//! One dimension's page walk: from a root, down the levels, to a leaf.
//!
//! Intel SDM volume 3, "4-Level Paging and 5-Level Paging". The descent is generic over the layout of an entry and knows
//! nothing of faults: it ends in a leaf with the rights that all levels grant, or in a refusal that the caller reports.

use crate::access::{Access, Privilege};
use crate::addr::{Gpa, NestedGpa};
use crate::entry::{EntryLayout, LongMode, Meaning, step};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::{MemoryType, PageFormat, index};
use crate::memory::{Backing, Memory};
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError, bits, reserved};
use crate::nested::NgpaWalk;
use crate::permission::{Rights, key_refusal};
use crate::trace::{Recorder, Step, Verdict};

/// Size of the page that a leaf maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// Paging is off: no page at all.
    Unpaged,
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// Bytes, or `None` where paging is off.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        match self {
            Self::Unpaged => None,
            Self::Size4K => Some(1 << 12),
            Self::Size2M => Some(1 << 21),
            Self::Size1G => Some(1 << 30),
        }
    }

    pub(crate) const fn of_long_mode(level: u32) -> Self {
        match level {
            1 => Self::Size4K,
            2 => Self::Size2M,
            _ => Self::Size1G,
        }
    }
}

/// What a GVA means right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation {
    /// The address in the machine's memory.
    pub gpa: Gpa,
    /// The L2 guest-physical address in between, in a nested walk.
    pub nested_gpa: Option<NestedGpa>,
    /// Size of the guest's page.
    pub page_size: PageSize,
    /// Size of the second dimension's page, in a nested walk.
    pub nested_page_size: Option<PageSize>,
    /// What every level of every dimension grants.
    pub rights: Rights,
    /// Protection key of the page, 0 to 15, whether or not keys are enabled.
    pub key: u8,
    /// The guest leaf's accessed bit, as the walk found it.
    pub accessed: bool,
    /// The guest leaf's dirty bit, as the walk found it.
    pub dirty: bool,
    /// The guest leaf's global bit.
    pub global: bool,
    /// What lies behind the final address.
    pub backing: Backing,
    /// The memory type that the guest leaf selects in the PAT; write back where paging is off. MTRRs are not applied.
    pub pat_type: MemoryType,
    /// Policy `Set` met entries in read-only memory and left their accessed and dirty bits alone.
    pub ad_skipped: bool,
}

/// A root and a page format: everything one dimension needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWalk {
    root: u64,
    format: PageFormat,
}

impl PageWalk {
    /// `gva_walk` under these registers.
    ///
    /// # Errors
    /// Names the register that no CPU would accept, or the mode that is not supported yet.
    pub fn new(registers: &ControlRegisters, cpu: &CpuProfile) -> Result<Self, StateError> {
        let format = PageFormat::guest(registers, cpu)?;
        Self::rooted(format, "CR3", registers.cr3, cpu)
    }

    pub(crate) fn rooted(
        format: PageFormat,
        register: &'static str,
        root: u64,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        if format.mode() != PagingMode::None {
            reserved(register, root, bits(u32::from(cpu.maxphyaddr), 63))?;
        }
        Ok(Self { root: root & LongMode::FRAME, format })
    }

    /// Address of the root table, in the space that this dimension's tables live in. Meaningless without paging.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The page format.
    #[must_use]
    pub fn format(&self) -> &PageFormat {
        &self.format
    }
}

/// Where a descent ended well.
pub(crate) struct Leaf {
    pub(crate) rights: Rights,
    pub(crate) entry: u64,
    pub(crate) level: u32,
    /// The translated address, in the space that this dimension maps to.
    pub(crate) output: u64,
    /// Every entry on the way, by level, so that a missing right can be laid at the door of the entry that withheld it.
    path: [(u64, Gpa); 8],
}

/// Why a descent ended early.
pub(crate) enum Stop {
    /// This dimension refused.
    Refused(Refusal),
    /// The second dimension refused the address of one of this dimension's tables.
    Second(Fault),
}

/// What a descent is for, and through what it reads its tables.
#[derive(Clone, Copy)]
pub(crate) struct Purpose<'a> {
    pub(crate) dimension: Dimension,
    pub(crate) second: Option<&'a NgpaWalk>,
    pub(crate) writes: bool,
    pub(crate) exempt: bool,
}

/// Walks down from the root to the leaf that maps `address`. Decides absence and reserved bits, not rights.
#[inline(always)]
pub(crate) fn descend<E: EntryLayout, M: Memory, R: Recorder>(
    walk: &PageWalk,
    memory: &M,
    address: u64,
    purpose: Purpose<'_>,
    recorder: &mut R,
) -> Result<Leaf, Stop> {
    let format = &walk.format;
    let mut path = [(0, Gpa(0)); 8];
    let mut table = walk.root;
    let mut grants = u64::MAX;
    let mut level = format.levels();
    loop {
        let shift = 12 + E::INDEX_BITS * (level - 1);
        let number = (address >> (shift & 63)) & ((1 << E::INDEX_BITS) - 1);
        let offset = number << E::SIZE_SHIFT;
        let entry_gpa = match purpose.second {
            None => Gpa(table + offset),
            Some(second) => second
                .table_entry(memory, NestedGpa(table + offset), purpose.exempt, recorder)
                .map_err(Stop::Second)?,
        };
        let mut note = |entry: u64, grants: u64, verdict: Verdict| {
            if R::ENABLED {
                recorder.record(Step {
                    dimension: purpose.dimension,
                    level,
                    input: address,
                    table_gpa: Gpa(entry_gpa.0.wrapping_sub(offset)),
                    index: number as u32,
                    entry_gpa,
                    entry,
                    rights_so_far: E::rights(grants),
                    verdict,
                    writes: purpose.writes,
                });
            }
        };
        let refused = |reason: Reason, entry: u64, bits: u64| {
            Err(Stop::Refused(Refusal { reason, level, entry_gpa, entry, bits, key: false }))
        };
        let Some(entry) = E::load(memory, entry_gpa) else {
            note(0, grants, Verdict::Unbacked);
            return refused(Reason::TableUnbacked, 0, 0);
        };
        path[index(level)] = (entry, entry_gpa);
        grants &= E::grants(entry);

        // The mask only ever accepts: what it does not know, the authority decides with the entry already loaded.
        let plain = entry & format.plain_at(level) == E::PRESENT;
        let meaning = match (plain, level) {
            (true, 1) => Meaning::Leaf,
            (true, _) => Meaning::Table,
            (false, _) => step::<E>(format, level, entry),
        };
        match meaning {
            Meaning::Table if level > 1 => {
                note(entry, grants, Verdict::Table);
                table = entry & E::FRAME;
                level -= 1;
            }
            Meaning::Table | Meaning::Leaf => {
                note(entry, grants, Verdict::Leaf);
                let within = (1 << (shift & 63)) - 1;
                let output = (entry & E::FRAME & !within) | (address & within);
                return Ok(Leaf { rights: E::rights(grants), entry, level, output, path });
            }
            Meaning::Absent => {
                note(entry, grants, Verdict::NotPresent);
                return refused(Reason::NotPresent, entry, E::PRESENT);
            }
            Meaning::Reserved(bits) => {
                note(entry, grants, Verdict::Reserved);
                return refused(Reason::ReservedBits, entry, bits);
            }
        }
    }
}

impl Leaf {
    /// Decides the rights of a page once, by the permission words and the protection-key mask.
    #[inline(always)]
    pub(crate) fn permit<E: EntryLayout>(&self, format: &PageFormat, access: &Access) -> Result<(), Refusal> {
        if access.privilege == Privilege::Exempt {
            return Ok(());
        }
        let words = format.permissions();
        let refused = (words[access.permission_index() & 15] >> self.rights.bits()) & 1 != 0;
        let keys = match format.protection_key_mask() {
            0 => 0,
            mask => key_refusal(mask, access, self.rights, E::protection_key(self.entry)),
        };
        if refused || keys != 0 { Err(self.blame::<E>(format, access, refused, keys != 0)) } else { Ok(()) }
    }

    #[cold]
    fn blame<E: EntryLayout>(
        &self,
        format: &PageFormat,
        access: &Access,
        refused: bool,
        key: bool,
    ) -> Refusal {
        let (reason, right) = if !refused {
            (Reason::ProtectionKey, None)
        } else if access.is_user() && !self.rights.user() {
            (Reason::SupervisorPage, Some(Rights::USER))
        } else if access.is_fetch() && !self.rights.execute() {
            (Reason::NoExecute, Some(Rights::EXECUTE))
        } else if access.is_fetch() {
            (Reason::Smep, None)
        } else if access.is_write() && !self.rights.write() && !self.smap_refuses(format, access) {
            (Reason::ReadOnly, Some(Rights::WRITE))
        } else {
            (Reason::Smap, None)
        };
        let level = right.map_or(self.level, |right| self.withholder::<E>(format.levels(), right));
        let (entry, entry_gpa) = self.path[index(level)];
        let bits = match reason {
            Reason::ProtectionKey => bits(59, 62),
            Reason::Smep | Reason::Smap => E::right_bits(Rights::USER),
            _ => E::right_bits(right.unwrap_or(Rights::NONE)),
        };
        Refusal { reason, level, entry_gpa, entry, bits, key }
    }

    /// Whether the access is refused even if the page were writable: then it is SMAP that refuses.
    fn smap_refuses(&self, format: &PageFormat, access: &Access) -> bool {
        let word = format.permissions()[access.permission_index() & 15];
        (word >> self.rights.or(Rights::WRITE).bits()) & 1 != 0
    }

    /// The highest level whose entry withholds `right`.
    fn withholder<E: EntryLayout>(&self, levels: u32, right: Rights) -> u32 {
        (self.level..=levels)
            .rev()
            .find(|level| E::rights(E::grants(self.path[index(*level)].0)).and(right) == Rights::NONE)
            .unwrap_or(self.level)
    }
}

/// Translates `gva` through the guest's tables, and where there is a second dimension, through it too.
#[inline(always)]
pub(crate) fn translate<M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    match walk.format.mode() {
        PagingMode::None => unpaged(second, memory, gva, access, recorder),
        _ => paged::<LongMode, M, R>(walk, second, memory, gva, access, recorder),
    }
}

/// CR0.PG is clear: linear addresses are 32 bits wide and physical.
fn unpaged<M: Memory, R: Recorder>(
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let leaf = Translation {
        gpa: Gpa(0),
        nested_gpa: None,
        page_size: PageSize::Unpaged,
        nested_page_size: None,
        rights: Rights::ALL,
        key: 0,
        accessed: false,
        dirty: false,
        global: false,
        backing: Backing::None,
        pat_type: MemoryType::WriteBack,
        ad_skipped: false,
    };
    finish(leaf, gva & 0xffff_ffff, second, memory, gva, access, recorder)
}

#[inline(always)]
fn paged<E: EntryLayout, M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let format = &walk.format;
    if !crate::addr::is_canonical(gva, format.linear_width()) {
        return Err(Refusal::without_entry(Reason::NonCanonical).in_guest(format, access, gva));
    }
    let purpose = Purpose {
        dimension: Dimension::Guest,
        second,
        writes: access.is_write(),
        exempt: access.privilege == Privilege::Exempt,
    };
    let leaf = match descend::<E, M, R>(walk, memory, gva, purpose, recorder) {
        Ok(leaf) => leaf,
        Err(Stop::Refused(refusal)) => return Err(refusal.in_guest(format, access, gva)),
        Err(Stop::Second(fault)) => return Err(Fault { address: gva, ..fault }),
    };
    if let Err(refusal) = leaf.permit::<E>(format, access) {
        return Err(refusal.in_guest(format, access, gva));
    }
    let translation = Translation {
        gpa: Gpa(0),
        nested_gpa: None,
        page_size: PageSize::of_long_mode(leaf.level),
        nested_page_size: None,
        rights: leaf.rights,
        key: E::protection_key(leaf.entry),
        accessed: leaf.entry & E::ACCESSED != 0,
        dirty: leaf.entry & E::DIRTY != 0,
        global: leaf.entry & E::GLOBAL != 0,
        backing: Backing::None,
        pat_type: format.memory_type(E::pat_index(leaf.entry, leaf.level)),
        ad_skipped: false,
    };
    finish(translation, leaf.output, second, memory, gva, access, recorder)
}

/// Takes the address that the guest's tables gave through the second dimension, and looks what lies behind it.
#[inline(always)]
fn finish<M: Memory, R: Recorder>(
    translation: Translation,
    output: u64,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let Some(second) = second else {
        return Ok(Translation { gpa: Gpa(output), backing: memory.backing(Gpa(output)), ..translation });
    };
    let page = second
        .final_page(memory, NestedGpa(output), access, recorder)
        .map_err(|fault| Fault { address: gva, ..fault })?;
    Ok(Translation {
        gpa: page.gpa,
        nested_gpa: Some(NestedGpa(output)),
        nested_page_size: Some(page.size),
        rights: translation.rights.and(page.rights),
        backing: memory.backing(page.gpa),
        ..translation
    })
}
