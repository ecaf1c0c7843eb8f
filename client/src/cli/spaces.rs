//! `spaces` and `across`: the address spaces of a machine, and one address in many of them.

use std::process::ExitCode;

use super::{
    Context,
    access::LinearAccessArgs,
    address::{Written, address},
    exit::{Failure, NEGATIVE},
    number, render,
    vcpu::FreshnessArgs,
};
use crate::v1::{ListAddressSpacesRequest, TranslateAcrossRequest, space_translation::Outcome};

#[derive(Debug, clap::Args)]
pub(super) struct AcrossArgs {
    /// Guest virtual address, or symbol+offset
    #[arg(value_name = "ADDRESS", value_parser = address)]
    address: Written,
    /// Address spaces, by their CR3s [default: those of `spaces`]
    #[arg(value_name = "CR3", value_parser = number::u64)]
    cr3s: Vec<u64>,
    #[command(flatten)]
    access: LinearAccessArgs,
    #[command(flatten)]
    freshness: FreshnessArgs,
}

pub(super) async fn spaces(context: &Context) -> Result<ExitCode, Failure> {
    let request = ListAddressSpacesRequest { machine: context.vcpu.machine_id() };
    let answer = context.client().await?.list_address_spaces(request).await?;
    context.output.answer("ListAddressSpacesResponse", &answer, render::spaces::list)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn across(context: &Context, args: &AcrossArgs) -> Result<ExitCode, Failure> {
    let request = TranslateAcrossRequest {
        vcpu: context.vcpu.reference(),
        address: Some(args.address.message()),
        access: Some(args.access.message()),
        freshness: args.freshness.freshness().into(),
        r#override: None,
        cr3s: args.cr3s.clone(),
    };
    let answer = context.client().await?.translate_across(request).await?;
    let mapped = answer.spaces.iter().any(|space| matches!(space.outcome, Some(Outcome::Translation(_))));
    context.output.answer("TranslateAcrossResponse", &answer, render::spaces::across)?;
    Ok(if mapped { ExitCode::SUCCESS } else { ExitCode::from(NEGATIVE) })
}
