//! Freestanding ELF64 executables, loaded by their program headers.
//!
//! System V ABI, "Program Loading", and its AMD64 supplement. linux-loader copies the segments; it trusts much of what the
//! headers say, so they are checked here first, and each thing that can be wrong has an error of its own. Segments go to
//! their physical addresses. There is no relocation and no dynamic linking.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::memory::GuestRam;
use super::regular_file;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PF_X: u32 = 1;

/// Why an ELF file cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", .file.display())]
pub struct ElfError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: ElfProblem,
}

/// What is wrong with an ELF file.
#[derive(Debug, thiserror::Error)]
pub enum ElfProblem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It does not begin as an ELF file does.
    #[error("is not an ELF file")]
    Magic,
    /// It is no little-endian ELF64.
    #[error("is not a little-endian 64-bit ELF (class {class}, data {data}): build it with -m64")]
    Class {
        /// EI_CLASS.
        class: u8,
        /// EI_DATA.
        data: u8,
    },
    /// It is for another CPU.
    #[error("is for machine {0}, not x86-64 (62)")]
    Machine(u16),
    /// It has to be relocated first.
    #[error("is position-independent: link it with -static -no-pie")]
    Shared,
    /// It is an object file, a core file or something else.
    #[error("is not an executable (type {0})")]
    Type(u16),
    /// It asks for a dynamic linker.
    #[error("asks for a dynamic linker: link it with -static -nostdlib")]
    Dynamic,
    /// It ends before what its headers promise.
    #[error("is truncated: {what} ends at byte {end}, the file at {size}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// Where it should end.
        end: u128,
        /// Size of the file.
        size: u64,
    },
    /// The program headers have a wrong place, size or number.
    #[error("has no usable program headers (offset {offset:#x}, size {size}, number {count})")]
    ProgramHeaders {
        /// e_phoff.
        offset: u64,
        /// e_phentsize.
        size: u16,
        /// e_phnum.
        count: u16,
    },
    /// It has nothing to load.
    #[error("has no segment to load")]
    Empty,
    /// A segment holds more bytes than it occupies.
    #[error(
        "has a segment at {at:#x} with more bytes in the file ({in_file:#x}) than in memory ({in_memory:#x})"
    )]
    Sizes {
        /// p_paddr.
        at: u64,
        /// p_filesz.
        in_file: u64,
        /// p_memsz.
        in_memory: u64,
    },
    /// A segment does not fit the machine.
    #[error(
        "has a segment at {at:#x} of {size:#x} bytes, outside the machine's {memory:#x} bytes of memory: link it lower, or give the machine more with mem=SIZE"
    )]
    Outside {
        /// p_paddr.
        at: u64,
        /// p_memsz.
        size: u64,
        /// Size of memory.
        memory: u64,
    },
    /// A segment lies where the boot tables and stacks are.
    #[error(
        "has a segment at {at:#x}, inside the boot area below {end:#x}: link it at 1 MiB or above, as with -Wl,-Ttext-segment=0x100000"
    )]
    BootArea {
        /// p_paddr.
        at: u64,
        /// End of the boot area.
        end: u64,
    },
    /// Two segments overlap.
    #[error("has segments that overlap, at {first:#x} and {second:#x}")]
    Overlap {
        /// Start of the lower one.
        first: u64,
        /// Start of the higher one.
        second: u64,
    },
    /// The entry point is not in a segment that can be executed.
    #[error("has its entry point {0:#x} in no executable segment: it is entered at that physical address")]
    EntryPoint(u64),
    /// The loader refused it.
    #[error("cannot be loaded: {0}")]
    Load(String),
}

struct Segment {
    memory: Range<u64>,
    executable: bool,
}

