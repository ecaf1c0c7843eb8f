//! `translate`: what guest virtual addresses mean.

use std::process::ExitCode;

use super::{
    Context,
    access::LinearAccessArgs,
    address::{Written, address},
    exit::{Failure, NEGATIVE},
    json, render,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{AdPolicy, TranslateRequest, TranslateResponse, translate_response::Outcome};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Guest virtual addresses: 0x and hex digits, or decimal; `_` may separate digits; or symbol+offset, where the machine has
    /// symbols
    #[arg(required = true, value_name = "ADDRESS", value_parser = address)]
    addresses: Vec<Written>,
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
    /// Set the accessed and dirty bits that the access would set; needs the control role
    #[arg(long)]
    set: bool,
    #[command(flatten)]
    access: LinearAccessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

impl Args {
    fn request(&self, context: &Context, address: &Written) -> TranslateRequest {
        TranslateRequest {
            vcpu: context.vcpu.reference(),
            address: Some(address.message()),
            access: Some(self.access.message()),
            ad_policy: if self.set { AdPolicy::Set } else { AdPolicy::Observe }.into(),
            freshness: self.freshness.freshness().into(),
            r#override: self.walker.message(),
            trace: self.trace,
            explain: self.explain,
            validate: self.validate,
        }
    }
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let client = context.client().await?;
    let mut documents = Vec::new();
    let mut faults = false;
    for address in &args.addresses {
        let answer = client.translate(args.request(context, address)).await?;
        match answer.outcome {
            Some(Outcome::Translation(_)) => {}
            Some(Outcome::Fault(_)) => faults = true,
            None => {
                return Err(Failure::Own(
                    "the answer is of a kind that this client does not know; update it".into(),
                ));
            }
        }
        if context.output.is_json() {
            documents.push(json::document("TranslateResponse", &answer)?);
        } else {
            context.output.print(&text(address.number(answer.address), &answer))?;
        }
    }
    if context.output.is_json() {
        let text = match documents.as_slice() {
            [document] => json::pretty(document)?,
            several => json::pretty(&several)?,
        };
        context.output.print(&text)?;
    }
    Ok(if faults { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

fn text(address: u64, answer: &TranslateResponse) -> String {
    let mut text = render::outcome::line(address, answer);
    if !answer.explanation.is_empty() {
        text = format!("{text}\n\n{}\n", render::explanation::coloured(&answer.explanation));
    }
    if !answer.steps.is_empty() {
        text = format!("{text}\n\n{}\n", render::steps::table(&answer.steps));
    }
    text
}
