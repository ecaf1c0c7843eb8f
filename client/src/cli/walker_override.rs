//! Options that replace registers of the vCPU: another address space is one option away.

use clap::Args;

use super::number;
use crate::v1::{Npt, WalkerOverride, walker_override::SecondDimension};

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
    /// Walk without a second dimension, even if the vCPU has one
    #[arg(long)]
    one_dimension: bool,
}

impl OverrideArgs {
    /// `None` if nothing is replaced.
    pub(super) fn message(&self) -> Option<WalkerOverride> {
        let second_dimension = match (self.ncr3, self.one_dimension) {
            (Some(ncr3), _) => Some(SecondDimension::Npt(Npt { ncr3, ..Npt::default() })),
            (None, true) => Some(SecondDimension::None(true)),
            (None, false) => None,
        };
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
