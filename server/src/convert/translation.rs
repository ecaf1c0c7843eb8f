//! Translations.

use pagewalk::{Backing, PageFormat, PageSize, Rights, Translation};
use pagewalk_proto::v1;

use super::rights::{backing, ept_type, memory_type, page_size, rights};

/// A translation by a walk whose guest has this format.
pub(crate) fn translation(page: &Translation, format: &PageFormat) -> v1::Translation {
    v1::Translation {
        gpa: page.gpa.0,
        page_size: page_size(page.page_size()).into(),
        effective: Some(rights(page.rights())),
        protection_key: u32::from(page.key()),
        accessed: page.accessed(),
        dirty: page.dirty(),
        backing: backing(page.backing()).into(),
        pat_type: memory_type(format.pat_type(page)).into(),
        nested_gpa: page.nested.map(|nested| nested.ngpa.0),
        nested_page_size: page.nested.map(|nested| page_size(nested.page_size).into()),
        ad_skipped: page.ad_skipped(),
        global: page.global(),
        ept_type: page.nested.and_then(|nested| nested.ept_memory_type).map(ept_type),
        effective_type: format.effective_type(page).map(|effective| memory_type(effective).into()),
    }
}

/// A translation by the second dimension alone, which meets no page of the guest, whose format this is.
pub(crate) fn nested(page: &Translation, format: &PageFormat) -> v1::Translation {
    let pat_has_a_say =
        page.nested.and_then(|nested| nested.ept_memory_type).is_some_and(|said| !said.ignore_pat);
    let by_both = translation(page, format);
    v1::Translation {
        pat_type: v1::MemoryType::Unspecified.into(),
        effective_type: by_both.effective_type.filter(|_| !pat_has_a_say),
        ..by_both
    }
}

/// Where there is no second dimension, an nGPA is its own GPA.
pub(crate) fn identity(gpa: u64, behind: Backing) -> v1::Translation {
    v1::Translation {
        gpa,
        page_size: page_size(PageSize::Unpaged).into(),
        effective: Some(rights(Rights::ALL)),
        backing: backing(behind).into(),
        ..Default::default()
    }
}
