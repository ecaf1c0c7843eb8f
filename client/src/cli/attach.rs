//! `attach`, `detach`: machines come and go.

use std::process::ExitCode;

use super::{Context, exit::Failure, render};
use crate::v1::{AttachMachineRequest, DetachMachineRequest};

#[derive(Debug, clap::Args)]
pub(super) struct AttachArgs {
    /// The machine: demo, demo:plain, kvm:elf=FILE,mem=64M,cpus=1, kvm:kernel=FILE,initrd=FILE, qemu:qmp=SOCKET, dump:FILE or image:FILE.toml; optionally with symbols=FILE as one more option, and as ID=SPEC. Files are the daemon's; console= and log= name files in the folder of its --client-files, unless its own user asks over its Unix socket
    #[arg(value_name = "SPEC")]
    spec: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct DetachArgs {
    /// Id of the machine
    #[arg(value_name = "ID")]
    id: String,
    /// Agree to the end of a guest that runs in the daemon
    #[arg(long)]
    end_guest: bool,
}

pub(super) async fn attach(context: &Context, args: AttachArgs) -> Result<ExitCode, Failure> {
    let answer = context.client().await?.attach_machine(AttachMachineRequest { spec: args.spec }).await?;
    context.output.answer("AttachMachineResponse", &answer, render::machine::attached)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn detach(context: &Context, args: DetachArgs) -> Result<ExitCode, Failure> {
    let DetachArgs { id, end_guest } = args;
    let request = DetachMachineRequest { machine: id.clone(), end_guest };
    let answer = context.client().await?.detach_machine(request).await?;
    context.output.answer("DetachMachineResponse", &answer, |_| format!("{id} is detached"))?;
    Ok(ExitCode::SUCCESS)
}
