//! One line for one address: what it means, or why nothing.

use pagewalk_proto::readable;

use super::{hex, names, paint, provenance};
use crate::v1::{
    Backing, Fault, FaultKind, Symbol, TranslateNestedGpaResponse, TranslateResponse, Translation,
    translate_nested_gpa_response, translate_response::Outcome,
};

/// `GVA <symbol> -> GPA  size  rights  A/D  type  backing  (provenance)`, or
/// `GVA <symbol> -> fault  entry  bits  reason  (provenance)`.
pub(in crate::cli) fn line(address: u64, answer: &TranslateResponse) -> String {
    let outcome = outcome(answer.outcome.as_ref());
    let name = symbol(answer.symbol.as_ref());
    format!("{}{name} -> {outcome}  {}", hex(address), provenance::short(answer.provenance.as_ref()))
}

/// ` <name+0x10>`, or nothing.
pub(super) fn symbol(symbol: Option<&Symbol>) -> String {
    let Some(symbol) = symbol else { return String::new() };
    let name = readable(&symbol.name);
    match symbol.offset {
        0 => format!(" <{name}>"),
        offset => format!(" <{name}+{offset:#x}>"),
    }
}

/// What follows the arrow.
fn outcome(outcome: Option<&Outcome>) -> String {
    match outcome {
        Some(Outcome::Translation(found)) => translation(found),
        Some(Outcome::Fault(refused)) => fault(refused),
        None => paint::bad("unknown outcome"),
    }
}

/// `nGPA -> GPA  size  rights  type  backing  (provenance)`, or a fault as [`line`] shows it.
pub(in crate::cli) fn nested_line(address: u64, answer: &TranslateNestedGpaResponse) -> String {
    use translate_nested_gpa_response::Outcome;
    let outcome = match &answer.outcome {
        Some(Outcome::Translation(found)) if answer.identity => {
            format!("{}  the same: no second dimension  {}", paint::address(hex(found.gpa)), behind(found))
        }
        Some(Outcome::Translation(found)) => nested_page(found),
        Some(Outcome::Fault(refused)) => fault(refused),
        None => paint::bad("unknown outcome"),
    };
    format!("nGPA {} -> {outcome}  {}", hex(address), provenance::short(answer.provenance.as_ref()))
}

fn nested_page(found: &Translation) -> String {
    let rights = match (&found.effective, &found.ept_type) {
        (None, _) => "unknown rights".into(),
        (Some(rights), None) => names::rights(rights),
        // EPT has no U/S.
        (Some(rights), Some(_)) => names::rwx(rights),
    };
    let ept = found.ept_type.map_or_else(String::new, |said| {
        let ignores = if said.ignore_pat { ", ignores the PAT" } else { "" };
        format!("  EPT type {}{ignores}", names::memory_type(said.memory_type()))
    });
    let size = names::page_size(found.nested_page_size());
    format!("{}  {size}  {rights}{ept}  {}", paint::address(hex(found.gpa)), behind(found))
}

fn behind(found: &Translation) -> String {
    match found.backing() {
        Backing::Ram => paint::good(names::backing(Backing::Ram)),
        other => paint::warning(names::backing(other)),
    }
}

pub(super) fn translation(found: &Translation) -> String {
    let memory_type = match found.effective_type {
        Some(_) => found.effective_type(),
        None => found.pat_type(),
    };
    page(found, names::memory_type(memory_type))
}

/// A translation whose memory type is said in these words.
pub(super) fn page(found: &Translation, memory_type: &str) -> String {
    let rights = found.effective.as_ref().map_or_else(|| "unknown rights".into(), names::rights);
    let size = match found.nested_page_size {
        None => names::page_size(found.page_size()).to_owned(),
        Some(_) => format!(
            "{} in {}",
            names::page_size(found.page_size()),
            names::page_size(found.nested_page_size())
        ),
    };
    let nested = found.nested_gpa.map(|nested| format!("nGPA {} -> ", hex(nested))).unwrap_or_default();
    let backing = behind(found);
    let letter = |set, letter| if set { letter } else { '-' };
    let mut line = format!(
        "{nested}{}  {size:<7}  {rights:<14}  {}{}  {memory_type:<3}  {backing}",
        paint::address(hex(found.gpa)),
        letter(found.accessed, 'A'),
        letter(found.dirty, 'D'),
    );
    if found.global {
        line += "  global";
    }
    if found.protection_key != 0 {
        line += &format!("  key {}", found.protection_key);
    }
    if found.ad_skipped {
        line += "  A/D bits not all set: a table lies in read-only memory";
    }
    line
}

