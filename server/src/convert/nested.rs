//! Nested mode and the second dimension.

use pagewalk::{
    ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, NptControls, StateError,
};
use pagewalk_proto::v1;

use crate::vcpu::{NestedMode, NptOverlay};

/// LME, LMA, NXE and SVME.
const HOST_EFER: u64 = 0x1d00;
/// PE, WP and PG.
const HOST_CR0: u64 = 0x8001_0001;
/// PAE.
const HOST_CR4: u64 = 0x20;

/// The registers that select NPT's format: L1's at VMRUN.
pub(crate) fn npt_host(npt: &v1::Npt) -> ControlRegisters {
    ControlRegisters {
        cr0: npt.host_cr0.unwrap_or(HOST_CR0),
        cr4: npt.host_cr4.unwrap_or(HOST_CR4),
        efer: npt.host_efer.unwrap_or(HOST_EFER),
        ..Default::default()
    }
}

/// `ngpa_walk` by NPT, as a request describes it.
pub(crate) fn npt_walk(npt: &v1::Npt, cpu: &CpuProfile) -> Result<NgpaWalk, StateError> {
    let controls = NptControls { guest_mode_execute_trap: npt.guest_mode_execute_trap };
    NgpaWalk::npt_with(npt.ncr3, &npt_host(npt), &controls, cpu)
}

/// `ngpa_walk` by EPT, as a request describes it.
pub(crate) fn ept_walk(ept: &v1::Ept, cpu: &CpuProfile) -> Result<NgpaWalk, StateError> {
    let controls =
        EptControls { mode_based_execute: ept.mode_based_execute, tables_written: ept.tables_written };
    let capabilities = ept.capabilities.map_or(EptCapabilities::all(), EptCapabilities::from_msr);
    NgpaWalk::ept(ept.eptp, &controls, &capabilities, cpu)
}

/// The field of `override` that `error`, met in its second dimension, is about.
pub(crate) fn override_field(ept: bool, error: &StateError) -> &'static str {
    let register = match error {
        StateError::ReservedBits { register, .. } | StateError::Contradiction { register, .. } => *register,
        StateError::MaxPhyAddr(_) => return "override.maxphyaddr",
        StateError::EncryptionBit(_) => return "override",
    };
    match (ept, register) {
        (true, _) => "override.ept.eptp",
        (false, "nCR3") => "override.npt.ncr3",
        (false, "CR0") => "override.npt.host_cr0",
        (false, "CR4") => "override.npt.host_cr4",
        (false, "EFER") => "override.npt.host_efer",
        (false, _) => "override.npt",
    }
}

pub(crate) fn nested_mode(mode: &NestedMode) -> v1::NestedMode {
    match mode {
        NestedMode::Off => v1::NestedMode { kind: v1::NestedModeKind::Off.into(), ..Default::default() },
        NestedMode::Npt(NptOverlay { ncr3, host, .. }) => v1::NestedMode {
            kind: v1::NestedModeKind::WalkerOnly.into(),
            reason: "switched on by SetNestedMode in the walkers alone; the vCPU itself runs on as L1"
                .to_owned(),
            second_dimension: Some(v1::nested_mode::SecondDimension::Npt(v1::Npt {
                ncr3: *ncr3,
                host_cr4: Some(host.cr4),
                host_efer: Some(host.efer),
                host_cr0: Some(host.cr0),
                guest_mode_execute_trap: false,
            })),
        },
    }
}
