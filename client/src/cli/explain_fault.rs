//! `explain-fault`: which entry and which bit a fault that somebody saw is about.

use std::process::ExitCode;

use super::{Context, exit::Failure, number, render, vcpu::FreshnessArgs};
use crate::v1::{
    Address, ExplainFaultRequest, NestedPageFault, PageFault, address, explain_fault_request::Seen,
};

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("seen").required(true).args(["error_code", "exit_info_1"])))]
pub(super) struct Args {
    /// The #PF error code, as the CPU pushed it
    #[arg(long, value_name = "CODE", requires = "cr2", value_parser = number::u32)]
    error_code: Option<u32>,
    /// CR2: the linear address that faulted
    #[arg(long, value_name = "ADDRESS", requires = "error_code", value_parser = number::u64)]
    cr2: Option<u64>,
    /// EXITINFO1 of a nested page fault
    #[arg(long = "exit-info-1", value_name = "CODE", requires = "exit_info_2", value_parser = number::u64)]
    exit_info_1: Option<u64>,
    /// EXITINFO2 of a nested page fault: the nGPA
    #[arg(long = "exit-info-2", value_name = "ADDRESS", requires = "exit_info_1", value_parser = number::u64)]
    exit_info_2: Option<u64>,
    /// CR3 at the time: the address space that faulted [default: the vCPU's of now]
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    cr3: Option<u64>,
    #[command(flatten)]
    freshness: FreshnessArgs,
}

fn address(number: u64) -> Option<Address> {
    Some(Address { value: Some(address::Value::Number(number)) })
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let seen = match *args {
        Args { error_code: Some(error_code), cr2: Some(cr2), .. } => {
            Seen::PageFault(PageFault { error_code, cr2: address(cr2) })
        }
        Args { exit_info_1: Some(exit_info_1), exit_info_2: Some(nested_gpa), .. } => {
            Seen::NestedPageFault(NestedPageFault { exit_info_1, nested_gpa: address(nested_gpa) })
        }
        _ => return Err(Failure::Usage("give --error-code and --cr2".into())),
    };
    let request = ExplainFaultRequest {
        vcpu: context.vcpu.reference(),
        seen: Some(seen),
        cr3: args.cr3,
        freshness: args.freshness.freshness().into(),
        r#override: None,
    };
    let answer = context.client().await?.explain_fault(request).await?;
    context.output.answer("ExplainFaultResponse", &answer, |answer| {
        format!(
            "{}\n{}",
            render::explanation::coloured(&answer.explanation),
            render::provenance::short(answer.provenance.as_ref())
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
