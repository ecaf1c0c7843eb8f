//! Registers, CPUs, accesses and second dimensions out of bytes: plausible ones for most, so that walks get somewhere, and
//! arbitrary words for the rest.

use pagewalk::mode::{
    CR0_PE, CR0_PG, CR4_CET, CR4_LA57, CR4_LAM_SUP, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, EFER_UAIE,
};
use pagewalk::{
    Access, AccessKind, ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, NptControls,
    PageWalk, PagingMode, Privilege, Vendor, Walker,
};

use crate::input::Input;
use crate::memory::PAGES;

const CR0_WP: u64 = 1 << 16;
/// What a mode may be combined with: PSE, PGE, SMEP, SMAP, PKE, PKS.
const CR4_FREE: u64 = 1 << 4 | 1 << 7 | 7 << 20 | 1 << 24;
/// LAM_U57 and LAM_U48.
const CR3_LAM: u64 = 3 << 61;

/// A CPU. One in eight has an impossible MAXPHYADDR.
pub fn cpu(input: &mut Input<'_>) -> CpuProfile {
    let byte = input.byte();
    let maxphyaddr = input.byte();
    CpuProfile {
        vendor: if byte & 1 == 0 { Vendor::Intel } else { Vendor::Amd },
        maxphyaddr: if byte & 0x70 == 0x70 { maxphyaddr } else { 32 + maxphyaddr % 21 },
        gib_pages: byte & 2 == 0,
        encryption_bit: [None, Some(47), Some(51), Some(maxphyaddr)][byte as usize >> 2 & 3],
    }
}

/// Registers: of a mode that a byte selects, or five arbitrary words.
pub fn registers(input: &mut Input<'_>) -> ControlRegisters {
    let mode = input.byte() & 7;
    let free = input.u64();
    let root = (free >> 40 & (PAGES - 1)) << 12;
    let paged = CR0_PE | CR0_PG | free & CR0_WP;
    let nxe = free >> 32 & EFER_NXE;
    let registers = |cr0, cr4, efer| ControlRegisters {
        cr0,
        cr3: root | free >> 8 & 0x18,
        // CET wants CR0.WP, and of eight that have not got that, one has CET.
        cr4: cr4 | free & (CR4_FREE | if free & CR0_WP != 0 || free >> 48 & 7 == 0 { CR4_CET } else { 0 }),
        efer,
        ..ControlRegisters::default()
    };
    let long = EFER_LME | EFER_LMA | nxe;
    // Bits that one vendor has and the other one refuses: seldom.
    let tagged = |registers: ControlRegisters| match free >> 60 {
        0..=3 => ControlRegisters { cr3: registers.cr3 | free << 5 & CR3_LAM, ..registers },
        4 => ControlRegisters { cr4: registers.cr4 | CR4_LAM_SUP, ..registers },
        5 => ControlRegisters { efer: registers.efer | EFER_UAIE, ..registers },
        _ => registers,
    };
    match mode {
        0 => registers(CR0_PE, 0, 0),
        1 => registers(paged, 0, nxe),
        2 => ControlRegisters { cr3: root | free >> 8 & 0xfe0, ..registers(paged, CR4_PAE, nxe) },
        3 | 4 => tagged(registers(paged, CR4_PAE, long)),
        5 | 6 => tagged(registers(paged, CR4_PAE | CR4_LA57, long)),
        _ => ControlRegisters {
            cr0: input.u64(),
            cr3: input.u64(),
            cr4: input.u64(),
            efer: input.u64(),
            pat: input.u64(),
        },
    }
}

/// `gva_walk`, where a CPU accepts the registers; under PAE paging with its PDPTE registers, or without.
pub fn gva_walk(input: &mut Input<'_>, registers: &ControlRegisters, cpu: &CpuProfile) -> Option<PageWalk> {
    let walk = PageWalk::new(registers, cpu).ok()?;
    let held = input.byte();
    if walk.format().mode() == PagingMode::Pae && held & 1 != 0 {
        let pdptes = core::array::from_fn(|number| match held >> (number + 1) & 1 {
            0 => input.u64(),
            _ => u64::from(input.byte() & 15) << 12 | 1,
        });
        return PageWalk::with_pdptes(registers, pdptes, cpu).ok();
    }
    Some(walk)
}

/// EPTP, and what decides over it: of a page-walk length and options that bytes select, or arbitrary words.
pub fn ept(input: &mut Input<'_>) -> (u64, EptControls, EptCapabilities) {
    let byte = input.byte();
    let options = input.byte();
    let controls = EptControls { mode_based_execute: options & 1 != 0, tables_written: options & 2 != 0 };
    if options & 0x80 != 0 {
        return (input.u64(), controls, EptCapabilities::from_msr(input.u64()));
    }
    let memory_type = if options & 4 == 0 { 6 } else { 0 };
    let length = if byte & 0x10 == 0 { 3 } else { 4 };
    // Accessed and dirty bits, supervisor shadow-stack control.
    let features = u64::from(options >> 3 & 3) << 6;
    let eptp = u64::from(byte & 15) << 12 | features | length << 3 | memory_type;
    // The same CPU without one of its features: execute-only pages, 2 MiB pages, 1 GiB pages, advanced information.
    let lacks = [0, 1, 1 << 16, 1 << 17, 1 << 22][usize::from(byte >> 5) % 5];
    (eptp, controls, EptCapabilities::from_msr(!lacks))
}

/// A second dimension, where the bytes ask for one and a CPU accepts it.
pub fn ngpa_walk(input: &mut Input<'_>, cpu: &CpuProfile) -> Option<NgpaWalk> {
    let kind = input.byte();
    match kind & 7 {
        0..=2 => None,
        3..=5 => {
            let host = registers(input);
            let ncr3 = if kind & 0x80 != 0 { input.u64() } else { u64::from(kind >> 3 & 15) << 12 };
            let controls = NptControls { guest_mode_execute_trap: kind & 7 == 5 };
            NgpaWalk::npt_with(ncr3, &host, &controls, cpu).ok()
        }
        _ => {
            let (eptp, controls, capabilities) = ept(input);
            NgpaWalk::ept(eptp, &controls, &capabilities, cpu).ok()
        }
    }
}

/// Both walkers.
pub fn walker(input: &mut Input<'_>) -> Option<Walker> {
    let cpu = cpu(input);
    let registers = registers(input);
    let gva_walk = gva_walk(input, &registers, &cpu)?;
    Some(match ngpa_walk(input, &cpu) {
        None => Walker::new(gva_walk),
        Some(second) => Walker::nested(gva_walk, second),
    })
}

/// One access.
pub fn access(input: &mut Input<'_>) -> Access {
    let byte = input.byte();
    let kind = match byte % 20 {
        18 => AccessKind::ShadowStackRead,
        19 => AccessKind::ShadowStackWrite,
        other => [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][other as usize % 3],
    };
    let privilege =
        [Privilege::Supervisor, Privilege::ImplicitSupervisor, Privilege::User, Privilege::Exempt];
    let privilege = privilege[input.byte() as usize & 3];
    let keys = if byte & 0x40 == 0 { 0 } else { input.u32() };
    let access = Access::new(kind, privilege).with_ac(byte & 0x80 != 0).through_stack(byte & 0x20 != 0);
    access.with_pkru(keys).with_pkrs(keys.rotate_left(16))
}
