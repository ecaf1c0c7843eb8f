//! Files that are mapped to be walked: another process's guest memory, a dump.
#![allow(unsafe_code)] // The promise about a mapping can only be made by its owner.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::sigbus::Guard;

/// A whole file, mapped to be read. What others write to it is seen; that they truncate it ends nothing but the mapping.
#[derive(Debug)]
pub struct FileMapping {
    // Before the mapping that it guards.
    guard: Guard,
    region: MmapRegion,
    file: FileOffset,
    /// A fetch met its end too early.
    short: AtomicBool,
}

impl FileMapping {
    /// Maps all of `file` as it is now.
    ///
    /// # Errors
    /// When the file is empty, is none that can be mapped, or the host refuses.
    pub fn of(file: &File) -> io::Result<Arc<Self>> {
        let size = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if size == 0 {
            return Err(io::Error::other("the file is empty"));
        }
        let file = FileOffset::new(file.try_clone()?, 0);
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(file.clone())
            .build()
            .map_err(io::Error::other)?;
        // SAFETY: the range is `region`, which is unmapped after the guard is dropped, by the order of the fields. All access
        // to it is atomic or volatile, so that any contents will do.
        let guard = unsafe { Guard::register(region.as_ptr(), region.size())? };
        Ok(Arc::new(Self { guard, region, file, short: AtomicBool::new(false) }))
    }

    /// Its size in bytes, as it was when it was mapped.
    #[must_use]
    pub fn size(&self) -> usize {
        self.region.size()
    }

    /// Whether the file was found shorter than it was: what was read since may be zeroes that nobody wrote.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.guard.is_broken() || self.short.load(Ordering::Acquire)
    }

    /// Where byte `offset` of the file is; `None` where `size` bytes from there do not lie in the file.
    pub(super) fn place(&self, offset: u64, size: u64) -> Option<*mut u8> {
        let end = offset.checked_add(size)?;
        (end <= self.region.size() as u64).then(|| self.region.as_ptr().wrapping_add(offset as usize))
    }
}

/// Memory that can be fetched and not mapped: another process's, a compressed dump. Loads from it may block, each for as
/// long as the host takes for a page.
pub trait Fetch: Send + Sync {
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// When not all of it can be had.
    fn fetch(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Not through the mapping: there, to read a hole of a file in memory allocates it, for good and at the guest's cost.
impl Fetch for FileMapping {
    fn fetch(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let read = self.file.file().read_exact_at(into, offset);
        if matches!(&read, Err(e) if e.kind() == io::ErrorKind::UnexpectedEof) {
            self.short.store(true, Ordering::Release);
        }
        read
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_truncated_file_breaks_its_mapping_and_nothing_else() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x4000]).unwrap();
        let mut other = tempfile::tempfile().unwrap();
        other.write_all(&[9; 0x1000]).unwrap();
        let (mapping, intact) = (FileMapping::of(&file).unwrap(), FileMapping::of(&other).unwrap());
        // SAFETY: inside the mapping, which lives.
        let read = |mapping: &FileMapping, at| unsafe { mapping.place(at, 1).unwrap().read_volatile() };
        assert_eq!((read(&mapping, 0x3fff), mapping.is_broken()), (7, false));
        file.set_len(0x1000).unwrap();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let mapping = Arc::clone(&mapping);
                std::thread::spawn(move || {
                    // SAFETY: inside the mapping, which lives.
                    unsafe { mapping.place(0x2000, 1).unwrap().read_volatile() }
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), 0);
        }
        assert!(mapping.is_broken());
        assert_eq!((read(&intact, 0xfff), intact.is_broken()), (9, false));
        assert!(mapping.place(0x3fff, 2).is_none() && mapping.place(u64::MAX, 2).is_none());
        // By a fetch, too, which the mapping's pages that are still there do not need.
        let fetched = FileMapping::of(&other).unwrap();
        fetched.fetch(0xff8, &mut [0; 8]).unwrap();
        assert!(!fetched.is_broken());
        other.set_len(0xffc).unwrap();
        assert!(fetched.fetch(0xff8, &mut [0; 8]).is_err() && fetched.is_broken());
        // The slot is used again, and remembers nothing.
        drop(mapping);
        assert!(!FileMapping::of(&other).unwrap().is_broken());
    }
}
