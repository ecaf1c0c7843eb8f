//! Guests of 4 GiB that stand still, with the same page tables at the same places: our own, and QEMU's with each kind of
//! memory behind them.
#![allow(unsafe_code, reason = "neither files in huge pages nor memory without them have a safe interface")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagewalk::{CpuProfile, Gpa, Vendor};
use pagewalkd::machine::{GuestRam, Machine, MachineSpec, Region};
use pagewalkd::vcpu::Registers;
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

use super::bed::guest::{Shape, machine};

const SIZE: u64 = 4 << 30;
/// Where QEMU's memory has a hole for devices.
const LOW_END: u64 = 3 << 30;
const HIGH: u64 = 4 << 30;
const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };

/// Tables of a shape, and where they begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    pub(crate) shape: Shape,
    pub(crate) origin: u64,
    pub(crate) name: &'static str,
}

impl Tables {
    /// All fit into one guest; the last ones lie in the smaller part of its memory.
    pub(crate) const ALL: [Self; 4] = [
        Self { shape: Shape::Hot, origin: 256 << 20, name: "hot" },
        Self { shape: Shape::Dense, origin: 512 << 20, name: "dense" },
        Self { shape: Shape::Sparse, origin: 1 << 30, name: "sparse" },
        Self { shape: Shape::Dense, origin: HIGH, name: "dense, tables above 4 GiB" },
    ];

    pub(crate) fn root(self) -> u64 {
        self.origin + self.shape.size() - 4096
    }
}

/// Pages of the host that hold a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Small,
    Huge,
}

/// Where QEMU has 4 GiB: as much below the hole for devices as there fits, and the rest above it.
const RANGES: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), LOW_END as usize), (GuestAddress(HIGH), (SIZE - LOW_END) as usize)];

/// Memory of our own.
pub(crate) fn memory(pages: Pages) -> GuestRam {
    if pages == Pages::Huge {
        let region = |(start, size): (GuestAddress, usize)| Region {
            start: Gpa(start.0),
            size: size as u64,
            read_only: false,
        };
        return GuestRam::allocate(&RANGES.map(region)).unwrap();
    }
    let map = GuestMemoryMmap::<()>::from_ranges(&RANGES).unwrap();
    for region in map.iter() {
        // SAFETY: the range is this mapping, and the advice changes nothing of what it holds.
        let advised =
            unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_NOHUGEPAGE) };
        assert_eq!(advised, 0);
    }
    GuestRam::new(map, &[]).unwrap()
}

/// A guest of our own.
pub(crate) fn own(id: &str, memory: GuestRam) -> Machine {
    machine(id, memory, Registers::default(), CPU)
}

/// A file for QEMU's memory, and that memory to be written.
pub(crate) struct Shared {
    file: File,
    pub(crate) memory: GuestRam,
}

impl Shared {
    /// `None` where the host has no such pages.
    pub(crate) fn new(pages: Pages) -> Option<Self> {
        let file = match pages {
            Pages::Small => tempfile::tempfile_in("/dev/shm").unwrap(),
            Pages::Huge => huge(c"pagewalk-bench").ok()?,
        };
        file.set_len(SIZE).unwrap();
        let ranges = RANGES.map(|(start, size)| {
            let offset = if start.0 < HIGH { start.0 } else { LOW_END };
            (start, size, Some(FileOffset::new(file.try_clone().unwrap(), offset)))
        });
        let map = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        Some(Self { memory: GuestRam::new(map, &[]).unwrap(), file })
    }
}

/// A QEMU whose guest stands still, and the socket for the daemon.
pub(crate) struct Qemu {
    child: Child,
    folder: TempDir,
    _memory: File,
}

impl Qemu {
    /// Starts it over that memory, which it shares or not.
    pub(crate) fn start(script: &Path, memory: Shared, shared: bool) -> Self {
        let memory = memory.file;
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new(script)
            .arg("stand")
            .arg(format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()))
            .arg(if shared { "on" } else { "off" })
            .env("PAGEWALK_BED_QMP", folder.path().join("qmp"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let qemu = Self { child, folder, _memory: memory };
        let end = Instant::now() + Duration::from_secs(30);
        while std::os::unix::net::UnixStream::connect(qemu.folder.path().join("qmp")).is_err() {
            assert!(Instant::now() < end, "QEMU does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        qemu
    }

    pub(crate) fn attach(&self, id: &str) -> Machine {
        let spec = format!("{id}=qemu:qmp={}", self.folder.path().join("qmp").display());
        spec.parse::<MachineSpec>().unwrap().open().unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file in pages of 2 MiB of the host's pool.
fn huge(name: &CStr) -> io::Result<File> {
    // SAFETY: the name ends with a zero.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, and nobody else has the descriptor.
    let file = unsafe { File::from_raw_fd(descriptor) };
    // Now or never: a page that is missing later would end the process.
    // SAFETY: the descriptor is open.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, SIZE as libc::off_t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
