//! Modes that the kernel's walker here does not have: 5-level, PAE and 32-bit paging.

use crate::{Mutant, RULES, unseen};

pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        slip: "5-level addresses are canonical in 48 bits",
        judges: RULES,
        changes: &[("walk.rs", "is_canonical(address, format.linear_width())", "is_canonical(address, 48)")],
    },
    Mutant {
        slip: "LA57 is walked as four levels",
        judges: RULES,
        changes: &[("format.rs", "PagingMode::FiveLevel => (5,", "PagingMode::FiveLevel => (4,")],
    },
    Mutant {
        slip: "the upper half of CR3 is refused outside long mode",
        judges: RULES,
        changes: &[("walk.rs", "PagingMode::TwoLevel | PagingMode::Pae => bits(32, 63),", "")],
    },
    Mutant {
        slip: "the PAE root is cut to 4 KiB",
        judges: RULES,
        changes: &[("walk.rs", "(bits(32, 63), !0x1f)", "(bits(32, 63), !0xfff)")],
    },
    Mutant {
        slip: "PAE 2 MiB frames are cut to 32 bits",
        judges: RULES,
        changes: &[(
            "entry.rs",
            "LongMode::page(level, entry)\n    }\n\n    fn sets(",
            "LongMode::page(level, entry) & 0xffff_ffff\n    }\n\n    fn sets(",
        )],
    },
    Mutant {
        slip: "a PDPTE's bits are taken for rights",
        judges: RULES,
        changes: &[("entry.rs", "if level == PDPTE { grants }", "if false { grants }")],
    },
    Mutant {
        slip: "a walk sets a PDPTE's accessed bit",
        judges: RULES,
        changes: &[("entry.rs", "if level == PDPTE { 0 }", "if false { 0 }")],
    },
    Mutant {
        slip: "PSE is honoured although CR4.PSE is clear",
        judges: RULES,
        changes: &[("format.rs", "let pse = mode != PagingMode::TwoLevel ||", "let pse = true ||")],
    },
    Mutant {
        slip: "PSE-36 is not known",
        judges: RULES,
        changes: &[("entry.rs", "(entry & 0x001f_e000) << 19", "0")],
    },
    Mutant {
        slip: "EFER.NXE reports fetches in 32-bit paging",
        judges: RULES,
        changes: &[("format.rs", "(nxe && mode != PagingMode::TwoLevel) || smep", "nxe || smep")],
    },
    unseen(
        "bits 62:52 of a PAE entry are free",
        &[(
            "reserved.rs",
            "let everywhere = cpu.address_reserved(62) |",
            "let everywhere = cpu.address_reserved(51) |",
        )],
    ),
    unseen("the low bits of a PDPTE are free", &[("reserved.rs", "bits(1, 2) | bits(5, 8) |", "")]),
    unseen(
        "a 4 MiB page has no reserved bits",
        &[("reserved.rs", "let large = if pse { bits(width - 19, 21) } else { 0 };", "let large = 0;")],
    ),
    unseen(
        "PSE-36 has 40 bits whatever MAXPHYADDR is",
        &[("reserved.rs", "if cpu.maxphyaddr < 40 { cpu.maxphyaddr as u32 } else { 40 }", "40")],
    ),
    unseen(
        "linear addresses are wider than 32 bits outside long mode",
        &[("walk.rs", "} else { gva & LINEAR_32 };", "} else { gva };")],
    ),
    unseen(
        "user pages have keys outside long mode",
        &[("format.rs", "registers.cr4 & CR4_PKE != 0 && long,", "registers.cr4 & CR4_PKE != 0,")],
    ),
];