pub(super) fn fault(refused: &Fault) -> String {
    let entry = if refused.level == 0 {
        String::new()
    } else {
        let name = names::entry_in(refused.dimension(), refused.level);
        let at = paint::address(hex(refused.entry_gpa));
        // An entry that nobody can read has no value.
        match refused.kind() {
            FaultKind::Unbacked => format!("{name} at {at}"),
            _ => format!("{name} {} at {at}", hex(refused.entry)),
        }
    };
    let bits = match refused.kind() {
        FaultKind::EptViolation | FaultKind::EptMisconfiguration => {
            names::ept_entry_bits(refused.bits, refused.entry)
        }
        _ => names::entry_bits(refused.bits, refused.entry),
    };
    let parts = [what(refused), entry, bits, readable(&refused.reason)];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ")
}

/// The fault's kind, its code decoded, and the nGPA it is about.
fn what(refused: &Fault) -> String {
    let mut words = vec![paint::bad(names::fault(refused.kind()))];
    if let Some(code) = refused.error_code.map(u64::from).or(refused.exit_info_1) {
        words.push(format!("{code:#x} ({})", names::error_code(code)));
    }
    if let Some(qualification) = refused.exit_qualification {
        words.push(format!("{qualification:#x} ({})", names::exit_qualification(qualification)));
    }
    if refused.nested_gpa != 0
        || matches!(
            refused.kind(),
            FaultKind::NestedPageFault | FaultKind::EptViolation | FaultKind::EptMisconfiguration
        )
    {
        words.push(format!("for nGPA {}", hex(refused.nested_gpa)));
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Dimension, MemoryType, PageSize, Provenance, Rights, RunState};

    fn shown(outcome: Outcome) -> String {
        let provenance = Provenance {
            generation: 12,
            run_state: RunState::Halted.into(),
            snapshot_age: Some(prost_types::Duration { seconds: 0, nanos: 3_000_000 }),
            ..Provenance::default()
        };
        let answer = TranslateResponse {
            outcome: Some(outcome),
            provenance: Some(provenance),
            ..TranslateResponse::default()
        };
        anstream::adapter::strip_str(&line(0xffff_8000_0000_1234, &answer)).to_string()
    }

    fn page() -> Translation {
        Translation {
            gpa: 0x0010_5234,
            page_size: PageSize::PageSize4k.into(),
            effective: Some(Rights { read: true, write: false, user: false, execute: true }),
            accessed: true,
            backing: Backing::Ram.into(),
            pat_type: MemoryType::Wb.into(),
            ..Translation::default()
        }
    }

    #[test]
    fn a_translation_is_one_line() {
        assert_eq!(
            shown(Outcome::Translation(page())),
            "0xffff800000001234 -> 0x0000000000105234  4 KiB    r-x supervisor  A-  WB   RAM  \
             (vcpu 0, generation 12, 3 ms old, halted)"
        );
    }

    #[test]
    fn a_symbol_stands_behind_its_address() {
        let answer = TranslateResponse {
            symbol: Some(Symbol { name: "linux_banner".into(), offset: 0x10 }),
            ..TranslateResponse::default()
        };
        assert!(line(0x10, &answer).starts_with("0x0000000000000010 <linux_banner+0x10> -> "));
    }

    #[test]
    fn a_nested_translation_shows_both_dimensions() {
        let nested = Translation {
            nested_gpa: Some(0x5234),
            nested_page_size: Some(PageSize::PageSize2m.into()),
            protection_key: 5,
            global: true,
            backing: Backing::None.into(),
            ..page()
        };
        let line = shown(Outcome::Translation(nested));
        for part in [
            "nGPA 0x0000000000005234 -> 0x0000000000105234",
            "4 KiB in 2 MiB",
            "no memory",
            "global",
            "key 5",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }

    #[test]
    fn a_fault_is_one_line_with_its_entry_and_bits() {
        let fault = Fault {
            kind: FaultKind::PageFault.into(),
            error_code: Some(3),
            level: 1,
            dimension: Dimension::Guest.into(),
            entry_gpa: 0x0010_4008,
            entry: 0x0010_5025,
            bits: 2,
            reason: "the page is read-only".into(),
            ..Fault::default()
        };
        assert_eq!(
            shown(Outcome::Fault(fault)),
            "0xffff800000001234 -> #PF 0x3 (present, write, supervisor)  PTE 0x0000000000105025 at \
             0x0000000000104008  R/W=0  the page is read-only  (vcpu 0, generation 12, 3 ms old, halted)"
        );
    }

    #[test]
    fn faults_without_an_entry_show_none() {
        let fault = Fault {
            kind: FaultKind::GeneralProtection.into(),
            reason: "not canonical".into(),
            ..Fault::default()
        };
        assert!(shown(Outcome::Fault(fault)).contains("-> #GP  not canonical  (vcpu 0"));
    }
}
