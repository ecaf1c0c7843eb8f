//! Guest memory: mapped and owned by vm-memory, read by the walker over plain windows.
//!
//! A walk loads each entry through [`pagewalk::Memory`]. Going through vm-memory's region lookup costs several times the
//! load itself, so the host addresses of the regions are taken once and a load is one bounds check and one relaxed
//! atomic load. Regions are page-aligned and never move or shrink while the [`GuestRam`] lives. Memory that the guest
//! cannot write (a ROM) is known as such, and the walker never writes it either.
#![allow(unsafe_code)] // Atomic access to memory that the guest writes at the same time has no safe form.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::{Backing, ExchangeError, Gpa, Memory};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

const PAGE: u64 = 4096;

/// A stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address of its first byte, 4 KiB-aligned.
    pub start: Gpa,
    /// Size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// The guest can read but not write it.
    pub read_only: bool,
}

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A machine without memory.
    #[error("a machine needs at least one memory region")]
    Empty,
    /// A region that is not made of whole pages.
    #[error("memory region {start:#x}+{size:#x} is not made of whole 4 KiB pages")]
    Unaligned {
        /// Start of the region.
        start: u64,
        /// Its size.
        size: u64,
    },
    /// The host gave no memory, or regions overlap.
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// An access outside the memory.
    #[error("guest memory at {gpa:#x}: {problem}")]
    Access {
        /// Where.
        gpa: u64,
        /// What was wrong.
        problem: String,
    },
}

/// One region as the host sees it.
struct Window {
    start: u64,
    /// Size in 8-byte words.
    words: u64,
    /// Where guest physical address 0 would lie, so that an address is one addition away. It carries the provenance of
    /// the mapping and points into it only after an address inside the region is added.
    origin: *mut u8,
    read_only: bool,
}

// SAFETY: `origin` leads into a mapping that `GuestRam::map` owns and keeps, and is only used for atomic accesses.
unsafe impl Send for Window {}
// SAFETY: as for `Send`; atomic accesses may come from several threads at once.
unsafe impl Sync for Window {}

impl Window {
    /// The word at `gpa`, if it lies in this window and is 8-byte aligned.
    #[inline]
    fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        // Rotating moves the low three bits to the top: one comparison refuses what lies outside and what is unaligned.
        if gpa.0.wrapping_sub(self.start).rotate_right(3) >= self.words {
            return None;
        }
        let word = self.origin.wrapping_add(gpa.0 as usize).cast::<u64>();
        // SAFETY: `word` lies inside the mapping, by the comparison, and is aligned, as the region is; the mapping lives
        // as long as `self`, and everyone in this process reaches it by atomic or volatile accesses only.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }
}

/// The memory of a machine.
pub struct GuestRam {
    first: Window,
    rest: Box<[Window]>,
    map: GuestMemoryMmap,
    regions: Box<[Region]>,
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Maps fresh, zeroed memory.
    ///
    /// # Errors
    /// When a region is not made of whole pages, regions overlap, or the host refuses.
    pub fn allocate(regions: &[Region]) -> Result<Self, MemoryError> {
        if regions.is_empty() {
            return Err(MemoryError::Empty);
        }
        let ranges = regions
            .iter()
            .map(|r| match usize::try_from(r.size) {
                Ok(size) if r.start.0 % PAGE == 0 && r.size % PAGE == 0 && size > 0 => {
                    Ok((GuestAddress(r.start.0), size))
                }
                _ => Err(MemoryError::Unaligned { start: r.start.0, size: r.size }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let map = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| MemoryError::Map(e.to_string()))?;
        let read_only: Vec<Gpa> = regions.iter().filter(|r| r.read_only).map(|r| r.start).collect();
        Self::new(map, &read_only)
    }

    /// Takes memory that is mapped already, such as a VMM's. `read_only` lists the starts of the regions that the guest
    /// cannot write.
    ///
    /// # Errors
    /// When there is no region, or one is not made of whole pages.
    pub fn new(map: GuestMemoryMmap, read_only: &[Gpa]) -> Result<Self, MemoryError> {
        let mut windows = Vec::new();
        let mut regions = Vec::new();
        for region in map.iter() {
            let (start, size) = (region.start_addr().0, region.len());
            let unaligned = MemoryError::Unaligned { start, size };
            if start % PAGE != 0 || size % PAGE != 0 {
                return Err(unaligned);
            }
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|e| MemoryError::Map(e.to_string()))?;
            if !host.cast::<u64>().is_aligned() {
                return Err(unaligned);
            }
            let read_only = read_only.contains(&Gpa(start));
            let origin = host.wrapping_sub(start as usize);
            windows.push(Window { start, words: size / 8, origin, read_only });
            regions.push(Region { start: Gpa(start), size, read_only });
        }
        let mut windows = windows.into_iter();
        let first = windows.next().ok_or(MemoryError::Empty)?;
        Ok(Self { first, rest: windows.collect(), map, regions: regions.into() })
    }

    /// The regions, by address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Sum of the regions' sizes in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.size).sum()
    }

