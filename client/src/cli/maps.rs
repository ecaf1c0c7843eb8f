//! `maps` and `find`: what an address space maps, and what maps an address.

use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::json;

use super::{
    Context,
    address::{Written, address},
    exit::{Failure, NEGATIVE},
    json, number,
    progress::Progress,
    render::{self, mappings::Summary},
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::Answers;
use crate::v1::{
    Address, Extent, FindMappingsRequest, FindMappingsResponse, GetWalkerStateRequest, GvaRange,
    ListMappingsRequest, ListMappingsResponse, MappingBudget, MappingFilter, MappingTally, PageSize,
    PagingMode, Provenance, Truncation, address::Value,
};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SizeArg {
    #[value(name = "4K")]
    Small,
    #[value(name = "2M")]
    TwoMega,
    #[value(name = "4M")]
    FourMega,
    #[value(name = "1G")]
    Giga,
    /// No page: paging is off
    #[value(name = "unpaged")]
    Unpaged,
}

const CR0_PG: u64 = 1 << 31;

/// A range as it is written: either end may be left out.
#[derive(Clone, Debug)]
struct Range {
    start: Option<Written>,
    end: Option<Written>,
}

fn range(text: &str) -> Result<Range, String> {
    let bound = |text: &str| match text {
        "" => Ok(None),
        text => address(text).map(Some).map_err(|problem| format!("{text}: {problem}")),
    };
    if let Some((start, end)) = text.split_once("..") {
        return Ok(Range { start: bound(start)?, end: bound(end)? });
    }
    let Some((start, size)) = text.split_once('+') else {
        return Err("write START..END, or START+SIZE; either end may be left out".into());
    };
    let (start, size) = match (bound(start)?, bound(size)?) {
        (Some(Written::Number(start)), Some(Written::Number(size))) => (start, size),
        (Some(Written::Symbol(start)), Some(Written::Number(size))) => {
            let end = Written::Symbol(format!("{start}+{size}"));
            return Ok(Range { start: Some(Written::Symbol(start)), end: Some(end) });
        }
        _ => return Err("write START+SIZE".into()),
    };
    let end = match start.checked_add(size) {
        Some(end) => Some(Written::Number(end)),
        // Up to the last byte that there is.
        None if start.wrapping_add(size) == 0 => None,
        None => return Err("it ends above 2^64".into()),
    };
    Ok(Range { start: Some(Written::Number(start)), end })
}

#[derive(Debug, clap::Args)]
struct WhichArgs {
    /// Guest virtual addresses: START..END (END is not included) or START+SIZE, aligned to 4 KiB; START and END may be symbols
    /// [default: all]
    #[arg(long, value_name = "RANGE", value_parser = range, allow_hyphen_values = true)]
    range: Option<Range>,
    /// Pages of the user
    #[arg(long, help_heading = "Filter")]
    user: bool,
    /// Pages of the supervisor
    #[arg(long, help_heading = "Filter", conflicts_with = "user")]
    kernel: bool,
    /// Pages that may be written
    #[arg(long, help_heading = "Filter")]
    writable: bool,
    /// Pages that may be executed
    #[arg(long, help_heading = "Filter")]
    executable: bool,
    /// Pages that may be both written and executed
    #[arg(long, help_heading = "Filter")]
    wx: bool,
    /// Size of the pages; may be repeated
    #[arg(long, value_name = "SIZE", help_heading = "Filter", ignore_case = true)]
    page_size: Vec<SizeArg>,
    /// Read so many table entries at most
    #[arg(long, value_name = "COUNT", value_parser = number::u64, help_heading = "Budget")]
    max_entries: Option<u64>,
    /// List so many extents at most
    #[arg(long, value_name = "COUNT", value_parser = number::u64, help_heading = "Budget")]
    max_extents: Option<u64>,
    #[command(flatten)]
    freshness: FreshnessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

impl WhichArgs {
    fn range(&self) -> Option<GvaRange> {
        let message = |written: &Option<Written>| written.as_ref().map(Written::message);
        self.range.as_ref().map(|range| GvaRange { start: message(&range.start), end: message(&range.end) })
    }

    fn end(&self) -> Option<&Written> {
        self.range.as_ref()?.end.as_ref()
    }

    fn filter(&self) -> Option<MappingFilter> {
        let size = |size: &SizeArg| match size {
            SizeArg::Small => PageSize::PageSize4k,
            SizeArg::TwoMega => PageSize::PageSize2m,
            SizeArg::FourMega => PageSize::PageSize4m,
            SizeArg::Giga => PageSize::PageSize1g,
            SizeArg::Unpaged => PageSize::Unpaged,
        };
        Some(MappingFilter {
            write: (self.writable || self.wx).then_some(true),
            execute: (self.executable || self.wx).then_some(true),
            user: if self.user { Some(true) } else { self.kernel.then_some(false) },
            page_sizes: self.page_size.iter().map(|it| size(it).into()).collect(),
        })
    }

    fn budget(&self) -> Option<MappingBudget> {
        Some(MappingBudget { entries: self.max_entries, extents: self.max_extents })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct MapsArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// Print what is present and leads nowhere, too: reserved bits, tables outside memory, refusals of the second dimension
    #[arg(long)]
    problems: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct FindArgs {
    /// Guest physical address, of the machine's memory: 0x and hex digits, or decimal; `_` may separate digits
    #[arg(value_name = "GPA", value_parser = number::gpa)]
    gpa: u64,
    /// Length of the memory to look for
    #[arg(long, value_name = "SIZE", value_parser = number::u64, default_value = "1")]
    bytes: u64,
    #[command(flatten)]
    which: WhichArgs,
}

pub(super) async fn maps(context: &Context, args: &MapsArgs) -> Result<ExitCode, Failure> {
    let which = &args.which;
    let request = ListMappingsRequest {
        vcpu: context.vcpu.reference(),
        range: which.range(),
        filter: which.filter(),
        budget: which.budget(),
        freshness: which.freshness.freshness().into(),
        r#override: which.walker.message(),
        problems: args.problems,
    };
    let parts = context.client().await?.list_mappings(request).await?;
    let found = print(context, parts, which.end()).await?;
    why_nothing(context, which, &found).await?;
    Ok(if found.truncated { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

pub(super) async fn find(context: &Context, args: &FindArgs) -> Result<ExitCode, Failure> {
    let which = &args.which;
    let request = FindMappingsRequest {
        vcpu: context.vcpu.reference(),
        gpa: Some(Address { value: Some(Value::Number(args.gpa)) }),
        bytes: Some(args.bytes),
        range: which.range(),
        filter: which.filter(),
        budget: which.budget(),
        freshness: which.freshness.freshness().into(),
        r#override: which.walker.message(),
    };
    let parts = context.client().await?.find_mappings(request).await?;
    let found = print(context, parts, which.end()).await?;
    why_nothing(context, which, &found).await?;
    let complete = found.extents > 0 && !found.truncated;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::from(NEGATIVE) })
}

/// Says why no page is the supervisor's where there are no pages at all.
async fn why_nothing(context: &Context, which: &WhichArgs, found: &Found) -> Result<(), Failure> {
    if !which.kernel || found.extents > 0 || found.truncated || context.output.is_json() {
        return Ok(());
    }
    let paging = match which.walker.message().and_then(|state| state.cr0) {
        Some(cr0) => cr0 & CR0_PG != 0,
        None => {
            let request = GetWalkerStateRequest {
                vcpu: context.vcpu.reference(),
                freshness: which.freshness.freshness().into(),
            };
            let state = context.client().await?.get_walker_state(request).await?;
            let format = state.gva_walk.and_then(|walk| walk.format);
            format.is_none_or(|format| format.mode() != PagingMode::None)
        }
    };
    if !paging {
        context
            .output
            .print("paging is off: addresses are physical ones, and none is the supervisor's alone")?;
    }
    Ok(())
}

/// One part of an answer, of either RPC.
struct Part {
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

parts!(ListMappingsResponse, FindMappingsResponse);

struct Found {
    extents: u64,
    truncated: bool,
}

/// Prints extents as they come, and what is to be said of all of them behind.
async fn print<T: Into<Part>>(
    context: &Context,
    mut parts: Answers<T>,
    end: Option<&Written>,
) -> Result<Found, Failure> {
    let json = context.output.is_json();
    let progress = Progress::new();
    let mut extents = 0;
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
                    end,
                };
                lines.push(render::mappings::summary(&summary));
            }
            progress.aside(|| context.output.print(&lines.join("\n")))?;
            return Ok(Found { extents, truncated: part.truncation.is_some() });
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
