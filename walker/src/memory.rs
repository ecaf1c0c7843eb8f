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
