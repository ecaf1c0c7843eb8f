//! A flat window of guest RAM: the memory that is fastest to walk.
//!
//! The bounds check of a slice counts words, where an entry holds an address
//! in bytes; checked in bytes, and once for a table instead of for each of its entries, a load waits for less.
#![allow(unsafe_code, reason = "an entry is loaded by an address that was checked with its whole table")]

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::Gpa;
use crate::memory::{Backing, ExchangeError, Memory};

/// A flat window of guest RAM that starts at guest physical address 0.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    words: &'a [AtomicU64],
    /// Bytes of the whole 4 KiB tables among `words`.
    tables: u64,
}

impl<'a> Window<'a> {
    /// A window over `words`: word `n` is guest physical address `8 * n`.
    #[must_use]
    pub const fn new(words: &'a [AtomicU64]) -> Self {
        Self { words, tables: (words.len() as u64 * 8) & !0xfff }
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

    #[inline(always)]
    fn load_in_table(&self, table: Gpa, offset: u64) -> Option<u64> {
        let (table, offset) = (table.0 & !0xfff, offset & 0xff8);
        if table >= self.tables {
            return None;
        }
        // The offset comes first, so that the load waits for nothing but the table's address.
        let word = self.words.as_ptr().wrapping_byte_add(offset as usize).wrapping_byte_add(table as usize);
        // SAFETY: `tables` is a multiple of 4096 and at most the bytes of `words`. `table` is a multiple of 4096 below it, so
        // that `table + 4096` does not exceed it, and `word` points to one of the 512 words of that table.
        let word = unsafe { &*word };
        Some(u64::from_le(word.load(Ordering::Relaxed)))
    }

    #[inline]
    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        let first = usize::try_from((table.0 & !0xfff) / 8).ok()?;
        self.words.get(first..)?.first_chunk::<512>()
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let word = self.word(gpa).ok_or(ExchangeError::Unbacked)?;
        word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed)
            .map(drop)
            .map_err(|found| ExchangeError::Changed(u64::from_le(found)))
    }

    #[inline]
    fn ram(&self) -> (Gpa, u64) {
        (Gpa(0), self.tables)
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self.words.get(..(self.tables / 8) as usize).unwrap_or_default()
    }

    #[inline(always)]
    fn prefetch(&self, gpa: Gpa) {
        if gpa.0 < self.tables {
            prefetch(self.words.as_ptr().wrapping_byte_add(gpa.0 as usize));
        }
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        if gpa.0 < self.words.len() as u64 * 8 { Backing::Ram } else { Backing::None }
    }

    #[inline]
    fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
        match (self.words.len() as u64 * 8).checked_sub(gpa.0) {
            None | Some(0) => (Backing::None, u64::MAX.wrapping_sub(gpa.0)),
            Some(left) => (Backing::Ram, left),
        }
    }
}

/// Asks for the cache line at `word`, wherever that leads.
#[inline(always)]
fn prefetch(word: *const AtomicU64) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that reads nothing the program can see, and does not fault at any address; every
        // x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(word.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = word;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_all_there_or_not() {
        let words: [AtomicU64; 1024 + 511] = core::array::from_fn(|at| AtomicU64::new(at as u64));
        let memory = Window::new(&words);
        for at in 0..1024 + 512 {
            let (table, offset) = (Gpa((at * 8) & !0xfff), (at * 8) & 0xfff);
            let whole = (at < 1024).then_some(at);
            assert_eq!(memory.load_in_table(table, offset), whole);
            assert_eq!(memory.load_in_table(Gpa(table.0 | 0xfff), offset | 7 | !0xfff), whole);
            let shown =
                memory.table(Gpa(at * 8)).map(|words| words[at as usize % 512].load(Ordering::Relaxed));
            assert_eq!(shown, whole);
            let word = (at < 1024 + 511).then_some(at);
            assert_eq!(memory.load_u64(Gpa(at * 8)), word);
            assert_eq!(memory.backing(Gpa(at * 8 + 7)) == Backing::Ram, word.is_some());
        }
        for table in [1 << 51, 1 << 63, !0xfff] {
            assert_eq!(memory.load_in_table(Gpa(table), 0), None);
            assert!(memory.table(Gpa(table)).is_none());
        }
        assert_eq!(Window::new(&[]).load_in_table(Gpa(0), 0), None);
    }
}
