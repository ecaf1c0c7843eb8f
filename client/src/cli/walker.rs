//! `walker`: the state of a vCPU's page walkers, once or as it changes.

use std::{process::ExitCode, time::Duration};

use super::{Context, connection::duration, exit::Failure, json, render, vcpu::FreshnessArgs};
use crate::v1::{GetWalkerStateRequest, WatchWalkerStateRequest};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    freshness: FreshnessArgs,
    /// Print the state now, and again whenever it changes: a line each, with --json a document per line
    #[arg(long, conflicts_with = "sync")]
    watch: bool,
    /// End after so many updates, the first included
    #[arg(long, value_name = "COUNT", requires = "watch", value_parser = clap::value_parser!(u32).range(1..))]
    updates: Option<u32>,
    /// Least time between two updates, such as 1s or 100ms
    #[arg(long, value_name = "TIME", requires = "watch", value_parser = duration)]
    interval: Option<Duration>,
}

const STATE: &str = "GetWalkerStateResponse";

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    if args.watch {
        return watch(context, args).await;
    }
    let request = GetWalkerStateRequest {
        vcpu: context.vcpu.reference(),
        freshness: args.freshness.freshness().into(),
    };
    let state = context.client().await?.get_walker_state(request).await?;
    context.output.answer(STATE, &state, render::walker::state)?;
    Ok(ExitCode::SUCCESS)
}

async fn watch(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let min_interval = args
        .interval
        .map(prost_types::Duration::try_from)
        .transpose()
        .map_err(|error| Failure::Usage(format!("--interval: {error}")))?;
    let request =
        WatchWalkerStateRequest { vcpu: context.vcpu.reference(), max_updates: args.updates, min_interval };
    let mut updates = context.client().await?.watch_walker_state(request).await?;
    while let Some(state) = updates.next().await {
        let state = state?;
        let line = if context.output.is_json() {
            json::line(&json::document(STATE, &state)?)?
        } else {
            render::walker::line(&state)
        };
        context.output.print(&line)?;
    }
    Ok(ExitCode::SUCCESS)
}
