//! The VMCB that L1 hands to VMRUN, and how L1 reads it afterwards.

use pagewalk::PagingMode;

use super::case::{Act, Case};
use super::memory::{IOPM, MSRPM, Memory, VMCBS};
use crate::bed::{PAGE, RFLAGS_AC, RFLAGS_FIXED, Ram, when};
use crate::nested::guest_mode::{
    CR0, CR3, CR4, DR6, DR7, EFER, GUEST_ASID, INTERCEPT_VMRUN, IOPM_BASE, MSRPM_BASE, NCR3, NESTED_CTL, PAT,
    RFLAGS,
};

// Control area.
const INTERCEPT_EXCEPTIONS: u64 = 0x08;
const EXIT_CODE: u64 = 0x70;
const EXIT_INFO_1: u64 = 0x78;
const EXIT_INFO_2: u64 = 0x80;
// Save area.
const ES: u64 = 0x400;
const CPL: u64 = 0x4c8;
const RIP: u64 = 0x578;
const RSP: u64 = 0x5d8;
const RAX: u64 = 0x5f8;

const EXIT_EXCEPTION: u64 = 0x40;
const EXIT_VMMCALL: u64 = 0x81;
const EXIT_NPF: u64 = 0x400;
const PF: u64 = 14;
const GP: u64 = 13;

/// How an access ended, as L1 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Done,
    /// The access succeeded at another address than the walker's.
    Elsewhere,
    PageFault {
        code: u64,
        cr2: u64,
    },
    GeneralProtection,
    NestedPageFault {
        info: u64,
        ngpa: u64,
    },
    Other {
        code: u64,
        info_1: u64,
        info_2: u64,
    },
}

/// What L2 left in its VMCB besides the exit.
pub(super) struct Left {
    pub(super) exit: Exit,
    pub(super) rax: u64,
    pub(super) rip: u64,
}

pub(super) fn write(memory: &Memory, number: u64, case: &Case) {
    let cpl = u64::from(case.user) * 3;
    let registers = &case.registers;
    let at = VMCBS + number * PAGE;
    let rip = if case.act == Act::Fetch { case.gva } else { memory.code(case.user, case.act == Act::Store) };
    // Selector, attributes, limit: code of 64 or 32 bits.
    let bits = if memory.l2.is_long() { 0x0a9b_0008 } else { 0x0c9b_0008 };
    let code = bits | cpl << 21 | cpl | 0xffff_ffff << 32;
    let data = 0x0c93_0010 | cpl << 21 | cpl | 0xffff_ffff << 32;
    for (field, segment) in (ES..).step_by(16).zip([data, code, data, data, data, data]) {
        memory.ram.write(at + field, segment);
    }
    let exceptions = 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << GP | 1 << PF | 1 << 17;
    let shutdown = 1 << (32 + 31);
    for (field, value) in [
        (INTERCEPT_EXCEPTIONS, exceptions | shutdown),
        (INTERCEPT_VMRUN as u64, 0b11),
        (IOPM_BASE as u64, IOPM),
        (MSRPM_BASE as u64, MSRPM),
        (GUEST_ASID as u64, 1),
        (NESTED_CTL as u64, 1),
        (NCR3 as u64, case.ncr3),
        (CPL, cpl << 24),
        (EFER as u64, registers.efer),
        (CR4 as u64, registers.cr4),
        (CR3 as u64, registers.cr3),
        (CR0 as u64, registers.cr0),
        (DR7 as u64, 0x400),
        (DR6 as u64, 0xffff_0ff0),
        (RFLAGS as u64, RFLAGS_FIXED | when(case.ac, RFLAGS_AC)),
        (RIP, rip),
        (RSP, 0),
        (RAX, case.gva),
        (PAT as u64, registers.pat),
    ] {
        memory.ram.write(at + field, value);
    }
}

pub(super) fn read(ram: Ram, number: u64, mode: PagingMode) -> Left {
    let at = |field| ram.read(VMCBS + number * PAGE + field);
    let (code, info_1, info_2) = (at(EXIT_CODE), at(EXIT_INFO_1), at(EXIT_INFO_2));
    let exit = match code {
        EXIT_VMMCALL => Exit::Done,
        EXIT_NPF => Exit::NestedPageFault { info: info_1, ngpa: info_2 },
        _ if code == EXIT_EXCEPTION + PF => Exit::PageFault { code: info_1, cr2: info_2 },
        _ if code == EXIT_EXCEPTION + GP && info_1 == 0 && mode.is_long() => Exit::GeneralProtection,
        _ => Exit::Other { code, info_1, info_2 },
    };
    Left { exit, rax: at(RAX), rip: at(RIP) }
}
