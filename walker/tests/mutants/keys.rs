//! Keys of user pages, and what a fault and a trace tell.

use crate::{Mutant, unseen};

pub(crate) const MUTANTS: &[Mutant] = &[
    unseen("PKRU is ignored", &[("permission.rs", "& decides) as u8", "& decides & 0) as u8")]),
    unseen(
        "keys guard supervisor pages",
        &[("permission.rs", "else { self.supervisor_keys };", "else { self.user_keys };")],
    ),
    unseen(
        "keys guard instruction fetches",
        &[("permission.rs", "if keys && index & FETCH == 0 {", "if keys {")],
    ),
    unseen(
        "a key's write-disable binds supervisors without CR0.WP",
        &[(
            "permission.rs",
            "index & WRITE != 0 && (user_write || self.write_protect)",
            "index & WRITE != 0 && (true || user_write)",
        )],
    ),
    unseen(
        "a key is reported only where it alone refuses",
        &[("fault.rs", "if self.key {", "if self.key && matches!(self.reason, Reason::ProtectionKey) {")],
    ),
    unseen(
        "the entry nearest to the root is blamed",
        &[("descent.rs", "(from..=format.levels()).find(", "(from..=format.levels()).rev().find(")],
    ),
    unseen(
        "an absent entry grants rights",
        &[("descent.rs", "entry, Rights::NONE, Verdict::NotPresent", "entry, rights, Verdict::NotPresent")],
    ),
];
