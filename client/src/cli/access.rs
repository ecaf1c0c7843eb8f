//! Options that say what an access does, and for whom.

use clap::{ArgAction, ValueEnum, builder::BoolishValueParser};

use super::number;
use crate::v1::{Access, AccessKind, Privilege};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum KindArg {
    Read,
    Write,
    Fetch,
    ShadowStackRead,
    ShadowStackWrite,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum PrivilegeArg {
    /// As the vCPU would now: user if its CPL is 3, else supervisor
    Cpl,
    /// User mode: CPL 3
    User,
    /// Explicit supervisor access: RFLAGS.AC suspends SMAP
    Supervisor,
    /// Implicit supervisor access, to a descriptor table or TSS
    Implicit,
    /// Check no rights: only whether and where it is mapped
    Exempt,
}

impl PrivilegeArg {
    pub(super) fn message(self) -> Privilege {
        match self {
            Self::Cpl => Privilege::AsCpl,
            Self::User => Privilege::User,
            Self::Supervisor => Privilege::Supervisor,
            Self::Implicit => Privilege::ImplicitSupervisor,
            Self::Exempt => Privilege::Exempt,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct AccessArgs {
    /// What the access does
    #[arg(long, value_name = "KIND", default_value = "read", help_heading = "Access")]
    access: KindArg,
    /// On whose behalf
    #[arg(long = "as", value_name = "WHO", default_value = "cpl", help_heading = "Access")]
    privilege: PrivilegeArg,
}

impl AccessArgs {
    pub(super) fn message(&self) -> Access {
        let kind = match self.access {
            KindArg::Read => AccessKind::Read,
            KindArg::Write => AccessKind::Write,
            KindArg::Fetch => AccessKind::Fetch,
            KindArg::ShadowStackRead => AccessKind::ShadowStackRead,
            KindArg::ShadowStackWrite => AccessKind::ShadowStackWrite,
        };
        Access { kind: kind.into(), privilege: self.privilege.message().into(), ..Access::default() }
    }
}

/// Of an access to a guest virtual address, for which registers and the segment count, too.
#[derive(Debug, clap::Args)]
pub(super) struct LinearAccessArgs {
    #[command(flatten)]
    access: AccessArgs,
    /// RFLAGS.AC [default: the vCPU's]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, value_parser = BoolishValueParser::new(), help_heading = "Access")]
    ac: Option<bool>,
    /// PKRU, rights of the user protection keys [default: the vCPU's]
    #[arg(long, value_name = "VALUE", value_parser = number::u32, help_heading = "Access")]
    pkru: Option<u32>,
    /// IA32_PKRS, rights of the supervisor protection keys [default: the vCPU's]
    #[arg(long, value_name = "VALUE", value_parser = number::u32, help_heading = "Access")]
    pkrs: Option<u32>,
    /// The access goes through the stack segment: #SS instead of #GP
    #[arg(long, help_heading = "Access")]
    stack: bool,
}

impl LinearAccessArgs {
    pub(super) fn message(&self) -> Access {
        let Self { access, ac, pkru, pkrs, stack } = self;
        Access { ac: *ac, pkru: *pkru, pkrs: *pkrs, stack: *stack, ..access.message() }
    }
}
