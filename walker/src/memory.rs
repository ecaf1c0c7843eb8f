//! Guest memory as the walker sees it.
//!
//! The walker loads every entry once, atomically, and never holds a reference into guest memory. A plain window answers
//! a load with one bounds check; sources that can only be read piecewise implement the same trait.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::Gpa;

/// What lies behind a guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Guest RAM.
    Ram,
    /// Memory the guest can read and not write, such as a ROM.
    ReadOnly,
    /// Nothing: MMIO or a hole.
    None,
}

/// Why a compare-exchange of an entry did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeError {
    /// The entry held this value instead of the expected one.
    Changed(u64),
    /// The memory that holds the entry cannot be written.
    ReadOnly,
    /// No memory holds the entry.
    Unbacked,
}

/// Guest physical memory.
///
/// Addresses passed in are naturally aligned for the width of the operation: the walker derives them from tables
/// and indices. Values are in the guest's (little-endian) order. Memory is hostile and may change between any two calls.
pub trait Memory {
    /// Loads the 64-bit entry at `gpa` in one atomic access, or `None` where no memory is.
    fn load_u64(&self, gpa: Gpa) -> Option<u64>;

    /// Replaces the 64-bit entry at `gpa` if it still holds `current`.
    ///
    /// # Errors
    /// Says why nothing was written.
    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError>;

    /// What lies behind `gpa`.
    fn backing(&self, gpa: Gpa) -> Backing;

    /// Loads the 32-bit entry at `gpa` in one atomic access, or `None` where no memory is.
    #[inline]
    fn load_u32(&self, gpa: Gpa) -> Option<u32> {
        Some(half(self.load_u64(Gpa(gpa.0 & !7))?, gpa))
    }

    /// Replaces the 32-bit entry at `gpa` if it still holds `current`.
    ///
    /// # Errors
    /// Says why nothing was written; `Changed` also where the entry beside it would not stand still.
    fn compare_exchange_u32(&self, gpa: Gpa, current: u32, new: u32) -> Result<(), ExchangeError> {
        let word = Gpa(gpa.0 & !7);
        let shift = (gpa.0 & 4) * 8;
        for _ in 0..NEIGHBOUR_CHANGES {
            let both = self.load_u64(word).ok_or(ExchangeError::Unbacked)?;
            if half(both, gpa) != current {
                return Err(ExchangeError::Changed(u64::from(half(both, gpa))));
            }
            let replaced = both & !(0xffff_ffff << shift) | u64::from(new) << shift;
            match self.compare_exchange_u64(word, both, replaced) {
                Err(ExchangeError::Changed(_)) => {}
                other => return other,
            }
        }
        Err(ExchangeError::Changed(u64::from(current)))
    }
}

/// How often the other entry in a 64-bit word may change under a compare-exchange of one.
const NEIGHBOUR_CHANGES: usize = 16;

/// The 32-bit entry at `gpa` out of the 64-bit word that holds it.
#[inline]
const fn half(word: u64, gpa: Gpa) -> u32 {
    (word >> ((gpa.0 & 4) * 8)) as u32
}

impl<M: Memory + ?Sized> Memory for &M {
    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        (**self).load_u64(gpa)
    }

    #[inline]
    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        (**self).compare_exchange_u64(gpa, current, new)
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        (**self).backing(gpa)
    }
}

/// A flat window of guest RAM that starts at guest physical address 0.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Window<'a> {
    /// A window over `words`: word `n` is guest physical address `8 * n`.
    #[must_use]
    pub const fn new(words: &'a [AtomicU64]) -> Self {
        Self { words }
    }

    #[inline]
    fn word(&self, gpa: Gpa) -> Option<&'a AtomicU64> {
        self.words.get(usize::try_from(gpa.0 >> 3).ok()?)
    }
}

impl Memory for Window<'_> {
    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        Some(u64::from_le(self.word(gpa)?.load(Ordering::Relaxed)))
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let word = self.word(gpa).ok_or(ExchangeError::Unbacked)?;
        word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed)
            .map(drop)
            .map_err(|found| ExchangeError::Changed(u64::from_le(found)))
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        if self.word(gpa).is_some() { Backing::Ram } else { Backing::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_a_word() {
        let words = [AtomicU64::new(0x1111_2222_3333_4444)];
        let memory = Window::new(&words);
        assert_eq!(memory.load_u32(Gpa(0)), Some(0x3333_4444));
        assert_eq!(memory.load_u32(Gpa(4)), Some(0x1111_2222));
        assert_eq!(memory.load_u32(Gpa(8)), None);
        assert_eq!(memory.compare_exchange_u32(Gpa(4), 0x1111_2222, 5), Ok(()));
        assert_eq!(memory.compare_exchange_u32(Gpa(0), 1, 6), Err(ExchangeError::Changed(0x3333_4444)));
        assert_eq!(memory.compare_exchange_u32(Gpa(0), 0x3333_4444, 6), Ok(()));
        assert_eq!(memory.compare_exchange_u32(Gpa(8), 0, 6), Err(ExchangeError::Unbacked));
        assert_eq!(memory.load_u64(Gpa(0)), Some(5 << 32 | 6));
    }
}
