//! `maps` and `find`: what an address space maps, and what maps an address.

use std::process::ExitCode;

use clap::ValueEnum;

use super::{
    Context,
    address::Written,
    exit::{Failure, NEGATIVE},
    extents::{self, BudgetArgs, Found},
    gva_range::Range,
    number,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{
    Address, FindMappingsRequest, GetWalkerStateRequest, ListMappingsRequest, MappingFilter, PageSize,
    PagingMode, address::Value,
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

#[derive(Debug, clap::Args)]
struct WhichArgs {
    /// Guest virtual addresses: START..END (END is not included) or START+SIZE, aligned to 4 KiB; START and END may be symbols
    /// [default: all]
    #[arg(long, value_name = "RANGE", value_parser = Range::parse, allow_hyphen_values = true)]
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
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    freshness: FreshnessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

impl WhichArgs {
    fn end(&self) -> Option<&Written> {
        self.range.as_ref()?.end()
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
        range: which.range.as_ref().map(Range::message),
        filter: which.filter(),
        budget: Some(which.budget.message()),
        freshness: which.freshness.freshness().into(),
        r#override: which.walker.message(),
        problems: args.problems,
    };
    let parts = context.client().await?.list_mappings(request).await?;
    let found = extents::print(context, parts, "--range ", which.end()).await?;
    why_nothing(context, which, &found).await?;
    Ok(if found.truncated { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

pub(super) async fn find(context: &Context, args: &FindArgs) -> Result<ExitCode, Failure> {
    let which = &args.which;
    let request = FindMappingsRequest {
        vcpu: context.vcpu.reference(),
        gpa: Some(Address { value: Some(Value::Number(args.gpa)) }),
        bytes: Some(args.bytes),
        range: which.range.as_ref().map(Range::message),
        filter: which.filter(),
        budget: Some(which.budget.message()),
        freshness: which.freshness.freshness().into(),
        r#override: which.walker.message(),
    };
    let parts = context.client().await?.find_mappings(request).await?;
    let found = extents::print(context, parts, "--range ", which.end()).await?;
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
