//! One dimension's page walk: from a root, down the levels, to a leaf.
//!
//! Intel SDM volume 3, "4-Level Paging and 5-Level Paging". The descent is generic over the layout of an entry and knows
//! nothing of faults: it ends in a leaf with the rights that all levels grant, or in a refusal that the caller reports.

use crate::access::Access;
use crate::addr::{Gpa, NestedGpa, is_canonical};
use crate::entry::{EntryLayout, Grants, LongMode, Meaning, step};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::{Backing, Memory};
use crate::mode::{ControlRegisters, CpuProfile, PagingMode, StateError, bits, reserved};
use crate::nested::NgpaWalk;
use crate::permission::{Rights, key_refusal};
use crate::trace::{Recorder, Step, Trace, Verdict};

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
    /// The guest's leaf, as the walk loaded it; 0 where paging is off.
    pub entry: u64,
    /// The L2 guest-physical address in between, in a nested walk.
    pub nested_gpa: Option<NestedGpa>,
    /// Size of the second dimension's page, in a nested walk.
    pub nested_page_size: Option<PageSize>,
    /// Size of the guest's page.
    pub page_size: PageSize,
    /// What every level of every dimension grants.
    pub rights: Rights,
    /// What lies behind the final address.
    pub backing: Backing,
    /// Policy `Set` met entries in read-only memory and left their accessed and dirty bits alone.
    pub ad_skipped: bool,
}

impl Translation {
    /// The guest leaf's accessed bit, as the walk found it.
    #[must_use]
    pub const fn accessed(&self) -> bool {
        self.entry & LongMode::ACCESSED != 0
    }

    /// The guest leaf's dirty bit, as the walk found it.
    #[must_use]
    pub const fn dirty(&self) -> bool {
        self.entry & LongMode::DIRTY != 0
    }

    /// The guest leaf's global bit.
    #[must_use]
    pub const fn global(&self) -> bool {
        self.entry & LongMode::GLOBAL != 0
    }

    /// Protection key of the page, 0 to 15, whether or not keys are enabled.
    #[must_use]
    pub fn key(&self) -> u8 {
        LongMode::protection_key(self.entry)
    }

    /// Number of the PAT field that the leaf selects, 0 to 7; `None` where paging is off.
    #[must_use]
    pub fn pat_index(&self) -> Option<usize> {
        match self.page_size {
            PageSize::Unpaged => None,
            PageSize::Size4K => Some(LongMode::pat_index(self.entry, 1)),
            PageSize::Size2M | PageSize::Size1G => Some(LongMode::pat_index(self.entry, 2)),
        }
    }
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
#[derive(Clone, Copy)]
pub(crate) struct Leaf {
    pub(crate) rights: Rights,
    pub(crate) entry: u64,
    pub(crate) level: u32,
    /// The translated address, in the space that this dimension maps to.
    pub(crate) output: u64,
    entry_gpa: Gpa,
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
pub(crate) fn descend<E: EntryLayout, M: Memory, R: Recorder, const LEVELS: u32>(
    walk: &PageWalk,
    memory: &M,
    address: u64,
    purpose: Purpose<'_>,
    recorder: &mut R,
) -> Result<Leaf, Stop> {
    let mut descent = Descent {
        walk,
        memory,
        address,
        purpose,
        recorder,
        table: walk.root,
        entry_gpa: Gpa(0),
        grants: Grants::ALL,
    };
    if LEVELS > 4 {
        descent.upper::<E, 5>()?;
    }
    if LEVELS > 3 {
        descent.upper::<E, 4>()?;
    }
    if let Some(leaf) = descent.upper::<E, 3>()? {
        return Ok(leaf);
    }
    if let Some(leaf) = descent.upper::<E, 2>()? {
        return Ok(leaf);
    }
    let entry = descent.entry::<E, 1>()?.0;
    Ok(descent.leaf::<E, 1>(entry))
}

/// A walk on its way down. The level is a constant at each step, so that shifts and masks are too.
struct Descent<'a, M, R> {
    walk: &'a PageWalk,
    memory: &'a M,
    address: u64,
    purpose: Purpose<'a>,
    recorder: &'a mut R,
    /// The table to read next, in the space that this dimension's tables live in.
    table: u64,
    /// Where the entry read last lies.
    entry_gpa: Gpa,
    grants: Grants,
}

impl<M: Memory, R: Recorder> Descent<'_, M, R> {
    /// Reads the entry of a level above the lowest: a leaf ends the descent, a table is descended into.
    #[inline(always)]
    fn upper<E: EntryLayout, const LEVEL: u32>(&mut self) -> Result<Option<Leaf>, Stop> {
        let (entry, leaf) = self.entry::<E, LEVEL>()?;
        if leaf {
            return Ok(Some(self.leaf::<E, LEVEL>(entry)));
        }
        self.table = entry & E::FRAME;
        Ok(None)
    }

