//! Which accesses the accumulated rights of a page allow.
//!
//! Intel SDM volume 3, "Determination of Access Rights" and "Protection Keys". The answers for every kind of access and
//! every combination of rights are computed once, when the control registers change; a walk looks its answer up.

use crate::access::Access;
use crate::entry::LongMode;

/// The effective rights of a page: what every level of the walk grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Rights(pub(crate) u8);

impl Rights {
    /// No right at all.
    pub const NONE: Self = Self(0);
    /// Data may be read.
    pub const READ: Self = Self(1);
    /// R/W is set at every level.
    pub const WRITE: Self = Self(2);
    /// U/S is set at every level: a user page. In a step of EPT, which has no U/S: instructions of user-mode linear
    /// addresses may be fetched.
    pub const USER: Self = Self(4);
    /// No level forbids execution. In a step of EPT with mode-based execute control: by supervisor-mode linear addresses.
    pub const EXECUTE: Self = Self(8);
    /// Everything.
    pub const ALL: Self = Self(15);

    /// Whether data may be read.
    #[must_use]
    pub const fn read(self) -> bool {
        self.0 & Self::READ.0 != 0
    }

    /// Whether every level allows writes.
    #[must_use]
    pub const fn write(self) -> bool {
        self.0 & Self::WRITE.0 != 0
    }

    /// Whether the page is a user page.
    #[must_use]
    pub const fn user(self) -> bool {
        self.0 & Self::USER.0 != 0
    }

    /// Whether every level allows execution.
    #[must_use]
    pub const fn execute(self) -> bool {
        self.0 & Self::EXECUTE.0 != 0
    }

    /// The rights as four bits: read 1, write 2, user 4, execute 8.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The rights that this or `other` has.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The rights of a page as the bits that its levels show: P, R/W and U/S where every level has them, and execute-disable where
/// one has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown(u32);

impl Shown {
    /// How many there are.
    pub(crate) const COUNT: usize = 16;

    #[inline(always)]
    pub(crate) const fn of_bits(bits: u32) -> Self {
        Self(bits & 15)
    }

    /// Of entries of long mode that have in common the bits `all`, and of which some have the bits `any`.
    #[inline(always)]
    pub(crate) const fn of_entries(all: u64, any: u64) -> Self {
        Self((all & LongMode::GRANTING) as u32 * 2 + (any >> 63) as u32)
    }

    #[inline(always)]
    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    pub(crate) const fn of(rights: Rights) -> Self {
        Self(((rights.0 << 1 & 14) | rights.0 >> 3) as u32 ^ 1)
    }

    #[inline(always)]
    pub(crate) const fn rights(self) -> Rights {
        Rights((self.0 as u8 >> 1 | (self.0 as u8 & 1) << 3) ^ Rights::EXECUTE.0)
    }
}

/// The control-register bits that decide permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protections {
    /// CR0.WP.
    pub(crate) write_protect: bool,
    /// CR4.SMEP.
    pub(crate) smep: bool,
    /// CR4.SMAP.
    pub(crate) smap: bool,
    /// CR4.PKE in long mode: keys of user pages.
    pub(crate) user_keys: bool,
    /// CR4.PKS in long mode: keys of supervisor pages.
    pub(crate) supervisor_keys: bool,
    /// CR4.CET: there are shadow-stack accesses.
    pub(crate) shadow_stacks: bool,
    /// U/S does not keep users out: NPT under GMET.
    pub(crate) supervisor_pages_open: bool,
}

/// How many permission words there are: see [`Protections::words`].
pub(crate) const WORDS: usize = 64;

/// Index bits of a permission word.
const WRITE: usize = 1;
const USER: usize = 2;
const SMAP_SUSPENDED: usize = 4;
const FETCH: usize = 8;

impl Protections {
    /// NPT knows no supervisor accesses, and so neither WP, SMEP, SMAP nor keys (AMD APM volume 2, "Nested Paging").
    /// To a page that backs a shadow stack, accesses are what they are to any other page.
    pub(crate) const NPT: Self = Self {
        write_protect: true,
        smep: false,
        smap: false,
        user_keys: false,
        supervisor_keys: false,
        shadow_stacks: false,
        supervisor_pages_open: false,
    };

    /// NPT with Guest Mode Execute Trap: U/S says no more than that the supervisor may not fetch.
    pub(crate) const NPT_GMET: Self = Self { smep: true, supervisor_pages_open: true, ..Self::NPT };

