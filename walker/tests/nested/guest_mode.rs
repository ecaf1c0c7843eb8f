//! Puts a vCPU into guest mode, as if its L1 had executed VMRUN, and takes it out again.
//!
//! AMD APM volume 2, "VMCB Layout". `KVM_SET_NESTED_STATE` takes L1's control area as it is; the save area holds the state
//! that L1 *left*, whose CR4 and EFER select NPT's format; L2's registers are those that the vCPU already has.

use kvm_bindings::nested::{KvmNestedStateBuffer, kvm_svm_nested_state_data};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE,
    kvm_svm_nested_state_hdr,
};
use kvm_ioctls::VcpuFd;
use pagewalk::ControlRegisters;

const HEADER_BYTES: u32 = 128;
const VMCB_BYTES: usize = 4096;

// Control area.
pub(crate) const INTERCEPT_VMRUN: usize = 0x10;
pub(crate) const IOPM_BASE: usize = 0x40;
pub(crate) const MSRPM_BASE: usize = 0x48;
pub(crate) const GUEST_ASID: usize = 0x58;
pub(crate) const NESTED_CTL: usize = 0x90;
pub(crate) const NCR3: usize = 0xb0;
// Save area.
pub(crate) const EFER: usize = 0x4d0;
pub(crate) const CR4: usize = 0x548;
pub(crate) const CR3: usize = 0x550;
pub(crate) const CR0: usize = 0x558;
pub(crate) const DR7: usize = 0x560;
pub(crate) const DR6: usize = 0x568;
pub(crate) const RFLAGS: usize = 0x570;
pub(crate) const PAT: usize = 0x668;

/// Enters guest mode with NPT rooted at `ncr3`. The VMCB lies at GPA 0, which nothing reads: the vCPU is never run.
pub(crate) fn enter(vcpu: &VcpuFd, ncr3: u64, host: &ControlRegisters) -> Result<(), String> {
    let mut vmcb12 = [0; VMCB_BYTES];
    for (at, value) in [
        (INTERCEPT_VMRUN, 1),
        (IOPM_BASE, 0),
        (MSRPM_BASE, 0),
        (GUEST_ASID, 1),
        (NESTED_CTL, 1),
        (NCR3, ncr3),
        (EFER, host.efer),
        (CR4, host.cr4),
        (CR3, host.cr3),
        (CR0, host.cr0),
        (DR7, 0x400),
        (DR6, 0xffff_0ff0),
        (RFLAGS, 2),
        (PAT, host.pat),
    ] {
        vmcb12[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    let mut state = state(KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_GIF_SET);
    state.size += VMCB_BYTES as u32;
    state.hdr.svm = kvm_svm_nested_state_hdr { vmcb_pa: 0 };
    state.data.svm = kvm_svm_nested_state_data { vmcb12 };
    set(vcpu, &state)
}

/// Back to L1. The registers stay as they are.
pub(crate) fn leave(vcpu: &VcpuFd) -> Result<(), String> {
    set(vcpu, &state(KVM_STATE_NESTED_GIF_SET))
}

fn state(flags: u32) -> KvmNestedStateBuffer {
    let mut state = KvmNestedStateBuffer::empty();
    state.format = KVM_STATE_NESTED_FORMAT_SVM as u16;
    state.flags = flags as u16;
    state.size = HEADER_BYTES;
    state
}

fn set(vcpu: &VcpuFd, state: &KvmNestedStateBuffer) -> Result<(), String> {
    vcpu.set_nested_state(state).map_err(|error| format!("KVM_SET_NESTED_STATE: {error}"))
}
