//! One dimension's way down: from a root, through the levels, to a leaf.
//!
//! Intel SDM volume 3, "Hierarchical Paging Structures: an Overview". The descent is generic over the layout of an entry and
//! knows nothing of faults: it ends in a leaf with the rights that all levels grant, or in a refusal that the caller
//! reports. Absence and reserved bits are decided at each level, rights once, at the leaf.

use core::cell::Cell;

use crate::access::{Access, AccessKind};
use crate::addr::{Gpa, NestedGpa};
use crate::entry::{EntryLayout, Grants, LongMode, Meaning, step};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::{PageFormat, index};
use crate::memory::Memory;
use crate::nested::{NgpaWalk, Update};
use crate::permission::{Rights, key_refusal};
use crate::shadow_stack::{self, Refused};
use crate::trace::{Held, Recorder, Step, Verdict};
use crate::translation::PageSize;
use crate::walk::PageWalk;

/// What a descent is for, and through what it reads its tables.
#[derive(Clone, Copy)]
pub(crate) struct Purpose<'a> {
    pub(crate) dimension: Dimension,
    pub(crate) second: Option<&'a NgpaWalk>,
    pub(crate) access: &'a Access,
    /// Learns why the page could not be written, if an access that is allowed only reads.
    pub(crate) unwritable: Option<&'a Cell<Option<Refusal>>>,
}

/// Where a descent ended well.
#[derive(Clone, Copy)]
pub(crate) struct Leaf {
    pub(crate) rights: Rights,
    pub(crate) entry: u64,
    pub(crate) size: PageSize,
    /// The translated address, in the space that this dimension maps to.
    pub(crate) output: u64,
}

/// Why a descent ended early.
pub(crate) enum Stop {
    /// This dimension refused.
    Refused(Refusal),
    /// The second dimension refused the address of one of this dimension's tables.
    Second(Fault),
}

/// Every entry on the way and where it lies, by level, so that a missing right can be laid at the door of the entry that
/// withholds it.
pub(crate) type Path = [(u64, Gpa); 8];