    /// Whether an access of `index` (see [`Access::permission_index`]) to a page with `rights` is refused.
    const fn refuses(self, index: usize, rights: Rights) -> bool {
        let user_access = index & USER != 0;
        if user_access && !rights.user() && !self.supervisor_pages_open {
            return true;
        }
        let to_user_page = !user_access && rights.user();
        if index & FETCH != 0 {
            return !rights.execute() || (self.smep && to_user_page);
        }
        if self.smap && to_user_page && index & SMAP_SUSPENDED == 0 {
            return true;
        }
        if index & WRITE != 0 {
            return !rights.write() && (user_access || self.write_protect);
        }
        !rights.read()
    }

    /// The sixteen permission words: bit `rights` of word `index` is set where the access is refused. Sixteen empty ones
    /// follow, for exempt accesses; then as many of both kinds for shadow-stack accesses.
    ///
    /// Where there are shadow stacks, their words refuse everything, so that [`crate::shadow_stack`] decides, which knows more
    /// of the page than its rights. Elsewhere they are those of data accesses.
    pub(crate) const fn words(self) -> [u16; WORDS] {
        let mut words = [0; WORDS];
        let mut index = 0;
        while index < 16 {
            let mut rights = 0;
            while rights < 16 {
                if self.refuses(index, Rights(rights)) {
                    words[index] |= 1 << rights;
                }
                rights += 1;
            }
            words[index + 32] = if self.shadow_stacks { u16::MAX } else { words[index] };
            index += 1;
        }
        words
    }

    /// The protection-key mask: sixteen fields of two bits, indexed as the permission words are but with the page's U/S in
    /// place of "AC is set". A field holds the bits (access-disable 1, write-disable 2) of PKRU, or for a supervisor page of
    /// PKRS, that refuse the access. A user access to a supervisor page is refused anyway, and its key is evaluated
    /// no less; for PKRS, CR0.WP alone decides whether write-disable counts.
    pub(crate) const fn key_mask(self) -> u32 {
        let page_user = SMAP_SUSPENDED;
        let mut mask = 0;
        let mut index = 0;
        while index < 16 {
            let user_page = index & page_user != 0;
            let keys = if user_page { self.user_keys } else { self.supervisor_keys };
            if keys && index & FETCH == 0 {
                let user_write = user_page && index & USER != 0;
                let write_disable = index & WRITE != 0 && (user_write || self.write_protect);
                mask |= (1 | (write_disable as u32) << 1) << (2 * index);
            }
            index += 1;
        }
        mask
    }
}

/// The field of a protection-key mask for an access of `index` to a page with `rights`.
pub(crate) const fn key_field(mask: u32, index: usize, rights: Rights) -> u32 {
    let index = (index & 15 & !SMAP_SUSPENDED) | (rights.user() as usize * SMAP_SUSPENDED);
    mask >> (2 * index) & 0b11
}

/// The permission words of EPT: each access needs its one right. User-mode fetches need [`Rights::USER`]. With supervisor
/// shadow-stack control, the words of supervisor shadow-stack accesses refuse everything: the leaf's bit 60 decides.
pub(crate) const fn ept_words(supervisor_shadow_stacks: bool) -> [u16; WORDS] {
    let mut words = [0; WORDS];
    let mut index = 0;
    while index < 16 {
        let needed = match (index & FETCH != 0, index & USER != 0, index & WRITE != 0) {
            (true, true, _) => Rights::USER,
            (true, false, _) => Rights::EXECUTE,
            (false, _, true) => Rights::WRITE,
            (false, _, false) => Rights::READ,
        };
        let mut rights = 0;
        while rights < 16 {
            if rights & needed.0 == 0 {
                words[index] |= 1 << rights;
            }
            rights += 1;
        }
        let by_leaf = supervisor_shadow_stacks && index & USER == 0;
        words[index + 32] = if by_leaf { u16::MAX } else { words[index] };
        index += 1;
    }
    words
}

/// The bits of `key` in PKRU, or for a supervisor page in PKRS, that refuse `access` to a page with `rights`:
/// access-disable 1, write-disable 2.
#[inline]
pub(crate) const fn key_refusal(mask: u32, access: &Access, rights: Rights, key: u8) -> u8 {
    let decides = key_field(mask, access.permission_index(), rights);
    let register = if rights.user() { access.pkru() } else { access.pkrs() };
    (register >> (2 * (key as u32 & 15)) & decides) as u8
}
