//! What a snapshot says was assumed: of registers that cannot be read, and of what the walkers do not model.

use pagewalk::{PagingMode, StateError, Walker};

use super::registers::{Registers, UNMODELLED};
use super::snapshot::Snapshot;

/// Says in `assumed` that all registers are those of an earlier moment.
const STALE: &str = "all registers as last read before the failure";

/// Adds what the walkers take for granted: where a backend does not read the PDPTE registers, PDPTEs come from memory, as if
/// CR3 were loaded now; what the walker does not model is as if it were off; and keys that cannot be read are open.
pub(super) fn with_limits(
    mut assumed: Vec<String>,
    registers: &Registers,
    walker: &Result<Walker, StateError>,
) -> Vec<String> {
    let pae = walker.as_ref().is_ok_and(|walker| {
        let gva_walk = walker.gva_walk();
        gva_walk.format().mode() == PagingMode::Pae && gva_walk.pdptes().is_none()
    });
    let unmodelled = UNMODELLED.iter().filter(|(bit, _)| registers.cr4 & bit != 0);
    // Which keys the walk asks for: of user pages in the upper half of the mask's first eight fields, of supervisor pages in
    // the lower one.
    let keys = walker.as_ref().map_or(0, |walker| walker.gva_walk().format().protection_key_mask());
    let unknown = [
        ("PKRU=0x0", keys & 0xff00 != 0 && registers.pkru.is_none()),
        ("PKRS=0x0", keys & 0xff != 0 && registers.pkrs.is_none()),
    ];
    let limits = unmodelled
        .map(|(_, name)| format!("{name}=0"))
        .chain(unknown.iter().filter(|(_, unknown)| *unknown).map(|(name, _)| (*name).to_owned()))
        .chain(pae.then(|| "PDPTE0-3=as in memory at CR3".to_owned()));
    for limit in limits {
        if !assumed.contains(&limit) {
            assumed.push(limit);
        }
    }
    assumed
}

/// What is assumed of the registers of an earlier snapshot.
pub(super) fn as_before(previous: &Snapshot) -> Vec<String> {
    let mut assumed = previous.assumed.clone();
    if !assumed.iter().any(|a| a == STALE) {
        assumed.push(STALE.to_owned());
    }
    assumed
}
