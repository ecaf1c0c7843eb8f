//! `nested`: switches nested mode.

use std::process::ExitCode;

use clap::Subcommand;

use super::{Context, exit::Failure, number, render};
use crate::v1::{Ept, Npt, Registers, SetNestedModeRequest, set_nested_mode_request::Mode};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    mode: ModeArg,
}

#[derive(Debug, Subcommand)]
enum ModeArg {
    /// L2 under NPT
    #[command(after_help = super::examples::NESTED)]
    Npt(NptArgs),
    /// L2 under EPT
    #[command(after_help = super::examples::NESTED)]
    Ept(EptArgs),
    /// No nested guest
    #[command(after_help = super::examples::NESTED)]
    Off {
        /// Take away what was laid over the walkers alone, and leave a real L2 alone
        #[arg(long)]
        walker_only: bool,
    },
}

#[derive(Debug, clap::Args)]
struct EptArgs {
    /// EPTP, the VMCS12 field: root, walk length and memory type
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    eptp: u64,
    /// Mode-based execute control
    #[arg(long)]
    mbec: bool,
    /// IA32_VMX_EPT_VPID_CAP (MSR 0x48c), for the walkers alone [default: everything]
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    ept_capabilities: Option<u64>,
    /// Where VMCS12 is to lie, for a real vCPU [default: a page of the daemon's own]
    #[arg(long, value_name = "ADDRESS", value_parser = number::u64)]
    vmcs12: Option<u64>,
    /// Switch the walkers alone, even where the real vCPU could enter guest mode
    #[arg(long)]
    walker_only: bool,
    #[command(flatten)]
    l2: L2Args,
}

#[derive(Debug, clap::Args)]
struct NptArgs {
    /// nCR3, the VMCB12 field: root of the nested page tables, an L1 GPA
    #[arg(long, value_name = "ADDRESS", value_parser = number::u64)]
    ncr3: u64,
    /// L1's CR4 at VMRUN; LA57 selects five nested levels [default: PAE alone]
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    host_cr4: Option<u64>,
    /// L1's IA32_EFER at VMRUN [default: 0x1d00]
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    host_efer: Option<u64>,
    /// L1's CR0 at VMRUN [default: 0x80010001]
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    host_cr0: Option<u64>,
    /// Guest Mode Execute Trap
    #[arg(long)]
    gmet: bool,
    /// Where VMCB12 is to lie, for a real vCPU [default: a page of the daemon's own]
    #[arg(long, value_name = "ADDRESS", value_parser = number::u64)]
    vmcb12: Option<u64>,
    /// Switch the walkers alone, even where the real vCPU could enter guest mode
    #[arg(long)]
    walker_only: bool,
    #[command(flatten)]
    l2: L2Args,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Registers of L2 (default: the vCPU's)")]
struct L2Args {
    /// L2's CR3
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_cr3: Option<u64>,
    /// L2's CR0
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_cr0: Option<u64>,
    /// L2's CR4
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_cr4: Option<u64>,
    /// L2's IA32_EFER
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_efer: Option<u64>,
    /// L2's IA32_PAT
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_pat: Option<u64>,
    /// L2's RIP, for a real vCPU
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_rip: Option<u64>,
    /// L2's RSP, for a real vCPU
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_rsp: Option<u64>,
    /// L2's RFLAGS, for a real vCPU
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    l2_rflags: Option<u64>,
}

impl L2Args {
    fn registers(&self) -> Option<Registers> {
        let registers = Registers {
            cr0: self.l2_cr0,
            cr3: self.l2_cr3,
            cr4: self.l2_cr4,
            efer: self.l2_efer,
            pat: self.l2_pat,
            rip: self.l2_rip,
            rsp: self.l2_rsp,
            rflags: self.l2_rflags,
            ..Registers::default()
        };
        (registers != Registers::default()).then_some(registers)
    }
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let vcpu = context.vcpu.reference();
    let request = match &args.mode {
        ModeArg::Off { walker_only } => SetNestedModeRequest {
            vcpu,
            mode: Some(Mode::Off(true)),
            walker_only: *walker_only,
            ..SetNestedModeRequest::default()
        },
        ModeArg::Npt(npt) => SetNestedModeRequest {
            vcpu,
            mode: Some(Mode::Npt(Npt {
                ncr3: npt.ncr3,
                host_cr4: npt.host_cr4,
                host_efer: npt.host_efer,
                host_cr0: npt.host_cr0,
                guest_mode_execute_trap: npt.gmet,
            })),
            l2: npt.l2.registers(),
            walker_only: npt.walker_only,
            vmcb12: npt.vmcb12,
            vmcs12: None,
        },
        ModeArg::Ept(ept) => SetNestedModeRequest {
            vcpu,
            mode: Some(Mode::Ept(Ept {
                eptp: ept.eptp,
                mode_based_execute: ept.mbec,
                capabilities: ept.ept_capabilities,
                tables_written: false,
            })),
            l2: ept.l2.registers(),
            walker_only: ept.walker_only,
            vmcb12: None,
            vmcs12: ept.vmcs12,
        },
    };
    let answer = context.client().await?.set_nested_mode(request).await?;
    context.output.answer("SetNestedModeResponse", &answer, render::walker::switched)?;
    Ok(ExitCode::SUCCESS)
}
