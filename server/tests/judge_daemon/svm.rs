//! An L1 over SVM, in [`crate::guest`]'s memory: its code, and the VMCB that it runs.

use crate::guest::{L2_CALLS, L2_CR3, SECOND_ROOT};

const VMCB: u64 = 0xa_0000;
const PERMISSIONS: u64 = 0xa_4000;

pub(crate) fn hypervisor() -> Vec<u8> {
    let mut code = vec![
        0x83, 0x3c, 0x25, 0x00, 0x20, 0x0a, 0x00, 0x00, // cmp dword [GO], 0
        0xf3, 0x90, // pause
        0x74, 0xf4, // je -12
        0xb9, 0x80, 0x00, 0x00, 0xc0, // mov ecx, IA32_EFER
        0x0f, 0x32, // rdmsr
        0x0d, 0x00, 0x10, 0x00, 0x00, // or eax, SVME
        0x0f, 0x30, // wrmsr
        0xb9, 0x17, 0x01, 0x01, 0xc0, // mov ecx, VM_HSAVE_PA
        0xb8, 0x00, 0x10, 0x0a, 0x00, // mov eax, 0xa1000
        0x31, 0xd2, // xor edx, edx
        0x0f, 0x30, // wrmsr
        0xb8, 0x00, 0x00, 0x0a, 0x00, // mov eax, VMCB
        0x0f, 0x01, 0xd8, // vmrun
        0xff, 0x04, 0x25, 0x08, 0x20, 0x0a, 0x00, // inc dword [EXITS]
        0xc7, 0x04, 0x25, 0x78, 0x05, 0x0a, 0x00, // mov dword [VMCB.RIP], ...
    ];
    code.extend((L2_CALLS as u32).to_le_bytes());
    code.extend([
        0xf4, // hlt
        0xeb, 0xe3, // jmp -29: mov eax, VMCB
    ]);
    code
}

/// Writes the VMCB of an L2 of 64 bits.
pub(crate) fn install(word: impl Fn(u64, u64) -> std::io::Result<()>) -> std::io::Result<()> {
    // Code of 64 bits, and data.
    for (field, value) in (0x400..).step_by(16).zip([1, 0, 1, 1, 1, 1]) {
        let segment = if value == 0 { 0xffff_ffff_0a9b_0008_u64 } else { 0xffff_ffff_0c93_0010 };
        word(VMCB + field, segment)?;
    }
    for (field, value) in [
        (0x08, 1 << 63),     // shutdown
        (0x10, 0b11),        // VMRUN, VMMCALL
        (0x40, PERMISSIONS), // IOPM
        (0x48, PERMISSIONS), // MSRPM
        (0x58, 1),           // ASID
        (0x90, 1),           // nested paging
        (0xb0, SECOND_ROOT),
        (0x4d0, 0x1d00),      // EFER
        (0x548, 0x20),        // CR4
        (0x550, L2_CR3),      // CR3
        (0x558, 0x8001_0031), // CR0
        (0x560, 0x400),       // DR7
        (0x568, 0xffff_0ff0), // DR6
        (0x570, 2),           // RFLAGS
        (0x578, L2_CALLS),    // RIP
        (0x668, 0x0007_0406_0007_0406),
    ] {
        word(VMCB + field, value)?;
    }
    Ok(())
}
