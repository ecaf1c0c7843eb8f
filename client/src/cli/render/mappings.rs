//! Extents as lines of a table whose widths are known before its rows are.

use super::{hex, names, outcome, paint, provenance};
use crate::cli::address::Written;
use crate::v1::{
    Backing, Extent, MappingLimit, MappingTally, Provenance, Translation, Truncation, extent::Outcome,
};

pub(in crate::cli) fn headings() -> String {
    paint::heading(format!(
        "{:<37}  {:>10}  {:<18}  {:<14}  {:<15}  {:<2}  {:<3}  {}",
        "ADDRESSES", "SIZE", "GPA", "RIGHTS", "PAGES", "AD", "TYPE", "BACKING"
    ))
}

/// `START-END  size  GPA  rights  page size  A/D  type  backing`; of a fault what it is.
pub(in crate::cli) fn row(extent: &Extent) -> String {
    // Behind the last address there is none.
    let end = extent.start.checked_add(extent.bytes).map_or_else(|| format!("{:<18}", "2^64"), hex);
    let addresses = format!("{}-{}", paint::address(hex(extent.start)), paint::address(end));
    let what = match &extent.outcome {
        Some(Outcome::Translation(page)) => mapped(page),
        Some(Outcome::Fault(refused)) => outcome::fault(refused),
        None => paint::bad("unknown outcome"),
    };
    format!("{addresses}  {:>10}  {what}", size(extent.bytes))
}

fn mapped(page: &Translation) -> String {
    let rights = page.effective.as_ref().map_or_else(|| "unknown rights".into(), names::rights);
    let pages = match page.nested_page_size {
        None => names::page_size(page.page_size()).to_owned(),
        Some(_) => {
            format!("{} in {}", names::page_size(page.page_size()), names::page_size(page.nested_page_size()))
        }
    };
    let memory_type = match page.effective_type {
        Some(_) => page.effective_type(),
        None => page.pat_type(),
    };
    let letter = |set, letter| if set { letter } else { '-' };
    let mut row = format!(
        "{}  {rights:<14}  {pages:<15}  {}{}  {:<4}  {}",
        paint::address(hex(page.gpa)),
        letter(page.accessed, 'A'),
        letter(page.dirty, 'D'),
        names::memory_type(memory_type),
        match page.backing() {
            Backing::Ram => names::backing(Backing::Ram).to_owned(),
            other => paint::warning(names::backing(other)),
        },
    );
    if page.global {
        row += "  global";
    }
    if page.protection_key != 0 {
        row += &format!("  key {}", page.protection_key);
    }
    if let Some(nested) = page.nested_gpa {
        row += &format!("  nGPA {}", hex(nested));
    }
    row
}

/// Bytes in a unit in which they are a number of few digits.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) >= 1 {
        // Stays whole while that takes few digits.
        let whole = bytes.is_multiple_of(1 << (10 * unit)) && !bytes.is_multiple_of(1 << (10 * (unit + 1)));
        if whole && bytes >> (10 * unit) < 100_000 {
            break;
        }
        unit += 1;
    }
    let whole = bytes >> (10 * unit);
    let rest = (bytes - (whole << (10 * unit))) * 10 / (1_u64 << (10 * unit)).max(1);
    if rest == 0 { format!("{whole} {}", UNITS[unit]) } else { format!("{whole}.{rest} {}", UNITS[unit]) }
}

/// What is said behind the last extent.
pub(in crate::cli) struct Summary<'a> {
    pub(in crate::cli) tally: Option<&'a MappingTally>,
    pub(in crate::cli) truncation: Option<&'a Truncation>,
    pub(in crate::cli) provenance: Option<&'a Provenance>,
    /// What a range is written behind on the command line.
    pub(in crate::cli) option: &'a str,
    /// Where the range that was asked for ends, as it was written.
    pub(in crate::cli) end: Option<&'a Written>,
}

pub(in crate::cli) fn summary(summary: &Summary<'_>) -> String {
    let mut lines = Vec::new();
    if let Some(tally) = summary.tally {
        let plural =
            |count: u64, one: &str, many: &str| format!("{count} {}", if count == 1 { one } else { many });
        let mut words = vec![
            plural(tally.extents, "extent", "extents"),
            format!("{} mapped", size(tally.mapped_bytes)),
            plural(tally.tables, "table", "tables") + " read",
        ];
        for (count, one, many) in [
            (tally.unbacked_tables, "table outside memory", "tables outside memory"),
            (tally.reserved_entries, "entry with reserved bits", "entries with reserved bits"),
            (tally.nested_refusals, "refusal by the second dimension", "refusals by the second dimension"),
        ] {
            if count > 0 {
                words.push(paint::warning(plural(count, one, many)));
            }
        }
        lines.push(format!("{}  {}", words.join(", "), provenance::short(summary.provenance)));
    }
    if let Some(truncation) = summary.truncation {
        let limit = match truncation.limit() {
            MappingLimit::Entries => "entries",
            MappingLimit::Extents => "extents",
            MappingLimit::Unspecified => "unknown",
        };
        lines.push(paint::bad(format!(
            "truncated: the budget of {limit} is used up; continue with {}{}..{}",
            summary.option,
            hex(truncation.continue_at),
            match summary.end {
                Some(Written::Number(end)) => hex(*end),
                Some(Written::Symbol(end)) => end.clone(),
                None => String::new(),
            }
        )));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_address_is_followed_by_none() {
        let extent = |bytes| Extent { start: 0xffff_8000_0000_0000, bytes, outcome: None };
        assert!(row(&extent(1 << 47)).contains("2^64") && !row(&extent(1 << 12)).contains("2^64"));
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (1, "1 B"),
            (4096, "4 KiB"),
            (12 << 10, "12 KiB"),
            (1 << 21, "2 MiB"),
            ((1 << 21) + 4096, "2052 KiB"),
            (1 << 30, "1 GiB"),
            ((1 << 30) + (1 << 21), "1026 MiB"),
            ((1 << 40) + 4096, "1 TiB"),
            (1 << 47, "128 TiB"),
            (1 << 56, "64 PiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
