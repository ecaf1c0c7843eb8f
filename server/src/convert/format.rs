//! Page walks and page formats.

use pagewalk::{PageFormat, PageWalk, PagingMode};
use pagewalk_proto::v1;

pub(crate) fn page_walk(walk: &PageWalk) -> v1::PageWalk {
    v1::PageWalk {
        root: walk.root(),
        pdptrs: walk.pdptes().map_or_else(Vec::new, |pdptes| pdptes.to_vec()),
        format: Some(page_format(walk.format())),
    }
}

pub(crate) fn mode(mode: PagingMode) -> v1::PagingMode {
    match mode {
        PagingMode::None => v1::PagingMode::None,
        PagingMode::TwoLevel => v1::PagingMode::TwoLevel,
        PagingMode::Pae => v1::PagingMode::Pae,
        PagingMode::FourLevel => v1::PagingMode::FourLevel,
        PagingMode::FiveLevel => v1::PagingMode::FiveLevel,
    }
}

pub(crate) fn paging_mode(format: &PageFormat) -> v1::PagingMode {
    match (format.is_ept(), format.mode()) {
        (true, PagingMode::FiveLevel) => v1::PagingMode::EptFiveLevel,
        (true, _) => v1::PagingMode::EptFourLevel,
        (false, by_registers) => mode(by_registers),
    }
}

fn page_format(format: &PageFormat) -> v1::PageFormat {
    let paged = format.levels() != 0;
    v1::PageFormat {
        mode: paging_mode(format).into(),
        levels: format.levels(),
        reserved_leaf: format.reserved_leaf().to_vec(),
        reserved_table: format.reserved_table().to_vec(),
        permissions: format.permissions().iter().map(|word| u32::from(*word)).collect(),
        protection_key_mask: format.protection_key_mask(),
        bad_memory_type_xwr: format.bad_memory_type_xwr(),
        linear_width: format.linear_width(),
        maxphyaddr: u32::from(format.maxphyaddr()),
        fetch_bit_reported: format.fetch_reported(),
        entry_bytes: format.entry_bytes(),
        index_bits: format.index_bits(),
        bits: paged.then(|| if format.is_ept() { ept_entry_bits(format) } else { entry_bits(format) }),
    }
}

/// The entries of 4-level and 5-level paging.
fn entry_bits(format: &PageFormat) -> v1::EntryBits {
    let no_execute = 1 << 63;
    let reserved = format.reserved_leaf().first().copied().unwrap_or_default();
    v1::EntryBits {
        present: 1,
        write: 1 << 1,
        user: 1 << 2,
        no_execute: no_execute & !reserved,
        execute: 0,
        accessed: 1 << 5,
        dirty: 1 << 6,
        page_size: 1 << 7,
        global: if format.global_pages() { 1 << 8 } else { 0 },
        protection_key: if format.protection_key_mask() == 0 { 0 } else { 0xf << 59 },
        frame: ((1 << format.maxphyaddr()) - 1) & !0xfff & format.address_bits(),
    }
}

/// The entries of EPT. Mode-based execute control has bit 10 in the place of U/S.
fn ept_entry_bits(format: &PageFormat) -> v1::EntryBits {
    let when = |has: bool, bit: u64| if has { bit } else { 0 };
    let user_execute = when(format.mode_based_execute(), 1 << 10);
    v1::EntryBits {
        present: 0b111 | user_execute,
        write: 1 << 1,
        user: user_execute,
        no_execute: 0,
        execute: 1 << 2,
        accessed: when(format.has_accessed_dirty(), 1 << 8),
        dirty: when(format.has_accessed_dirty(), 1 << 9),
        page_size: 1 << 7,
        global: 0,
        protection_key: 0,
        frame: ((1 << format.maxphyaddr()) - 1) & !0xfff,
    }
}
