//! Fresh memory for a guest, in pages of the host as large as can be had.
//!
//! A walk misses the host's TLB as often as it misses its caches, and a prefetch that misses the TLB walks the host's tables
//! first: with small pages a batch takes about twice the time.
#![allow(unsafe_code)] // There is no safe advice about memory.

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::memory::MemoryError;

/// Which pages of the host hold a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Transparent huge pages, as far as the host has them.
    #[default]
    Transparent,
    /// 2 MiB pages of the host's pool.
    Of2M,
    /// 1 GiB pages of the host's pool.
    Of1G,
}

impl HugePages {
    /// Bytes that memory has to be a multiple of.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Transparent => 1 << 12,
            Self::Of2M => 1 << 21,
            Self::Of1G => 1 << 30,
        }
    }

    fn flags(self) -> libc::c_int {
        let pool = match self {
            // No more than is used of it has to be there.
            Self::Transparent => libc::MAP_NORESERVE,
            // Reserved now: a page that is missing later would end the process.
            Self::Of2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Self::Of1G => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
        };
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | pool
    }

    /// Maps fresh, zeroed memory at these addresses, of these sizes in bytes.
    ///
    /// # Errors
    /// When a size is no multiple of the pages', ranges overlap, or the host has no such pages left: it says how to get some.
    pub(super) fn map(self, ranges: &[(GuestAddress, usize)]) -> Result<GuestMemoryMmap, MemoryError> {
        let regions = ranges.iter().map(|(start, size)| {
            let region = self.region(*size)?;
            GuestRegionMmap::new(region, *start)
                .ok_or(MemoryError::Unaligned { start: start.0, size: *size as u64 })
        });
        GuestMemoryMmap::from_regions(regions.collect::<Result<Vec<_>, _>>()?)
            .map_err(|e| MemoryError::Map(e.to_string()))
    }

    fn region(self, size: usize) -> Result<MmapRegion, MemoryError> {
        let page = self.bytes();
        if !(size as u64).is_multiple_of(page) {
            let problem = format!("{size} bytes are no multiple of the {} KiB of a huge page", page >> 10);
            return Err(MemoryError::Map(problem));
        }
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(self.flags())
            .build()
            .map_err(|e| {
                let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page >> 10);
                MemoryError::Map(match self {
                    Self::Transparent => e.to_string(),
                    _ => format!(
                        "{e}: {} such pages are needed; `echo N > {pool}` makes some",
                        size as u64 / page
                    ),
                })
            })?;
        if self == Self::Transparent {
            // SAFETY: the range is this mapping, and the advice changes nothing of what it holds. A host that has no such
            // pages refuses, which is as well.
            let _ = unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
        Ok(region)
    }
}
