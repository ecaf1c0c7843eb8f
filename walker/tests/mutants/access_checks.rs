//! Mutants of what decides over one access besides the rights of a page.

use crate::{CHECKS, Mutant, unseen};

/// One that worked examples notice: of registers that no CPU accepts, which the oracle is never asked about, of memory that
/// changes under the walk, or of a bit that the fast lane must not have at the leaf and may have above it.
const fn unasked(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: CHECKS, changes }
}

pub(crate) const MUTANTS: &[Mutant] = &[
    // Protection keys.
    unseen(
        "supervisor pages have no keys",
        &[(
            "format.rs",
            "supervisor_keys: registers.cr4 & CR4_PKS != 0 && long,",
            "supervisor_keys: false && long,",
        )],
    ),
    unseen(
        "supervisor pages have keys outside long mode",
        &[("format.rs", "registers.cr4 & CR4_PKS != 0 && long,", "registers.cr4 & CR4_PKS != 0,")],
    ),
    unseen(
        "PKRU decides over supervisor pages",
        &[(
            "permission.rs",
            "if rights.user() { access.pkru() } else { access.pkrs() }",
            "if true { access.pkru() } else { access.pkrs() }",
        )],
    ),
    unseen(
        "the access and not the page picks PKRU or PKRS",
        &[(
            "permission.rs",
            "if rights.user() { access.pkru() } else { access.pkrs() }",
            "if access.is_user() { access.pkru() } else { access.pkrs() }",
        )],
    ),
    unseen(
        "a supervisor key's write-disable binds without CR0.WP where the access is a user's",
        &[("permission.rs", "user_page && index & USER != 0;", "index & USER != 0;")],
    ),
    // Shadow stacks.
    unseen(
        "a clean page is a shadow stack",
        &[("shadow_stack.rs", "page.leaf_write || !page.leaf_dirty", "page.leaf_write")],
    ),
    unseen(
        "a writable page is a shadow stack",
        &[("shadow_stack.rs", "page.leaf_write || !page.leaf_dirty", "!page.leaf_dirty")],
    ),
    unseen(
        "R/W above the leaf says nothing of a shadow stack",
        &[("shadow_stack.rs", "} else if !page.upper_write {", "} else if false {")],
    ),
    unseen(
        "a shadow stack has R/W clear at every level",
        &[("shadow_stack.rs", "} else if !page.upper_write {", "} else if page.upper_write {")],
    ),
    unseen(
        "the supervisor uses the user's shadow stacks",
        &[("shadow_stack.rs", "!access.is_user() && page.rights.user()", "false")],
    ),
    unseen(
        "the user uses the supervisor's shadow stacks",
        &[("shadow_stack.rs", "access.is_user() && !page.rights.user()", "false")],
    ),
    unseen(
        "shadow stacks are known to the permission words alone",
        &[(
            "permission.rs",
            "words[index + 32] = if self.shadow_stacks { u16::MAX } else { words[index] };",
            "words[index + 32] = words[index];",
        )],
    ),
    unseen(
        "the error code does not tell a shadow-stack access",
        &[("fault.rs", "code |= PFEC_SHADOW_STACK;", "")],
    ),
    unseen(
        "there are shadow-stack accesses without CR4.CET",
        &[(
            "walk.rs",
            "let access = if walk.format.shadow_stacks() { access } else { &as_data };",
            "let access = if true { access } else { &as_data };",
        )],
    ),
    unseen(
        "a shadow-stack access makes a shadow stack",
        &[("descent.rs", "purpose.access.is_write() && !shadow_stack;", "purpose.access.is_write();")],
    ),
    unasked(
        "the dirty bit of a shadow stack may go under the walk",
        &[(
            "descent.rs",
            "let dirty_is_meant = shadow_stack && !purpose.access.is_exempt();",
            "let dirty_is_meant = false;",
        )],
    ),
    unasked(
        "CR4.CET does not want CR0.WP",
        &[("mode.rs", "if self.cr4 & CR4_CET != 0 && self.cr0 & CR0_WP == 0 {", "if false {")],
    ),
    // Pointers with metadata.
    unseen(
        "LAM_U48 wins over LAM_U57",
        &[(
            "masking.rs",
            "let user = if registers.cr3 & CR3_LAM_U57 != 0 {",
            "let user = if registers.cr3 & CR3_LAM_U57 != 0 && registers.cr3 & CR3_LAM_U48 == 0 {",
        )],
    ),
    unseen(
        "LAM48 is laid over 4-level paging alone",
        &[(
            "masking.rs",
            "} else if registers.cr3 & CR3_LAM_U48 != 0 {",
            "} else if registers.cr3 & CR3_LAM_U48 != 0 && !matches!(mode, PagingMode::FiveLevel) {",
        )],
    ),
    unseen(
        "CR3's LAM bits are for supervisor pointers, too",
        &[(
            "masking.rs",
            "let width = if pointer & SIGN == 0 { self.user } else { self.supervisor };",
            "let width = self.user;",
        )],
    ),
    unseen(
        "the privilege and not bit 63 picks the kind of a pointer",
        &[("masking.rs", "if pointer & SIGN == 0 { self.user }", "if access.is_user() { self.user }")],
    ),
    unseen(
        "supervisor pointers are masked as in 4-level paging",
        &[("masking.rs", "PagingMode::FiveLevel => 57,", "PagingMode::FiveLevel => 48,")],
    ),
    unseen(
        "LAM changes bit 63",
        &[("masking.rs", "extended & !SIGN | pointer & SIGN", "extended | 0 & pointer & SIGN")],
    ),
    unseen(
        "fetches are masked",
        &[(
            "masking.rs",
            "if access.is_fetch() || self.upper_address_ignore && direct {",
            "if self.upper_address_ignore && direct {",
        )],
    ),
    unseen(
        "upper address ignore spares no access",
        &[(
            "masking.rs",
            "if access.is_fetch() || self.upper_address_ignore && direct {",
            "if access.is_fetch() || false && direct {",
        )],
    ),
    unseen(
        "upper address ignore keeps bit 63",
        &[("masking.rs", "upper_address_ignore: true }", "upper_address_ignore: false }")],
    ),
    unseen(
        "LAM spares what upper address ignore does",
        &[(
            "masking.rs",
            "if access.is_fetch() || self.upper_address_ignore && direct {",
            "if access.is_fetch() || direct {",
        )],
    ),
    unseen(
        "the pointer and not what is left of it is tested for being canonical",
        &[(
            "walk.rs",
            "!is_canonical(address, format.linear_width())",
            "!is_canonical(gva, format.linear_width())",
        )],
    ),
    unseen(
        "CR2 has the metadata",
        &[(
            "walk.rs",
            "linear(walk, second, memory, address, access, recorder)",
            "linear(walk, second, memory, address, access, recorder)
                .map_err(|fault| Fault { address: gva, ..fault })",
        )],
    ),
    unasked(
        "the fast lane knows nothing of LAM48 over 5-level paging",
        &[(
            "masking.rs",
            "if (self.user as u32) < linear_width { self.user as u32 } else { linear_width }",
            "linear_width",
        )],
    ),
    unasked(
        "every vendor's CR3 has LAM bits",
        &[(
            "walk.rs",
            "mode if mode.is_long() && cpu.vendor == Vendor::Intel =>",
            "mode if mode.is_long() =>",
        )],
    ),
    unasked(
        "both vendors ignore address bits in both ways",
        &[("format.rs", "registers.check_vendor(cpu.vendor)?;", "")],
    ),
    // The encryption bit.
    unasked(
        "the encryption bit is reserved",
        &[(
            "mode.rs",
            "bits(self.maxphyaddr as u32, highest) & !self.encryption_mask()",
            "bits(self.maxphyaddr as u32, highest)",
        )],
    ),
    unseen(
        "the encryption bit is an address bit of a table",
        &[("descent.rs", "table = E::table(entry) & format.address_bits();", "table = E::table(entry);")],
    ),
    unseen(
        "the encryption bit is an address bit of a page",
        &[(
            "descent.rs",
            "E::page(level, entry) & format.address_bits() & !within",
            "E::page(level, entry) & !within",
        )],
    ),
    unasked(
        "the encryption bit is an address bit in the fast lane",
        &[(
            "lane.rs",
            "_ if format.address_bits() != u64::MAX => return Self::CLOSED,",
            "_ if false => return Self::CLOSED,",
        )],
    ),
    unseen(
        "the encryption bit is an address bit of the root",
        &[("walk.rs", "LongMode::FRAME & format.address_bits()", "LongMode::FRAME")],
    ),
];
