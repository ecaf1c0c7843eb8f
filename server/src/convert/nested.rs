//! Nested mode and the second dimension.

use pagewalk::{
    ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, NptControls, StateError,
};
use pagewalk_proto::v1;

use crate::status::Error;
use crate::vcpu::nested::{HOST_CR0_DEFAULT, HOST_CR4_DEFAULT, HOST_EFER_DEFAULT};
use crate::vcpu::{Entered, L2Error, NestedMode, SecondDimension, Snapshot};

/// The registers that select NPT's format: L1's at VMRUN.
pub(crate) fn npt_host(npt: &v1::Npt) -> ControlRegisters {
    ControlRegisters {
        cr0: npt.host_cr0.unwrap_or(HOST_CR0_DEFAULT),
        cr4: npt.host_cr4.unwrap_or(HOST_CR4_DEFAULT),
        efer: npt.host_efer.unwrap_or(HOST_EFER_DEFAULT),
        ..Default::default()
    }
}

/// NPT as a request describes it.
pub(crate) fn npt(npt: &v1::Npt) -> SecondDimension {
    let controls = NptControls { guest_mode_execute_trap: npt.guest_mode_execute_trap };
    SecondDimension::Npt { ncr3: npt.ncr3, host: npt_host(npt), controls }
}

/// EPT as a request describes it.
pub(crate) fn ept(ept: &v1::Ept) -> SecondDimension {
    let controls =
        EptControls { mode_based_execute: ept.mode_based_execute, tables_written: ept.tables_written };
    let capabilities = ept.capabilities.map_or(EptCapabilities::all(), EptCapabilities::from_msr);
    SecondDimension::Ept { eptp: ept.eptp, controls, capabilities }
}

/// `ngpa_walk` by NPT, as a request describes it.
pub(crate) fn npt_walk(request: &v1::Npt, cpu: &CpuProfile) -> Result<NgpaWalk, StateError> {
    npt(request).walk(cpu)
}

/// `ngpa_walk` by EPT, as a request describes it.
pub(crate) fn ept_walk(request: &v1::Ept, cpu: &CpuProfile) -> Result<NgpaWalk, StateError> {
    ept(request).walk(cpu)
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

/// The field of `SetNestedMode` that `error` is about.
pub(crate) fn request_field(error: &L2Error) -> &'static str {
    let register = match error.state() {
        StateError::ReservedBits { register, .. } | StateError::Contradiction { register, .. } => *register,
        StateError::MaxPhyAddr(_) | StateError::EncryptionBit(_) => "",
    };
    match (error, register) {
        (L2Error::Ept(_), _) => "ept.eptp",
        (L2Error::Npt(_), "nCR3") => "npt.ncr3",
        (L2Error::Npt(_), "CR0") => "npt.host_cr0",
        (L2Error::Npt(_), "CR4") => "npt.host_cr4",
        (L2Error::Npt(_), "EFER") => "npt.host_efer",
        (L2Error::Npt(_), _) => "npt",
        (L2Error::Registers(_), "CR0") => "l2.cr0",
        (L2Error::Registers(_), "CR3") => "l2.cr3",
        (L2Error::Registers(_), "CR4") => "l2.cr4",
        (L2Error::Registers(_), "EFER") => "l2.efer",
        (L2Error::Registers(_), "PAT") => "l2.pat",
        (L2Error::Registers(_), _) => "l2",
    }
}

/// Where VMCB12 or VMCS12 is to lie: the field that goes with the second dimension.
pub(crate) fn control_structure(request: &v1::SetNestedModeRequest) -> Result<Option<u64>, Error> {
    use v1::set_nested_mode_request::Mode;
    let other = |field, second: &str| Err(Error::invalid(field, format!("goes with {second}: leave it out")));
    match (&request.mode, request.vmcb12, request.vmcs12) {
        (Some(Mode::Npt(_)), vmcb12, None) => Ok(vmcb12),
        (Some(Mode::Ept(_)), None, vmcs12) => Ok(vmcs12),
        (_, None, None) => Ok(None),
        (_, Some(_), _) => other("vmcb12", "npt"),
        (_, None, Some(_)) => other("vmcs12", "ept"),
    }
}

pub(crate) fn nested_mode(snapshot: &Snapshot) -> v1::NestedMode {
    let (kind, reason) = match snapshot.nested {
        NestedMode::Off => (v1::NestedModeKind::Off, ""),
        NestedMode::WalkerOnly { .. } => (
            v1::NestedModeKind::WalkerOnly,
            "switched on by SetNestedMode in the walkers alone; the vCPU itself runs on as it did",
        ),
        NestedMode::Guest(guest) => match guest.entered {
            Entered::ByRequest => (v1::NestedModeKind::RealVcpu, "SetNestedMode had the vCPU enter this L2"),
            Entered::ByGuest => (v1::NestedModeKind::Observed, "the guest itself entered this L2"),
            Entered::BeforeItWasRecorded => {
                (v1::NestedModeKind::Observed, "the vCPU ran this L2 when it was recorded")
            }
        },
    };
    let reason = match (snapshot.nested, snapshot.nested_reason.as_str()) {
        (NestedMode::Off, said) => said,
        _ => reason,
    };
    v1::NestedMode {
        kind: kind.into(),
        reason: reason.to_owned(),
        second_dimension: snapshot.nested.second().as_ref().map(second_dimension),
    }
}

fn second_dimension(second: &SecondDimension) -> v1::nested_mode::SecondDimension {
    match second {
        SecondDimension::Npt { ncr3, host, controls } => v1::nested_mode::SecondDimension::Npt(v1::Npt {
            ncr3: *ncr3,
            host_cr4: Some(host.cr4),
            host_efer: Some(host.efer),
            host_cr0: Some(host.cr0),
            guest_mode_execute_trap: controls.guest_mode_execute_trap,
        }),
        SecondDimension::Ept { eptp, controls, capabilities } => {
            v1::nested_mode::SecondDimension::Ept(v1::Ept {
                eptp: *eptp,
                mode_based_execute: controls.mode_based_execute,
                capabilities: Some(capabilities.msr()),
                tables_written: controls.tables_written,
            })
        }
    }
}
