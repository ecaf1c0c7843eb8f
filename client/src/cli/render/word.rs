//! The word of an address in a batch, as `BatchTranslateResponse.words` describes it.

use super::{hex, outcome};
use crate::v1::{Backing, Dimension, Fault, FaultKind, PageSize, Rights, Translation};

/// As a single translation is shown, without its provenance; `told` is the fault in full, where the answer has it.
pub(in crate::cli) fn line(address: u64, word: u64, told: Option<&Fault>) -> String {
    let outcome = match told {
        Some(fault) => outcome::fault(fault),
        None if bit(word, 0) => outcome::page(&translation(address, word), &memory_type(word)),
        None => outcome::fault(&fault(address, word)),
    };
    format!("{} -> {outcome}", hex(address))
}

/// The word has the entry of IA32_PAT that the page selects, and not what that register holds.
fn memory_type(word: u64) -> String {
    let entry = word >> 3 & 3 | word >> 5 & 4;
    if word >> 9 & 7 == 0 { "-".to_owned() } else { format!("PAT{entry}") }
}

fn bit(word: u64, bit: u32) -> bool {
    word >> bit & 1 != 0
}

fn translation(address: u64, word: u64) -> Translation {
    let nested = word >> 54 & 7;
    Translation {
        gpa: word & 0xf_ffff_ffff_f000 | address & 0xfff,
        page_size: page_size(word >> 9 & 7).into(),
        effective: Some(Rights {
            read: !bit(word, 57),
            write: bit(word, 1),
            user: bit(word, 2),
            execute: !bit(word, 63),
        }),
        // Four bits.
        protection_key: (word >> 59 & 15) as u32,
        accessed: bit(word, 5),
        dirty: bit(word, 6),
        global: bit(word, 8),
        backing: match word >> 52 & 3 {
            0 => Backing::Ram,
            1 => Backing::ReadOnly,
            2 => Backing::None,
            _ => Backing::Unspecified,
        }
        .into(),
        nested_page_size: (nested != 0).then(|| page_size(nested).into()),
        ..Translation::default()
    }
}

fn page_size(code: u64) -> PageSize {
    match code {
        0 => PageSize::Unpaged,
        1 => PageSize::PageSize4k,
        2 => PageSize::PageSize2m,
        3 => PageSize::PageSize4m,
        4 => PageSize::PageSize1g,
        _ => PageSize::Unspecified,
    }
}

/// What the word alone says of a fault: nothing of the entry.
fn fault(address: u64, word: u64) -> Fault {
    let kind = FaultKind::try_from((word >> 1 & 15) as i32).unwrap_or_default();
    let code = word >> 16;
    Fault {
        kind: kind.into(),
        address,
        error_code: (kind == FaultKind::PageFault).then_some(code as u32),
        exit_qualification: (kind == FaultKind::EptViolation).then_some(code),
        exit_info_1: (kind == FaultKind::NestedPageFault).then_some(code),
        dimension: if bit(word, 8) { Dimension::Nested } else { Dimension::Guest }.into(),
        reason: match word >> 5 & 7 {
            0 => String::new(),
            level => format!("level {level}"),
        },
        ..Fault::default()
    }
}
