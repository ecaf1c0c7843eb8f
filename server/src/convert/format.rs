//! Page walks and page formats.

use pagewalk::{Masking, PageFormat, PageWalk, PagingMode};
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
        shadow_stacks: format.shadow_stacks(),
        pointer_masking: pointer_masking(format.masking()),
        encryption_mask: !format.address_bits(),
        mode_based_execute: format.mode_based_execute(),
        supervisor_shadow_stack_control: format.supervisor_shadow_stack_control(),
        bits: paged.then(|| if format.is_ept() { ept_entry_bits(format) } else { entry_bits(format) }),
    }
}

fn pointer_masking(masking: Masking) -> Option<v1::PointerMasking> {
    (masking != Masking::NONE).then(|| v1::PointerMasking {
        user_width: masking.user_width(),
        supervisor_width: masking.supervisor_width(),
        bit_63_ignored: masking.upper_address_ignore(),
    })
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
        frame: ((1 << format.maxphyaddr()) - 1) & !0xfff & format.address_bits(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use pagewalk::mode::{CR0_WP, CR4_CET, CR4_LA57, CR4_LAM_SUP, CR4_PAE, EFER_LMA, EFER_LME, EFER_UAIE};
    use pagewalk::{ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, Vendor};

    use super::*;

    const CPU: CpuProfile =
        CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };

    fn format(cr3: u64, cr4: u64, efer: u64, cpu: &CpuProfile) -> v1::PageFormat {
        let registers = ControlRegisters {
            cr0: 0x8000_0001 | CR0_WP,
            cr3,
            cr4: CR4_PAE | cr4,
            efer: EFER_LME | EFER_LMA | efer,
            ..ControlRegisters::default()
        };
        page_walk(&PageWalk::new(&registers, cpu).unwrap()).format.unwrap()
    }

    #[test]
    fn shadow_stacks_and_ignored_bits_of_pointers() {
        let plain = format(0x1000, 0, 0, &CPU);
        assert_eq!((plain.shadow_stacks, plain.pointer_masking), (false, None));
        assert!(format(0x1000, CR4_CET, 0, &CPU).shadow_stacks);
        let masking = |user_width, supervisor_width, bit_63_ignored| {
            Some(v1::PointerMasking { user_width, supervisor_width, bit_63_ignored })
        };
        let (lam_u57, lam_u48) = (1 << 61, 1 << 62);
        assert_eq!(format(0x1000 | lam_u57, 0, 0, &CPU).pointer_masking, masking(57, 64, false));
        assert_eq!(format(0x1000 | lam_u48, 0, 0, &CPU).pointer_masking, masking(48, 64, false));
        assert_eq!(format(0x1000, CR4_LAM_SUP, 0, &CPU).pointer_masking, masking(64, 48, false));
        assert_eq!(format(0x1000, CR4_LAM_SUP | CR4_LA57, 0, &CPU).pointer_masking, masking(64, 57, false));
        let amd = CpuProfile { vendor: Vendor::Amd, encryption_bit: Some(47), ..CPU };
        let uai = format(0x1000, 0, EFER_UAIE, &amd);
        assert_eq!(uai.pointer_masking, masking(57, 57, true));
        assert_eq!((uai.encryption_mask, plain.encryption_mask), (1 << 47, 0));
    }

    #[test]
    fn controls_of_ept() {
        for (eptp, mode_based_execute, control) in [(0x105e, false, false), (0x10de, true, true)] {
            let controls = EptControls { mode_based_execute, ..EptControls::default() };
            let walk = NgpaWalk::ept(eptp, &controls, &EptCapabilities::all(), &CPU).unwrap();
            let format = page_walk(walk.page_walk()).format.unwrap();
            assert_eq!(
                (format.mode_based_execute, format.supervisor_shadow_stack_control),
                (mode_based_execute, control)
            );
            assert_eq!((format.shadow_stacks, format.pointer_masking), (false, None));
        }
    }
}
