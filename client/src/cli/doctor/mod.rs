//! `doctor`: what this host and the daemon can do, and what to do about what they cannot. Works without a daemon.

mod check;
mod daemon;
mod huge_pages;
mod kvm;
mod qmp;

use std::{path::PathBuf, process::ExitCode};

use self::check::Report;
use super::{
    Context,
    exit::{Failure, NEGATIVE},
    json,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also look whether a QEMU greets at this QMP socket; may be repeated
    #[arg(long, value_name = "PATH")]
    qmp: Vec<PathBuf>,
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let endpoint = context.connection.endpoint()?;
    let mut report = Report::default();
    kvm::examine(&mut report);
    huge_pages::examine(&mut report);
    qmp::examine(&mut report, &args.qmp);
    daemon::examine(&mut report, endpoint, &context.connection).await;
    if context.output.is_json() {
        context.output.print(&json::escaped(format!("{:#}", report.json())))?;
    } else {
        context.output.print(&report.text())?;
    }
    Ok(if report.has_failed() { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}
