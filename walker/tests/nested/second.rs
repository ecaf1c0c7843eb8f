//! The second dimension that a judge puts under L2: what its entries look like, and how a vCPU and the walker get it.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::VcpuFd;
use pagewalk::{ControlRegisters, EptCapabilities, EptControls, NgpaWalk};

use super::{guest_mode, vmcs12};
use crate::bed::{ACCESSED, DIRTY, Vcpu};

const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
/// EPTP: write-back, a page-walk length of 4.
const EPTP_4_LEVELS: u64 = 3 << 3 | 6;
pub(crate) const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Second {
    /// NPT of this many levels.
    Npt(u32),
    /// EPT of four levels.
    Ept,
}

impl Second {
    pub(crate) fn levels(self) -> u32 {
        match self {
            Second::Npt(levels) => levels,
            Second::Ept => 4,
        }
    }

    /// Its accessed and its dirty bit.
    pub(crate) fn accessed_dirty(self) -> (u64, u64) {
        match self {
            Second::Npt(_) => (ACCESSED, DIRTY),
            Second::Ept => (1 << 8, 1 << 9),
        }
    }
}

/// What L1's VMCB12 or VMCS12 says of the second dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Root {
    /// nCR3, and the registers that L1 runs VMRUN with.
    Npt(u64, ControlRegisters),
    Eptp(u64),
}

impl Root {
    pub(crate) fn eptp(root: u64, accessed_dirty: bool) -> Root {
        Root::Eptp(root | EPTP_4_LEVELS | if accessed_dirty { EPTP_ACCESSED_DIRTY } else { 0 })
    }

    /// The accessed and dirty bits that walks set: none where EPTP does not enable them.
    pub(crate) fn accessed_dirty(&self) -> (u64, u64) {
        match *self {
            Root::Npt(..) => Second::Npt(4).accessed_dirty(),
            Root::Eptp(eptp) if eptp & EPTP_ACCESSED_DIRTY != 0 => Second::Ept.accessed_dirty(),
            Root::Eptp(_) => (0, 0),
        }
    }

    /// Puts the vCPU, which holds L2's registers `sregs`, into guest mode. The control structure lies in L1's memory, but at a
    /// place that nothing reads: the vCPU is never run.
    pub(crate) fn enter(&self, vcpu: &Vcpu, sregs: &kvm_sregs) -> Result<(), String> {
        match self {
            Root::Npt(ncr3, host) => guest_mode::enter(&vcpu.fd, *ncr3, host),
            Root::Eptp(eptp) => vmcs12::enter(&vcpu.fd, &vmcs12::Vmcs12::new(*eptp, sregs, &vcpu.reset)),
        }
    }

    /// Back to L1.
    pub(crate) fn leave(&self, vcpu: &Vcpu) -> Result<(), String> {
        match self {
            Root::Npt(..) => guest_mode::leave(&vcpu.fd),
            Root::Eptp(_) => vmcs12::leave(&vcpu.fd),
        }
    }

    /// `ngpa_walk`, with `tables_written` where KVM itself walks L2's tables.
    pub(crate) fn walk(&self, vcpu: &Vcpu, tables_written: bool) -> Result<NgpaWalk, String> {
        let walk = match self {
            Root::Npt(ncr3, host) => NgpaWalk::npt(*ncr3, host, &vcpu.profile()),
            Root::Eptp(eptp) => {
                let controls = EptControls { tables_written, ..EptControls::default() };
                NgpaWalk::ept(*eptp, &controls, &ept_capabilities(&vcpu.fd)?, &vcpu.profile())
            }
        };
        walk.map_err(|error| error.to_string())
    }
}

/// What KVM lets an L1 on this vCPU do.
fn ept_capabilities(vcpu: &VcpuFd) -> Result<EptCapabilities, String> {
    let asked = kvm_msr_entry { index: IA32_VMX_EPT_VPID_CAP, ..kvm_msr_entry::default() };
    let mut msrs = Msrs::from_entries(&[asked]).map_err(|error| format!("{error:?}"))?;
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => Ok(EptCapabilities::from_msr(msrs.as_slice()[0].data)),
        other => Err(format!("IA32_VMX_EPT_VPID_CAP cannot be read: {other:?}")),
    }
}
