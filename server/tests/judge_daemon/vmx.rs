//! An L1 over VMX, in [`crate::guest`]'s memory: its code, and the fields of the VMCS that it runs.
//!
//! Intel SDM volume 3, "Field Encoding in VMCS".

use crate::guest::{CODE, EXITS, GO, L2_CALLS, L2_CR3, SECOND_ROOT};

/// Memory type of a page in EPT.
pub(crate) const WRITE_BACK: u64 = 6 << 3;
/// [`SECOND_ROOT`] as EPTP: write-back, four levels, accessed and dirty bits.
pub(crate) const EPTP: u64 = SECOND_ROOT | 1 << 6 | 3 << 3 | 6;

const VMXON: u64 = 0xa_0000;
const VMCS: u64 = 0xa_1000;
const VMXON_POINTER: u64 = 0xa_2010;
const VMCS_POINTER: u64 = 0xa_2018;
/// Encodings of fields, each followed by what [`hypervisor`] writes there.
const FIELDS_AT: u64 = 0xa_3000;
const REVISION: u64 = 0x11e5_7ed0;

/// The prologue of [`hypervisor`] ends here, in its page.
const AFTER_EXIT: usize = 0x80;

pub(crate) fn hypervisor() -> Vec<u8> {
    let mut code = vec![
        0x83, 0x3c, 0x25, 0x00, 0x20, 0x0a, 0x00, 0x00, // cmp dword [GO], 0
        0xf3, 0x90, // pause
        0x74, 0xf4, // je -12
        0xb9, 0x3a, 0x00, 0x00, 0x00, // mov ecx, IA32_FEATURE_CONTROL
        0xb8, 0x05, 0x00, 0x00, 0x00, // mov eax, 5: locked, VMX outside SMX
        0x31, 0xd2, // xor edx, edx
        0x0f, 0x30, // wrmsr
        0x0f, 0x20, 0xe0, // mov rax, cr4
        0x0d, 0x00, 0x20, 0x00, 0x00, // or eax, VMXE
        0x0f, 0x22, 0xe0, // mov cr4, rax
    ];
    let absolute = |opcode: &[u8], at: u64| [opcode, &[0x34, 0x25], &(at as u32).to_le_bytes()].concat();
    code.extend(absolute(&[0xf3, 0x0f, 0xc7], VMXON_POINTER)); // vmxon
    code.extend(absolute(&[0x66, 0x0f, 0xc7], VMCS_POINTER)); // vmclear
    code.extend(absolute(&[0x0f, 0xc7], VMCS_POINTER)); // vmptrld
    code.push(0xbe); // mov esi, FIELDS_AT
    code.extend((FIELDS_AT as u32).to_le_bytes());
    code.push(0xb9); // mov ecx, number of fields
    code.extend((fields().len() as u32).to_le_bytes());
    code.extend([
        0x48, 0x8b, 0x06, // mov rax, [rsi]
        0x48, 0x8b, 0x5e, 0x08, // mov rbx, [rsi + 8]
        0x0f, 0x79, 0xc3, // vmwrite rax, rbx
        0x83, 0xc6, 0x10, // add esi, 16
        0xff, 0xc9, // dec ecx
        0x75, 0xef, // jnz -17
        0x0f, 0x01, 0xc2, // vmlaunch
        0x0f, 0x0b, // ud2: it was refused
    ]);
    assert!(code.len() <= AFTER_EXIT);
    code.resize(AFTER_EXIT, 0);
    code.extend([
        0xff, 0x04, 0x25, 0x08, 0x20, 0x0a, 0x00, // inc dword [EXITS]
        0xb8, 0x1e, 0x68, 0x00, 0x00, // mov eax, guest RIP
        0xbb, // mov ebx, L2_CALLS
    ]);
    code.extend((L2_CALLS as u32).to_le_bytes());
    code.extend([
        0x0f, 0x79, 0xc3, // vmwrite rax, rbx
        0xf4, // hlt
        0x0f, 0x01, 0xc3, // vmresume
        0x0f, 0x0b, // ud2
    ]);
    code
}

/// The fields that are not zero.
fn fields() -> Vec<(u64, u64)> {
    const LOADS_EFER_AT_EXIT: u64 = 1 << 21;
    const HOST_IN_64_BIT_MODE: u64 = 1 << 9;
    const LOADS_EFER_AT_ENTRY: u64 = 1 << 15;
    const GUEST_IN_LONG_MODE: u64 = 1 << 9;
    let mut fields = vec![
        (0x4000, 0x16),                  // pin-based
        (0x4002, 0x0401_e172 | 1 << 31), // processor-based, with the secondary ones
        (0x401e, 1 << 1),                // secondary: EPT
        (0x400c, 0x0003_6dff | HOST_IN_64_BIT_MODE | LOADS_EFER_AT_EXIT),
        (0x4012, 0x11ff | GUEST_IN_LONG_MODE | LOADS_EFER_AT_ENTRY),
        (0x201a, EPTP),
        (0x2800, u64::MAX), // VMCS link pointer
        // L2.
        (0x2806, 0xd00),       // EFER
        (0x6800, 0x8001_0031), // CR0
        (0x6802, L2_CR3),
        (0x6804, 0x2020), // CR4
        (0x681a, 0x400),  // DR7
        (0x681e, L2_CALLS),
        (0x6820, 2), // RFLAGS
        // L1, after an exit.
        (0x2c02, 0xd00),       // EFER
        (0x6c00, 0x8001_0033), // CR0
        (0x6c02, 0x2000),      // CR3
        (0x6c04, 0x26a0),      // CR4
        (0x6c0c, 0x1000),      // GDTR
        (0x6c16, CODE + AFTER_EXIT as u64),
        (0x0c0c, 0x18), // TR
    ];
    // ES, CS, SS, DS, FS, GS.
    for number in 0..6 {
        let (selector, rights) = if number == 1 { (0x08, 0xa09b) } else { (0x10, 0xc093) };
        fields.extend([
            (0x0800 + 2 * number, selector),
            (0x0c00 + 2 * number, selector),
            (0x4800 + 2 * number, 0xffff_ffff),
            (0x4814 + 2 * number, rights),
        ]);
    }
    // LDTR holds nothing; TR is a busy TSS.
    fields.extend([(0x4820, 0x1_0000), (0x480e, 0x67), (0x4822, 0x8b)]);
    fields
}

/// Writes what [`hypervisor`] reads.
pub(crate) fn install(word: impl Fn(u64, u64) -> std::io::Result<()>) -> std::io::Result<()> {
    for (at, value) in [(VMXON, REVISION), (VMCS, REVISION), (VMXON_POINTER, VMXON), (VMCS_POINTER, VMCS)] {
        word(at, value)?;
    }
    assert!((GO, EXITS) == (0xa_2000, 0xa_2008));
    for (at, (field, value)) in (FIELDS_AT..).step_by(16).zip(fields()) {
        word(at, field)?;
        word(at + 8, value)?;
    }
    Ok(())
}
