//! Options that name a vCPU.

use clap::Args;

use crate::v1::{Freshness, VcpuRef};

#[derive(Debug, Args)]
#[command(next_help_heading = "vCPU")]
pub(super) struct VcpuArgs {
    /// Id of the machine [default: the only one]
    #[arg(long, global = true, value_name = "ID")]
    pub(super) machine: Option<String>,
    /// Index of the vCPU
    #[arg(long, global = true, value_name = "INDEX", default_value_t = 0)]
    vcpu: u32,
}

impl VcpuArgs {
    pub(super) fn reference(&self) -> Option<VcpuRef> {
        Some(VcpuRef { machine: self.machine_id(), vcpu: self.vcpu })
    }

    /// Id of the machine; empty means the only one.
    pub(super) fn machine_id(&self) -> String {
        self.machine.clone().unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, Args)]
pub(super) struct FreshnessArgs {
    /// Have the vCPU come out of the guest and publish its registers first
    #[arg(long)]
    sync: bool,
}

impl FreshnessArgs {
    pub(super) fn is_sync(self) -> bool {
        self.sync
    }

    pub(super) fn freshness(self) -> Freshness {
        if self.sync { Freshness::Sync } else { Freshness::Latest }
    }
}
