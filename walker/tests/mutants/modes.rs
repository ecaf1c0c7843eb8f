//! Modes that the kernel's walker here does not have: 5-level, PAE and 32-bit paging.

use crate::{Mutant, RULES};

pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        slip: "5-level addresses are canonical in 48 bits",
        judges: RULES,
        changes: &[("walk.rs", "is_canonical(masked, format.linear_width())", "is_canonical(masked, 48)")],
    },
    Mutant {
        slip: "LA57 is walked as four levels",
        judges: RULES,
        changes: &[("format.rs", "PagingMode::FiveLevel => (5,", "PagingMode::FiveLevel => (4,")],
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
];
