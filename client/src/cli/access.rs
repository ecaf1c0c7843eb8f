//! Options that say what an access does, and for whom.

use clap::ValueEnum;

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
