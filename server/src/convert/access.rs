//! Accesses. What a request leaves open is the vCPU's.

use pagewalk::{Access, AccessKind, NestedPhase, Privilege, Walker};
use pagewalk_proto::v1;

use crate::status::Error;
use crate::vcpu::Registers;

/// RFLAGS.AC.
const RFLAGS_AC: u64 = 1 << 18;

/// An access that the vCPU makes, with its RFLAGS.AC, PKRU and PKRS of now.
pub(crate) fn by_vcpu(kind: AccessKind, privilege: Privilege, registers: &Registers) -> Access {
    Access::new(kind, privilege)
        .with_ac(registers.rflags & RFLAGS_AC != 0)
        .with_pkru(registers.pkru.unwrap_or_default())
        .with_pkrs(registers.pkrs.unwrap_or_default())
}

pub(crate) fn access(request: Option<v1::Access>, registers: &Registers) -> Result<Access, Error> {
    let request = request
        .ok_or_else(|| Error::invalid("access", r#"required, for its kind: {"kind": "ACCESS_KIND_READ"}"#))?;
    let kind = kind(request.kind)?;
    let privilege = privilege(request.privilege, registers, "access.privilege")?;
    if request.stack && kind == AccessKind::Fetch {
        return Err(Error::invalid("access.stack", "a fetch does not go through the stack segment"));
    }
    if request.stack && kind.is_shadow_stack() {
        return Err(Error::invalid(
            "access.stack",
            "a shadow stack has nothing to do with the stack segment",
        ));
    }
    let mut access = by_vcpu(kind, privilege, registers).through_stack(request.stack);
    if let Some(ac) = request.ac {
        access = access.with_ac(ac);
    }
    if let Some(pkru) = request.pkru {
        access = access.with_pkru(pkru);
    }
    if let Some(pkrs) = request.pkrs {
        access = access.with_pkrs(pkrs);
    }
    Ok(access)
}

/// Refuses what no CPU does in this state: a shadow-stack access while CR4.CET is clear.
pub(crate) fn check(access: &Access, walker: &Walker) -> Result<(), Error> {
    if access.is_shadow_stack() && !walker.gva_walk().format().shadow_stacks() {
        let problem =
            "CR4.CET is clear, and without it there are no shadow-stack accesses: ask for a read or a write";
        return Err(Error::invalid("access.kind", problem));
    }
    Ok(())
}

/// The access behind an nGPA: kind and privilege. What belongs to a GVA would be dropped silently, so it is refused.
pub(crate) fn nested(request: Option<v1::Access>, registers: &Registers) -> Result<Access, Error> {
    let given = request.unwrap_or_default();
    let foreign = [
        ("access.ac", given.ac.is_some()),
        ("access.pkru", given.pkru.is_some()),
        ("access.pkrs", given.pkrs.is_some()),
        ("access.stack", given.stack),
    ];
    match foreign.into_iter().find(|(_, given)| *given) {
        Some((field, _)) => Err(Error::invalid(field, "has no say over an nGPA: leave it out")),
        None => access(request, registers),
    }
}

pub(crate) fn phase(phase: i32) -> Result<NestedPhase, Error> {
    match v1::NestedPhase::try_from(phase) {
        Ok(v1::NestedPhase::Unspecified | v1::NestedPhase::Final) => Ok(NestedPhase::Final),
        Ok(v1::NestedPhase::Table) => Ok(NestedPhase::Table),
        Ok(v1::NestedPhase::Pdpte) => Ok(NestedPhase::Pdpte),
        Err(_) => Err(Error::invalid("phase", format!("{phase} is no phase"))),
    }
}

/// What the address is for, as a person says it.
pub(crate) fn describe_phase(phase: NestedPhase) -> &'static str {
    match phase {
        NestedPhase::Final => "final address",
        NestedPhase::Table => "guest table",
        NestedPhase::Pdpte => "guest PDPTE",
    }
}

fn kind(kind: i32) -> Result<AccessKind, Error> {
    match v1::AccessKind::try_from(kind) {
        Ok(v1::AccessKind::Read) => Ok(AccessKind::Read),
        Ok(v1::AccessKind::Write) => Ok(AccessKind::Write),
        Ok(v1::AccessKind::Fetch) => Ok(AccessKind::Fetch),
        Ok(v1::AccessKind::ShadowStackRead) => Ok(AccessKind::ShadowStackRead),
        Ok(v1::AccessKind::ShadowStackWrite) => Ok(AccessKind::ShadowStackWrite),
        Ok(v1::AccessKind::Unspecified) => Err(Error::invalid(
            "access.kind",
            "required: ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_KIND_FETCH or a shadow-stack access",
        )),
        Err(_) => Err(Error::invalid("access.kind", format!("{kind} is no access kind"))),
    }
}

pub(crate) fn privilege(
    privilege: i32,
    registers: &Registers,
    field: &'static str,
) -> Result<Privilege, Error> {
    match v1::Privilege::try_from(privilege) {
        Ok(v1::Privilege::Exempt) => Ok(Privilege::Exempt),
        Ok(v1::Privilege::User) => Ok(Privilege::User),
        Ok(v1::Privilege::Supervisor) => Ok(Privilege::Supervisor),
        Ok(v1::Privilege::ImplicitSupervisor) => Ok(Privilege::ImplicitSupervisor),
        Ok(v1::Privilege::Unspecified | v1::Privilege::AsCpl) if registers.cpl == 3 => Ok(Privilege::User),
        Ok(v1::Privilege::Unspecified | v1::Privilege::AsCpl) => Ok(Privilege::Supervisor),
        Err(_) => Err(Error::invalid(field, format!("{privilege} is no privilege"))),
    }
}

/// "supervisor write", as a person says it.
pub(crate) fn describe(access: &Access) -> String {
    let who = match access.privilege() {
        Privilege::Exempt => "exempt",
        Privilege::User => "user",
        Privilege::Supervisor => "supervisor",
        Privilege::ImplicitSupervisor => "implicit supervisor",
    };
    let what = match access.kind() {
        AccessKind::Read => "read",
        AccessKind::Write => "write",
        AccessKind::Fetch => "fetch",
        AccessKind::ShadowStackRead => "shadow-stack read",
        AccessKind::ShadowStackWrite => "shadow-stack write",
    };
    let stack = if access.is_stack() { " through the stack" } else { "" };
    format!("{who} {what}{stack}")
}
