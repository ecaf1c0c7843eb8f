//! Guests that the daemon runs: ELF files of a few instructions.

use std::path::PathBuf;

/// Where the code lies; the pages below are for tables.
pub(crate) const CODE: u64 = 0x10_0000;
/// Bytes of memory: the code's page is the last.
pub(crate) const MEMORY: u64 = CODE + 0x1000;
/// By this the machine's memory is found in the daemon's.
pub(crate) const MARK: &[u8; 32] = b"pagewalk: judged in a nested bed";
/// Where the mark lies in the code's page.
pub(crate) const MARK_AT: usize = 0xfc0;

/// Rests in 64-bit mode.
pub(crate) const RESTS: &[u8] = &[0xf4, 0xeb, 0xfd]; // hlt; jmp -3

/// Selector of 32-bit code in [`into_32_bit_code`].
pub(crate) const CODE_32: u16 = 0x18;

/// Goes on in a code segment of 32 bits, from which paging can be switched off, and rests there.
pub(crate) fn into_32_bit_code() -> Vec<u8> {
    let mut code = vec![
        0x0f,
        0x01,
        0x15,
        0x39,
        0,
        0,
        0, // lgdt [rip + 0x39]: at 0x40
        0x6a,
        CODE_32 as u8, // push CODE_32
        0x48,
        0x8d,
        0x05,
        3,
        0,
        0,
        0,    // lea rax, [rip + 3]
        0x50, // push rax
        0x48,
        0xcb, // retfq
        0xf4,
        0xeb,
        0xfd, // hlt; jmp -3
    ];
    code.resize(0x40, 0);
    code.extend(0x1f_u16.to_le_bytes());
    code.extend((CODE + 0x50).to_le_bytes());
    code.resize(0x50, 0);
    for descriptor in [0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code
}

/// Writes an ELF64 executable whose one segment is the page of `code`, entered at its first byte.
pub(crate) fn write(name: &str, code: &[u8]) -> std::io::Result<PathBuf> {
    let mut page = code.to_vec();
    page.resize(MARK_AT, 0);
    page.extend(MARK);
    page.resize(0x1000, 0);
    let mut file = vec![0u8; 120];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    let size = page.len() as u64;
    // e_type: executable, e_machine: x86-64, e_version, e_entry, e_phoff, e_ehsize, e_phentsize, e_phnum; then PT_LOAD,
    // readable and executable, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
    let fields: [(usize, u64, usize); 16] = [
        (16, 2, 2),
        (18, 62, 2),
        (20, 1, 4),
        (24, CODE, 8),
        (32, 64, 8),
        (52, 64, 2),
        (54, 56, 2),
        (56, 1, 2),
        (64, 1, 4),
        (68, 5, 4),
        (72, 120, 8),
        (80, CODE, 8),
        (88, CODE, 8),
        (96, size, 8),
        (104, size, 8),
        (112, 1, 8),
    ];
    for (at, value, bytes) in fields {
        file[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    file.extend(page);
    let path = std::env::temp_dir().join(format!("{name}-{}.elf", std::process::id()));
    std::fs::write(&path, file)?;
    Ok(path)
}
