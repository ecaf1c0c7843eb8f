//! `range`: what every address of a range means, for one access.

use std::process::ExitCode;

use super::{
    Context,
    access::LinearAccessArgs,
    exit::{Failure, NEGATIVE},
    extents::{self, BudgetArgs},
    gva_range::Range,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::TranslateRangeRequest;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Guest virtual addresses: START..END (END is not included) or START+SIZE, aligned to 4 KiB; START and END may be symbols,
    /// and either may be left out. Of addresses that are refused alike, the entry shown is that of the first
    #[arg(value_name = "RANGE", value_parser = Range::parse)]
    range: Range,
    #[command(flatten)]
    access: LinearAccessArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    freshness: FreshnessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let request = TranslateRangeRequest {
        vcpu: context.vcpu.reference(),
        range: Some(args.range.message()),
        access: Some(args.access.message()),
        budget: Some(args.budget.message()),
        freshness: args.freshness.freshness().into(),
        r#override: args.walker.message(),
    };
    let parts = context.client().await?.translate_range(request).await?;
    let found = extents::print(context, parts, "", args.range.end()).await?;
    Ok(if found.faults || found.truncated { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}
