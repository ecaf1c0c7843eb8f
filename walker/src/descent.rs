//! One dimension's way down: from a root, through the levels, to a leaf.
//!
//! Intel SDM volume 3, "Hierarchical Paging Structures: an Overview". The descent is generic over the layout of an entry and
//! knows nothing of faults: it ends in a leaf with the rights that all levels grant, or in a refusal that the caller
//! reports. Absence and reserved bits are decided at each level, rights once, at the leaf.

use crate::access::Access;
use crate::addr::{Gpa, NestedGpa};
use crate::entry::{EntryLayout, Grants, LongMode, Meaning, step};
use crate::fault::{Dimension, Fault, Reason, Refusal};
use crate::format::{PageFormat, index};
use crate::memory::Memory;
use crate::nested::NgpaWalk;
use crate::permission::{Rights, key_refusal};
use crate::trace::{Held, Recorder, Step, Verdict};
use crate::translation::PageSize;
use crate::walk::PageWalk;

/// What a descent is for, and through what it reads its tables.
#[derive(Clone, Copy)]
pub(crate) struct Purpose<'a> {
    pub(crate) dimension: Dimension,
    pub(crate) second: Option<&'a NgpaWalk>,
    pub(crate) access: &'a Access,
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
type Path = [(u64, Gpa); 8];

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
    loop {
        let shift = (12 + E::INDEX_BITS * level.wrapping_sub(1)) & 63;
        let number = (address >> shift) & ((1 << E::INDEX_BITS) - 1);
        let refused = |reason, entry_gpa, entry, bits| {
            Err(Stop::Refused(Refusal { reason, level, entry_gpa, entry, bits, key: false }))
        };
        let note = |recorder: &mut R, held, entry_gpa: Gpa, entry, rights_so_far, verdict| {
            if R::ENABLED {
                let dirties = verdict == Verdict::Leaf && purpose.access.is_write();
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
                    sets: if walked { E::sets(level, dirties) } else { 0 },
                    accessed_dirty: E::ACCESSED | E::DIRTY,
                });
            }
        };

        let (held, entry_gpa, entry) = match walk.pdpte_register(level, number) {
            Some(register) => (Held::Register, Gpa(0), register),
            None => {
                let at = table + (number << E::SIZE_SHIFT);
                let entry_gpa = match purpose.second {
                    None => Gpa(at),
                    Some(second) => second
                        .table_entry(memory, NestedGpa(at), purpose.access, recorder)
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
                table = E::table(entry);
                level -= 1;
            }
            Meaning::Leaf => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Leaf);
                let within = (1 << shift) - 1;
                let output = (E::page(level, entry) & !within) | (address & within);
                let leaf = Leaf { rights, entry, size: PageSize::of_bits(shift), output };
                return match permit::<E>(&leaf, level, format, purpose.access, &path) {
                    Ok(()) => Ok(leaf),
                    Err(refusal) => Err(Stop::Refused(refusal)),
                };
            }
            Meaning::Absent => {
                // The other bits of an absent entry are ignored: it grants nothing.
                note(recorder, held, entry_gpa, entry, Rights::NONE, Verdict::NotPresent);
                return refused(Reason::NotPresent, entry_gpa, entry, E::PRESENT);
            }
            Meaning::Reserved(bits) => {
                note(recorder, held, entry_gpa, entry, rights, Verdict::Reserved);
                return refused(Reason::ReservedBits, entry_gpa, entry, bits);
            }
        }
    }
}

/// Decides the rights of a page once, by the permission words and the protection-key mask.
fn permit<E: EntryLayout>(
    leaf: &Leaf,
    level: u32,
    format: &PageFormat,
    access: &Access,
    path: &Path,
) -> Result<(), Refusal> {
    let refused = format.refuses(access, leaf.rights);
    let key = match format.protection_key_mask() {
        0 => false,
        mask => key_refusal(mask, access, leaf.rights, LongMode::protection_key(leaf.entry)) != 0,
    };
    if !refused && !key {
        return Ok(());
    }
    let (reason, right) =
        if refused { reason(leaf.rights, format, access) } else { (Reason::ProtectionKey, None) };
    let withholds = |level: u32| {
        let alone = E::rights(E::through(Grants::ALL, level, path[index(level)].0));
        right.is_none_or(|right| alone.and(right) == Rights::NONE)
    };
    // Of several entries that withhold the right, the one nearest to the leaf.
    let level = (level..=format.levels()).find(|level| withholds(*level)).unwrap_or(level);
    let (entry, entry_gpa) = path[index(level)];
    let bits = match reason {
        Reason::ProtectionKey => E::KEY,
        _ => E::right_bits(right.unwrap_or(Rights::USER)),
    };
    Err(Refusal { reason, level, entry_gpa, entry, bits, key })
}

/// Why the permission words refuse the access, and the right that is missing, if one is.
fn reason(rights: Rights, format: &PageFormat, access: &Access) -> (Reason, Option<Rights>) {
    if access.is_user() && !rights.user() {
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
    }
}
