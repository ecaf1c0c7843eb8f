//! A kernel's bzImage, its initramfs and its command line, in memory as the kernel wants to find them.
//!
//! Linux, "The Linux/x86 Boot Protocol": "The Real-Mode Kernel Header" and "64-bit Boot Protocol". linux-loader copies the
//! kernel and trusts its header, which is therefore checked here first.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader as _, load_cmdline};
use vm_memory::{Bytes as _, GuestAddress};

use super::acpi;
use crate::machine::memory::GuestRam;
use crate::machine::regular_file;

/// The kernel's parameters, of one page.
pub(super) const PARAMETERS_AT: u64 = 0x1_5000;
const COMMAND_LINE_AT: u64 = 0x1_6000;
const COMMAND_LINE_END: u64 = 0x2_0000;
const CONVENTIONAL_MEMORY: u64 = 0xa_0000;
/// Where memory goes on above what a PC keeps for its ROMs.
const HIGH_MEMORY: u64 = 0x10_0000;
/// Where its first 64-bit instruction lies in a kernel.
const ENTRY_64: u64 = 0x200;

const HEADER_AT: u64 = 0x1f1;
const HEADER_END: u64 = 0x26c;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version that tells where a kernel can be entered.
const VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
const SOME_LOADER: u8 = 0xff;
const RAM: u32 = 1;
const SECTOR: u64 = 512;

/// Why Linux cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// The kernel cannot be loaded.
    #[error("kernel {}: {problem}", .file.display())]
    Kernel {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: KernelProblem,
    },
    /// The initramfs cannot be loaded.
    #[error("initrd {}: {problem}", .file.display())]
    Initrd {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: InitrdProblem,
    },
    /// The command line is longer than the kernel takes.
    #[error("cmdline has {length} bytes, and this kernel takes {most}: shorten it")]
    CommandLine {
        /// Its bytes.
        length: usize,
        /// What the kernel takes.
        most: u64,
    },
    /// The command line has characters that cannot be typed.
    #[error("cmdline has characters that are no printable ASCII")]
    CommandLineCharacters,
    /// The console's socket or log cannot be had.
    #[error("console: {0}")]
    Console(String),
    /// The host gives no thread or eventfd.
    #[error("the machine's devices cannot be made: {0}")]
    Devices(io::Error),
}

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelProblem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It does not have a kernel's header.
    #[error("is no bzImage: use the file that distributions call vmlinuz, not vmlinux")]
    NotAKernel,
    /// It is too old, or for 32-bit CPUs.
    #[error("cannot be entered in 64-bit mode (boot protocol {version:#x}): use an x86-64 kernel")]
    No64Bit {
        /// Version of the boot protocol.
        version: u16,
    },
    /// Its header promises no code.
    #[error(
        "is damaged: its header says that there is no kernel behind it (`syssize` is 0); take another copy"
    )]
    NoCode,
    /// It ends before what its header promises.
    #[error("is truncated: it has to have {wanted} bytes and has {size}")]
    Truncated {
        /// What the header says.
        wanted: u64,
        /// Size of the file.
        size: u64,
    },
    /// It does not fit the machine.
    #[error(
        "needs {needed:#x} bytes of memory below 3 GiB, and the machine has {memory:#x}: give it more with mem=SIZE"
    )]
    Memory {
        /// What it needs.
        needed: u64,
        /// What there is.
        memory: u64,
    },
    /// The loader refused it.
    #[error("cannot be loaded: {0}")]
    Load(String),
}

/// What is wrong with an initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitrdProblem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is empty.
    #[error("is empty")]
    Empty,
    /// It does not fit the machine beside the kernel.
    #[error(
        "has {size:#x} bytes, and {room:#x} are free beside the kernel: give the machine more with mem=SIZE"
    )]
    Memory {
        /// Its size.
        size: u64,
        /// What is free.
        room: u64,
    },
}

