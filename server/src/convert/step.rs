//! Steps.

use pagewalk::{Dimension, Step, Verdict, Walker};
use pagewalk_proto::v1;

use super::fault::dimension;
use super::format::paging_mode;
use super::rights::rights;
use crate::symbols::Near;

/// A step of `walker`, whose entry has this symbol.
pub(crate) fn step(step: &Step, walker: &Walker, symbol: Option<Near>) -> v1::Step {
    let walk = match (step.dimension, walker.ngpa_walk()) {
        (Dimension::Nested, Some(second)) => second.page_walk(),
        _ => walker.gva_walk(),
    };
    v1::Step {
        dimension: dimension(step.dimension).into(),
        level: step.level,
        table_gpa: step.table_gpa.0,
        index: step.index,
        entry_gpa: step.entry_gpa.0,
        entry: step.entry,
        rights_so_far: Some(rights(step.rights_so_far)),
        verdict: verdict(step.verdict).to_owned(),
        input: Some(step.input),
        leaf: step.verdict == Verdict::Leaf,
        mode: paging_mode(walk.format()).into(),
        symbol: symbol.map(super::symbol::symbol),
    }
}

pub(crate) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Table => "table",
        Verdict::Leaf => "maps a page",
        Verdict::NotPresent => "not present",
        Verdict::Reserved => "reserved bits set",
        Verdict::Misconfigured => "misconfigured",
        Verdict::Unbacked => "outside memory",
    }
}
