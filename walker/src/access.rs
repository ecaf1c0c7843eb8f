//! What belongs to one access: its kind, its privilege, and the values that modify protection.

/// What the access does. The discriminant is the kind's share of the index of its permission word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read = 0,
    /// A data write.
    Write = 1,
    /// An instruction fetch.
    Fetch = 8,
    /// A read of a shadow stack, as RET or INCSSP makes (Intel SDM volume 3, "Determination of Access Rights"). WRUSS and its
    /// like are user accesses at any CPL: say so by [`Privilege::User`].
    ///
    /// Where CR4.CET is clear no CPU makes one: it is then decided and reported as a data read.
    ShadowStackRead = 32,
    /// A write to a shadow stack, as CALL or WRSS makes. Where CR4.CET is clear, a data write.
    ShadowStackWrite = 33,
}

impl AccessKind {
    /// Whether the access is to a shadow stack.
    #[must_use]
    #[inline]
    pub const fn is_shadow_stack(self) -> bool {
        matches!(self, Self::ShadowStackRead | Self::ShadowStackWrite)
    }
}

/// On whose behalf the access is made (Intel SDM volume 3, "Determination of Access Rights").
///
/// In the discriminant, bit 0 is "implicit" and bit 1 is the privilege's share of [`Access::permission_index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// An explicit supervisor-mode access: CPL below 3. RFLAGS.AC suspends SMAP for it.
    Supervisor = 0,
    /// A supervisor access the CPU makes by itself at any CPL, such as a descriptor load. RFLAGS.AC never helps it.
    ImplicitSupervisor = 1,
    /// A user-mode access: CPL 3.
    User = 2,
    /// No rights are checked; absence and reserved bits still are.
    Exempt = 4,
}

/// One access to a guest virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    kind: AccessKind,
    privilege: Privilege,
    stack: bool,
    /// [`Self::permission_index`], with bit 4 set for an exempt access, and bit 5 for one to a shadow stack. Known when the
    /// access is built, so that a walk does not compute it.
    index: u8,
    pkru: u32,
    pkrs: u32,
}

impl Access {
    /// An access with RFLAGS.AC clear, all protection keys open, and not through the stack segment.
    #[must_use]
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        let index = kind as u8 | (privilege as u8 & 2) | (privilege as u8 & 4) << 2;
        Self { kind, privilege, stack: false, index, pkru: 0, pkrs: 0 }
    }

    /// The same access under this value of RFLAGS.AC, which suspends SMAP for explicit supervisor accesses.
    #[must_use]
    pub const fn with_ac(mut self, ac: bool) -> Self {
        let suspends_smap = ac as u8 & !(self.privilege as u8) & 1;
        self.index = self.index & !4 | suspends_smap << 2;
        self
    }

    /// The same access under this PKRU: two bits a key, access-disable and write-disable. Decides over user pages, where
    /// CR4.PKE is set, and nothing for an exempt access.
    #[must_use]
    pub const fn with_pkru(mut self, pkru: u32) -> Self {
        self.pkru = if matches!(self.privilege, Privilege::Exempt) { 0 } else { pkru };
        self
    }

    /// The same access under this value of IA32_PKRS (MSR 0x6e1), laid out as PKRU is. Decides over supervisor pages,
    /// where CR4.PKS is set, and nothing for an exempt access.
    #[must_use]
    pub const fn with_pkrs(mut self, pkrs: u32) -> Self {
        self.pkrs = if matches!(self.privilege, Privilege::Exempt) { 0 } else { pkrs };
        self
    }

    /// The data access of the same direction, where this is a shadow-stack access.
    #[must_use]
    pub(crate) const fn as_data(&self) -> Self {
        let kind = match self.kind {
            AccessKind::ShadowStackRead => AccessKind::Read,
            AccessKind::ShadowStackWrite => AccessKind::Write,
            _ => return *self,
        };
        Self { kind, index: self.index & !(AccessKind::ShadowStackRead as u8), ..*self }
    }

    /// The same access made through SS, so that a non-canonical address is #SS instead of #GP.
    #[must_use]
    pub const fn through_stack(mut self, stack: bool) -> Self {
        self.stack = stack;
        self
    }

    /// Read, write, fetch, or an access to a shadow stack.
    #[must_use]
    pub const fn kind(&self) -> AccessKind {
        self.kind
    }

    /// By user, supervisor, implicit supervisor, or exempt.
    #[must_use]
    pub const fn privilege(&self) -> Privilege {
        self.privilege
    }

    /// PKRU; 0 for an exempt access.
    #[must_use]
    pub const fn pkru(&self) -> u32 {
        self.pkru
    }

    /// IA32_PKRS; 0 for an exempt access.
    #[must_use]
    pub const fn pkrs(&self) -> u32 {
        self.pkrs
    }

    /// Whether the access goes through SS.
    #[must_use]
    pub const fn is_stack(&self) -> bool {
        self.stack
    }

    /// Whether the access writes.
    #[must_use]
    #[inline]
    pub const fn is_write(&self) -> bool {
        matches!(self.kind, AccessKind::Write | AccessKind::ShadowStackWrite)
    }

    /// Whether the access is to a shadow stack.
    #[must_use]
    #[inline]
    pub const fn is_shadow_stack(&self) -> bool {
        self.kind.is_shadow_stack()
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

    /// Whether no rights are checked.
    #[must_use]
    #[inline]
    pub const fn is_exempt(&self) -> bool {
        matches!(self.privilege, Privilege::Exempt)
    }

    /// Index of the permission word that decides this access: bits 4:1 of the page-fault error code it would raise, with
    /// RSVD's place taken by "RFLAGS.AC is set and the access is not implicit". Meaningless for an exempt access and for one
    /// to a shadow stack, which none of the sixteen words decides.
    #[must_use]
    #[inline]
    pub const fn permission_index(&self) -> usize {
        (self.index & 15) as usize
    }

    /// Index into all permission words: sixteen empty ones lie behind the first sixteen, for exempt accesses, and as many of
    /// both kinds again for shadow-stack accesses.
    #[inline(always)]
    pub(crate) const fn word_index(&self) -> usize {
        (self.index & 63) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_index_is_the_error_code_shifted() {
        use AccessKind::{Fetch, Read, Write};
        use Privilege::{ImplicitSupervisor, Supervisor, User};
        for (kind, kind_bits) in [(Read, 0), (Write, 0b0001), (Fetch, 0b1000)] {
            for (privilege, ac_off, ac_on) in
                [(User, 0b0010, 0b0110), (Supervisor, 0, 0b0100), (ImplicitSupervisor, 0, 0)]
            {
                let access = Access::new(kind, privilege);
                assert_eq!(access.permission_index(), kind_bits | ac_off, "{access:?}");
                let with_ac = access.with_ac(true);
                assert_eq!(with_ac.permission_index(), kind_bits | ac_on, "{with_ac:?}");
                assert_eq!(with_ac.with_ac(false), access);
            }
        }
    }
}
