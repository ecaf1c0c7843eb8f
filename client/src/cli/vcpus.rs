//! `vcpus`: the vCPUs of a machine.

use std::process::ExitCode;

use super::{Context, exit::Failure, render};
use crate::v1::ListVcpusRequest;

pub(super) async fn run(context: &Context) -> Result<ExitCode, Failure> {
    let answer =
        context.client().await?.list_vcpus(ListVcpusRequest { machine: context.vcpu.machine_id() }).await?;
    context.output.answer("ListVcpusResponse", &answer, render::vcpu::list)?;
    Ok(ExitCode::SUCCESS)
}
