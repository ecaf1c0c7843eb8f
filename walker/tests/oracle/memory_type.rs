//! What memory type an access has, where EPT is in use and CR0.CD is 0.
//!
//! Intel SDM volume 3, "Memory Type Used for Translated Guest-Physical Addresses", and "Effective Page-Level Memory Types for
//! Pentium III and More Recent Processor Families", with EPT's type in the place of the MTRR's. Types are in their encoding: UC 0, WC 1,
//! WT 4, WP 5, WB 6, UC- 7.

const UC: u64 = 0;
const WC: u64 = 1;
const WT: u64 = 4;
const WP: u64 = 5;
const WB: u64 = 6;
const UC_MINUS: u64 = 7;

/// "If the value of the IPAT bit is 1, the memory type is that specified by the EPT memory type"; otherwise the table's.
pub(crate) fn effective(ept: u64, ignore_pat: bool, pat: u64) -> u64 {
    if ignore_pat { ept } else { TABLE.iter().find(|row| (row.0, row.1) == (ept, pat)).unwrap().2 }
}

/// The table's rows: MTRR's type, PAT's type, effective type.
const TABLE: [(u64, u64, u64); 30] = [
    (UC, UC, UC),
    (UC, UC_MINUS, UC),
    (UC, WC, WC),
    (UC, WT, UC),
    (UC, WB, UC),
    (UC, WP, UC),
    (WC, UC, UC),
    (WC, UC_MINUS, WC),
    (WC, WC, WC),
    (WC, WT, UC),
    (WC, WB, WC),
    (WC, WP, UC),
    (WT, UC, UC),
    (WT, UC_MINUS, UC),
    (WT, WC, WC),
    (WT, WT, WT),
    (WT, WB, WT),
    (WT, WP, WP),
    (WB, UC, UC),
    (WB, UC_MINUS, UC),
    (WB, WC, WC),
    (WB, WT, WT),
    (WB, WB, WB),
    (WB, WP, WP),
    (WP, UC, UC),
    (WP, UC_MINUS, WC),
    (WP, WC, WC),
    (WP, WT, WT),
    (WP, WB, WP),
    (WP, WP, WP),
];
