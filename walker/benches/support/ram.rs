//! Guest memory for tables that do not fit into any cache.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::slice;
use std::sync::atomic::AtomicU64;

use super::bed::Ram;

const HUGE_PAGE: usize = 2 << 20;

/// `bytes` of memory, in huge pages where the host has transparent ones: with small ones, a miss of the TLB hides behind every
/// miss of the cache. Never freed.
pub(crate) fn huge(bytes: u64) -> Ram {
    let bytes = usize::try_from(bytes).expect("memory that can be addressed").next_multiple_of(HUGE_PAGE);
    let layout = Layout::from_size_align(bytes, HUGE_PAGE).expect("a size below the address space's");
    // SAFETY: the layout has a size.
    #[allow(unsafe_code, reason = "memory aligned to huge pages")]
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: the range is this allocation, untouched so far; the advice changes nothing of what it holds.
    #[allow(unsafe_code, reason = "there is no safe advice")]
    let _ = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
    // SAFETY: the allocation is zeroed, aligned, never freed, and known to nobody else.
    #[allow(unsafe_code, reason = "memory aligned to huge pages")]
    let words = unsafe { slice::from_raw_parts(start.cast::<AtomicU64>(), bytes / 8) };
    Ram::over(words)
}