    #[inline(always)]
    fn leaf<E: EntryLayout, const LEVEL: u32>(&self, entry: u64) -> Leaf {
        let within = (1 << shift::<E>(LEVEL)) - 1;
        let output = (entry & E::FRAME & !within) | (self.address & within);
        Leaf { rights: E::rights(self.grants), entry, level: LEVEL, output, entry_gpa: self.entry_gpa }
    }

    /// Reads one entry, and says whether it is a leaf.
    #[inline(always)]
    fn entry<E: EntryLayout, const LEVEL: u32>(&mut self) -> Result<(u64, bool), Stop> {
        let offset = index_at::<E>(self.address, LEVEL) << E::SIZE_SHIFT;
        let entry_gpa = match self.purpose.second {
            None => Gpa(self.table + offset),
            Some(second) => second
                .table_entry(self.memory, NestedGpa(self.table + offset), self.purpose.exempt, self.recorder)
                .map_err(Stop::Second)?,
        };
        let Some(entry) = E::load(self.memory, entry_gpa) else {
            self.note::<E>(LEVEL, entry_gpa, 0, Verdict::Unbacked);
            return refuse(Reason::TableUnbacked, LEVEL, entry_gpa, 0, 0);
        };
        self.entry_gpa = entry_gpa;
        self.grants = self.grants.through::<E>(entry);

        // The mask only ever accepts: what it does not know, the authority decides with the entry already loaded.
        let format = &self.walk.format;
        let plain = entry & format.plain_at(LEVEL) == E::PRESENT;
        let meaning = match (plain, LEVEL) {
            (true, 1) => Meaning::Leaf,
            (true, _) => Meaning::Table,
            (false, _) => step::<E>(format, LEVEL, entry),
        };
        match meaning {
            Meaning::Table => {
                self.note::<E>(LEVEL, entry_gpa, entry, Verdict::Table);
                Ok((entry, false))
            }
            Meaning::Leaf => {
                self.note::<E>(LEVEL, entry_gpa, entry, Verdict::Leaf);
                Ok((entry, true))
            }
            Meaning::Absent => {
                self.note::<E>(LEVEL, entry_gpa, entry, Verdict::NotPresent);
                refuse(Reason::NotPresent, LEVEL, entry_gpa, entry, E::PRESENT)
            }
            Meaning::Reserved(bits) => {
                self.note::<E>(LEVEL, entry_gpa, entry, Verdict::Reserved);
                refuse(Reason::ReservedBits, LEVEL, entry_gpa, entry, bits)
            }
        }
    }

    #[inline(always)]
    fn note<E: EntryLayout>(&mut self, level: u32, entry_gpa: Gpa, entry: u64, verdict: Verdict) {
        if R::ENABLED {
            let number = index_at::<E>(self.address, level);
            self.recorder.record(Step {
                dimension: self.purpose.dimension,
                level,
                input: self.address,
                table_gpa: Gpa(entry_gpa.0.wrapping_sub(number << E::SIZE_SHIFT)),
                index: number as u32,
                entry_gpa,
                entry,
                rights_so_far: E::rights(self.grants),
                verdict,
                writes: self.purpose.writes,
            });
        }
    }
}

