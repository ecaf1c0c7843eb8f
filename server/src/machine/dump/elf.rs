//! The file: an ELF core file, as `dump-guest-memory` and `virsh dump --memory-only` write it.
//!
//! System V ABI, "Program Header", and the notes of QEMU. Of the ELF header QEMU fills in little: `e_ehsize` is 8, and above
//! 65534 segments their number is in the first section header. With `paging=true` there is a segment for every virtual
//! mapping, so that one piece of the file appears under several; they are joined by physical address. A segment without bytes
//! in the file has none: holes stay holes. Whatever the headers say is checked against the file's size before it is read, and
//! what is kept in memory is bounded.

use std::io;

use object::elf::{EM_386, EM_X86_64, ET_CORE, FileHeader32, FileHeader64, PN_XNUM, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader as _};
use object::{Endianness, ReadRef};
use pagewalk::Gpa;

use super::super::PAGE;
use super::note::{self, CpuState};

/// No physical address has more bits.
const PHYSICAL: u64 = 1 << 52;
/// Program headers that are looked at: 256 GiB in 1 MiB pieces have as many.
const HEADERS_MAX: u64 = 1 << 18;
/// Pieces of memory, after those that touch are joined.
const STRETCHES_MAX: usize = 1 << 12;
/// Bytes of notes, in however many segments.
const NOTES_MAX: u64 = 4 << 20;
/// vCPUs. Each has a thread of its own here.
const CPUS_MAX: usize = 1024;
/// What is said of a file that is no ELF file is decided by so many bytes.
const MAGIC: u64 = 16;

/// What is wrong with a dump.
#[derive(Debug, thiserror::Error)]
pub enum DumpProblem {
    /// It cannot be read or mapped.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It does not begin as an ELF file does.
    #[error("is not an ELF file: it begins with {0}")]
    Magic(String),
    /// It is a dump in another format.
    #[error("is a {format}, which is not read here: {instead}")]
    Format {
        /// The format.
        format: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// Its numbers are big-endian.
    #[error("is big-endian (at offset 0x5): no dump of an x86 guest is")]
    ByteOrder,
    /// It is of a guest with another CPU.
    #[error(
        "is of a guest with another architecture: its ELF machine is {0} (at offset 0x12), where i386 is 3 and x86-64 is 62"
    )]
    Architecture(u16),
    /// It is an executable, a library or an object file.
    #[error("is no core file: its ELF type is {0} (at offset 0x10), where 4 is one")]
    Type(u16),
    /// It ends before what its headers promise.
    #[error("is truncated: {what} at offset {at:#x} has {size:#x} bytes, and the file ends at {end:#x}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// Its offset.
        at: u64,
        /// Its size.
        size: u64,
        /// Size of the file.
        end: u64,
    },
    /// A header says what cannot be.
    #[error("is corrupt: {what} at offset {at:#x}: {problem}")]
    Corrupt {
        /// What is.
        what: &'static str,
        /// Its offset.
        at: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// There is more of something than is read.
    #[error("has {count} {what}, where {most} are the most")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// How many there may be.
        most: u64,
    },
    /// Two segments put different bytes at one address.
    #[error(
        "is corrupt: two segments disagree about physical address {gpa:#x}: it is at offset {first:#x} or at {second:#x}"
    )]
    Disagreement {
        /// The address.
        gpa: u64,
        /// Offset by the one.
        first: u64,
        /// Offset by the other.
        second: u64,
    },
    /// It has no registers.
    #[error(
        "has no QEMU note, so that nothing is known of control registers: describe it as an image (`image:FILE.toml`) with the registers in it"
    )]
    NoCpu,
    /// It has no memory.
    #[error("has no memory in it: no segment has a whole page in the file")]
    NoMemory,
    /// Its memory cannot be used.
    #[error("{0}")]
    Memory(String),
}

/// A piece of guest memory in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its guest physical address, 4 KiB-aligned.
    pub gpa: Gpa,
    /// Its size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Its offset in the file; there are as many bytes.
    pub offset: u64,
}

