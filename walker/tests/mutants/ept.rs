//! EPT: presence, misconfigurations, rights, what a violation tells, accessed and dirty bits.

use crate::{EPT, Mutant, unseen};

pub(crate) const MUTANTS: &[Mutant] = &[
    unseen(
        "an execute-only entry is absent",
        &[("entry.rs", "const PRESENT: u64 = 7 | if MODE_BASED", "const PRESENT: u64 = 3 | if MODE_BASED")],
    ),
    unseen(
        "an entry that only users may execute is absent",
        &[(
            "entry.rs",
            "7 | if MODE_BASED { Ept::USER_EXECUTE } else { 0 }",
            "7 | if MODE_BASED { 0 } else { 0 }",
        )],
    ),
    unseen(
        "an entry may be writable and not readable",
        &[("format.rs", "types | unreadable | only_executable", "types | only_executable")],
    ),
    unseen(
        "every CPU knows execute-only entries",
        &[("format.rs", "types | unreadable | only_executable", "types | unreadable")],
    ),
    unseen(
        "no CPU knows execute-only entries",
        &[("format.rs", "(true, _) => 0,", "(true, _) => EVERY_TYPE << 0b100,")],
    ),
    unseen(
        "bit 10 does not make an entry execute-only",
        &[(
            "format.rs",
            "(false, true) => EVERY_TYPE << 0b100 | EVERY_TYPE,",
            "(false, true) => EVERY_TYPE << 0b100,",
        )],
    ),
    unseen(
        "memory type 7 is taken",
        &[(
            "format.rs",
            "0xff << (2 * 8) | 0xff << (3 * 8) | 0xff << (7 * 8);",
            "0xff << (2 * 8) | 0xff << (3 * 8);",
        )],
    ),
    unseen(
        "bits 6:3 of an EPT table entry are free",
        &[("reserved.rs", "let table = everywhere | bits(3, 6);", "let table = everywhere;")],
    ),
    unseen(
        "bits 7:3 of an EPT PML4E are free",
        &[("reserved.rs", "let no_leaf = everywhere | bits(3, 7);", "let no_leaf = everywhere;")],
    ),
    unseen(
        "a large EPT page may be misaligned",
        &[("reserved.rs", "everywhere | bits(12, 20) } else { no_leaf }", "everywhere } else { no_leaf }")],
    ),
    unseen(
        "every EPT maps 1 GiB pages",
        &[("reserved.rs", "let pdpte = if pages_1g {", "let pdpte = if pages_1g || true {")],
    ),
    unseen(
        "every EPT maps 2 MiB pages",
        &[("reserved.rs", "let pde = if pages_2m {", "let pde = if pages_2m || true {")],
    ),
    unseen(
        "EPT's address bits above MAXPHYADDR are free",
        &[("reserved.rs", "let everywhere = cpu.address_reserved(51);", "let everywhere = 0; let _ = cpu;")],
    ),
    unseen(
        "5-level EPT is walked as four levels",
        &[("format.rs", "levels: if five_level { 5 } else { 4 },", "levels: 4,")],
    ),
    unseen(
        "an nGPA's bits above EPT's width are dropped",
        &[("ept.rs", "if ngpa.0 >> (self.walk.format().linear_width() & 63) != 0 {", "if false {")],
    ),
    unseen(
        "bit 2 lets users execute, too",
        &[("permission.rs", "(true, true, _) => Rights::USER,", "(true, true, _) => Rights::EXECUTE,")],
    ),
    unseen(
        "bit 10 lets supervisors execute, too",
        &[("permission.rs", "(true, false, _) => Rights::EXECUTE,", "(true, false, _) => Rights::USER,")],
    ),
    unseen(
        "the CPL and not the guest's U/S picks the right to execute",
        &[("ept.rs", "_ if guest.user() => Privilege::User,", "Privilege::User => Privilege::User,")],
    ),
    unseen(
        "EPT lets nobody read what it lets everybody write",
        &[("permission.rs", "(false, _, false) => Rights::READ,", "(false, _, false) => Rights::WRITE,")],
    ),
    unseen(
        "EPT's accessed and dirty bits do not make writes of table accesses",
        &[(
            "ept.rs",
            "self.walk.format().has_accessed_dirty() || self.controls.tables_written",
            "self.controls.tables_written",
        )],
    ),
    unseen(
        "every table access under EPT is a write",
        &[("ept.rs", "self.walk.format().has_accessed_dirty() || self.controls.tables_written", "true")],
    ),
    unseen(
        "PDPTEs are loaded as writes",
        &[("ept.rs", "NestedPhase::Pdpte => AccessKind::Read,", "NestedPhase::Pdpte => AccessKind::Write,")],
    ),
    unseen(
        "the load of a PDPTE tells a linear address",
        &[("ept.rs", "NestedPhase::Pdpte => 0,", "NestedPhase::Pdpte => EPT_VIOLATION_GVA_VALID,")],
    ),
    unseen(
        "a table access is told as the final one",
        &[(
            "ept.rs",
            "NestedPhase::Table => EPT_VIOLATION_GVA_VALID,",
            "NestedPhase::Table => EPT_VIOLATION_GVA_VALID | EPT_VIOLATION_GVA_TRANSLATED,",
        )],
    ),
    unseen(
        "a table's write is not told as a read",
        &[(
            "ept.rs",
            "AccessKind::Write if phase != NestedPhase::Final => EPT_VIOLATION_READ | EPT_VIOLATION_WRITE,",
            "AccessKind::Write if phase != NestedPhase::Final => EPT_VIOLATION_WRITE,",
        )],
    ),
    unseen(
        "bit 6 is told without mode-based execute control",
        &[("ept.rs", "when(rights.user() && self.controls.mode_based_execute,", "when(rights.user(),")],
    ),
    unseen(
        "advanced information is told by every CPU",
        &[("ept.rs", "if self.advanced_information && phase", "if phase")],
    ),
    unseen(
        "bit 60 is told without supervisor shadow-stack control",
        &[("ept.rs", "self.eptp & EPTP_SUPERVISOR_SHADOW_STACK != 0 && refusal", "refusal")],
    ),
    unseen(
        "a violation does not tell a shadow-stack access",
        &[("ept.rs", "EPT_VIOLATION_WRITE | EPT_VIOLATION_SHADOW_STACK", "EPT_VIOLATION_WRITE")],
    ),
    unseen(
        "rights are told though an entry is absent",
        &[("fault.rs", "rights: Rights::NONE, leaf: 0 }", "rights: Rights::ALL, leaf: 0 }")],
    ),
    unseen(
        "a supervisor's shadow stack needs no bit 60",
        &[("ept.rs", "} else if leaf.entry & SUPERVISOR_SHADOW_STACK == 0 {", "} else if false {")],
    ),
    unseen(
        "a supervisor's shadow stack has to be writable",
        &[("ept.rs", "(above..=format.levels()).all(", "(level..=format.levels()).all(")],
    ),
    unseen(
        "bit 60 binds users, too",
        &[("permission.rs", "supervisor_shadow_stacks && index & USER == 0;", "supervisor_shadow_stacks;")],
    ),
    unseen(
        "an unpaged shadow-stack access is the user's",
        &[("ept.rs", "privilege if access.is_shadow_stack() => privilege,", "")],
    ),
    unseen(
        "a guest's accessed bit is set where EPT forbids writes",
        &[("descent.rs", "E::sets(level, dirties) & !entry != 0 =>", "level == 0 && dirties =>")],
    ),
    // So rare in the oracle's cases that a run may meet none: a worked example has it.
    Mutant {
        slip: "a guest's dirty bit is set where EPT forbids writes",
        judges: EPT,
        changes: &[("descent.rs", "purpose.access.is_write(), &update)", "false, &update)")],
    },
    unseen(
        "EPT has accessed bits although EPTP does not say so",
        &[("descent.rs", "if walked && format.has_accessed_dirty()", "if walked")],
    ),
    unseen(
        "EPT's accessed bit is bit 5",
        &[("entry.rs", "const ACCESSED: u64 = 1 << 8;", "const ACCESSED: u64 = 1 << 5;")],
    ),
    unseen(
        "execution is told by bit 2 for user pages",
        &[("ept.rs", "if guest.user() { nested.user() } else { nested.execute() }", "nested.execute()")],
    ),
];
