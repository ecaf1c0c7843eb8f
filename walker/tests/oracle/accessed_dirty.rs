//! Accessed and dirty bits.
//!
//! Intel SDM volume 3, "Accessed and Dirty Flags": bit 5 is set in every entry that the translation used, bit 6 in the entry
//! that maps a page which is written. AMD APM volume 2, "Nested Table Walk": the nested tables' bits are set likewise, and a
//! guest's paging structure counts as written. "Accessed and Dirty Flags for EPT" says the same of bits 8 and 9 where EPTP enables
//! them. By the project's own rule (`AdPolicy::Set`) that happens only after the access
//! was allowed, and entries in read-only memory keep what they hold.

use super::{Found, Nature, Physical, Visit, Written};

/// The entries that change, in order, and whether one stays as it is for lying in read-only memory.
pub(super) fn written<P: Physical>(memory: &P, visits: &[Visit]) -> (Vec<Written>, bool) {
    let mut written: Vec<Written> = Vec::new();
    let mut skipped = false;
    for visit in visits {
        let Some(flags) = visit.flags else { continue };
        let mut wanted = 1 << flags.accessed;
        if visit.found == Found::Leaf && visit.writes {
            wanted |= 1 << flags.dirty;
        }
        // A structure that is met twice in one walk already holds what the first visit left in it.
        let earlier = written.iter_mut().find(|earlier| earlier.address == visit.address);
        let now = earlier.as_ref().map_or(visit.entry, |earlier| earlier.entry);
        if now & wanted == wanted {
            continue;
        }
        if memory.nature(visit.address) == Nature::Rom {
            skipped = true;
            continue;
        }
        match earlier {
            Some(earlier) => earlier.entry = now | wanted,
            None => written.push(Written { address: visit.address, entry: now | wanted, bytes: visit.bytes }),
        }
    }
    (written, skipped)
}

/// Whether the walk met one word as an entry of four bytes and as one of eight, or as the guest's and as EPT's. The flags of the one
/// are then other bits of the other: setting them may move a frame under the CPU's feet, in an order that no manual gives.
pub(super) fn overlap(visits: &[Visit], ept: bool) -> bool {
    let word = |visit: &Visit| visit.address & !7;
    let differ = |one: &Visit, other: &Visit| {
        let in_size = one.bytes == 4 && other.bytes == 8 && other.flags.is_some();
        let in_format = ept && one.dimension != other.dimension;
        word(one) == word(other) && (in_size || in_format)
    };
    // Only then can they.
    let formats_differ = ept || visits.iter().any(|visit| visit.bytes == 4);
    formats_differ && visits.iter().any(|one| visits.iter().any(|other| differ(one, other)))
}
