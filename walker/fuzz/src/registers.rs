//! Arbitrary control registers: which are accepted, and what formats come of them.
//!
//! Whether a CPU accepts a set of registers is written out here a second time, from the manuals' sentences (Intel SDM volume 3,
//! "Control Registers" and "Paging Modes and Control Bits"; AMD APM volume 2, "Extended Feature Enable Register").

use pagewalk::{ControlRegisters, CpuProfile, EptCapabilities, Gpa, NgpaWalk, PageWalk, PagingMode, Vendor};

use crate::input::Input;
use crate::setup;

/// What registers can come to.
pub const CLASSES: [&str; 10] = [
    "refused",
    "unpaged",
    "2-level",
    "PAE",
    "4-level",
    "5-level",
    "PDPTE registers refused",
    "NPT",
    "EPT",
    "EPT refused",
];

/// Checks one input, and counts what it comes to by [`CLASSES`].
pub fn check(bytes: &[u8], counts: &mut [u64]) {
    let mut input = Input::new(bytes);
    let cpu = setup::cpu(&mut input);
    let mut registers = setup::registers(&mut input);
    // Near-misses: plausible registers with a few bits turned.
    for register in
        [&mut registers.cr0, &mut registers.cr3, &mut registers.cr4, &mut registers.efer, &mut registers.pat]
    {
        let flips = input.byte();
        for _ in 0..if flips < 128 { 0 } else { flips & 3 } {
            *register ^= 1 << (input.byte() & 63);
        }
    }
    let pdptes = core::array::from_fn(|_| input.u64());
    let ncr3 = input.u64();

    let walk = PageWalk::new(&registers, &cpu);
    let expected = mode(&registers, &cpu).filter(|mode| {
        // LAM_U57 and LAM_U48; outside long mode nothing is refused.
        let lam = if cpu.vendor == Vendor::Intel { 3 << 61 } else { 0 };
        !mode.is_long() || registers.cr3 & !lam & !cr3_bits(*mode, &cpu) == 0
    });
    assert_eq!(
        walk.as_ref().ok().map(|walk| walk.format().mode()),
        expected,
        "{registers:x?} {cpu:?}: {walk:?}"
    );
    if let Err(problem) = &walk {
        assert!(!problem.to_string().is_empty());
    }
    counts[expected.map_or(0, |mode| 1 + mode as usize)] += 1;
    if let Ok(walk) = &walk {
        plausible(walk, &cpu);
        assert_eq!(
            PageWalk::new(&registers, &cpu).as_ref(),
            Ok(walk),
            "the same registers give another walk"
        );
    }

    let held = PageWalk::with_pdptes(&registers, pdptes, &cpu);
    let loadable = pdptes.iter().all(|pdpte| pdpte & 1 == 0 || pdpte & pdpte_reserved(&cpu) == 0);
    assert_eq!(held.is_ok(), expected == Some(PagingMode::Pae) && loadable, "{pdptes:x?}");
    counts[6] += u64::from(expected == Some(PagingMode::Pae) && !loadable);

    let host = mode(&registers, &cpu).filter(|mode| *mode != PagingMode::None);
    let rooted = host.filter(|mode| ncr3 & !cr3_bits(*mode, &cpu) == 0);
    let npt = NgpaWalk::npt(ncr3, &registers, &cpu);
    assert_eq!(npt.is_ok(), rooted.is_some(), "nCR3 {ncr3:#x}: {npt:?}");
    counts[7] += u64::from(npt.is_ok());
    if let Ok(npt) = &npt {
        plausible(npt.page_walk(), &cpu);
    }

    let (mut eptp, controls, capabilities) = setup::ept(&mut input);
    if input.byte() & 1 != 0 {
        eptp ^= 1 << (input.byte() & 63);
    }
    let ept = NgpaWalk::ept(eptp, &controls, &capabilities, &cpu);
    let accepted = eptp_accepted(eptp, &capabilities, &cpu);
    assert_eq!(ept.is_ok(), accepted, "EPTP {eptp:#x} {capabilities:?} {cpu:?}: {ept:?}");
    counts[if accepted { 8 } else { 9 }] += 1;
    if let Ok(NgpaWalk::Ept(ept)) = &ept {
        let format = ept.page_walk().format();
        assert_eq!(u64::from(format.levels()), (eptp >> 3 & 7) + 1);
        assert_eq!(ept.page_walk().root(), eptp & 0x000f_ffff_ffff_f000 & !encryption(&cpu));
        assert_eq!(ept.eptp(), eptp);
    }
}

/// "Checks on VM-Execution Control Fields": the memory type and page-walk length are ones that the CPU has, bits 6 and 7 are clear
/// where it has not what they enable, and bits 11:8 and those above the physical-address width are clear.
fn eptp_accepted(eptp: u64, capabilities: &EptCapabilities, cpu: &CpuProfile) -> bool {
    let sound =
        (32..=52).contains(&cpu.maxphyaddr) && cpu.encryption_bit.is_none_or(|bit| (47..52).contains(&bit));
    let memory_type = match eptp & 7 {
        0 => capabilities.uncacheable,
        6 => capabilities.write_back,
        _ => false,
    };
    let length = match eptp >> 3 & 7 {
        3 => capabilities.four_level,
        4 => capabilities.five_level,
        _ => false,
    };
    sound
        && memory_type
        && length
        && (eptp >> 6 & 1 == 0 || capabilities.accessed_dirty)
        && (eptp >> 7 & 1 == 0 || capabilities.supervisor_shadow_stack)
        && eptp & 0xf00 == 0
        && eptp & !(low(cpu.maxphyaddr) | encryption(cpu)) == 0
}