/// Loads `path` into `memory`, outside the first `boot_area_end` bytes, and gives its entry point.
pub(super) fn load(memory: &GuestRam, path: &Path, boot_area_end: u64) -> Result<u64, ElfError> {
    let load = || -> Result<u64, ElfProblem> {
        let mut file = regular_file(path)?;
        let entry = check(&mut file, memory.size(), boot_area_end)?;
        // An explicit offset makes linux-loader leave PVH notes alone: nothing here uses them.
        Elf::load(memory.map(), Some(GuestAddress(0)), &mut file, None)
            .map_err(|e| ElfProblem::Load(e.to_string()))?;
        Ok(entry)
    };
    load().map_err(|problem| ElfError { file: path.to_owned(), problem })
}

/// Checks all that the headers say; gives the entry point.
fn check(file: &mut File, memory: u64, boot_area_end: u64) -> Result<u64, ElfProblem> {
    let size = file.metadata()?.len();
    let fits = |what, offset: u64, length: u64| {
        let end = u128::from(offset) + u128::from(length);
        if end > u128::from(size) { Err(ElfProblem::Truncated { what, end, size }) } else { Ok(()) }
    };
    let mut magic = [0; 4];
    let ident = file.read(&mut magic)?;
    if magic.get(..ident) != Some(b"\x7fELF") {
        return Err(ElfProblem::Magic);
    }
    fits("the ELF header", 0, HEADER as u64)?;
    let header: [u8; HEADER] = read_at(file, 0)?;
    if (header[4], header[5]) != (CLASS_64, LITTLE_ENDIAN) {
        return Err(ElfProblem::Class { class: header[4], data: header[5] });
    }
    match u16_at(&header, 18) {
        MACHINE_X86_64 => {}
        machine => return Err(ElfProblem::Machine(machine)),
    }
    match u16_at(&header, 16) {
        TYPE_EXECUTABLE => {}
        TYPE_SHARED => return Err(ElfProblem::Shared),
        other => return Err(ElfProblem::Type(other)),
    }
    let entry = u64_at(&header, 24);
    let offset = u64_at(&header, 32);
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(entry_size) != PROGRAM_HEADER || count == 0 || offset < HEADER as u64 {
        return Err(ElfProblem::ProgramHeaders { offset, size: entry_size, count });
    }
    fits("the program header table", offset, u64::from(count) * u64::from(entry_size))?;

    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let header: [u8; PROGRAM_HEADER] = read_at(file, offset + index * PROGRAM_HEADER as u64)?;
        let (kind, flags) = (u32_at(&header, 0), u32_at(&header, 4));
        if kind == PT_INTERP {
            return Err(ElfProblem::Dynamic);
        }
        let (at, in_file, in_memory) = (u64_at(&header, 24), u64_at(&header, 32), u64_at(&header, 40));
        if kind != PT_LOAD || (in_memory == 0 && in_file == 0) {
            continue;
        }
        if in_file > in_memory {
            return Err(ElfProblem::Sizes { at, in_file, in_memory });
        }
        fits("a segment", u64_at(&header, 8), in_file)?;
        let end = match at.checked_add(in_memory) {
            Some(end) if end <= memory => end,
            _ => return Err(ElfProblem::Outside { at, size: in_memory, memory }),
        };
        if at < boot_area_end {
            return Err(ElfProblem::BootArea { at, end: boot_area_end });
        }
        segments.push(Segment { memory: at..end, executable: flags & PF_X != 0 });
    }
    segments.sort_by_key(|s| s.memory.start);
    for pair in segments.windows(2) {
        if let [first, second] = pair
            && first.memory.end > second.memory.start
        {
            return Err(ElfProblem::Overlap { first: first.memory.start, second: second.memory.start });
        }
    }
    if segments.is_empty() {
        return Err(ElfProblem::Empty);
    }
    if !segments.iter().any(|s| s.executable && s.memory.contains(&entry)) {
        return Err(ElfProblem::EntryPoint(entry));
    }
    Ok(entry)
}

fn read_at<const N: usize>(file: &mut File, offset: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The `N` bytes at `at` of a header; the callers' offsets are constants inside it.
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    header.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(header, at))
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(header, at))
}

fn u64_at(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(header, at))
}
