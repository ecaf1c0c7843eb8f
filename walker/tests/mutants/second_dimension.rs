//! Mutants of what EPT and GMET make of an address, a page and its rights.

use crate::{EPT, Mutant, unseen};

/// One that worked examples notice: no walk decides whether an EPTP is taken, or what a memory type comes to.
const fn unasked(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: EPT, changes }
}

pub(crate) const MUTANTS: &[Mutant] = &[
    // EPTP.
    unasked("bit 8 of EPTP is free", &[("ept.rs", "let unknown = bits(8, 11)", "let unknown = bits(9, 11)")]),
    unasked(
        "EPTP's address bits above MAXPHYADDR are free",
        &[("ept.rs", "            | cpu.address_reserved(63)\n", "")],
    ),
    unasked(
        "every EPT has accessed and dirty bits",
        &[("ept.rs", "unless(capabilities.accessed_dirty, EPTP_ACCESSED_DIRTY)", "0")],
    ),
    unasked(
        "every EPT has supervisor shadow-stack control",
        &[("ept.rs", "unless(capabilities.supervisor_shadow_stack, EPTP_SUPERVISOR_SHADOW_STACK)", "0")],
    ),
    unasked(
        "EPTP takes any memory type",
        &[(
            "ept.rs",
            "_ => return contradiction(\"the memory type (bits 2:0) is neither 0 nor 6\"),",
            "_ => {}",
        )],
    ),
    unasked(
        "EPTP takes any page-walk length",
        &[(
            "ept.rs",
            "_ => return contradiction(\"the page-walk length, 1 more than bits 5:3, is neither 4 nor 5\"),",
            "_ => {}",
        )],
    ),
    // Entries.
    unseen("EPT's memory type 2 is taken", &[("format.rs", "0xff << (2 * 8) | ", "")]),
    unseen("EPT's memory type 3 is taken", &[("format.rs", " | 0xff << (3 * 8)", "")]),
    unseen(
        "an EPT table entry has a memory type",
        &[(
            "entry.rs",
            "= E::bad_rights(format, entry) {",
            "= E::bad_rights(format, entry).or(E::bad_memory_type(format, entry)) {",
        )],
    ),
    unseen("bit 12 of a 2 MiB EPT page is free", &[("reserved.rs", "bits(12, 20)", "bits(13, 20)")]),
    unseen("bit 12 of a 1 GiB EPT page is free", &[("reserved.rs", "bits(12, 29)", "bits(13, 29)")]),
    unseen(
        "bit 10 makes an EPT entry present without mode-based execute control",
        &[("entry.rs", "if MODE_BASED { Ept::USER_EXECUTE } else { 0 }", "Ept::USER_EXECUTE")],
    ),
    unseen(
        "EPT's reserved bits are a violation",
        &[("fault.rs", "Reason::ReservedBits | Reason::WriteWithoutRead", "Reason::WriteWithoutRead")],
    ),
    unseen("EPT's memory types are a violation", &[("fault.rs", "| Reason::MemoryType => {", "=> {")]),
    // Rights.
    unseen(
        "only the EPT leaf's rights count",
        &[("entry.rs", "Grants { withheld: grants.withheld | !entry }", "Grants { withheld: !entry }")],
    ),
    unseen(
        "EPT takes the user's right away",
        &[(
            "ept.rs",
            "guest.and(nested.or(Rights::USER).or(Rights::EXECUTE))",
            "guest.and(nested.or(Rights::EXECUTE))",
        )],
    ),
    unseen(
        "what EPT forbids to write is told as writable",
        &[(
            "ept.rs",
            "nested.or(Rights::USER).or(Rights::EXECUTE)",
            "nested.or(Rights::USER).or(Rights::EXECUTE).or(Rights::WRITE)",
        )],
    ),
    unseen(
        "an unpaged address is the supervisor's",
        &[("walk.rs", "Shown::of(Rights::ALL)", "Shown::of(Rights::ALL.without(Rights::USER))")],
    ),
    // Accesses to the guest's tables.
    unseen(
        "a walk as KVM makes it reads tables",
        &[(
            "ept.rs",
            "self.walk.format().has_accessed_dirty() || self.controls.tables_written",
            "self.walk.format().has_accessed_dirty()",
        )],
    ),
    unseen(
        "a leaf is marked before its rights are checked",
        &[(
            "descent.rs",
            "permit::<E>(&leaf, level, format, purpose.access, &path).map_err(Stop::Refused)?;
                check_update::<E>(entry, level, purpose.access.is_write(), &update)?;",
            "check_update::<E>(entry, level, purpose.access.is_write(), &update)?;
                permit::<E>(&leaf, level, format, purpose.access, &path).map_err(Stop::Refused)?;",
        )],
    ),
    unseen(
        "only the leaf's accessed bit has to be writable",
        &[("descent.rs", "                check_update::<E>(entry, level, false, &update)?;\n", "")],
    ),
    unseen(
        "an access that checks no rights may not mark a table",
        &[(
            "descent.rs",
            "Access::new(AccessKind::Write, purpose.access.privilege())",
            "Access::new(AccessKind::Write, crate::access::Privilege::User)",
        )],
    ),
    // The exit qualification.
    unseen(
        "advanced information tells the access's privilege",
        &[(
            "ept.rs",
            "when(guest.user(), EPT_VIOLATION_USER_PAGE)",
            "when(need.access.is_user(), EPT_VIOLATION_USER_PAGE)",
        )],
    ),
    unseen(
        "advanced information tells EPT's right to write",
        &[(
            "ept.rs",
            "when(guest.write(), EPT_VIOLATION_WRITABLE_PAGE)",
            "when(rights.write(), EPT_VIOLATION_WRITABLE_PAGE)",
        )],
    ),
    unseen(
        "advanced information tells EPT's right to execute",
        &[(
            "ept.rs",
            "when(!guest.execute(), EPT_VIOLATION_NO_EXECUTE_PAGE)",
            "when(!rights.execute(), EPT_VIOLATION_NO_EXECUTE_PAGE)",
        )],
    ),
    // The memory type.
    unasked("EPT's type never ignores the PAT", &[("memory_type.rs", "if self.ignore_pat {", "if false {")]),
    unseen("bit 7 ignores the PAT", &[("memory_type.rs", "entry >> 6 & 1 != 0", "entry >> 7 & 1 != 0")]),
    unasked(
        "CR0.CD does not count in the memory type",
        &[("format.rs", "cache_disabled: registers.cr0 & CR0_CD != 0", "cache_disabled: false")],
    ),
    // GMET.
    unseen(
        "GMET refuses users' fetches, too",
        &[(
            "permission.rs",
            "(self.smep && to_user_page)",
            "(self.smep && (to_user_page || self.supervisor_pages_open && rights.user()))",
        )],
    ),
    unseen(
        "what GMET traps is told as executable",
        &[("npt.rs", "if trapped { all.without(Rights::EXECUTE) } else { all }", "all")],
    ),
];
