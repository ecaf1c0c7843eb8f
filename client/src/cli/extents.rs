//! Extents as they come, and how much they may cost: what `maps`, `find` and `range` have in common.

use serde_json::json;

use super::{
    Context,
    address::Written,
    exit::Failure,
    json, number,
    progress::Progress,
    render::{self, mappings::Summary},
};
use crate::Answers;
use crate::v1::{
    Extent, FindMappingsResponse, ListMappingsResponse, MappingBudget, MappingTally, Provenance,
    TranslateRangeResponse, Truncation, extent::Outcome,
};

#[derive(Debug, clap::Args)]
pub(super) struct BudgetArgs {
    /// Read so many table entries at most
    #[arg(long, value_name = "COUNT", value_parser = number::u64, help_heading = "Budget")]
    max_entries: Option<u64>,
    /// List so many extents at most
    #[arg(long, value_name = "COUNT", value_parser = number::u64, help_heading = "Budget")]
    max_extents: Option<u64>,
}

impl BudgetArgs {
    pub(super) fn message(&self) -> MappingBudget {
        MappingBudget { entries: self.max_entries, extents: self.max_extents }
    }
}

/// One part of an answer, whichever RPC gave it.
pub(super) struct Part {
    extents: Vec<Extent>,
    tally: Option<MappingTally>,
    position: u64,
    last: bool,
    truncation: Option<Truncation>,
    provenance: Option<Provenance>,
}

macro_rules! parts {
    ($($message:ident),*) => {$(
        impl From<$message> for Part {
            fn from(message: $message) -> Self {
                let $message { extents, tally, position, last, truncation, provenance } = message;
                Self { extents, tally, position, last, truncation, provenance }
            }
        }
    )*};
}

parts!(ListMappingsResponse, FindMappingsResponse, TranslateRangeResponse);

pub(super) struct Found {
    pub(super) extents: u64,
    /// Some of them are faults.
    pub(super) faults: bool,
    pub(super) truncated: bool,
}

/// Prints extents as they come, and what is to be said of all of them behind. The range that was asked for stands behind `option`,
/// and goes to `end`.
pub(super) async fn print<T: Into<Part>>(
    context: &Context,
    mut parts: Answers<T>,
    option: &str,
    end: Option<&Written>,
) -> Result<Found, Failure> {
    let json = context.output.is_json();
    let progress = Progress::new();
    let (mut extents, mut faults) = (0, false);
    loop {
        let part: Part = match parts.next().await {
            Some(part) => part?.into(),
            None => return Err(Failure::Own("the daemon ended the list before its end: ask again".into())),
        };
        let mut lines = Vec::with_capacity(part.extents.len() + 2);
        for extent in &part.extents {
            if json {
                let separator = if extents == 0 { "{\"extents\": [" } else { "," };
                lines.push(format!("{separator}\n  {}", json::line(&json::document("Extent", extent)?)?));
            } else {
                if extents == 0 {
                    lines.push(render::mappings::headings());
                }
                lines.push(render::mappings::row(extent));
            }
            extents += 1;
            faults |= matches!(extent.outcome, Some(Outcome::Fault(_)));
        }
        if part.last {
            if json {
                let mut rest = json!({});
                if let Some(tally) = &part.tally {
                    rest["tally"] = json!(json::document("MappingTally", tally)?);
                }
                if let Some(truncation) = &part.truncation {
                    rest["truncation"] = json!(json::document("Truncation", truncation)?);
                }
                if let Some(provenance) = &part.provenance {
                    rest["provenance"] = json!(json::document("Provenance", provenance)?);
                }
                let rest = json::line(&rest)?;
                let opening = if extents == 0 { "{\"extents\": [" } else { "" };
                lines.push(format!("{opening}], {}", rest.trim_start_matches('{')));
            } else {
                let summary = Summary {
                    tally: part.tally.as_ref(),
                    truncation: part.truncation.as_ref(),
                    provenance: part.provenance.as_ref(),
                    option,
                    end,
                };
                lines.push(render::mappings::summary(&summary));
            }
            progress.aside(|| context.output.print(&lines.join("\n")))?;
            return Ok(Found { extents, faults, truncated: part.truncation.is_some() });
        }
        if !lines.is_empty() {
            progress.aside(|| context.output.print(&lines.join("\n")))?;
        }
        progress.tell(|| {
            let entries = part.tally.as_ref().map_or(0, |tally| tally.entries);
            let position = render::hex(part.position);
            format!("at {position}: {extents} extents, {entries} table entries read")
        });
    }
}
