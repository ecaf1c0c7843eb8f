//! Guest memory: mapped and owned by vm-memory, read by the walker over plain windows.
//!
//! A walk loads each entry through [`pagewalk::Memory`]. Going through vm-memory's region lookup costs several times the
//! load itself, so the host addresses of the regions are taken once and a load is one bounds check and one relaxed
//! atomic load. Regions are page-aligned and never move or shrink while the [`GuestRam`] lives. Memory that the guest
//! cannot write (a ROM) is known as such, and the walker never writes it either.
//!
//! Memory of others (an attached guest's, a dump's) is only ever read: mapped from a file where that can be done, and walked
//! at the same speed; fetched piece by piece where it cannot. Stretches that have to be fetched are looked for last. Bytes are
//! fetched from a file, too, where many are wanted that nobody may have written.
#![allow(unsafe_code)] // That a window's memory stays mapped can only be promised by who keeps it.

mod walked;
mod window;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pagewalk::Gpa;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use window::Window;

use super::mapping::{Fetch, FileMapping};
use super::pages::HugePages;

/// Bytes of the smallest page; memory is made of whole ones.
pub(crate) const PAGE: u64 = 4096;

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
    /// Two regions share an address.
    #[error("memory regions overlap at {0:#x}")]
    Overlap(u64),
    /// A region lies outside the file.
    #[error("memory region {start:#x}+{size:#x} does not lie in its file at {offset:#x}")]
    Outside {
        /// Start of the region.
        start: u64,
        /// Its size.
        size: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// An access outside the memory.
    #[error("guest memory at {gpa:#x}: {problem}")]
    Access {
        /// Where.
        gpa: u64,
        /// What was wrong.
        problem: String,
    },
}

/// Where the bytes of a region are that belongs to somebody else.
#[derive(Clone)]
pub enum Place {
    /// In a mapped file, from this byte on. Where that is no multiple of 8, entries are fetched: they are loaded as whole words.
    Mapped(Arc<FileMapping>, u64),
    /// To be fetched, from this offset on.
    Fetched(Arc<dyn Fetch>, u64),
}

/// The largest window is the one that is looked into first.
fn largest_first(windows: &mut [Window]) {
    windows.sort_by_key(|window| std::cmp::Reverse(window.words));
}

/// A stretch of somebody else's memory.
struct Stretch {
    start: u64,
    size: u64,
    read_only: bool,
    from: Arc<dyn Fetch>,
    offset: u64,
}

impl Stretch {
    /// Offset of `gpa` where the bytes come from, and how many there are from there on.
    fn find(&self, gpa: Gpa) -> Option<(u64, u64)> {
        let offset = gpa.0.checked_sub(self.start).filter(|offset| *offset < self.size)?;
        Some((self.offset + offset, self.size - offset))
    }
}

