//! Guests that the daemon runs: ELF files of a few instructions.
//!
//! Each rests again and again: the bed has one CPU, and the daemon has to have a share of it.

use std::path::PathBuf;

use crate::bed::Maker;
use crate::{svm, vmx};

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

/// Counts in RAX, and never ends.
pub(crate) const COUNTS: &[u8] = &[0x48, 0xff, 0xc0, 0xf4, 0xeb, 0xfa]; // inc rax; hlt; jmp -6

/// Where [`hypervisor`] waits for a word that is not zero.
pub(crate) const GO: u64 = 0xa_2000;
/// Where it counts the exits of its L2.
pub(crate) const EXITS: u64 = 0xa_2008;

/// An L1: runs the L2 of [`L2_CALLS`] again and again, and rests between.
pub(crate) fn hypervisor(maker: Maker) -> Vec<u8> {
    match maker {
        Maker::Amd => svm::hypervisor(),
        Maker::Intel => vmx::hypervisor(),
    }
}

/// L2's CR3, an nGPA.
pub(crate) const L2_CR3: u64 = 0x1_8000;
/// Where NPT or EPT is rooted.
pub(crate) const SECOND_ROOT: u64 = 0x9_0000;
/// L2's code that counts and then calls its L1.
pub(crate) const L2_CALLS: u64 = 0x40_0000;
/// L2's code that counts, in memory and in registers, and never ends.
pub(crate) const L2_COUNTS: u64 = 0x40_0800;
/// L2's code that ends in a triple fault.
pub(crate) const L2_CRASHES: u64 = 0x40_0900;
/// The word that both count in: L2's address, its nGPA, and L1's address. L1 itself maps nothing there.
pub(crate) const L2_DATA: u64 = 0x40_1000;
pub(crate) const L2_DATA_NGPA: u64 = 0x3_1000;
pub(crate) const L2_DATA_GPA: u64 = 0xb_1000;
/// NPT or EPT maps nGPAs from 0 to here.
const L2_MEMORY: u64 = 0x8_0000;

/// Puts an L2 into the memory of a machine: NPT or EPT, tables, code, and what [`hypervisor`] needs.
pub(crate) fn install_l2(
    maker: Maker,
    write: impl Fn(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    // Present, writable and a user's, or readable, writable and executable.
    const LINK: u64 = 0b111;
    let word = |gpa: u64, value: u64| write(gpa, &value.to_le_bytes());
    for table in 0..3 {
        word(SECOND_ROOT + table * 0x1000, (SECOND_ROOT + (table + 1) * 0x1000) | LINK)?;
        // L2's tables, of which NPT or EPT makes GPAs.
        let index = if table == 2 { L2_CALLS >> 21 } else { 0 };
        word(L2_MEMORY + L2_CR3 + table * 0x1000 + index * 8, (L2_CR3 + (table + 1) * 0x1000) | LINK)?;
    }
    let leaf = LINK | if maker == Maker::Intel { vmx::WRITE_BACK } else { 0 };
    for page in 0..L2_MEMORY / 0x1000 {
        word(SECOND_ROOT + 0x3000 + page * 8, (L2_MEMORY + page * 0x1000) | leaf)?;
    }
    let lowest = L2_MEMORY + L2_CR3 + 0x3000;
    word(lowest, (L2_DATA_NGPA - 0x1000) | LINK)?;
    word(lowest + 8, L2_DATA_NGPA | LINK)?;
    let code = L2_DATA_GPA - 0x1000;
    let count = [0x48, 0xff, 0x04, 0x25, 0x00, 0x10, 0x40, 0x00]; // inc qword [L2_DATA]
    let call = match maker {
        Maker::Amd => [0x0f, 0x01, 0xd9],   // vmmcall
        Maker::Intel => [0x0f, 0x01, 0xc1], // vmcall
    };
    let calls = [&[0xf4][..], &call].concat(); // hlt first
    let counts = [
        0x48, 0xff, 0xc0, 0x48, 0xff, 0xc3, 0x48, 0xff, 0xc6, 0x49, 0xff, 0xc0, // inc rax, rbx, rsi, r8
        0xf4, // hlt
        0xeb, 0xe9, // jmp -23
    ];
    write(code, &[&count[..], &calls].concat())?;
    write(code + (L2_COUNTS & 0xfff), &[&count[..], &counts[..]].concat())?;
    write(code + (L2_CRASHES & 0xfff), &[0x0f, 0x0b])?; // ud2, without an IDT
    match maker {
        Maker::Amd => svm::install(word),
        Maker::Intel => vmx::install(word),
    }
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
