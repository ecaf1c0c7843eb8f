//! The code of the demo guest, assembled by hand.
//!
//! One round: count, switch the address space, touch pages so that their accessed and dirty bits become real, point one
//! page at its other frame, halt. Intel SDM volume 2, "Instruction Format". RBX holds the base of the kernel half, so that
//! every address is a 32-bit displacement.

use super::image::{
    ADDRESS_SPACES, HUGE_2M, KERNEL, READ_ONLY, REMAPPED, REMAPPED_FRAMES, REMAPPED_PTE, ROUND_COUNTER,
    USER_DATA,
};

/// Displacement of a kernel address from RBX.
const fn from_rbx(gva: u64) -> [u8; 4] {
    ((gva - KERNEL) as u32).to_le_bytes()
}

/// The code, to be placed at the entry point. It is position-independent.
pub(super) fn code() -> Vec<u8> {
    let switch = (ADDRESS_SPACES[0] ^ ADDRESS_SPACES[1]) as u32;
    let remap = (REMAPPED_FRAMES[0] ^ REMAPPED_FRAMES[1]) as u32;
    let start: Vec<u8> = [
        [0x48, 0xbb].as_slice(), // mov rbx, KERNEL
        &KERNEL.to_le_bytes(),
    ]
    .concat();
    let round: Vec<u8> = [
        [0x48, 0xff, 0x83].as_slice(), // inc qword [rbx + ROUND_COUNTER]
        &from_rbx(ROUND_COUNTER),
        &[0x0f, 0x20, 0xd8], // mov rax, cr3
        &[0x48, 0x35],       // xor rax, switch
        &switch.to_le_bytes(),
        &[0x0f, 0x22, 0xd8], // mov cr3, rax
        &[0x48, 0x8b, 0x83], // mov rax, [rbx + READ_ONLY]
        &from_rbx(READ_ONLY),
        &[0x48, 0x8b, 0x83], // mov rax, [rbx + HUGE_2M]
        &from_rbx(HUGE_2M),
        &[0x48, 0x8b, 0x83], // mov rax, [rbx + ROUND_COUNTER]
        &from_rbx(ROUND_COUNTER),
        &[0x48, 0x89, 0x04, 0x25], // mov [USER_DATA], rax
        &(USER_DATA as u32).to_le_bytes(),
        &[0x48, 0x8b, 0x93], // mov rdx, [rbx + REMAPPED_PTE]
        &from_rbx(REMAPPED_PTE),
        &[0x48, 0x81, 0xf2], // xor rdx, remap
        &remap.to_le_bytes(),
        &[0x48, 0x89, 0x93], // mov [rbx + REMAPPED_PTE], rdx
        &from_rbx(REMAPPED_PTE),
        &[0x0f, 0x01, 0xbb], // invlpg [rbx + REMAPPED]
        &from_rbx(REMAPPED),
        &[0x48, 0x8b, 0x83], // mov rax, [rbx + REMAPPED]
        &from_rbx(REMAPPED),
        &[0xf4], // hlt
    ]
    .concat();
    // jmp round: E9 and the distance from the next instruction.
    let back = -(round.len() as i32 + 5);
    [start.as_slice(), &round, &[0xe9], &back.to_le_bytes()].concat()
}