/// The memory of a machine.
pub struct GuestRam {
    first: Window,
    rest: Box<[Window]>,
    /// The memory that is ours. Empty where all of it is somebody else's.
    map: GuestMemoryMmap,
    /// The files that windows lead into where it is not.
    files: Box<[Arc<FileMapping>]>,
    /// All that is somebody else's.
    others: Box<[Stretch]>,
    /// Bytes of those that no window is on.
    fetched: u64,
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
        Self::allocate_in(regions, HugePages::default())
    }

    /// [`Self::allocate`], in these pages of the host.
    ///
    /// # Errors
    /// As [`Self::allocate`]; also when a region is not made of whole such pages.
    pub fn allocate_in(regions: &[Region], pages: HugePages) -> Result<Self, MemoryError> {
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
        let map = pages.map(&ranges)?;
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
            let region = Region { start: Gpa(start), size, read_only: read_only.contains(&Gpa(start)) };
            // SAFETY: the mapping is kept next to the window, and is accessed by windows and by vm-memory, whose accesses are
            // volatile.
            windows.push(unsafe { Window::new(&region, host) });
            regions.push(region);
        }
        largest_first(&mut windows);
        let mut windows = windows.into_iter();
        let first = windows.next().ok_or(MemoryError::Empty)?;
        let (files, others, fetched) = Default::default();
        Ok(Self { first, rest: windows.collect(), map, files, others, fetched, regions: regions.into() })
    }

    /// Memory that belongs to somebody else, and is only ever read.
    ///
    /// # Errors
    /// When there is no region, one is not made of whole pages or not in its file, or two overlap.
    pub fn of_others(regions: impl IntoIterator<Item = (Region, Place)>) -> Result<Self, MemoryError> {
        let (mut windows, mut files, mut others, mut all) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut fetched = 0;
        for (region, place) in regions {
            let Region { start: Gpa(start), size, read_only } = region;
            if start % PAGE != 0 || size % PAGE != 0 || size == 0 || start.checked_add(size).is_none() {
                return Err(MemoryError::Unaligned { start, size });
            }
            let (from, offset, is_mapped): (Arc<dyn Fetch>, _, _) = match place {
                Place::Mapped(file, offset) => {
                    let host =
                        file.place(offset, size).ok_or(MemoryError::Outside { start, size, offset })?;
                    let is_mapped = host.cast::<u64>().is_aligned();
                    if is_mapped {
                        // SAFETY: the file's mapping is kept next to the window, and is accessed by windows alone.
                        windows.push(unsafe { Window::new(&region, host) });
                    }
                    if !files.iter().any(|known| Arc::ptr_eq(known, &file)) {
                        files.push(Arc::clone(&file));
                    }
                    (file, offset, is_mapped)
                }
                Place::Fetched(_, offset) if offset.checked_add(size).is_none() => {
                    return Err(MemoryError::Outside { start, size, offset });
                }
                Place::Fetched(from, offset) => (from, offset, false),
            };
            fetched += if is_mapped { 0 } else { size };
            others.push(Stretch { start, size, read_only, from, offset });
            all.push(region);
        }
        all.sort_by_key(|region| region.start.0);
        for pair in all.windows(2) {
            if let [low, high] = pair
                && low.start.0 + low.size > high.start.0
            {
                return Err(MemoryError::Overlap(high.start.0));
            }
        }
        if all.is_empty() {
            return Err(MemoryError::Empty);
        }
        largest_first(&mut windows);
        let mut windows = windows.into_iter();
        Ok(Self {
            first: windows.next().unwrap_or(Window::NONE),
            rest: windows.collect(),
            map: GuestMemoryMmap::new(),
            files: files.into(),
            others: others.into(),
            fetched,
            regions: all.into(),
        })
    }

    /// No memory at all, until it is known where it lies.
    pub(super) fn none() -> Self {
        let (rest, files, others, fetched, regions) = Default::default();
        Self { first: Window::NONE, rest, map: GuestMemoryMmap::new(), files, others, fetched, regions }
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

    /// Whether it can be written: memory of others cannot.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.others.is_empty()
    }

    /// Whether none of it has to be fetched.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.fetched == 0
    }

    /// Whether most of it has to be fetched, so that a walk may block: to be done where that holds up nobody.
    ///
    /// Where only a small part has to be (a device's memory, a ROM), a walk that strays there fetches in place, some
    /// microseconds for an entry.
    #[must_use]
    pub fn blocks(&self) -> bool {
        self.fetched > self.size() / 2
    }

    /// Whether a file behind it was found shorter than it was: some of what was read may be zeroes that nobody wrote.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.files.iter().any(|file| file.is_broken())
    }

    /// Copies bytes from `gpa` on, until `into` is full or memory ends, and gives their number. Each byte is read once; what
    /// the guest writes meanwhile is there or not, byte by byte.
    ///
    /// # Errors
    /// When the host does not give what is there.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty())
            && let Some(at) = gpa.0.checked_add(done as u64).map(Gpa)
        {
            if let Some((from, offset, left)) = self.other_at(at) {
                let size = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                from.fetch(offset, &mut rest[..size])
                    .map_err(|e| MemoryError::Access { gpa: at.0, problem: e.to_string() })?;
                done += size;
            } else if let Some(bytes) = self.windows().find_map(|window| window.bytes(at, rest.len())) {
                done += bytes.copy_to(rest);
            } else {
                break;
            }
        }
        Ok(done)
    }

    /// The mapping, for those who load images into it or hand it to a hypervisor. Empty for memory of others.
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
        let word = Some(self)
            .filter(|memory| memory.is_ours())
            .and_then(|memory| memory.window(gpa))
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

    fn windows(&self) -> impl Iterator<Item = &Window> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    fn other_at(&self, gpa: Gpa) -> Option<(&dyn Fetch, u64, u64)> {
        self.others
            .iter()
            .find_map(|stretch| stretch.find(gpa).map(|(offset, left)| (stretch.from.as_ref(), offset, left)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::FromRawFd as _;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use pagewalk::{Backing, ExchangeError, Memory as _};

    use super::walked::tests::two_regions;
    use super::*;

    #[test]
    fn memory_in_huge_pages_is_theirs_or_says_how_to_get_some() {
        let region = |size| [Region { start: Gpa(0), size, read_only: false }];
        for pages in [HugePages::Of2M, HugePages::Of1G] {
            let odd = GuestRam::allocate_in(&region(pages.bytes() + PAGE), pages).unwrap_err().to_string();
            assert!(odd.contains("no multiple"), "{odd}");
            match GuestRam::allocate_in(&region(pages.bytes()), pages) {
                Ok(ram) => {
                    ram.write_u64(Gpa(8), 5).unwrap();
                    assert_eq!(ram.load_u64(Gpa(8)), Some(5));
                }
                Err(error) => assert!(error.to_string().contains("nr_hugepages"), "{error}"),
            }
        }
    }

    /// Two pages of a file above one that is fetched, with each byte its page's number.
    fn others() -> GuestRam {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3u8).flat_map(|page| [page; 4096]).collect();
        file.write_all(&bytes).unwrap();
        let mapping = FileMapping::of(&file).unwrap();
        let region = |start, size, read_only| Region { start: Gpa(start), size, read_only };
        GuestRam::of_others([
            (region(0x2000, 0x2000, false), Place::Mapped(Arc::clone(&mapping), 0x1000)),
            (region(0x1000, 0x1000, true), Place::Fetched(mapping, 0)),
        ])
        .unwrap()
    }

    #[test]
    fn memory_of_others_is_read_and_never_written() {
        let ram = others();
        assert_eq!(ram.regions().iter().map(|r| r.start.0).collect::<Vec<_>>(), [0x1000, 0x2000]);
        let words = [0x1000, 0x1ff8, 0x2000, 0x3ff8, 0x4000, 0xff8, 0x1004].map(|gpa| ram.load_u64(Gpa(gpa)));
        let repeated = |byte: u8| Some(u64::from_le_bytes([byte; 8]));
        assert_eq!(words, [repeated(0), repeated(0), repeated(1), repeated(2), None, None, None]);
        assert_eq!(ram.backing(Gpa(0x1fff)), Backing::ReadOnly);
        assert_eq!(ram.backing(Gpa(0x2000)), Backing::Ram);
        assert_eq!(ram.compare_exchange_u64(Gpa(0x2000), 0, 1), Err(ExchangeError::ReadOnly));
        assert!(ram.write_u64(Gpa(0x2000), 1).is_err() && ram.write(Gpa(0x2000), &[1]).is_err());
        assert!(!ram.is_ours() && !ram.blocks() && !ram.is_broken());
    }

    #[test]
    fn bytes_are_read_across_regions_until_memory_ends() {
        let ram = others();
        let mut bytes = [0xff; 0x3000];
        assert_eq!(ram.read(Gpa(0x1fff), &mut bytes).unwrap(), 0x2001);
        assert_eq!((bytes[0], bytes[1], bytes[0x1001], bytes[0x2001]), (0, 1, 2, 0xff));
        assert_eq!(ram.read(Gpa(0x4000), &mut bytes).unwrap(), 0);
        assert_eq!(ram.read(Gpa(u64::MAX), &mut bytes).unwrap(), 0);
        let ours = two_regions();
        ours.write(Gpa(0x2ffe), &[5, 6]).unwrap();
        assert_eq!(ours.read(Gpa(0x2ffe), &mut bytes).unwrap(), 2);
        assert_eq!(bytes[..2], [5, 6]);
    }

    /// At any byte of the file.
    #[test]
    fn entries_that_are_no_words_of_their_file_are_fetched() {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..0x2000_u32).map(|at| (at % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        for offset in 0..16_usize {
            let mapping = FileMapping::of(&file).unwrap();
            let region = Region { start: Gpa(0x1000), size: 0x1000, read_only: false };
            let ram = GuestRam::of_others([(region, Place::Mapped(mapping, offset as u64))]).unwrap();
            assert_eq!((ram.is_mapped(), ram.blocks()), (offset % 8 == 0, offset % 8 != 0));
            for at in [0, 8, 0xff8] {
                let word = bytes[offset + at..][..8].try_into().unwrap();
                assert_eq!(ram.load_u64(Gpa(0x1000 + at as u64)), Some(u64::from_le_bytes(word)));
            }
            let mut entries = [0; 512];
            assert!(ram.load_table(Gpa(0x1000), &mut entries));
            assert_eq!(entries[1], u64::from_le_bytes(bytes[offset + 8..][..8].try_into().unwrap()));
            // Truncated to one byte less than the last entry needs.
            file.set_len((offset + 0xfff) as u64).unwrap();
            let whole = ram.load_u64(Gpa(0x1ff8));
            // A page that the file still has in part is mapped whole.
            assert!(offset % 8 == 0 || (whole.is_none() && ram.is_broken()), "{offset}");
            file.set_len(0).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
        }
    }

    /// A guest's memory that nobody has touched stays so.
    #[test]
    fn to_read_a_hole_does_not_fill_it() {
        // SAFETY: the name is a string, and the call has no other precondition.
        let file = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(file >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: it was just made, and is nobody else's.
        let file = unsafe { std::fs::File::from_raw_fd(file) };
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&[7], 5 << 20).unwrap();
        let before = file.metadata().unwrap().blocks();
        let mapping = FileMapping::of(&file).unwrap();
        let region = Region { start: Gpa(0), size: 16 << 20, read_only: false };
        let ram = GuestRam::of_others([(region, Place::Mapped(mapping, 0))]).unwrap();
        let mut bytes = vec![1; 16 << 20];
        assert_eq!(ram.read(Gpa(0), &mut bytes).unwrap(), bytes.len());
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 1);
        assert_eq!(bytes[5 << 20], 7);
        assert_eq!(file.metadata().unwrap().blocks(), before);
    }

    #[test]
    fn refuses_regions_of_others_that_cannot_be() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let mapping = FileMapping::of(&file).unwrap();
        let at = |start, size, offset| {
            let region = Region { start: Gpa(start), size, read_only: false };
            (region, Place::Mapped(Arc::clone(&mapping), offset))
        };
        assert!(matches!(GuestRam::of_others([]), Err(MemoryError::Empty)));
        assert!(matches!(GuestRam::of_others([at(0, 0x3000, 0)]), Err(MemoryError::Outside { .. })));
        assert!(matches!(GuestRam::of_others([at(0, 0x1000, u64::MAX)]), Err(MemoryError::Outside { .. })));
        assert!(matches!(GuestRam::of_others([at(1, 0x1000, 0)]), Err(MemoryError::Unaligned { .. })));
        assert!(matches!(
            GuestRam::of_others([at(u64::MAX - 0xfff, 0x1000, 0)]),
            Err(MemoryError::Unaligned { .. })
        ));
        let twice = [at(0x1000, 0x1000, 0), at(0, 0x2000, 0)];
        assert!(matches!(GuestRam::of_others(twice), Err(MemoryError::Overlap(0x1000))));
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
