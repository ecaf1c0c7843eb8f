//! Options that replace registers of the vCPU: another address space is one option away.

use clap::Args;

use super::number;
use crate::v1::{Ept, Npt, WalkerOverride, walker_override::SecondDimension};

#[derive(Debug, Args)]
#[command(next_help_heading = "Walker state of your own (default: the vCPU's)")]
pub(super) struct OverrideArgs {
    /// CR3: root of the page tables
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    cr3: Option<u64>,
    /// CR0
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    cr0: Option<u64>,
    /// CR4
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    cr4: Option<u64>,
    /// IA32_EFER
    #[arg(long, value_name = "VALUE", value_parser = number::u64)]
    efer: Option<u64>,
    /// Physical address width in bits, 32 to 52
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u32).range(32..=52))]
    maxphyaddr: Option<u32>,
    /// nCR3: walk as an L2 under NPT with this root
    #[arg(long, value_name = "ADDRESS", value_parser = number::u64, conflicts_with = "one_dimension")]
    ncr3: Option<u64>,
    /// Guest Mode Execute Trap, under NPT
    #[arg(long, requires = "ncr3")]
    gmet: bool,
    /// EPTP: walk as an L2 under EPT with this root, walk length and memory type
    #[arg(long, value_name = "VALUE", value_parser = number::u64, conflicts_with_all = ["ncr3", "one_dimension"])]
    eptp: Option<u64>,
    /// Mode-based execute control, under EPT
    #[arg(long, requires = "eptp")]
    mbec: bool,
    /// IA32_VMX_EPT_VPID_CAP (MSR 0x48c), under EPT [default: everything]
    #[arg(long, value_name = "VALUE", value_parser = number::u64, requires = "eptp")]
    ept_capabilities: Option<u64>,
    /// Walk without a second dimension, even if the vCPU has one
    #[arg(long)]
    one_dimension: bool,
}

impl OverrideArgs {
    /// `None` if nothing is replaced.
    pub(super) fn message(&self) -> Option<WalkerOverride> {
        let npt = self.ncr3.map(|ncr3| {
            let guest_mode_execute_trap = self.gmet;
            SecondDimension::Npt(Npt { ncr3, guest_mode_execute_trap, ..Npt::default() })
        });
        let ept = self.eptp.map(|eptp| {
            let (mode_based_execute, capabilities) = (self.mbec, self.ept_capabilities);
            SecondDimension::Ept(Ept { eptp, mode_based_execute, capabilities, ..Ept::default() })
        });
        let second_dimension = npt.or(ept).or(self.one_dimension.then_some(SecondDimension::None(true)));
        let message = WalkerOverride {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            maxphyaddr: self.maxphyaddr,
            second_dimension,
            ..WalkerOverride::default()
        };
        (message != WalkerOverride::default()).then_some(message)
    }
}
