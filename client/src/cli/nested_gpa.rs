//! `nested-gpa`: what a guest physical address of an L2 means to its L1.

use std::process::ExitCode;

use clap::ValueEnum;

use super::{
    Context,
    access::AccessArgs,
    exit::{Failure, NEGATIVE},
    number, render,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{
    AdPolicy, Address, NestedPhase, TranslateNestedGpaRequest, TranslateNestedGpaResponse, address,
    translate_nested_gpa_response::Outcome,
};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PhaseArg {
    /// The final address of an access
    Final,
    /// An entry of the guest's paging structures
    Table,
    /// A PDPTE of PAE paging, as CR3 is written
    Pdpte,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Guest physical address of the L2: 0x and hex digits, or decimal; `_` may separate digits
    #[arg(value_name = "ADDRESS", value_parser = number::u64)]
    address: u64,
    /// Print the walk as a ladder: each entry, its bits, the rights so far
    #[arg(long)]
    explain: bool,
    /// Print the entries read, as a table
    #[arg(long)]
    trace: bool,
    #[command(flatten)]
    freshness: FreshnessArgs,
    /// Read the entries again at the end of the walk, and walk again if one has changed
    #[arg(long)]
    validate: bool,
    /// Set the accessed and dirty bits of the second dimension that the access would set; needs the control role
    #[arg(long)]
    set: bool,
    /// What the address is accessed for
    #[arg(long, value_name = "PHASE", default_value = "final", help_heading = "Access")]
    phase: PhaseArg,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let phase = match args.phase {
        PhaseArg::Final => NestedPhase::Final,
        PhaseArg::Table => NestedPhase::Table,
        PhaseArg::Pdpte => NestedPhase::Pdpte,
    };
    let request = TranslateNestedGpaRequest {
        vcpu: context.vcpu.reference(),
        address: Some(Address { value: Some(address::Value::Number(args.address)) }),
        access: Some(args.access.message()),
        phase: phase.into(),
        ad_policy: if args.set { AdPolicy::Set } else { AdPolicy::Observe }.into(),
        freshness: args.freshness.freshness().into(),
        r#override: args.walker.message(),
        trace: args.trace,
        explain: args.explain,
        validate: args.validate,
    };
    let answer = context.client().await?.translate_nested_gpa(request).await?;
    let code = match answer.outcome {
        Some(Outcome::Translation(_)) => ExitCode::SUCCESS,
        Some(Outcome::Fault(_)) => ExitCode::from(NEGATIVE),
        None => {
            let problem = "the answer is of a kind that this client does not know; update it";
            return Err(Failure::Own(problem.into()));
        }
    };
    context.output.answer("TranslateNestedGpaResponse", &answer, |answer| text(args.address, answer))?;
    Ok(code)
}

fn text(address: u64, answer: &TranslateNestedGpaResponse) -> String {
    let mut text = render::outcome::nested_line(address, answer);
    if !answer.explanation.is_empty() {
        text = format!("{text}\n\n{}\n", render::explanation::coloured(&answer.explanation));
    }
    if !answer.steps.is_empty() {
        text = format!("{text}\n\n{}\n", render::steps::table(&answer.steps));
    }
    text
}
