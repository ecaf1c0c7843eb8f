//! What the kernel's own walker can see here: 4-level paging in one dimension.

use crate::{Mutant, mutant};

pub(crate) const MUTANTS: &[Mutant] = &[
    mutant(
        "rights of the levels are OR-ed",
        &[
            (
                "entry.rs",
                "const ALL: Self = Self { withheld: 0 };",
                "const ALL: Self = Self { withheld: u64::MAX };",
            ),
            (
                "entry.rs",
                "Self { withheld: self.withheld | entry ^ LongMode::GRANTING }",
                "Self { withheld: self.withheld & (entry ^ LongMode::GRANTING) }",
            ),
        ],
    ),
    mutant(
        "only the leaf's rights count",
        &[(
            "entry.rs",
            "Self { withheld: self.withheld | entry ^ LongMode::GRANTING }",
            "Self { withheld: entry ^ LongMode::GRANTING }",
        )],
    ),
    mutant(
        "a table entry has no reserved bits",
        &[("reserved.rs", "table: [everywhere, everywhere, everywhere, top, top, 0, 0, 0]", "table: [0; 8]")],
    ),
    mutant(
        "a 4 KiB leaf has no reserved bits",
        &[(
            "reserved.rs",
            "leaf: [everywhere, everywhere | bits(13, 20)",
            "leaf: [0, everywhere | bits(13, 20)",
        )],
    ),
    mutant(
        "a large frame may be misaligned",
        &[("reserved.rs", "leaf: [everywhere, everywhere | bits(13, 20)", "leaf: [everywhere, everywhere")],
    ),
    mutant(
        "address bits above MAXPHYADDR are free",
        &[("reserved.rs", "let everywhere = cpu.address_reserved(51) |", "let everywhere =")],
    ),
    mutant(
        "bit 8 of an AMD PML4E is free",
        &[("reserved.rs", "Vendor::Amd => LongMode::GLOBAL,", "Vendor::Amd => 0,")],
    ),
    mutant(
        "bit 8 of an Intel PML4E is reserved",
        &[("reserved.rs", "Vendor::Intel => 0,", "Vendor::Intel => LongMode::GLOBAL,")],
    ),
    mutant(
        "bit 7 of a PML4E ends the walk",
        &[("reserved.rs", "let no_leaf = top | LongMode::PAGE_SIZE;", "let no_leaf = top;")],
    ),
    mutant(
        "bit 7 of a PDPTE ends the walk without 1 GiB pages",
        &[("reserved.rs", "if cpu.gib_pages {", "if true {")],
    ),
    mutant(
        "bit 7 of a PDE is ignored",
        &[("entry.rs", "let leaf = level == 1 ||", "let leaf = level == 1 || level > 2 &&")],
    ),
    mutant(
        "the offset into a large page is cut to 12 bits",
        &[("descent.rs", "let within = (1 << shift) - 1;", "let within = 0xfff;")],
    ),
    mutant(
        "NX is reserved although it is enabled",
        &[("reserved.rs", "if nxe { 0 } else { 1 << 63 }", "if nxe { 1 << 63 } else { 1 << 63 }")],
    ),
    mutant(
        "NX is free although it is not enabled",
        &[("reserved.rs", "if nxe { 0 } else { 1 << 63 }", "if nxe { 0 } else { 0 }")],
    ),
    mutant("NX is ignored", &[("permission.rs", "!rights.execute() ||", "")]),
    mutant(
        "an absent entry is searched for reserved bits",
        &[(
            "entry.rs",
            "if entry & E::PRESENT == 0 {",
            "if entry & E::PRESENT == 0 && entry & format.reserved_table_at(level) == 0 {",
        )],
    ),
    mutant(
        "CR0.WP is taken to be set",
        &[("format.rs", "write_protect: registers.cr0 & CR0_WP != 0,", "write_protect: true,")],
    ),
    mutant(
        "CR0.WP is taken to be clear",
        &[("format.rs", "write_protect: registers.cr0 & CR0_WP != 0,", "write_protect: false,")],
    ),
    mutant(
        "U/S is ignored",
        &[(
            "permission.rs",
            "if user_access && !rights.user() && !self.supervisor_pages_open {",
            "if false {",
        )],
    ),
    mutant("SMEP is ignored", &[("format.rs", "smep: registers.cr4 & CR4_SMEP != 0,", "smep: false,")]),
    mutant("SMAP is ignored", &[("format.rs", "smap: registers.cr4 & CR4_SMAP != 0,", "smap: false,")]),
    mutant("SMAP ignores AC", &[("permission.rs", "&& index & SMAP_SUSPENDED == 0", "")]),
    mutant(
        "AC helps an implicit supervisor access",
        &[(
            "access.rs",
            "let suspends_smap = ac as u8 & !(self.privilege as u8) & 1;",
            "let suspends_smap = ac as u8;",
        )],
    ),
    mutant(
        "the error code always tells a fetch",
        &[(
            "format.rs",
            "fetch_reported: (nxe && mode != PagingMode::TwoLevel) || smep,",
            "fetch_reported: true,",
        )],
    ),
    mutant(
        "the error code tells a fetch under NXE only",
        &[(
            "format.rs",
            "fetch_reported: (nxe && mode != PagingMode::TwoLevel) || smep,",
            "fetch_reported: nxe,",
        )],
    ),
    mutant(
        "RSVD without P",
        &[(
            "fault.rs",
            "Reason::ReservedBits => PFEC_PRESENT | PFEC_RESERVED,",
            "Reason::ReservedBits => PFEC_RESERVED,",
        )],
    ),
    mutant(
        "CR2 is cut to the page",
        &[(
            "fault.rs",
            "self.into_fault(kind, Dimension::Guest, gva)",
            "self.into_fault(kind, Dimension::Guest, gva & !0xfff)",
        )],
    ),
    mutant(
        "addresses are not tested for being canonical",
        &[("walk.rs", "if format.mode().is_long() && !is_canonical", "if false && !is_canonical")],
    ),
    mutant(
        "a non-canonical stack access is #GP",
        &[("fault.rs", "Reason::NonCanonical if access.is_stack() => FaultKind::StackFault,", "")],
    ),
    mutant(
        "reads set the dirty bit",
        &[(
            "descent.rs",
            "verdict == Verdict::Leaf && purpose.access.is_write() &&",
            "verdict == Verdict::Leaf &&",
        )],
    ),
    mutant(
        "writes set the dirty bit above the leaf",
        &[(
            "descent.rs",
            "verdict == Verdict::Leaf && purpose.access.is_write() &&",
            "purpose.access.is_write() &&",
        )],
    ),
    mutant("the accessed bit is not set", &[("entry.rs", "Self::ACCESSED | if dirties", "if dirties")]),
    mutant(
        "a walk that faults sets accessed bits",
        &[(
            "accessed_dirty.rs",
            "let translation = walk(trace)?;",
            "let outcome = walk(trace);
             if outcome.is_err() { let _ = commit(memory, trace.steps()); }
             let translation = outcome?;",
        )],
    ),
];
