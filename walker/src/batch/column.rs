//! Columns: one value for each of the addresses that are walked together.

/// Addresses of a block: as many as a mask has bits.
pub(super) const BLOCK: usize = 64;

/// A column with one value a lane.
pub(super) type Column = [u64; BLOCK];

/// The lanes of a mask, in order.
#[inline(always)]
pub(super) fn lanes(mut mask: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < u64::BITS).then_some(lane as usize)
    })
}

/// A bit for each lane that `holds`.
#[inline(always)]
pub(super) fn mask(holds: impl Iterator<Item = bool>) -> u64 {
    holds.zip(0..u64::BITS).fold(0, |mask, (holds, lane)| mask | u64::from(holds) << lane)
}

/// The bits in which some of `addresses` differ from the first one.
#[inline(always)]
pub(super) fn differing(addresses: &[u64]) -> u64 {
    let first = addresses.first().copied().unwrap_or_default();
    addresses.iter().fold(0, |differing, address| differing | (address ^ first))
}

/// Number of address bits below the index of `level`.
#[inline(always)]
pub(super) const fn shift(level: u32) -> u32 {
    (12 + 9 * level.wrapping_sub(1)) & 63
}

/// Where the entry for `address` lies in a table of `level`, in bytes.
#[inline(always)]
pub(super) const fn offset(address: u64, level: u32) -> u64 {
    (address >> shift(level) & 511) << 3
}