/// Loads all of it into `memory`, whose first region ends at `low_end`; gives the address of the first instruction.
pub(super) fn load(
    memory: &GuestRam,
    low_end: u64,
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
) -> Result<u64, LinuxError> {
    let of_kernel = |problem| LinuxError::Kernel { file: kernel.to_owned(), problem };
    let (mut header, kernel_end) = load_kernel(memory, low_end, kernel).map_err(of_kernel)?;
    header.type_of_loader = SOME_LOADER;
    if let Some(file) = initrd {
        let of_initrd = |problem| LinuxError::Initrd { file: file.to_owned(), problem };
        let highest = low_end.min(u64::from(header.initrd_addr_max) + 1);
        let (at, size) = load_initrd(memory, kernel_end, highest, file).map_err(of_initrd)?;
        header.ramdisk_image = at;
        header.ramdisk_size = size;
    }
    // One byte is for the zero at its end.
    let most = u64::from(header.cmdline_size).min(COMMAND_LINE_END - COMMAND_LINE_AT - 1);
    if command_line.len() as u64 > most {
        return Err(LinuxError::CommandLine { length: command_line.len(), most });
    }
    let loaded = Cmdline::new(most as usize + 1)
        .and_then(|mut line| line.insert_str(command_line).map(|()| line))
        .map_err(|_| LinuxError::CommandLineCharacters)?;
    let refused = |e: String| of_kernel(KernelProblem::Load(e));
    load_cmdline(memory.map(), GuestAddress(COMMAND_LINE_AT), &loaded).map_err(|e| refused(e.to_string()))?;
    header.cmd_line_ptr = COMMAND_LINE_AT as u32;

    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: acpi::AT, ..Default::default() };
    let high = memory.regions().iter().filter(|region| region.start.0 > 0);
    let ranges = [(0, CONVENTIONAL_MEMORY), (HIGH_MEMORY, low_end - HIGH_MEMORY)]
        .into_iter()
        .chain(high.map(|region| (region.start.0, region.size)));
    for (entry, (addr, size)) in parameters.e820_table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr, size, r#type: RAM };
        parameters.e820_entries += 1;
    }
    let parameters = BootParams::new(&parameters, GuestAddress(PARAMETERS_AT));
    LinuxBootConfigurator::write_bootparams(&parameters, memory.map()).map_err(|e| refused(e.to_string()))?;
    Ok(HIGH_MEMORY + ENTRY_64)
}

/// Copies the kernel to where high memory begins. Gives its header, and where the memory ends that it needs at first.
fn load_kernel(memory: &GuestRam, low_end: u64, path: &Path) -> Result<(setup_header, u64), KernelProblem> {
    let mut file = regular_file(path)?;
    let size = file.metadata()?.len();
    if size < HEADER_END || u32::from_le_bytes(read_at(&mut file, 0x202)?) != MAGIC {
        return Err(KernelProblem::NotAKernel);
    }
    let version = u16::from_le_bytes(read_at(&mut file, 0x206)?);
    let [load_flags] = read_at(&mut file, 0x211)?;
    let can = u16::from_le_bytes(read_at(&mut file, 0x236)?);
    if version < VERSION || load_flags & LOADED_HIGH == 0 || can & KERNEL_64 == 0 {
        return Err(KernelProblem::No64Bit { version });
    }
    let [sectors] = read_at(&mut file, HEADER_AT)?;
    // 0 means 4, for the sake of very old loaders; and the boot sector comes first.
    let setup = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * SECTOR;
    let paragraphs = u32::from_le_bytes(read_at(&mut file, 0x1f4)?);
    if paragraphs == 0 {
        return Err(KernelProblem::NoCode);
    }
    let wanted = setup + u64::from(paragraphs) * 16;
    if size < wanted {
        return Err(KernelProblem::Truncated { wanted, size });
    }
    let preferred = u64::from_le_bytes(read_at(&mut file, 0x258)?);
    let needed = u64::from(u32::from_le_bytes(read_at(&mut file, 0x260)?));
    // Loaded lower, it moves itself to where it prefers to be.
    let end = preferred.max(HIGH_MEMORY).saturating_add(needed).max(HIGH_MEMORY.saturating_add(size));
    if end > low_end {
        return Err(KernelProblem::Memory { needed: end, memory: low_end });
    }
    let loaded = BzImage::load(memory.map(), Some(GuestAddress(HIGH_MEMORY)), &mut file, None)
        .map_err(|e| KernelProblem::Load(e.to_string()))?;
    Ok((loaded.setup_header.ok_or(KernelProblem::NotAKernel)?, end))
}

/// Copies the initramfs as high as it may lie.
fn load_initrd(
    memory: &GuestRam,
    lowest: u64,
    highest: u64,
    path: &Path,
) -> Result<(u32, u32), InitrdProblem> {
    let mut file = regular_file(path)?;
    let size = file.metadata()?.len();
    if size == 0 {
        return Err(InitrdProblem::Empty);
    }
    let room = highest.saturating_sub(lowest) & !0xfff;
    let at = highest.checked_sub(size).map(|at| at & !0xfff).filter(|at| *at >= lowest);
    let (Some(at), Ok(length)) = (at.and_then(|at| u32::try_from(at).ok()), u32::try_from(size)) else {
        return Err(InitrdProblem::Memory { size, room });
    };
    memory
        .map()
        .read_exact_volatile_from(GuestAddress(at.into()), &mut file, length as usize)
        .map_err(io::Error::other)?;
    Ok((at, length))
}

fn read_at<const N: usize>(file: &mut File, offset: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}