/// Finds the page that maps `address`, and decides whether the access is allowed to it.
pub(crate) fn descend<E: EntryLayout, M: Memory, R: Recorder>(
    walk: &PageWalk,
    memory: &M,
    address: u64,
    purpose: Purpose<'_>,
    recorder: &mut R,
) -> Result<Leaf, Stop> {
    let format = walk.format();
    let mut path: Path = [(0, Gpa(0)); 8];
    let mut table = walk.root();
    let mut grants = Grants::ALL;
    let mut level = format.levels();
    // The dirty bit makes a shadow stack of a page: a shadow-stack access finds it set and never sets it, and where rights are
    // checked, its change is a change of meaning.
    let shadow_stack = format.shadow_stacks() && purpose.access.is_shadow_stack();
    let dirty_is_meant = shadow_stack && !purpose.access.is_exempt();
    loop {
        let shift = (12 + E::INDEX_BITS * level.wrapping_sub(1)) & 63;
        let number = (address >> shift) & ((1 << E::INDEX_BITS) - 1);
        let refused = |reason, entry_gpa, entry, bits| {
            Err(Stop::Refused(Refusal::at(reason, level, entry_gpa, entry, bits)))
        };
        let note = |recorder: &mut R, held, entry_gpa: Gpa, entry, rights_so_far, verdict| {
            if R::ENABLED {
                let dirties = verdict == Verdict::Leaf && purpose.access.is_write() && !shadow_stack;
                let walked = matches!(verdict, Verdict::Table | Verdict::Leaf);
                recorder.record(Step {
                    dimension: purpose.dimension,
                    level,
                    input: address,
                    table_gpa: Gpa(entry_gpa.0.saturating_sub(number << E::SIZE_SHIFT)),
                    index: number as u32,
                    entry_gpa,
                    entry,
                    rights_so_far,
                    verdict,
                    held,
                    sets: if walked && format.has_accessed_dirty() { E::sets(level, dirties) } else { 0 },
                    accessed_dirty: E::ACCESSED | if dirty_is_meant { 0 } else { E::DIRTY },
                });
            }
        };

        let mut update = None;
        let (held, entry_gpa, entry) = match walk.pdpte_register(level, number) {
            Some(register) => (Held::Register, Gpa(0), register),
            None => {
                let at = table + (number << E::SIZE_SHIFT);
                let entry_gpa = match purpose.second {
                    None => Gpa(at),
                    Some(second) => second
                        .table_entry(
                            memory,
                            NestedGpa(at),
                            E::sets(level, false) == 0,
                            purpose.access,
                            &mut update,
                            recorder,
                        )
                        .map_err(Stop::Second)?,
                };
                let held = if E::SIZE_SHIFT == 2 { Held::Word32 } else { Held::Word64 };
                let Some(entry) = E::load(memory, entry_gpa) else {
                    note(recorder, held, entry_gpa, 0, E::rights(grants), Verdict::Unbacked);
                    return refused(Reason::TableUnbacked, entry_gpa, 0, 0);
                };
                (held, entry_gpa, entry)
            }
        };
        path[index(level)] = (entry, entry_gpa);
        grants = E::through(grants, level, entry);
        let rights = E::rights(grants);
        match step::<E>(format, level, entry) {
            Meaning::Table => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Table);
                check_update::<E>(entry, level, false, &update)?;
                table = E::table(entry) & format.address_bits();
                level -= 1;
            }
            Meaning::Leaf => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Leaf);
                let within = (1 << shift) - 1;
                let output = (E::page(level, entry) & format.address_bits() & !within) | (address & within);
                let leaf = Leaf { rights, entry, size: PageSize::of_bits(shift), output };
                permit::<E>(&leaf, level, format, purpose.access, &path).map_err(Stop::Refused)?;
                check_update::<E>(entry, level, purpose.access.is_write(), &update)?;
                if let Some(unwritable) = purpose.unwritable {
                    let write = Access::new(AccessKind::Write, purpose.access.privilege());
                    unwritable.set(refusal::<E>(&leaf, level, format, &write, &path));
                }
                return Ok(leaf);
            }
            Meaning::Absent => {
                // The other bits of an absent entry are ignored: it grants nothing.
                note(recorder, held, entry_gpa, entry, Rights::NONE, Verdict::NotPresent);
                return refused(Reason::NotPresent, entry_gpa, entry, E::PRESENT);
            }
            Meaning::Misconfigured(reason, bits) => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Misconfigured);
                return refused(reason, entry_gpa, entry, bits);
            }
            Meaning::Reserved(bits) => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Reserved);
                return refused(Reason::ReservedBits, entry_gpa, entry, bits);
            }
        }
    }
}

/// Whether the walk may set the accessed and dirty bits that `entry` lacks, where the second dimension let it be read only.
#[inline(always)]
fn check_update<E: EntryLayout>(entry: u64, level: u32, dirties: bool, update: &Update) -> Result<(), Stop> {
    match update {
        Some(fault) if E::sets(level, dirties) & !entry != 0 => Err(Stop::Second(*fault)),
        _ => Ok(()),
    }
}

/// What keeps an access from a page.
pub(crate) struct Lack {
    pub(crate) reason: Reason,
    /// The right that is missing, if one is.
    pub(crate) right: Option<Rights>,
    /// The lowest level whose entry may withhold it.
    pub(crate) from: u32,
    /// The bits of that entry that are responsible.
    pub(crate) bits: u64,
}

/// Decides the rights of a page once, by the permission words and the protection-key mask.
#[inline(always)]
fn permit<E: EntryLayout>(
    leaf: &Leaf,
    level: u32,
    format: &PageFormat,
    access: &Access,
    path: &Path,
) -> Result<(), Refusal> {
    // The words of shadow-stack accesses refuse everything where more than rights decides.
    if format.protection_key_mask() == 0 && !format.refuses(access, leaf.rights) {
        return Ok(());
    }
    match refusal::<E>(leaf, level, format, access, path) {
        None => Ok(()),
        Some(refusal) => Err(refusal),
    }
}

