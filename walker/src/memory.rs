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
    /// Nothing: MMIO or a hole.
    None,
    /// Memory the guest can read and not write, such as a ROM.
    ReadOnly,
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

    /// Loads the 64-bit entry at `offset` in the 4 KiB table at `table` in one atomic access, or `None` where that table is
    /// not wholly in memory. Bits 11:0 of `table` do not count, and of `offset` only bits 11:3 do.
    #[inline]
    fn load_in_table(&self, table: Gpa, offset: u64) -> Option<u64> {
        self.load_u64(Gpa(table.0 & !0xfff | offset & 0xff8))
    }

    /// The 4 KiB table at `table`, its entries in the guest's order, where memory can be shown as it is and the table is wholly in it.
    /// Bits 11:0 of `table` do not count. Without this, entries are loaded one by one.
    #[inline]
    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        let _ = table;
        None
    }

    /// Loads all of the 4 KiB table at `table` into `entries`, each 64-bit entry in one atomic access, and says whether that table
    /// is wholly in memory; where it is not, `entries` holds nothing that counts. Bits 11:0 of `table` do not count.
    #[inline]
    fn load_table(&self, table: Gpa, entries: &mut [u64; 512]) -> bool {
        if let Some(words) = self.table(table) {
            for (entry, word) in entries.iter_mut().zip(words) {
                *entry = u64::from_le(word.load(Ordering::Relaxed));
            }
            return true;
        }
        let mut offset = 0;
        for entry in entries {
            let Some(loaded) = self.load_in_table(table, offset) else { return false };
            *entry = loaded;
            offset += 8;
        }
        true
    }

    /// Replaces the 64-bit entry at `gpa` if it still holds `current`.
    ///
    /// # Errors
    /// Says why nothing was written.
    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError>;

    /// A run of whole 4 KiB pages below 2^52 that are guest RAM, the longest there is: where it begins, and its size in bytes.
    /// What lies behind any other page, [`Self::backing`] says, and does not take as long for as this saves.
    #[inline]
    fn ram(&self) -> (Gpa, u64) {
        (Gpa(0), 0)
    }

    /// The words of [`Self::ram`], in the guest's order, where memory can be shown as it is. Without this, entries are loaded one
    /// by one.
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        &[]
    }

    /// Hints that the word at `gpa` will soon be loaded. Does nothing that can be seen, wherever `gpa` leads.
    #[inline]
    fn prefetch(&self, gpa: Gpa) {
        let _ = gpa;
    }

    /// What lies behind `gpa`.
    fn backing(&self, gpa: Gpa) -> Backing;

    /// What lies behind `gpa`, and for how many bytes from there on, one at least, that is so. By default as far as its 4 KiB
    /// page reaches: memory that begins or ends within one says how far.
    #[inline]
    fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
        (self.backing(gpa), 0x1000 - (gpa.0 & 0xfff))
    }

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
    fn load_in_table(&self, table: Gpa, offset: u64) -> Option<u64> {
        (**self).load_in_table(table, offset)
    }

    #[inline]
    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        (**self).table(table)
    }

    #[inline]
    fn ram(&self) -> (Gpa, u64) {
        (**self).ram()
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }

    #[inline]
    fn prefetch(&self, gpa: Gpa) {
        (**self).prefetch(gpa);
    }

    #[inline]
    fn load_table(&self, table: Gpa, entries: &mut [u64; 512]) -> bool {
        (**self).load_table(table, entries)
    }

    #[inline]
    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        (**self).compare_exchange_u64(gpa, current, new)
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        (**self).backing(gpa)
    }

    #[inline]
    fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
        (**self).backing_run(gpa)
    }

    #[inline]
    fn load_u32(&self, gpa: Gpa) -> Option<u32> {
        (**self).load_u32(gpa)
    }

    #[inline]
    fn compare_exchange_u32(&self, gpa: Gpa, current: u32, new: u32) -> Result<(), ExchangeError> {
        (**self).compare_exchange_u32(gpa, current, new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::Window;

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

    /// Answers each method as no default does.
    struct Peculiar {
        table: [AtomicU64; 512],
        prefetched: AtomicU64,
    }

    impl Memory for Peculiar {
        fn load_u64(&self, gpa: Gpa) -> Option<u64> {
            Some(gpa.0 + 1)
        }

        fn load_in_table(&self, table: Gpa, offset: u64) -> Option<u64> {
            Some(table.0 + offset + 2)
        }

        fn table(&self, _table: Gpa) -> Option<&[AtomicU64; 512]> {
            Some(&self.table)
        }

        fn load_table(&self, _table: Gpa, entries: &mut [u64; 512]) -> bool {
            *entries = [3; 512];
            true
        }

        fn compare_exchange_u64(&self, _gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
            Err(ExchangeError::Changed(current + new + 4))
        }

        fn ram(&self) -> (Gpa, u64) {
            (Gpa(5), 5)
        }

        fn words(&self) -> &[AtomicU64] {
            &self.table[..6]
        }

        fn prefetch(&self, gpa: Gpa) {
            self.prefetched.store(gpa.0 + 7, Ordering::Relaxed);
        }

        fn backing(&self, _gpa: Gpa) -> Backing {
            Backing::ReadOnly
        }

        fn backing_run(&self, _gpa: Gpa) -> (Backing, u64) {
            (Backing::Ram, 8)
        }

        fn load_u32(&self, _gpa: Gpa) -> Option<u32> {
            Some(9)
        }

        fn compare_exchange_u32(&self, _gpa: Gpa, current: u32, new: u32) -> Result<(), ExchangeError> {
            Err(ExchangeError::Changed(u64::from(current + new + 10)))
        }
    }

    /// Generic, so that it is the reference's methods that are called where `M` is one.
    fn ask<M: Memory>(memory: &M) {
        assert_eq!(memory.load_u64(Gpa(0x10)), Some(0x11));
        assert_eq!(memory.load_in_table(Gpa(0x1000), 8), Some(0x100a));
        assert!(memory.table(Gpa(0)).is_some());
        let mut entries = [0; 512];
        assert!(memory.load_table(Gpa(0), &mut entries));
        assert_eq!(entries, [3; 512]);
        assert_eq!(memory.compare_exchange_u64(Gpa(0), 1, 2), Err(ExchangeError::Changed(7)));
        assert_eq!(memory.ram(), (Gpa(5), 5));
        assert_eq!(memory.words().len(), 6);
        memory.prefetch(Gpa(0x20));
        assert_eq!(memory.backing(Gpa(0)), Backing::ReadOnly);
        assert_eq!(memory.backing_run(Gpa(0)), (Backing::Ram, 8));
        assert_eq!(memory.load_u32(Gpa(0)), Some(9));
        assert_eq!(memory.compare_exchange_u32(Gpa(0), 1, 2), Err(ExchangeError::Changed(13)));
    }

    #[test]
    fn a_reference_forwards_every_method() {
        let memory = Peculiar { table: [const { AtomicU64::new(0) }; 512], prefetched: AtomicU64::new(0) };
        ask::<&Peculiar>(&&memory);
        assert_eq!(memory.prefetched.into_inner(), 0x27);
    }
}
