//! Answers as text for people: compact, aligned, in hex.
//!
//! One file per thing shown. Words from the daemon pass through [`readable`](pagewalk_proto::readable) right
//! where they are put in, so that they cannot steer the terminal, and the colours around them can.

pub(super) mod explanation;
pub(super) mod machine;
pub(super) mod mappings;
pub(super) mod memory;
mod names;
pub(super) mod outcome;
mod page_format;
pub(super) mod paint;
mod permission_words;
pub(super) mod provenance;
pub(super) mod registers;
pub(super) mod spaces;
pub(super) mod steps;
pub(super) mod table;
pub(super) mod vcpu;
pub(super) mod walker;
pub(super) mod word;

/// A 64-bit value in full width.
pub(super) fn hex(value: u64) -> String {
    format!("{value:#018x}")
}
