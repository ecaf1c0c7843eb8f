//! Pointers with metadata: which address bits a CPU ignores before it checks that an address is canonical.
//!
//! Intel SDM volume 3, "Linear-Address Masking" (LAM), and AMD APM volume 2, "Upper Address Ignore" (UAI). Both exist in
//! 64-bit mode and for data accesses alone, never for fetches. Compatibility mode needs no rule of its own: its linear
//! addresses have 32 bits, and masking changes none of those.
//!
//! LAM takes a pointer for the user's or the supervisor's by its bit 63, whatever the CPL, and never changes that bit. It
//! applies to shadow-stack accesses and to implicit ones as to other data accesses (KVM exempts implicit ones, whose
//! addresses were canonical when they were loaded into a register).
//!
//! UAI applies to what goes through DS or ES: not through the stack segment, not to shadow stacks, not to implicit accesses.
//! An access through FS or GS cannot be told from one through DS here.
//!
//! The manuals check first and mask then, by rules made for each width; masking first and checking as ever is the same.

use crate::access::{Access, Privilege};
use crate::mode::{CR4_LAM_SUP, ControlRegisters, EFER_UAIE, PagingMode};

/// CR3.LAM_U57: bits 62:57 of a user pointer are ignored.
pub(crate) const CR3_LAM_U57: u64 = 1 << 61;
/// CR3.LAM_U48: bits 62:48 of a user pointer are ignored, unless LAM_U57 is set.
pub(crate) const CR3_LAM_U48: u64 = 1 << 62;

const SIGN: u64 = 1 << 63;

/// What is ignored of the address of a data access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masking {
    /// Low bits kept of a user pointer; 64 is all.
    user: u8,
    /// Low bits kept of a supervisor pointer.
    supervisor: u8,
    /// Upper Address Ignore: bit 63 is not kept either.
    upper_address_ignore: bool,
}

impl Masking {
    /// Nothing is ignored.
    pub const NONE: Self = Self { user: 64, supervisor: 64, upper_address_ignore: false };

    /// What these registers ask for; they are taken to be valid for their CPU.
    pub(crate) const fn new(registers: &ControlRegisters, mode: PagingMode) -> Self {
        if !mode.is_long() {
            return Self::NONE;
        }
        if registers.efer & EFER_UAIE != 0 {
            return Self { user: 57, supervisor: 57, upper_address_ignore: true };
        }
        let user = if registers.cr3 & CR3_LAM_U57 != 0 {
            57
        } else if registers.cr3 & CR3_LAM_U48 != 0 {
            48
        } else {
            64
        };
        let supervisor = match mode {
            _ if registers.cr4 & CR4_LAM_SUP == 0 => 64,
            PagingMode::FiveLevel => 57,
            _ => 48,
        };
        Self { user, supervisor, upper_address_ignore: false }
    }

    /// Low bits that are kept of a pointer whose bit 63 is clear: 48 or 57; 64 is all. The highest of them is repeated in the
    /// bits that are ignored.
    #[must_use]
    pub const fn user_width(&self) -> u32 {
        self.user as u32
    }

    /// The same of a pointer whose bit 63 is set.
    #[must_use]
    pub const fn supervisor_width(&self) -> u32 {
        self.supervisor as u32
    }

    /// Whether bit 63 is ignored as well: Upper Address Ignore.
    #[must_use]
    pub const fn upper_address_ignore(&self) -> bool {
        self.upper_address_ignore
    }

    /// The linear address that `access` to `pointer` translates.
    #[must_use]
    pub const fn apply(self, pointer: u64, access: &Access) -> u64 {
        let direct = access.is_stack()
            || access.is_shadow_stack()
            || matches!(access.privilege(), Privilege::ImplicitSupervisor);
        if access.is_fetch() || self.upper_address_ignore && direct {
            return pointer;
        }
        let width = if pointer & SIGN == 0 { self.user } else { self.supervisor };
        let ignored = 64u32.wrapping_sub(width as u32) & 63;
        let extended = ((pointer << ignored) as i64 >> ignored) as u64;
        if self.upper_address_ignore { extended } else { extended & !SIGN | pointer & SIGN }
    }

