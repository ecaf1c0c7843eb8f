//! `pause`, `resume`, `step`.

use std::process::ExitCode;

use super::{Context, exit::Failure, render};
use crate::v1::{PauseVcpuRequest, ResumeVcpuRequest, StepVcpuRequest};

pub(super) async fn pause(context: &Context) -> Result<ExitCode, Failure> {
    let answer =
        context.client().await?.pause_vcpu(PauseVcpuRequest { vcpu: context.vcpu.reference() }).await?;
    context.output.answer("PauseVcpuResponse", &answer, |answer| {
        render::vcpu::now(answer.vcpu.as_ref(), answer.provenance.as_ref())
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn resume(context: &Context) -> Result<ExitCode, Failure> {
    let answer =
        context.client().await?.resume_vcpu(ResumeVcpuRequest { vcpu: context.vcpu.reference() }).await?;
    context.output.answer("ResumeVcpuResponse", &answer, |answer| {
        render::vcpu::now(answer.vcpu.as_ref(), answer.provenance.as_ref())
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn step(context: &Context) -> Result<ExitCode, Failure> {
    let answer =
        context.client().await?.step_vcpu(StepVcpuRequest { vcpu: context.vcpu.reference() }).await?;
    context.output.answer("StepVcpuResponse", &answer, |answer| {
        let line = render::vcpu::now(answer.vcpu.as_ref(), answer.provenance.as_ref());
        match &answer.registers {
            None => line,
            Some(registers) => format!("{line}\n{}", render::registers::table(registers)),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