#[inline(always)]
fn refuse<T>(reason: Reason, level: u32, entry_gpa: Gpa, entry: u64, bits: u64) -> Result<T, Stop> {
    Err(Stop::Refused(Refusal { reason, level, entry_gpa, entry, bits, key: false }))
}

impl Leaf {
    /// Decides the rights of a page once, by the permission words and the protection-key mask.
    #[inline(always)]
    pub(crate) fn permit<E: EntryLayout>(&self, format: &PageFormat, access: &Access) -> Permission {
        let keys = match format.protection_key_mask() {
            0 => 0,
            mask => key_refusal(mask, access, self.rights, E::protection_key(self.entry)),
        };
        Permission { refused: format.refuses(access, self.rights), key: keys != 0 }
    }

    /// If a right to write would not help, it is SMAP that refuses a data access.
    fn refused_even_if_writable(&self, format: &PageFormat, access: &Access) -> bool {
        format.refuses(access, self.rights.or(Rights::WRITE))
    }

    /// Why an access that [`permit`](Self::permit) did not allow is refused, and the right that is missing, if one is.
    fn reason(
        &self,
        permission: Permission,
        format: &PageFormat,
        access: &Access,
    ) -> (Reason, Option<Rights>) {
        if !permission.refused {
            (Reason::ProtectionKey, None)
        } else if access.is_user() && !self.rights.user() {
            (Reason::SupervisorPage, Some(Rights::USER))
        } else if access.is_fetch() && !self.rights.execute() {
            (Reason::NoExecute, Some(Rights::EXECUTE))
        } else if access.is_fetch() {
            (Reason::Smep, None)
        } else if self.refused_even_if_writable(format, access) {
            (Reason::Smap, None)
        } else {
            (Reason::ReadOnly, Some(Rights::WRITE))
        }
    }

    /// Names the entry that refuses: the lowest one that withholds the missing right.
    ///
    /// Above the leaf only a recorded walk knows the entries. Rather than have every walk keep them, `None` asks the caller
    /// to make the walk once more, recorded, and to let that second walk be the answer.
    pub(crate) fn blame<E: EntryLayout, R: Recorder>(
        &self,
        format: &PageFormat,
        access: &Access,
        (dimension, address): (Dimension, u64),
        recorder: &R,
    ) -> Option<Refusal> {
        let permission = self.permit::<E>(format, access);
        let (reason, right) = self.reason(permission, format, access);
        let withholds = |entry: u64| {
            right.is_none_or(|right| E::rights(Grants::ALL.through::<E>(entry)).and(right) == Rights::NONE)
        };
        let mut found = (self.level, self.entry_gpa, self.entry);
        if !withholds(self.entry) {
            if !R::ENABLED {
                return None;
            }
            found = recorder
                .steps()
                .iter()
                .rev()
                .filter(|step| (step.dimension, step.input) == (dimension, address))
                .find(|step| withholds(step.entry))
                .map_or(found, |step| (step.level, step.entry_gpa, step.entry));
        }
        let bits = match reason {
            Reason::ProtectionKey => E::KEY,
            _ => E::right_bits(right.unwrap_or(Rights::USER)),
        };
        let (level, entry_gpa, entry) = found;
        Some(Refusal { reason, level, entry_gpa, entry, bits, key: permission.key })
    }
}

/// Whether the rights of a page refuse an access, and whether its protection key does.
#[derive(Clone, Copy)]
pub(crate) struct Permission {
    refused: bool,
    key: bool,
}

impl Permission {
    #[inline(always)]
    pub(crate) const fn granted(self) -> bool {
        !(self.refused | self.key)
    }
}

