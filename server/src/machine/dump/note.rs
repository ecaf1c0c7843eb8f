//! The note of a vCPU: QEMU's `QEMUCPUState`, version 1.
//!
//! It is the same for 32-bit and 64-bit guests, and little-endian: general registers, ten segment registers, CR0 to CR4 and
//! the kernel's GS base, which the oldest QEMUs leave out. EFER, PKRU, PAT and all other MSRs are not in it.

use crate::vcpu::{RFLAGS_VM, Registers, Selectors};

/// Owner of the note.
pub(super) const NAME: &[u8] = b"QEMU";
/// Without the kernel's GS base.
const SIZE_MIN: usize = 432;
const VERSION: u32 = 1;

/// CS.L, where QEMU keeps a segment's attributes: as in the upper half of its descriptor.
const SEGMENT_L: u32 = 1 << 21;

/// Offsets of the fields.
const GENERAL: usize = 8;
const RIP: usize = 136;
const RFLAGS: usize = 144;
const SEGMENTS: usize = 152;
const SEGMENT_SIZE: usize = 24;
const CONTROL: usize = 392;

/// What the note says of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// Its registers, without those that the note does not have.
    pub registers: Registers,
    /// CS.L: the vCPU executes 64-bit code.
    pub long_code: bool,
}

impl CpuState {
    /// Reads the contents of a note.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn read(note: &[u8]) -> Result<Self, String> {
        let word32 =
            |at: usize| note.get(at..).and_then(|rest| rest.first_chunk()).map(|b| u32::from_le_bytes(*b));
        let word64 =
            |at: usize| note.get(at..).and_then(|rest| rest.first_chunk()).map(|b| u64::from_le_bytes(*b));
        let short = || format!("a vCPU's note of {} bytes, where {SIZE_MIN} are the least", note.len());
        match word32(0).ok_or_else(short)? {
            VERSION => {}
            other => return Err(format!("a vCPU's note of version {other}, where {VERSION} is known")),
        }
        if note.len() < SIZE_MIN {
            return Err(short());
        }
        let general = |index: usize| word64(GENERAL + index * 8).unwrap_or_default();
        let selector = |index: usize| word32(SEGMENTS + index * SEGMENT_SIZE).unwrap_or_default() as u16;
        let attributes = |index: usize| word32(SEGMENTS + index * SEGMENT_SIZE + 8).unwrap_or_default();
        let base = |index: usize| word64(SEGMENTS + index * SEGMENT_SIZE + 16).unwrap_or_default();
        let control = |index: usize| word64(CONTROL + index * 8).unwrap_or_default();
        let rflags = word64(RFLAGS).unwrap_or_default();
        let (cs, cr0) = (selector(0), control(0));
        let cpl = match () {
            () if cr0 & pagewalk::mode::CR0_PE == 0 => 0,
            () if rflags & RFLAGS_VM != 0 => 3,
            () => (cs & 3) as u8,
        };
        let registers = Registers {
            cr0,
            cr2: control(2),
            cr3: control(3),
            cr4: control(4),
            rip: word64(RIP).unwrap_or_default(),
            rflags,
            rax: general(0),
            rbx: general(1),
            rcx: general(2),
            rdx: general(3),
            rsi: general(4),
            rdi: general(5),
            rsp: general(6),
            rbp: general(7),
            r8: general(8),
            r9: general(9),
            r10: general(10),
            r11: general(11),
            r12: general(12),
            r13: general(13),
            r14: general(14),
            r15: general(15),
            fs_base: base(3),
            gs_base: base(4),
            cpl,
            selectors: Selectors {
                cs,
                ds: selector(1),
                es: selector(2),
                fs: selector(3),
                gs: selector(4),
                ss: selector(5),
            },
            ..Registers::default()
        };
        Ok(Self { registers, long_code: attributes(0) & SEGMENT_L != 0 })
    }
}
