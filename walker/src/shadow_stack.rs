//! Which pages shadow-stack accesses are allowed to.
//!
//! Intel SDM volume 3, "Determination of Access Rights"; AMD APM volume 2, "Shadow Stack Protection". A page is a shadow stack
//! if its leaf has R/W clear and D set, and every entry above the leaf has R/W set (PDPTEs of PAE paging have no such bit).
//! User accesses are allowed to the user's shadow stacks alone, supervisor accesses to the supervisor's alone: SMAP and
//! RFLAGS.AC have no say, and CR0.WP is set wherever CR4.CET is. Protection keys apply as to data accesses. What
//! other accesses may do to a shadow stack, the ordinary rights decide: it is a read-only page.
//!
//! Not modelled: enclave mode, and the supervisor shadow-stack bits of NPT.

use crate::access::Access;
use crate::permission::Rights;

/// What a shadow-stack access finds of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// What all levels grant.
    pub(crate) rights: Rights,
    /// R/W of the leaf alone.
    pub(crate) leaf_write: bool,
    /// D of the leaf.
    pub(crate) leaf_dirty: bool,
    /// Whether every entry above the leaf has R/W set.
    pub(crate) upper_write: bool,
}

/// Why a page refuses a shadow-stack access. Where several reasons hold, the first in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A user access to a supervisor page.
    SupervisorPage,
    /// A supervisor access to a user page.
    UserPage,
    /// The leaf has R/W set or D clear.
    ByLeaf,
    /// An entry above the leaf has R/W clear.
    FromAbove,
}

/// Whether the shadow-stack access `access` to `page` is refused, and why.
pub(crate) const fn refused(access: &Access, page: Page) -> Option<Refused> {
    if access.is_exempt() {
        None
    } else if access.is_user() && !page.rights.user() {
        Some(Refused::SupervisorPage)
    } else if !access.is_user() && page.rights.user() {
        Some(Refused::UserPage)
    } else if page.leaf_write || !page.leaf_dirty {
        Some(Refused::ByLeaf)
    } else if !page.upper_write {
        Some(Refused::FromAbove)
    } else {
        None
    }
}