/// Index into the table of `level` that `address` selects.
#[inline(always)]
fn index_at<E: EntryLayout>(address: u64, level: u32) -> u64 {
    (address >> (shift::<E>(level) & 63)) & ((1 << E::INDEX_BITS) - 1)
}

/// Number of address bits below the index of `level`.
#[inline(always)]
const fn shift<E: EntryLayout>(level: u32) -> u32 {
    12 + E::INDEX_BITS * (level - 1)
}

/// Translates `gva` through the guest's tables alone.
#[inline(always)]
pub(crate) fn translate<M: Memory, R: Recorder>(
    walk: &PageWalk,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    match walk.format.mode() {
        PagingMode::None => unpaged(None, memory, gva, access, recorder),
        PagingMode::FiveLevel => paged::<LongMode, M, R, 5>(walk, None, memory, gva, access, recorder),
        _ => paged::<LongMode, M, R, 4>(walk, None, memory, gva, access, recorder),
    }
}

/// Translates `gva` through the guest's tables, and every address on the way through the second dimension.
#[inline(never)]
pub(crate) fn translate_nested<M: Memory, R: Recorder>(
    walk: &PageWalk,
    second: &NgpaWalk,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    match walk.format.mode() {
        PagingMode::None => unpaged(Some(second), memory, gva, access, recorder),
        PagingMode::FiveLevel => {
            paged::<LongMode, M, R, 5>(walk, Some(second), memory, gva, access, recorder)
        }
        _ => paged::<LongMode, M, R, 4>(walk, Some(second), memory, gva, access, recorder),
    }
}

/// CR0.PG is clear: linear addresses are 32 bits wide and physical.
#[inline(never)]
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
        entry: 0,
        rights: Rights::ALL,
        backing: Backing::None,
        ad_skipped: false,
    };
    finish(leaf, gva & 0xffff_ffff, second, memory, gva, access, recorder)
}

#[inline(always)]
fn paged<E: EntryLayout, M: Memory, R: Recorder, const LEVELS: u32>(
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &mut R,
) -> Result<Translation, Fault> {
    let format = &walk.format;
    if !is_canonical(gva, 12 + E::INDEX_BITS * LEVELS) {
        return Err(Refusal::without_entry(Reason::NonCanonical).in_guest(format, access, gva));
    }
    let purpose = Purpose {
        dimension: Dimension::Guest,
        second,
        writes: access.is_write(),
        exempt: access.is_exempt(),
    };
    let leaf = match descend::<E, M, R, LEVELS>(walk, memory, gva, purpose, recorder) {
        Ok(leaf) => leaf,
        Err(Stop::Refused(refusal)) => return Err(refusal.in_guest(format, access, gva)),
        Err(Stop::Second(fault)) => return Err(Fault { address: gva, ..fault }),
    };
    if !leaf.permit::<E>(format, access).granted() {
        return refused::<E, M, R, LEVELS>(&Leaf { ..leaf }, walk, second, memory, gva, access, recorder);
    }
    let translation = Translation {
        gpa: Gpa(0),
        nested_gpa: None,
        page_size: PageSize::of_long_mode(leaf.level),
        nested_page_size: None,
        entry: leaf.entry,
        rights: leaf.rights,
        backing: Backing::None,
        ad_skipped: false,
    };
    finish(translation, leaf.output, second, memory, gva, access, recorder)
}

#[cold]
#[inline(never)]
fn refused<E: EntryLayout, M: Memory, R: Recorder, const LEVELS: u32>(
    leaf: &Leaf,
    walk: &PageWalk,
    second: Option<&NgpaWalk>,
    memory: &M,
    gva: u64,
    access: &Access,
    recorder: &R,
) -> Result<Translation, Fault> {
    match leaf.blame::<E, R>(&walk.format, access, (Dimension::Guest, gva), recorder) {
        Some(refusal) => Err(refusal.in_guest(&walk.format, access, gva)),
        None => paged::<E, M, Trace, LEVELS>(walk, second, memory, gva, access, &mut Trace::new()),
    }
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
