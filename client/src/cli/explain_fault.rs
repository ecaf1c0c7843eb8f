//! `explain-fault`: which entry and which bit a fault that somebody saw is about.

use std::process::ExitCode;

use super::address::{Written, address as written};
use super::{Context, exit::Failure, number, render, vcpu::FreshnessArgs, walker_override::OverrideArgs};
use crate::v1::{
    Address, EptMisconfiguration, EptViolation, ExplainFaultRequest, NestedPageFault, PageFault, address,
    explain_fault_request::Seen,
};

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("seen").required(true)
    .args(["error_code", "exit_info_1", "exit_qualification", "ept_misconfiguration"])))]
pub(super) struct Args {
    /// The #PF error code, as the CPU pushed it
    #[arg(long, value_name = "CODE", requires = "cr2", value_parser = number::u32)]
    error_code: Option<u32>,
    /// CR2: the linear address that faulted, or symbol+offset
    #[arg(long, value_name = "ADDRESS", requires = "error_code", value_parser = written)]
    cr2: Option<Written>,
    /// EXITINFO1 of a nested page fault
    #[arg(long = "exit-info-1", value_name = "CODE", requires = "exit_info_2", value_parser = number::u64)]
    exit_info_1: Option<u64>,
    /// EXITINFO2 of a nested page fault: the nGPA
    #[arg(long = "exit-info-2", value_name = "ADDRESS", requires = "exit_info_1", value_parser = number::u64)]
    exit_info_2: Option<u64>,
    /// Exit qualification of an EPT violation
    #[arg(long, value_name = "CODE", requires = "guest_physical", value_parser = number::u64)]
    exit_qualification: Option<u64>,
    /// Guest-physical address of an EPT violation: the nGPA
    #[arg(long, value_name = "ADDRESS", requires = "exit_qualification", value_parser = number::u64)]
    guest_physical: Option<u64>,
    /// Guest-linear address of an EPT violation, where bit 7 of the qualification says that it is valid
    #[arg(long, value_name = "ADDRESS", requires = "exit_qualification", value_parser = number::u64)]
    guest_linear: Option<u64>,
    /// Guest-physical address of an EPT misconfiguration: the nGPA
    #[arg(long, value_name = "ADDRESS", value_parser = number::u64)]
    ept_misconfiguration: Option<u64>,
    #[command(flatten)]
    freshness: FreshnessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

fn address(number: u64) -> Option<Address> {
    Some(Address { value: Some(address::Value::Number(number)) })
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let seen = match *args {
        Args { error_code: Some(error_code), cr2: Some(ref cr2), .. } => {
            Seen::PageFault(PageFault { error_code, cr2: Some(cr2.message()) })
        }
        Args { exit_info_1: Some(exit_info_1), exit_info_2: Some(nested_gpa), .. } => {
            Seen::NestedPageFault(NestedPageFault { exit_info_1, nested_gpa: address(nested_gpa) })
        }
        Args { exit_qualification: Some(exit_qualification), guest_physical, guest_linear, .. } => {
            Seen::EptViolation(EptViolation {
                exit_qualification,
                nested_gpa: guest_physical.and_then(address),
                gva: guest_linear.and_then(address),
            })
        }
        Args { ept_misconfiguration: Some(nested_gpa), .. } => {
            Seen::EptMisconfiguration(EptMisconfiguration { nested_gpa: address(nested_gpa) })
        }
        _ => {
            return Err(Failure::Usage(
                "give --error-code and --cr2, --exit-info-1 and --exit-info-2, --exit-qualification and --guest-physical, or --ept-misconfiguration"
                    .into(),
            ));
        }
    };
    let request = ExplainFaultRequest {
        vcpu: context.vcpu.reference(),
        seen: Some(seen),
        cr3: None,
        freshness: args.freshness.freshness().into(),
        r#override: args.walker.message(),
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