    /// The mapping, for those who load images into it or hand it to a hypervisor.
    #[must_use]
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Writes `bytes` at `gpa`, in read-only regions too: this is the host's hand, not the guest's.
    ///
    /// # Errors
    /// When the range is not all in memory.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.map
            .write_slice(bytes, GuestAddress(gpa.0))
            .map_err(|e| MemoryError::Access { gpa: gpa.0, problem: e.to_string() })
    }

    /// Writes a 64-bit word at `gpa`, as [`GuestRam::write`] does.
    ///
    /// # Errors
    /// When the word is not all in memory, or not aligned.
    pub fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryError> {
        let word = self
            .window(gpa)
            .and_then(|w| w.word(gpa))
            .ok_or_else(|| MemoryError::Access { gpa: gpa.0, problem: "no aligned word of memory".into() })?;
        word.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    #[inline]
    fn window(&self, gpa: Gpa) -> Option<&Window> {
        let holds = |w: &Window| (gpa.0.wrapping_sub(w.start) >> 3) < w.words;
        if holds(&self.first) { Some(&self.first) } else { self.rest.iter().find(|w| holds(w)) }
    }

    #[cold]
    fn load_rest(&self, gpa: Gpa) -> Option<u64> {
        self.rest.iter().find_map(|w| w.word(gpa)).map(|w| u64::from_le(w.load(Ordering::Relaxed)))
    }
}

impl Memory for GuestRam {
    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        match self.first.word(gpa) {
            Some(word) => Some(u64::from_le(word.load(Ordering::Relaxed))),
            None => self.load_rest(gpa),
        }
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let window = self.window(gpa).ok_or(ExchangeError::Unbacked)?;
        if window.read_only {
            return Err(ExchangeError::ReadOnly);
        }
        let word = window.word(gpa).ok_or(ExchangeError::Unbacked)?;
        word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed)
            .map(drop)
            .map_err(|found| ExchangeError::Changed(u64::from_le(found)))
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        match self.window(gpa) {
            None => Backing::None,
            Some(window) if window.read_only => Backing::ReadOnly,
            Some(_) => Backing::Ram,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn two_regions() -> GuestRam {
        GuestRam::allocate(&[
            Region { start: Gpa(0x1000), size: 0x2000, read_only: false },
            Region { start: Gpa(0x10_0000), size: 0x1000, read_only: true },
        ])
        .unwrap()
    }

    #[test]
    fn loads_inside_and_nowhere_else() {
        let ram = two_regions();
        ram.write_u64(Gpa(0x1000), 11).unwrap();
        ram.write_u64(Gpa(0x2ff8), 12).unwrap();
        ram.write_u64(Gpa(0x10_0ff8), 13).unwrap();
        assert_eq!(ram.load_u64(Gpa(0x1000)), Some(11));
        assert_eq!(ram.load_u64(Gpa(0x2ff8)), Some(12));
        assert_eq!(ram.load_u64(Gpa(0x10_0ff8)), Some(13));
        for outside in [0, 0xff8, 0x3000, 0xf_fff8, 0x10_1000, u64::MAX, u64::MAX - 7, 1 << 63] {
            assert_eq!(ram.load_u64(Gpa(outside)), None, "{outside:#x}");
            assert_eq!(ram.backing(Gpa(outside)), Backing::None, "{outside:#x}");
        }
        for unaligned in 0x1001..0x1008 {
            assert_eq!(ram.load_u64(Gpa(unaligned)), None, "{unaligned:#x}");
        }
    }

    #[test]
    fn backing_is_by_byte() {
        let ram = two_regions();
        assert_eq!(ram.backing(Gpa(0x2fff)), Backing::Ram);
        assert_eq!(ram.backing(Gpa(0x3000)), Backing::None);
        assert_eq!(ram.backing(Gpa(0x10_0fff)), Backing::ReadOnly);
    }

    #[test]
    fn exchanges_only_what_it_expected_and_never_in_a_rom() {
        let ram = two_regions();
        assert_eq!(ram.compare_exchange_u64(Gpa(0x1008), 0, 5), Ok(()));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x1008), 0, 6), Err(ExchangeError::Changed(5)));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x10_0000), 0, 6), Err(ExchangeError::ReadOnly));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x3000), 0, 6), Err(ExchangeError::Unbacked));
        assert_eq!(ram.load_u64(Gpa(0x1008)), Some(5));
    }

    #[test]
    fn refuses_what_is_not_whole_pages() {
        let region = |start, size| [Region { start: Gpa(start), size, read_only: false }];
        assert!(matches!(GuestRam::allocate(&[]), Err(MemoryError::Empty)));
        for (start, size) in [(0, 0), (0, 100), (8, 4096)] {
            assert!(
                matches!(GuestRam::allocate(&region(start, size)), Err(MemoryError::Unaligned { .. })),
                "{start} {size}"
            );
        }
        let overlapping = [region(0, 0x2000)[0], region(0x1000, 0x2000)[0]];
        assert!(matches!(GuestRam::allocate(&overlapping), Err(MemoryError::Map(_))));
        assert!(GuestRam::allocate(&region(u64::MAX - 4095, 8192)).is_err());
    }
}
