//! NPT and GMET, and what both kinds of second dimension share.

use crate::{Mutant, unseen};

pub(crate) const MUTANTS: &[Mutant] = &[
    unseen(
        "a guest's table is read, not written, in the nested walk",
        &[(
            "npt.rs",
            "if table { AccessKind::Write } else { access.kind() }",
            "if table { AccessKind::Read } else { access.kind() }",
        )],
    ),
    unseen(
        "the phase does not decide how the second dimension alone is walked",
        &[("npt.rs", "if table { AccessKind::Write } else { access.kind() }", "access.kind()")],
    ),
    unseen(
        "EXITINFO1 takes guest tables for final addresses",
        &[("npt.rs", "if table { EXIT_INFO_1_TABLE }", "if table { EXIT_INFO_1_FINAL }")],
    ),
    unseen(
        "an nGPA's bits above the width are dropped",
        &[("npt.rs", "if ngpa.0 >> (format.linear_width() & 63) != 0 {", "if false {")],
    ),
    unseen(
        "the second dimension's rights do not count in the answer",
        &[("walk.rs", "with_rights(nested.rights)", "with_rights(page.rights())")],
    ),
    unseen(
        "a guest's table is read by the supervisor in the nested walk",
        &[("npt.rs", "_ => Privilege::User,", "_ => Privilege::Supervisor,")],
    ),
    unseen(
        "a nested PAE guest's PDPTE registers are not used",
        &[("walk.rs", "Some(pdptes) if level == self.format.levels()", "Some(pdptes) if level == 0")],
    ),
    unseen(
        "GMET does nothing to fetches",
        &[(
            "permission.rs",
            "Self { smep: true, supervisor_pages_open",
            "Self { smep: false, supervisor_pages_open",
        )],
    ),
    unseen(
        "GMET keeps users out of supervisor pages",
        &[("permission.rs", "supervisor_pages_open: true,", "supervisor_pages_open: false,")],
    ),
    unseen(
        "GMET reports every access as the user's",
        &[("npt.rs", "let user = if gmet && !table { 0 }", "let user = if false { 0 }")],
    ),
    unseen(
        "GMET does not report fetches without EFER.NXE",
        &[(
            "format.rs",
            "Self::build(host, cpu, protections, gmet)?",
            "Self::build(host, cpu, protections, false)?",
        )],
    ),
];