/// What every format has to be, whatever it was built from.
fn plausible(walk: &PageWalk, cpu: &CpuProfile) {
    let format = walk.format();
    let (levels, width, bytes) = match format.mode() {
        PagingMode::None => (0, 32, 0),
        PagingMode::TwoLevel => (2, 32, 4),
        PagingMode::Pae => (3, 32, 8),
        PagingMode::FourLevel => (4, 48, 8),
        PagingMode::FiveLevel => (5, 57, 8),
    };
    assert_eq!((format.levels(), format.linear_width(), format.entry_bytes()), (levels, width, bytes));
    assert_eq!(format.reserved_leaf().len(), levels as usize);
    assert_eq!(format.reserved_table().len(), levels as usize);
    assert_eq!(format.permissions().len(), 16);
    assert_eq!(format.maxphyaddr(), cpu.maxphyaddr);
    for mask in format.reserved_leaf().iter().chain(format.reserved_table()) {
        assert_eq!(mask & 1, 0, "the present bit is reserved");
        assert!(bytes == 8 || mask >> 32 == 0);
    }
    if levels > 3 {
        assert_eq!(walk.root() & encryption(cpu), 0, "the encryption bit is taken for an address bit");
    }
    // The first table lies within the CPU's physical addresses.
    let Gpa(root) = Gpa(walk.root());
    let aligned = if format.mode() == PagingMode::Pae { 32 } else { 4096 };
    assert!(levels == 0 || root % aligned == 0 && root < 1 << 52, "{root:#x}");
    // A word refuses at least what it would with every right granted, and a right granted to nobody refuses all but data reads.
    for (index, word) in format.permissions().iter().enumerate() {
        assert!(
            index & 2 == 0 || word & 0x0f0f == 0x0f0f,
            "a user reaches a supervisor page: word {index} is {word:#x}"
        );
        assert!(
            index & 8 == 0 || word & 0x00ff == 0x00ff,
            "a fetch from a no-execute page: word {index} is {word:#x}"
        );
    }
}

fn cr3_bits(mode: PagingMode, cpu: &CpuProfile) -> u64 {
    match mode {
        PagingMode::None => u64::MAX,
        PagingMode::TwoLevel | PagingMode::Pae => 0xffff_ffff,
        PagingMode::FourLevel | PagingMode::FiveLevel => low(cpu.maxphyaddr) | encryption(cpu),
    }
}

fn low(width: u8) -> u64 {
    1_u64.checked_shl(u32::from(width)).map_or(u64::MAX, |bit| bit - 1)
}

/// The bit that stands for encryption, and is no address bit.
fn encryption(cpu: &CpuProfile) -> u64 {
    cpu.encryption_bit.and_then(|bit| 1_u64.checked_shl(u32::from(bit))).unwrap_or(0)
}

fn pdpte_reserved(cpu: &CpuProfile) -> u64 {
    !(low(cpu.maxphyaddr) & !0xfff | encryption(cpu) | 0xe19)
}

/// The mode, if a CPU accepts the registers.
fn mode(registers: &ControlRegisters, cpu: &CpuProfile) -> Option<PagingMode> {
    let &ControlRegisters { cr0, cr4, efer, pat, .. } = registers;
    let bit = |register: u64, number: u32| register >> number & 1 != 0;
    // CR0: PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
    let cr0_defined = [0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31];
    // CR4: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, LA57, VMXE, SMXE; FSGSBASE, PCIDE, OSXSAVE,
    // KL, SMEP, SMAP, PKE, CET, PKS, UINTR; LASS, LAM_SUP; FRED.
    let cr4_defined: Vec<u32> = (0..15).chain(16..26).chain([27, 28, 32]).collect();
    // EFER: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE.
    let efer_defined = [0, 8, 10, 11, 12, 13, 14, 15, 17, 18, 20, 21];
    let only = |register: u64, defined: &[u32]| {
        (0..64).all(|number| !bit(register, number) || defined.contains(&number))
    };
    let types = pat.to_le_bytes().into_iter().all(|field| matches!(field, 0 | 1 | 4 | 5 | 6 | 7));
    let sound = (32..=52).contains(&cpu.maxphyaddr)
        && only(cr0, &cr0_defined)
        && only(cr4, &cr4_defined)
        && only(efer, &efer_defined)
        && types
        && cpu.encryption_bit.is_none_or(|bit| (47..52).contains(&bit))
        // "NW=1 and CD=0 is invalid."
        && (!bit(cr0, 29) || bit(cr0, 30))
        // CR4.CET cannot be set while CR0.WP is clear, nor CR0.WP cleared while CR4.CET is set.
        && (!bit(cr4, 23) || bit(cr0, 16))
        // Upper address ignore is AMD's, linear-address masking Intel's.
        && match cpu.vendor {
            Vendor::Intel => !bit(efer, 20),
            Vendor::Amd => !bit(cr4, 28),
        };
    if !sound {
        return None;
    }
    let (paged, long, active) = (bit(cr0, 31), bit(efer, 8), bit(efer, 10));
    if !paged {
        return (!active).then_some(PagingMode::None);
    }
    // Paging needs protection; IA-32e mode needs PAE, and is active exactly when it is enabled; only it has PCIDs.
    if !bit(cr0, 0) || long != active || long && !bit(cr4, 5) || !long && bit(cr4, 17) {
        return None;
    }
    Some(match (bit(cr4, 5), long, bit(cr4, 12)) {
        (false, ..) => PagingMode::TwoLevel,
        (true, false, _) => PagingMode::Pae,
        (true, true, false) => PagingMode::FourLevel,
        (true, true, true) => PagingMode::FiveLevel,
    })
}
