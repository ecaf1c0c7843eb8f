//! `machines`: what the daemon serves; with `--machine`, one of them.

use std::process::ExitCode;

use super::{Context, exit::Failure, render};
use crate::v1::{GetMachineRequest, ListMachinesRequest};

pub(super) async fn run(context: &Context) -> Result<ExitCode, Failure> {
    if let Some(machine) = context.vcpu.machine.clone() {
        let answer = context.client().await?.get_machine(GetMachineRequest { machine }).await?;
        context.output.answer("GetMachineResponse", &answer, render::machine::one)?;
    } else {
        let answer = context.client().await?.list_machines(ListMachinesRequest {}).await?;
        context.output.answer("ListMachinesResponse", &answer, render::machine::list)?;
    }
    Ok(ExitCode::SUCCESS)
}
