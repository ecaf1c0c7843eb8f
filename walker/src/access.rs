//! What belongs to one access: its kind, its privilege, and the values that modify protection.

/// What the access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// On whose behalf the access is made (Intel SDM volume 3, "Determination of Access Rights").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// No rights are checked; absence and reserved bits still are.
    Exempt,
    /// A user-mode access: CPL 3.
    User,
    /// An explicit supervisor-mode access: CPL below 3. RFLAGS.AC suspends SMAP for it.
    Supervisor,
    /// A supervisor access the CPU makes by itself at any CPL, such as a descriptor load. RFLAGS.AC never helps it.
    ImplicitSupervisor,
}

/// One access to a guest virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: AccessKind,
    /// By user, supervisor, implicit supervisor, or exempt.
    pub privilege: Privilege,
    /// RFLAGS.AC.
    pub ac: bool,
    /// PKRU: two bits a key, access-disable and write-disable. Decides only where CR4.PKE is set.
    pub pkru: u32,
    /// The access goes through SS, so that a non-canonical address is #SS instead of #GP.
    pub stack: bool,
}

impl Access {
    /// An access with RFLAGS.AC clear, all protection keys open, and not through the stack segment.
    #[must_use]
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        Self { kind, privilege, ac: false, pkru: 0, stack: false }
    }

    /// Whether the access writes.
    #[must_use]
    #[inline]
    pub const fn is_write(&self) -> bool {
        matches!(self.kind, AccessKind::Write)
    }

    /// Whether the access is an instruction fetch.
    #[must_use]
    #[inline]
    pub const fn is_fetch(&self) -> bool {
        matches!(self.kind, AccessKind::Fetch)
    }

    /// Whether the access is a user-mode access.
    #[must_use]
    #[inline]
    pub const fn is_user(&self) -> bool {
        matches!(self.privilege, Privilege::User)
    }

    /// Index of the permission word that decides this access: bits 4:1 of the page-fault error code it would raise, with
    /// RSVD's place taken by "RFLAGS.AC is set and the access is not implicit".
    #[must_use]
    #[inline]
    pub const fn permission_index(&self) -> usize {
        let suspends_smap = self.ac && !matches!(self.privilege, Privilege::ImplicitSupervisor);
        self.is_write() as usize
            | (self.is_user() as usize) << 1
            | (suspends_smap as usize) << 2
            | (self.is_fetch() as usize) << 3
    }
}
