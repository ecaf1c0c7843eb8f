//! The walker's answers in the oracle's words, so that they compare with `==`.

use pagewalk::{
    Access, AccessKind, Backing, Fault, FaultKind, MemoryType, PageSize, Privilege, Reason, Rights, Step,
    Translation, Verdict,
};

use crate::oracle::{
    By, Cause, Dimension, Event, Found, Granted, Kind, Nature, Page, Refusal, Request, Size, Visit,
};

pub(crate) fn access(request: &Request) -> Access {
    let kind = match request.kind {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Fetch => AccessKind::Fetch,
        Kind::ShadowStackRead => AccessKind::ShadowStackRead,
        Kind::ShadowStackWrite => AccessKind::ShadowStackWrite,
    };
    let privilege = match request.by {
        By::User => Privilege::User,
        By::Supervisor => Privilege::Supervisor,
        By::ImplicitSupervisor => Privilege::ImplicitSupervisor,
        By::Exempt => Privilege::Exempt,
    };
    Access::new(kind, privilege)
        .with_ac(request.ac)
        .with_pkru(request.pkru)
        .with_pkrs(request.pkrs)
        .through_stack(request.stack)
}

/// The walker's outcome; `None` where the oracle has no word for it.
pub(crate) fn outcome(of: &Result<Translation, Fault>) -> Option<Result<Page, Refusal>> {
    match of {
        Ok(translation) => page(translation).map(Ok),
        Err(fault) => refusal(fault).map(Err),
    }
}

fn page(of: &Translation) -> Option<Page> {
    Some(Page {
        physical: of.gpa.0,
        nested: of.nested.map(|nested| (nested.ngpa.0, size(nested.page_size))),
        entry: of.entry,
        size: size(of.page_size()),
        granted: granted(of.rights()),
        key: of.key(),
        accessed: of.accessed(),
        dirty: of.dirty(),
        global: of.global(),
        pat_index: of.pat_index(),
        ept_type: of
            .nested
            .and_then(|nested| nested.ept_memory_type)
            .map(|it| (ept_type(it.memory_type), it.ignore_pat)),
        nature: match of.backing() {
            Backing::Ram => Nature::Ram,
            Backing::ReadOnly => Nature::Rom,
            Backing::None => Nature::Nothing,
        },
    })
}

/// The encoding of a memory type, as in the MTRRs, the PAT and EPT.
pub(crate) fn ept_type(of: MemoryType) -> u64 {
    match of {
        MemoryType::Uncacheable => 0,
        MemoryType::WriteCombining => 1,
        MemoryType::WriteThrough => 4,
        MemoryType::WriteProtected => 5,
        MemoryType::WriteBack => 6,
        MemoryType::UncacheableMinus => 7,
    }
}

fn size(of: PageSize) -> Size {
    match of {
        PageSize::Unpaged => Size::Unpaged,
        PageSize::Size4K => Size::FourKib,
        PageSize::Size2M => Size::TwoMib,
        PageSize::Size4M => Size::FourMib,
        PageSize::Size1G => Size::OneGib,
    }
}

fn granted(of: Rights) -> Granted {
    Granted { read: of.read(), write: of.write(), user: of.user(), execute: of.execute() }
}

fn dimension(of: pagewalk::Dimension) -> Dimension {
    match of {
        pagewalk::Dimension::Guest => Dimension::Guest,
        pagewalk::Dimension::Nested => Dimension::Nested,
    }
}

fn refusal(of: &Fault) -> Option<Refusal> {
    Some(Refusal {
        event: match of.kind {
            FaultKind::PageFault { error_code } => Event::PageFault(error_code),
            FaultKind::GeneralProtection => Event::GeneralProtection,
            FaultKind::StackFault => Event::StackFault,
            FaultKind::NestedPageFault { exit_info_1 } => Event::NestedPageFault(exit_info_1),
            FaultKind::Unbacked => Event::Unbacked,
            FaultKind::EptViolation { exit_qualification } => Event::EptViolation(exit_qualification),
            FaultKind::EptMisconfiguration => Event::EptMisconfiguration,
            FaultKind::Contended => return None,
        },
        cause: match of.reason {
            Reason::NonCanonical => Cause::NonCanonical,
            Reason::TooWide => Cause::TooWide,
            Reason::TableUnbacked => Cause::TableUnbacked,
            Reason::NotPresent => Cause::NotPresent,
            Reason::ReservedBits => Cause::ReservedBits,
            Reason::SupervisorPage => Cause::SupervisorPage,
            Reason::NoExecute => Cause::NoExecute,
            Reason::Smep => Cause::Smep,
            Reason::Smap => Cause::Smap,
            Reason::ReadOnly => Cause::ReadOnly,
            Reason::ProtectionKey => Cause::ProtectionKey,
            Reason::UserShadowStack => Cause::UserShadowStack,
            Reason::NotShadowStack => Cause::NotShadowStack,
            Reason::NotReadable => Cause::NotReadable,
            Reason::WriteWithoutRead => Cause::WriteWithoutRead,
            Reason::ExecuteOnly => Cause::ExecuteOnly,
            Reason::MemoryType => Cause::MemoryType,
            Reason::GuestModeExecuteTrap => Cause::Gmet,
            Reason::Changing => return None,
        },
        linear: of.address,
        dimension: dimension(of.dimension),
        level: of.level,
        at: of.entry_gpa.0,
        entry: of.entry,
        bits: of.bits,
        nested: of.nested_gpa.map(|it| it.0),
    })
}

/// Whether the walker's steps tell of the same visits. (`Visit::writes` shows in what is dirty afterwards.)
pub(crate) fn same_steps(steps: &[Step], visits: &[Visit]) -> bool {
    steps.len() == visits.len() && steps.iter().zip(visits).all(|(step, visit)| same_step(step, visit))
}

fn same_step(step: &Step, visit: &Visit) -> bool {
    let found = match step.verdict {
        Verdict::Table => Found::Table,
        Verdict::Leaf => Found::Leaf,
        Verdict::NotPresent => Found::NotPresent,
        Verdict::Reserved => Found::Reserved,
        Verdict::Misconfigured => Found::Misconfigured,
        Verdict::Unbacked => Found::Unbacked,
    };
    dimension(step.dimension) == visit.dimension
        && step.level == visit.level
        && step.input == visit.input
        && step.table_gpa.0 == visit.table
        && step.index == visit.index
        && step.entry_gpa.0 == visit.address
        && step.entry == visit.entry
        && granted(step.rights_so_far) == visit.so_far
        && found == visit.found
}