/// What a dump's headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// The file is for x86-64: QEMU's first vCPU was in long mode.
    pub long_mode: bool,
    /// Memory, by address. Pieces neither overlap nor touch.
    pub stretches: Vec<Stretch>,
    /// What the notes say of the vCPUs, in their order.
    pub cpus: Vec<CpuState>,
}

impl Dump {
    /// Reads the headers and notes, and nothing of the memory.
    ///
    /// # Errors
    /// Says what is wrong, and where.
    pub fn read<'a>(data: impl ReadRef<'a>) -> Result<Self, DumpProblem> {
        let size = data.len().map_err(|()| io::Error::other("its size is unknown"))?;
        let magic = data.read_bytes_at(0, size.min(MAGIC)).map_err(|()| io::Error::other("its beginning"))?;
        match magic {
            [0x7f, b'E', b'L', b'F', 1, ..] => read_as::<FileHeader32<Endianness>, _>(data, size),
            [0x7f, b'E', b'L', b'F', 2, ..] => read_as::<FileHeader64<Endianness>, _>(data, size),
            [0x7f, b'E', b'L', b'F', class, ..] => Err(DumpProblem::Corrupt {
                what: "the ELF class",
                at: 4,
                problem: format!("{class} is neither 1 nor 2"),
            }),
            other => Err(not_elf(other)),
        }
    }
}

/// What to do instead of compressing.
const AS_ELF: &str = "`makedumpfile -E` cannot turn it into ELF, so have QEMU write that, with `dump-guest-memory FILE` and no format=kdump-..., or `virsh dump --memory-only --format elf`";

/// What a file is that is no ELF file.
fn not_elf(magic: &[u8]) -> DumpProblem {
    let (format, instead) = if magic.starts_with(b"KDUMP   ") || magic.starts_with(b"DISKDUMP") {
        ("kdump-compressed dump", AS_ELF)
    } else if magic.starts_with(b"makedumpfile") {
        // QEMU writes its compressed dumps in this form, too.
        ("flattened kdump-compressed stream", AS_ELF)
    } else if magic.starts_with(b"PAGEDU64") || magic.starts_with(b"PAGEDUMP") {
        ("Windows crash dump", "have QEMU write ELF, with `dump-guest-memory FILE` and no format=win-dmp")
    } else if magic.starts_with(b"EMiL") {
        ("LiME dump", "describe its ranges and the registers as an image (`image:FILE.toml`)")
    } else {
        let bytes: Vec<String> = magic.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        return DumpProblem::Magic(if bytes.is_empty() { "nothing".to_owned() } else { bytes.join(" ") });
    };
    DumpProblem::Format { format, instead }
}

