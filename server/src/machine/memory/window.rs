//! One region of memory as the host has it mapped: a bounds check, and a load.
#![allow(unsafe_code)] // Atomic access to memory that the guest writes at the same time has no safe form.

use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::Gpa;
use vm_memory::VolatileSlice;

use super::{PAGE, Region};

/// One region as the host sees it.
pub(super) struct Window {
    pub(super) start: u64,
    /// Size in 8-byte words.
    pub(super) words: u64,
    /// Where guest physical address 0 would lie, so that an address is one addition away. It carries the provenance of
    /// the mapping and points into it only after an address inside the region is added.
    origin: *mut u8,
    pub(super) read_only: bool,
}

// SAFETY: `origin` leads into a mapping that `GuestRam::map` owns and keeps, and is only used for atomic accesses.
unsafe impl Send for Window {}
// SAFETY: as for `Send`; atomic accesses may come from several threads at once.
unsafe impl Sync for Window {}

impl Window {
    /// A window of no memory.
    pub(super) const NONE: Self = Self { start: 0, words: 0, origin: std::ptr::null_mut(), read_only: false };

    /// The window on a region of whole pages, of which the host has the first byte at `host`, aligned to words.
    ///
    /// # Safety
    /// The region is mapped for as long as the window is used, and everyone in this process reaches it by atomic or volatile
    /// accesses only. Unless it may be written, nobody writes through the window.
    pub(super) unsafe fn new(region: &Region, host: *mut u8) -> Self {
        let Region { start: Gpa(start), size, read_only } = *region;
        Self { start, words: size / 8, origin: host.wrapping_sub(start as usize), read_only }
    }

    /// The word at `gpa`, if it lies in this window and is 8-byte aligned.
    #[inline]
    pub(super) fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        // Rotating moves the low three bits to the top: one comparison refuses what lies outside and what is unaligned.
        if gpa.0.wrapping_sub(self.start).rotate_right(3) >= self.words {
            return None;
        }
        let word = self.origin.wrapping_add(gpa.0 as usize).cast::<u64>();
        // SAFETY: `word` lies inside the mapping, by the comparison, and is aligned, as the region is; the mapping lives
        // as long as `self`, and everyone in this process reaches it by atomic or volatile accesses only.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }

    /// The 4 KiB table at `gpa`, if it lies in this window: windows are made of whole pages.
    #[inline]
    pub(super) fn table(&self, gpa: Gpa) -> Option<&[AtomicU64; 512]> {
        let gpa = Gpa(gpa.0 & !(PAGE - 1));
        let first: *const AtomicU64 = self.word(gpa)?;
        // SAFETY: `first` is aligned and lies inside the mapping, which is made of whole 4 KiB pages and lives as long as
        // `self`: so do the 511 words behind it. All accesses to them are atomic or volatile.
        Some(unsafe { &*first.cast() })
    }

    /// The word at `offset` of the table at `table`, if that lies in this window. Both are cut to what they may be.
    #[inline(always)]
    pub(super) fn load_in_table(&self, table: u64, offset: u64) -> Option<u64> {
        let (table, offset) = (table & !(PAGE - 1), offset & (PAGE - 8));
        if table.wrapping_sub(self.start) >> 3 >= self.words {
            return None;
        }
        // The offset comes first, so that the load waits for nothing but the table's address.
        let word = self.origin.wrapping_add(offset as usize).wrapping_add(table as usize).cast::<u64>();
        // SAFETY: regions are made of whole pages, and one begins at `table`, by the comparison: the word lies in it, and is
        // accessed as in `word`.
        let word = unsafe { AtomicU64::from_ptr(word) };
        Some(u64::from_le(word.load(Ordering::Relaxed)))
    }

    /// Asks for the cache line at `gpa`, which lies in this window.
    #[inline]
    pub(super) fn prefetch(&self, gpa: Gpa) {
        prefetch(self.origin.wrapping_add(gpa.0 as usize));
    }

    /// All of it.
    #[inline]
    pub(super) fn all(&self) -> &[AtomicU64] {
        if self.words == 0 {
            return &[];
        }
        let first = self.origin.wrapping_add(self.start as usize).cast();
        // SAFETY: the window lies in the mapping and is aligned, as for `word`; all accesses to it are atomic or volatile.
        unsafe { slice::from_raw_parts(first, self.words as usize) }
    }

    /// The bytes from `gpa` on that lie in this window, `most` at most.
    pub(super) fn bytes(&self, gpa: Gpa, most: usize) -> Option<VolatileSlice<'_>> {
        let offset = gpa.0.checked_sub(self.start).filter(|offset| *offset < self.words * 8)?;
        let size = usize::try_from(self.words * 8 - offset).map_or(most, |left| left.min(most));
        // SAFETY: the range lies inside the mapping, which lives as long as `self`; it is accessed as in `word`.
        Some(unsafe { VolatileSlice::new(self.origin.wrapping_add(gpa.0 as usize), size) })
    }
}

/// Asks for a cache line, wherever that is.
#[inline(always)]
fn prefetch(byte: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint that reads nothing the program can see, and faults nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(byte.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = byte;
}