/// Whether the page is refused to the access, and by which entry.
#[inline(never)]
fn refusal<E: EntryLayout>(
    leaf: &Leaf,
    level: u32,
    format: &PageFormat,
    access: &Access,
    path: &Path,
) -> Option<Refusal> {
    let lack = if format.shadow_stacks() && access.is_shadow_stack() {
        no_shadow_stack::<E>(leaf, level, format, access, path)
    } else if format.refuses(access, leaf.rights) {
        E::lack(leaf, level, format, access, path)
    } else {
        None
    };
    let key = match format.protection_key_mask() {
        0 => false,
        mask => key_refusal(mask, access, leaf.rights, LongMode::protection_key(leaf.entry)) != 0,
    };
    let Lack { reason, right, from, bits } = match lack {
        Some(lack) => lack,
        None if key => Lack { reason: Reason::ProtectionKey, right: None, from: level, bits: E::KEY },
        None => return None,
    };
    let withholds = |level: u32| right.is_none_or(|right| alone::<E>(level, path).and(right) == Rights::NONE);
    // Of several entries that withhold the right, the one nearest to the leaf.
    let level = (from..=format.levels()).find(|level| withholds(*level)).unwrap_or(level);
    let (entry, entry_gpa) = path[index(level)];
    let refusal = Refusal::at(reason, level, entry_gpa, entry, bits);
    Some(Refusal { key, rights: leaf.rights, leaf: leaf.entry, ..refusal })
}

/// What the entry of `level` grants by itself.
pub(crate) fn alone<E: EntryLayout>(level: u32, path: &Path) -> Rights {
    E::rights(E::through(Grants::ALL, level, path[index(level)].0))
}

/// Why the permission words refuse the access.
pub(crate) fn lack<E: EntryLayout>(rights: Rights, level: u32, format: &PageFormat, access: &Access) -> Lack {
    // Under GMET, U/S keeps no user out.
    let user_needed = format.refuses(access, Rights::ALL.without(Rights::USER));
    let (reason, right) = if access.is_user() && !rights.user() && user_needed {
        (Reason::SupervisorPage, Some(Rights::USER))
    } else if access.is_fetch() && !rights.execute() {
        (Reason::NoExecute, Some(Rights::EXECUTE))
    } else if access.is_fetch() {
        (Reason::Smep, None)
    } else if format.refuses(access, rights.or(Rights::WRITE)) {
        // A right to write would not help: it is SMAP that refuses.
        (Reason::Smap, None)
    } else {
        (Reason::ReadOnly, Some(Rights::WRITE))
    };
    Lack { reason, right, from: level, bits: E::right_bits(right.unwrap_or(Rights::USER)) }
}

/// Why the page is no shadow stack for the access, if it is none.
fn no_shadow_stack<E: EntryLayout>(
    leaf: &Leaf,
    level: u32,
    format: &PageFormat,
    access: &Access,
    path: &Path,
) -> Option<Lack> {
    let above = level + 1;
    let page = shadow_stack::Page {
        rights: leaf.rights,
        leaf_write: alone::<E>(level, path).write(),
        leaf_dirty: leaf.entry & E::DIRTY != 0,
        upper_write: (above..=format.levels()).all(|level| alone::<E>(level, path).write()),
    };
    let (user, write) = (E::right_bits(Rights::USER), E::right_bits(Rights::WRITE));
    Some(match shadow_stack::refused(access, page)? {
        Refused::SupervisorPage => {
            Lack { reason: Reason::SupervisorPage, right: Some(Rights::USER), from: level, bits: user }
        }
        Refused::UserPage => Lack { reason: Reason::UserShadowStack, right: None, from: level, bits: user },
        Refused::ByLeaf => {
            let bits = (leaf.entry & write) | (!leaf.entry & E::DIRTY);
            Lack { reason: Reason::NotShadowStack, right: None, from: level, bits }
        }
        Refused::FromAbove => {
            Lack { reason: Reason::NotShadowStack, right: Some(Rights::WRITE), from: above, bits: write }
        }
    })
}