    /// The width by which an address has to be canonical for no access to see it changed, where linear addresses are
    /// `linear_width` wide.
    ///
    /// A canonical address repeats the bit that masking extends, unless LAM48 is laid over 5-level paging: there bits
    /// 56:48 translate, and are ignored all the same.
    pub(crate) const fn unchanged_width(self, linear_width: u32) -> u32 {
        if (self.user as u32) < linear_width { self.user as u32 } else { linear_width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::AccessKind;
    use crate::addr::is_canonical;
    use crate::mode::{CR4_LA57, EFER_LMA};

    const READ: Access = Access::new(AccessKind::Read, Privilege::User);
    const FETCH: Access = Access::new(AccessKind::Fetch, Privilege::User);

    fn masking(mode: PagingMode, cr3: u64, cr4: u64, efer: u64) -> Masking {
        let la57 = if mode == PagingMode::FiveLevel { CR4_LA57 } else { 0 };
        let registers =
            ControlRegisters { cr3, cr4: cr4 | la57, efer: EFER_LMA | efer, ..ControlRegisters::default() };
        Masking::new(&registers, mode)
    }

    #[test]
    fn lam57_ignores_six_bits_of_a_user_pointer() {
        for mode in [PagingMode::FourLevel, PagingMode::FiveLevel] {
            let lam = masking(mode, CR3_LAM_U57 | CR3_LAM_U48, 0, 0);
            assert_eq!(lam.apply(0x7e00_7fff_ffff_f123, &READ), 0x0000_7fff_ffff_f123);
            // Bit 56 is extended over the ignored bits, but not over bit 63.
            assert_eq!(lam.apply(0x0100_0000_0000_0000, &READ), 0x7f00_0000_0000_0000);
            assert_eq!(lam.apply(0xfe00_7fff_ffff_f123, &READ), 0xfe00_7fff_ffff_f123);
            assert_eq!(lam.apply(0x7e00_7fff_ffff_f123, &FETCH), 0x7e00_7fff_ffff_f123);
        }
    }

    #[test]
    fn lam48_ignores_fifteen_bits_of_a_user_pointer() {
        for mode in [PagingMode::FourLevel, PagingMode::FiveLevel] {
            let lam = masking(mode, CR3_LAM_U48, 0, 0);
            assert_eq!(lam.apply(0x7fff_0000_1234_5678, &READ), 0x1234_5678);
            assert_eq!(lam.apply(0x0000_8000_0000_0000, &READ), 0x7fff_8000_0000_0000);
            assert_eq!(lam.apply(0x8000_0000_1234_5678, &READ), 0x8000_0000_1234_5678);
        }
    }

    #[test]
    fn the_paging_mode_sets_the_width_of_supervisor_pointers() {
        let four = masking(PagingMode::FourLevel, 0, CR4_LAM_SUP, 0);
        assert_eq!(four.apply(0x8000_8000_0000_0000, &READ), 0xffff_8000_0000_0000);
        assert_eq!(four.apply(0x8000_0000_0000_0000, &READ), 0x8000_0000_0000_0000);
        assert_eq!(four.apply(0x7e00_0000_0000_0000, &READ), 0x7e00_0000_0000_0000);
        let five = masking(PagingMode::FiveLevel, 0, CR4_LAM_SUP, 0);
        assert_eq!(five.apply(0x8100_8000_0000_0000, &READ), 0xff00_8000_0000_0000);
        assert_eq!(five.apply(0x8000_8000_0000_0000, &READ), 0x8000_8000_0000_0000);
    }

    #[test]
    fn bit_63_and_not_the_privilege_selects() {
        let lam = masking(PagingMode::FourLevel, CR3_LAM_U57, 0, 0);
        for privilege in [Privilege::Supervisor, Privilege::ImplicitSupervisor, Privilege::Exempt] {
            for kind in [AccessKind::Write, AccessKind::ShadowStackRead, AccessKind::ShadowStackWrite] {
                let access = Access::new(kind, privilege).through_stack(true);
                assert_eq!(lam.apply(0x5a00_0000_0000_1000, &access), 0x1000);
            }
        }
    }

    #[test]
    fn upper_address_ignore_ignores_bit_63_too_and_spares_some_accesses() {
        let uai = masking(PagingMode::FourLevel, 0, 0, EFER_UAIE);
        assert_eq!(uai.apply(0xfe00_7fff_ffff_f123, &READ), 0x0000_7fff_ffff_f123);
        assert_eq!(uai.apply(0x01ff_8000_0000_0000, &READ), 0xffff_8000_0000_0000);
        let pointer = 0x5a00_0000_0000_1000;
        let user = |kind| Access::new(kind, Privilege::User);
        for access in [
            FETCH,
            READ.through_stack(true),
            user(AccessKind::ShadowStackRead),
            user(AccessKind::ShadowStackWrite),
            Access::new(AccessKind::Read, Privilege::ImplicitSupervisor),
        ] {
            assert_eq!(uai.apply(pointer, &access), pointer, "{access:?}");
        }
        for access in [READ, user(AccessKind::Write), Access::new(AccessKind::Read, Privilege::Supervisor)] {
            assert_eq!(uai.apply(pointer, &access), 0x1000, "{access:?}");
        }
    }

    #[test]
    fn nothing_is_ignored_outside_long_mode() {
        for mode in [PagingMode::None, PagingMode::TwoLevel, PagingMode::Pae] {
            let all = masking(mode, CR3_LAM_U48 | CR3_LAM_U57, CR4_LAM_SUP, EFER_UAIE);
            assert_eq!(all, Masking::NONE);
        }
    }

    /// What the fast lane rests on: every address it takes means the same with and without masking.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn addresses_of_the_unchanged_width_stay_as_they_are() {
        let mut rng = fastrand::Rng::with_seed(1);
        for (mode, width) in [(PagingMode::FourLevel, 48), (PagingMode::FiveLevel, 57)] {
            for cr3 in [0, CR3_LAM_U48, CR3_LAM_U57, CR3_LAM_U48 | CR3_LAM_U57] {
                for (cr4, efer) in [(0, 0), (CR4_LAM_SUP, 0), (0, EFER_UAIE)] {
                    let masking = masking(mode, cr3, cr4, efer);
                    let unchanged = masking.unchanged_width(width);
                    let lam48_over_57 = masking.user == 48 && width == 57;
                    assert_eq!(unchanged, if lam48_over_57 { 48 } else { width });
                    for _ in 0..10_000 {
                        let pointer = ((rng.u64(..) << (64 - width)) as i64 >> (64 - width)) as u64;
                        if is_canonical(pointer, unchanged) {
                            assert_eq!(masking.apply(pointer, &READ), pointer);
                        }
                        assert_eq!(masking.apply(pointer, &FETCH), pointer);
                    }
                }
            }
        }
    }
}