fn read_as<'a, H: FileHeader<Endian = Endianness>, R: ReadRef<'a>>(
    data: R,
    size: u64,
) -> Result<Dump, DumpProblem> {
    let fits = |what, at: u64, length: u64| match at.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DumpProblem::Truncated { what, at, size: length, end: size }),
    };
    let corrupt = |what, at: u64, problem: object::Error| DumpProblem::Corrupt {
        what,
        at,
        problem: problem.to_string(),
    };
    fits("the ELF header", 0, size_of::<H>() as u64)?;
    let header = H::parse(data).map_err(|e| corrupt("the ELF header", 0, e))?;
    let endian = header.endian().map_err(|e| corrupt("the ELF header", 0, e))?;
    if endian != Endianness::Little {
        return Err(DumpProblem::ByteOrder);
    }
    let long_mode = match header.e_machine(endian) {
        EM_X86_64 => true,
        EM_386 => false,
        other => return Err(DumpProblem::Architecture(other)),
    };
    match header.e_type(endian) {
        ET_CORE => {}
        other => return Err(DumpProblem::Type(other)),
    }

    let table: u64 = header.e_phoff(endian).into();
    let entry_size = size_of::<H::ProgramHeader>() as u64;
    let sized = u64::from(header.e_phentsize(endian));
    if sized != entry_size {
        let problem = format!("an entry has {sized} bytes, not {entry_size}");
        return Err(DumpProblem::Corrupt { what: "the program header table", at: table, problem });
    }
    if header.e_phnum(endian) == PN_XNUM {
        let at: u64 = header.e_shoff(endian).into();
        fits("the section header with the number of segments", at, size_of::<H::SectionHeader>() as u64)?;
    }
    let count = header.phnum(endian, data).map_err(|e| corrupt("the number of segments", table, e))?;
    let count = u64::try_from(count).unwrap_or(u64::MAX);
    if count > HEADERS_MAX {
        return Err(DumpProblem::TooMany { what: "segments", count, most: HEADERS_MAX });
    }
    fits("the program header table", table, count * entry_size)?;
    let segments =
        header.program_headers(endian, data).map_err(|e| corrupt("the program header table", table, e))?;

    let (mut stretches, mut cpus) = (Vec::new(), Vec::new());
    let mut noted = 0;
    for (index, segment) in (0..).zip(segments) {
        let (at, bytes): (u64, u64) = (segment.p_offset(endian).into(), segment.p_filesz(endian).into());
        match segment.p_type(endian) {
            PT_NOTE => {
                fits("a segment of notes", at, bytes)?;
                noted += bytes;
                if noted > NOTES_MAX {
                    let (count, most) = (noted, NOTES_MAX);
                    return Err(DumpProblem::TooMany { what: "bytes of notes", count, most });
                }
                let wrong = |problem| DumpProblem::Corrupt { what: "the notes", at, problem };
                let notes = segment.notes(endian, data).map_err(|e| corrupt("the notes", at, e))?;
                let mut notes = notes.into_iter();
                let Some(mut notes) = notes.next() else { continue };
                while let Some(note) = notes.next().map_err(|e| corrupt("the notes", at, e))? {
                    if note.name() == note::NAME && note.n_type(endian) == 0 {
                        cpus.push(CpuState::read(note.desc()).map_err(wrong)?);
                    }
                    if cpus.len() > CPUS_MAX {
                        let (count, most) = (cpus.len() as u64, CPUS_MAX as u64);
                        return Err(DumpProblem::TooMany { what: "vCPUs", count, most });
                    }
                }
            }
            PT_LOAD if bytes != 0 => {
                fits("a segment of memory", at, bytes)?;
                let start: u64 = segment.p_paddr(endian).into();
                let end = start.checked_add(bytes).filter(|end| *end <= PHYSICAL).ok_or_else(|| {
                    let header = table + index * entry_size;
                    let problem = format!("physical address {start:#x}+{bytes:#x} has more than 52 bits");
                    DumpProblem::Corrupt { what: "a segment's header", at: header, problem }
                })?;
                // Whole pages only: what is left over of one says nothing of the rest.
                let (first, last) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
                if first < last {
                    let offset = at + (first - start);
                    stretches.push(Stretch { gpa: Gpa(first), size: last - first, offset });
                }
            }
            _ => {}
        }
    }
    if cpus.is_empty() {
        return Err(DumpProblem::NoCpu);
    }
    Ok(Dump { long_mode, stretches: joined(stretches)?, cpus })
}

/// Joins stretches that overlap or touch, where they agree about what is where.
fn joined(mut stretches: Vec<Stretch>) -> Result<Vec<Stretch>, DumpProblem> {
    stretches.sort_by_key(|stretch| stretch.gpa.0);
    let mut joined: Vec<Stretch> = Vec::new();
    for next in stretches {
        let Some(last) = joined.last_mut() else {
            joined.push(next);
            continue;
        };
        let end = last.gpa.0 + last.size;
        // Where `last` has, or would have, the first byte of `next`.
        let expected = last.offset.checked_add(next.gpa.0 - last.gpa.0);
        if next.gpa.0 <= end && expected == Some(next.offset) {
            last.size = last.size.max(next.gpa.0 + next.size - last.gpa.0);
        } else if next.gpa.0 < end {
            return Err(DumpProblem::Disagreement {
                gpa: next.gpa.0,
                first: expected.unwrap_or(u64::MAX),
                second: next.offset,
            });
        } else {
            joined.push(next);
        }
    }
    match joined.len() {
        0 => Err(DumpProblem::NoMemory),
        count if count > STRETCHES_MAX => Err(DumpProblem::TooMany {
            what: "separate pieces of memory",
            count: count as u64,
            most: STRETCHES_MAX as u64,
        }),
        _ => Ok(joined),
    }
}
