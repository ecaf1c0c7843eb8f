//! Translations.

use pagewalk::{PageFormat, Translation};
use pagewalk_proto::v1;

use super::rights::{backing, memory_type, page_size, rights};

pub(crate) fn translation(page: &Translation, format: &PageFormat) -> v1::Translation {
    v1::Translation {
        gpa: page.gpa.0,
        page_size: page_size(page.page_size).into(),
        effective: Some(rights(page.rights)),
        protection_key: u32::from(page.key()),
        accessed: page.accessed(),
        dirty: page.dirty(),
        backing: backing(page.backing).into(),
        pat_type: memory_type(format.pat_type(page)).into(),
        nested_gpa: page.nested.map(|nested| nested.ngpa.0),
        nested_page_size: page.nested.map(|nested| page_size(nested.page_size).into()),
        ad_skipped: page.ad_skipped,
        global: page.global(),
    }
}
