//! Addresses, one type for each space, so that mixing them does not compile.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

address! {
    /// A guest virtual address: the *linear* address after segmentation, of L2 when a nested guest runs.
    Gva
}
address! {
    /// A guest physical address in the space of the machine's memory: L1's when a nested guest runs.
    Gpa
}
address! {
    /// An L2 guest-physical address: what `ngpa_walk` translates to a [`Gpa`].
    NestedGpa
}

/// Whether `address` is canonical for a linear address of `width` bits: 48, or 57 with CR4.LA57.
///
/// Bits 63 down to `width - 1` must be equal (Intel SDM volume 1, "Canonical Addressing").
#[must_use]
#[inline]
pub const fn is_canonical(address: u64, width: u32) -> bool {
    let unused = 64u32.wrapping_sub(width) & 63;
    ((address << unused) as i64 >> unused) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_edges() {
        for (width, last_low) in [(48, 0x0000_7fff_ffff_ffff_u64), (57, 0x00ff_ffff_ffff_ffff)] {
            assert!(is_canonical(0, width));
            assert!(is_canonical(last_low, width));
            assert!(!is_canonical(last_low + 1, width));
            assert!(!is_canonical(!last_low - 1, width));
            assert!(is_canonical(!last_low, width));
            assert!(is_canonical(u64::MAX, width));
        }
    }

    #[test]
    fn five_level_is_wider_than_four() {
        let between = 0x0000_8000_0000_0000;
        assert!(!is_canonical(between, 48));
        assert!(is_canonical(between, 57));
    }
}
