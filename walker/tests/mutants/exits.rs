//! What an L1 sees of its L2 under EPT: which exit, its qualification, its addresses. kvm_intel alone judges these, by what an L2
//! executes.

use crate::{KVM_INTEL, Mutant};

const fn seen_by_l1(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: KVM_INTEL, changes }
}

pub(crate) const MUTANTS: &[Mutant] = &[
    seen_by_l1(
        "L1 sees the access to a table as the final one",
        &[(
            "ept.rs",
            "NestedPhase::Table => EPT_VIOLATION_GVA_VALID,",
            "NestedPhase::Table => EPT_VIOLATION_GVA_VALID | EPT_VIOLATION_GVA_TRANSLATED,",
        )],
    ),
    seen_by_l1(
        "L1 sees the access to a table without a linear address",
        &[("ept.rs", "NestedPhase::Table => EPT_VIOLATION_GVA_VALID,", "NestedPhase::Table => 0,")],
    ),
    seen_by_l1(
        "L1 sees a write as a read",
        &[(
            "ept.rs",
            "AccessKind::Write => EPT_VIOLATION_WRITE,",
            "AccessKind::Write => EPT_VIOLATION_READ,",
        )],
    ),
    seen_by_l1(
        "L1 sees a fetch as a read",
        &[(
            "ept.rs",
            "AccessKind::Fetch => EPT_VIOLATION_FETCH,",
            "AccessKind::Fetch => EPT_VIOLATION_READ,",
        )],
    ),
    seen_by_l1(
        "L1 does not see what EPT allows",
        &[("ept.rs", "let rights = refusal.rights;", "let rights = Rights::NONE;")],
    ),
    seen_by_l1(
        "L1 sees what EPT allows to write as what it allows to read",
        &[(
            "ept.rs",
            "when(rights.write(), EPT_VIOLATION_WRITABLE)",
            "when(rights.read(), EPT_VIOLATION_WRITABLE)",
        )],
    ),
    seen_by_l1(
        "L1 sees the page of the guest-physical address alone",
        &[(
            "fault.rs",
            "Fault { nested_gpa: Some(ngpa), ..self.into_fault(kind, Dimension::Nested, 0) }",
            "Fault {
                nested_gpa: Some(NestedGpa(ngpa.0 & !0xfff)),
                ..self.into_fault(kind, Dimension::Nested, 0)
            }",
        )],
    ),
    seen_by_l1(
        "L1 sees the page of the linear address alone",
        &[(
            "walk.rs",
            ".map_err(|fault| Fault { address: gva, ..fault })?;",
            ".map_err(|fault| Fault { address: gva & !0xfff, ..fault })?;",
        )],
    ),
    seen_by_l1(
        "L1 sees a memory type that does not exist as a violation",
        &[("fault.rs", "Reason::ExecuteOnly | Reason::MemoryType => {", "Reason::ExecuteOnly => {")],
    ),
    seen_by_l1(
        "L1 sees a page that is writable and not readable as a violation",
        &[(
            "fault.rs",
            "Reason::ReservedBits | Reason::WriteWithoutRead | Reason::ExecuteOnly",
            "Reason::ReservedBits | Reason::ExecuteOnly",
        )],
    ),
    seen_by_l1(
        "L1 sees an absent entry as a misconfiguration",
        &[(
            "fault.rs",
            "Reason::ReservedBits | Reason::WriteWithoutRead | Reason::ExecuteOnly",
            "Reason::NotPresent | Reason::ReservedBits | Reason::WriteWithoutRead | Reason::ExecuteOnly",
        )],
    ),
];
