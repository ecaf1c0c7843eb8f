//! One dimension: root, levels, reserved bits per level, protection-key mask, permission words.

use super::{
    hex, names, paint, permission_words,
    table::{Cell, Table},
};
use crate::v1::{EntryBits, PageFormat, PageWalk, PagingMode, PointerMasking};

pub(super) fn walk(name: &str, walk: &PageWalk) -> String {
    let Some(format) = &walk.format else {
        return format!("{}: the daemon gave no format", paint::heading(name));
    };
    let mode = names::paging_mode(format.mode());
    let title = format!("{}: {mode}", paint::heading(name));
    if format.mode() == PagingMode::None {
        return format!("{title}, addresses pass through unchanged");
    }
    let mut parts = vec![title, summary(walk, format)];
    parts.push(reserved(format));
    if let Some(bits) = &format.bits {
        parts.push(entry_bits(bits));
    }
    parts.push(permission_words::table(&format.permissions));
    parts.join("\n")
}

fn summary(walk: &PageWalk, format: &PageFormat) -> String {
    let mut table = Table::default().indented(2);
    table.row(["root".into(), Cell::address(walk.root)]);
    for (pdptr, index) in walk.pdptrs.iter().zip(0..) {
        table.row([format!("PDPTE{index}").into(), Cell::address(*pdptr)]);
    }
    table.row([
        "levels".into(),
        format!(
            "{}, {} index bits each, entries of {} bytes",
            format.levels, format.index_bits, format.entry_bytes
        )
        .into(),
    ]);
    table.row([
        "widths".into(),
        format!("linear {} bits, physical (MAXPHYADDR) {} bits", format.linear_width, format.maxphyaddr)
            .into(),
    ]);
    let fetch = if format.fetch_bit_reported { "reported" } else { "not reported" };
    table.row(["fetches".into(), format!("{fetch} in #PF error codes (bit 4)").into()]);
    let keys = match format.protection_key_mask {
        0 => "off (mask 0)".into(),
        mask => format!("mask {mask:#010x}"),
    };
    table.row(["keys".into(), keys.into()]);
    if format.shadow_stacks {
        table.row(["stacks".into(), "shadow-stack accesses exist (CR4.CET)".into()]);
    }
    if let Some(masking) = &format.pointer_masking {
        table.row(["pointers".into(), ignored(masking).into()]);
    }
    if format.encryption_mask != 0 {
        table.row(["encryption".into(), format!("bit {}", span(format.encryption_mask)).into()]);
    }
    if format.mode_based_execute {
        table.row(["execute".into(), "by mode (MBEC): X supervisors, bit 10 users".into()]);
    }
    if format.supervisor_shadow_stack_control {
        table.row(["stacks".into(), "the supervisor's marked by bit 60 of the leaf".into()]);
    }
    if format.bad_memory_type_xwr != 0 {
        table.row(["misconfigured".into(), hex(format.bad_memory_type_xwr).into()]);
    }
    table.render()
}

/// Which bits of a pointer are ignored.
fn ignored(masking: &PointerMasking) -> String {
    let highest = if masking.bit_63_ignored { 63 } else { 62 };
    let part = |whose: &str, width: u32| match width {
        64.. => format!("no bits of {whose}"),
        _ => format!("bits {highest}:{width} of {whose}"),
    };
    format!(
        "{} and {} ignored",
        part("a user's (bit 63 clear)", masking.user_width),
        part("a supervisor's (bit 63 set)", masking.supervisor_width)
    )
}

fn reserved(format: &PageFormat) -> String {
    let mut table = Table::new(&["RESERVED BITS", "IN A LEAF", "IN A TABLE REFERENCE"]).indented(2);
    for (index, leaf) in format.reserved_leaf.iter().enumerate().rev() {
        let reference = match format.reserved_table.get(index) {
            // Every entry of a page table maps a page.
            Some(mask) if index > 0 => hex(*mask),
            _ => "-".into(),
        };
        let level = u32::try_from(index + 1).unwrap_or(u32::MAX);
        table.row([names::entry(level).into(), hex(*leaf).into(), reference.into()]);
    }
    table.render()
}

fn entry_bits(bits: &EntryBits) -> String {
    let words: Vec<String> = [
        ("P", bits.present),
        ("R/W", bits.write),
        ("U/S", bits.user),
        ("NX", bits.no_execute),
        ("X", bits.execute),
        ("A", bits.accessed),
        ("D", bits.dirty),
        ("PS", bits.page_size),
        ("G", bits.global),
        ("key", bits.protection_key),
        ("frame", bits.frame),
    ]
    .into_iter()
    .filter(|(_, mask)| *mask != 0)
    .map(|(name, mask)| format!("{name} {}", span(mask)))
    .collect();
    format!("  {}  {}", paint::heading("ENTRY BITS"), words.join(", "))
}

/// Bit numbers, as the manuals write them: `63`, `51:12`.
fn span(mask: u64) -> String {
    let Some(high) = mask.checked_ilog2() else {
        return "none".into();
    };
    let low = mask.trailing_zeros();
    if mask.count_ones() != high - low + 1 {
        format!("{mask:#x}")
    } else if low == high {
        format!("{low}")
    } else {
        format!("{high}:{low}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_bits_of_pointers() {
        let said = |user_width, supervisor_width, bit_63_ignored| {
            ignored(&PointerMasking { user_width, supervisor_width, bit_63_ignored })
        };
        let lam = "bits 62:57 of a user's (bit 63 clear) and no bits of a supervisor's (bit 63 set) ignored";
        assert_eq!(said(57, 64, false), lam);
        let uai =
            "bits 63:57 of a user's (bit 63 clear) and bits 63:57 of a supervisor's (bit 63 set) ignored";
        assert_eq!(said(57, 57, true), uai);
    }

    #[test]
    fn masks_as_bit_numbers() {
        for (mask, text) in [
            (1, "0"),
            (1 << 63, "63"),
            (0x000f_ffff_ffff_f000, "51:12"),
            (u64::MAX, "63:0"),
            (0b101, "0x5"),
            (0, "none"),
        ] {
            assert_eq!(span(mask), text);
        }
    }
}
