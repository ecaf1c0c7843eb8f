//! Puts a vCPU into guest mode, as if its L1 had executed VMLAUNCH, and takes it out again.
//!
//! Intel SDM volume 3, "VM Entries", "Checks on the Guest State Area". Where a VMCS keeps a field is the CPU's own business;
//! these are the places in that of the CPU that KVM shows its guests. Unlike VMCB12, it has all of L2's registers but the
//! general ones.

use kvm_bindings::nested::{KvmNestedStateBuffer, kvm_nested_state__data, kvm_vmx_nested_state_data};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE, KVM_STATE_NESTED_RUN_PENDING, kvm_segment,
    kvm_sregs, kvm_vmx_nested_state_hdr,
};
use kvm_ioctls::VcpuFd;
use pagewalk::mode::{CR0_PG, EFER_LMA};

use crate::bed::{
    CR0_NE, CR0_PE, CR4_PAE, EFER_LME, EFER_NXE, RFLAGS_FIXED, code_segment, data_segment, when,
};

const VMCS12_BYTES: usize = 4096;
const REVISION: u32 = 0x11e5_7ed0;
const HEADER_BYTES: usize = 128;

pub(crate) const CR4_VMXE: u64 = 1 << 13;
/// GPAs of the VMXON region and the VMCS, which KVM takes note of and does not read.
const VMXON: u64 = 0x1000;
const VMCS: u64 = 0x2000;
const NOWHERE: u64 = u64::MAX;

// 64-bit fields.
const EPT_POINTER: usize = 120;
pub(crate) const GUEST_PHYSICAL_ADDRESS: usize = 168;
const VMCS_LINK_POINTER: usize = 176;
const GUEST_EFER: usize = 200;
const GUEST_PDPTRS: usize = 216;
const HOST_EFER: usize = 264;
// Natural width.
pub(crate) const EXIT_QUALIFICATION: usize = 408;
pub(crate) const GUEST_LINEAR_ADDRESS: usize = 416;
const GUEST_CR0: usize = 424;
const GUEST_CR3: usize = 432;
const GUEST_CR4: usize = 440;
const GUEST_BASES: usize = 448;
const GUEST_GDTR_BASE: usize = 512;
const GUEST_IDTR_BASE: usize = 520;
const GUEST_DR7: usize = 528;
pub(crate) const GUEST_RIP: usize = 544;
pub(crate) const GUEST_RFLAGS: usize = 552;
const HOST_CR0: usize = 584;
const HOST_CR3: usize = 592;
const HOST_CR4: usize = 600;
const HOST_RIP: usize = 672;
// 32-bit fields.
const PIN_BASED_CONTROLS: usize = 744;
const PROCESSOR_BASED_CONTROLS: usize = 748;
pub(crate) const EXCEPTION_BITMAP: usize = 752;
const EXIT_CONTROLS: usize = 768;
const ENTRY_CONTROLS: usize = 780;
const SECONDARY_CONTROLS: usize = 804;
pub(crate) const EXIT_REASON: usize = 812;
pub(crate) const EXIT_INTERRUPTION_INFO: usize = 816;
pub(crate) const EXIT_INTERRUPTION_CODE: usize = 820;
const GUEST_LIMITS: usize = 840;
const GUEST_GDTR_LIMIT: usize = 872;
const GUEST_IDTR_LIMIT: usize = 876;
const GUEST_ACCESS_RIGHTS: usize = 880;
// 16-bit fields.
const GUEST_SELECTORS: usize = 964;
/// ES, CS, SS, DS, FS, GS, TR.
const HOST_SELECTORS: usize = 982;

// Controls: those that are always on, and what is needed.
const PIN_BASED: u32 = 0x16;
const PROCESSOR_BASED: u32 = 0x0401_e172 | SECONDARY;
const SECONDARY: u32 = 1 << 31;
const ENABLE_EPT: u32 = 1 << 1;
const UNRESTRICTED_GUEST: u32 = 1 << 7;
const EXIT: u32 = 0x0003_6dff | HOST_IN_64_BIT_MODE | EXIT_LOADS_EFER;
const HOST_IN_64_BIT_MODE: u32 = 1 << 9;
const EXIT_LOADS_EFER: u32 = 1 << 21;
const ENTRY: u32 = 0x11ff | ENTRY_LOADS_EFER;
const GUEST_IN_LONG_MODE: u32 = 1 << 9;
const ENTRY_LOADS_EFER: u32 = 1 << 15;

/// Access rights of a segment register that holds nothing.
const UNUSABLE: u32 = 1 << 16;

/// The VMCS of an L2.
#[derive(Clone)]
pub(crate) struct Vmcs12 {
    bytes: [u8; VMCS12_BYTES],
}

impl Vmcs12 {
    /// An L2 with these registers over EPT; `reset` brings what no mode changes. L1 is in 64-bit mode, and never meant to run.
    pub(crate) fn new(eptp: u64, sregs: &kvm_sregs, reset: &kvm_sregs) -> Vmcs12 {
        let mut vmcs = Vmcs12 { bytes: [0; VMCS12_BYTES] };
        let long = sregs.efer & EFER_LMA != 0;
        vmcs.set_u32(0, REVISION);
        for (at, value) in [
            (PIN_BASED_CONTROLS, PIN_BASED),
            (PROCESSOR_BASED_CONTROLS, PROCESSOR_BASED),
            (SECONDARY_CONTROLS, ENABLE_EPT | UNRESTRICTED_GUEST),
            (EXIT_CONTROLS, EXIT),
            (ENTRY_CONTROLS, ENTRY | if long { GUEST_IN_LONG_MODE } else { 0 }),
            (GUEST_GDTR_LIMIT, 0xffff),
            (GUEST_IDTR_LIMIT, 0xffff),
        ] {
            vmcs.set_u32(at, value);
        }
        for (at, value) in [
            (EPT_POINTER, eptp),
            (VMCS_LINK_POINTER, NOWHERE),
            (GUEST_EFER, sregs.efer),
            (GUEST_CR0, sregs.cr0),
            (GUEST_CR3, sregs.cr3),
            (GUEST_CR4, sregs.cr4),
            (GUEST_GDTR_BASE, 0),
            (GUEST_IDTR_BASE, 0),
            (GUEST_DR7, 0x400),
            (GUEST_RFLAGS, RFLAGS_FIXED),
            (HOST_CR0, CR0_PG | CR0_NE | CR0_PE),
            (HOST_CR4, CR4_VMXE | CR4_PAE),
            (HOST_EFER, EFER_LME | EFER_LMA | EFER_NXE),
        ] {
            vmcs.set(at, value);
        }
        let tr = kvm_segment { type_: 11, ..reset.tr };
        let ldt = kvm_segment { unusable: 1, ..reset.ldt };
        let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs, &ldt, &tr];
        for (number, segment) in segments.into_iter().enumerate() {
            vmcs.set(GUEST_BASES + number * 8, segment.base);
            vmcs.set_u32(GUEST_LIMITS + number * 4, segment.limit);
            vmcs.set_u32(GUEST_ACCESS_RIGHTS + number * 4, access_rights(segment));
            vmcs.set_u16(GUEST_SELECTORS + number * 2, segment.selector);
        }
        let (code, data) = (code_segment(0x08, 0).selector, data_segment(0x10, 0).selector);
        for (number, selector) in [data, code, data, data, data, data, 0x18].into_iter().enumerate() {
            vmcs.set_u16(HOST_SELECTORS + number * 2, selector);
        }
        vmcs
    }

    /// The PDPTE registers of L2.
    pub(crate) fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        for (number, pdpte) in pdptes.into_iter().enumerate() {
            self.set(GUEST_PDPTRS + number * 8, pdpte);
        }
    }

    /// Where L1 goes on after a VM exit.
    pub(crate) fn set_host(&mut self, cr3: u64, rip: u64) {
        self.set(HOST_CR3, cr3);
        self.set(HOST_RIP, rip);
    }

    pub(crate) fn set(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn get(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|byte| self.bytes[at + byte]))
    }

    pub(crate) fn get_u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|byte| self.bytes[at + byte]))
    }
}

fn access_rights(segment: &kvm_segment) -> u32 {
    let &kvm_segment { type_, s, dpl, present, avl, l, db, g, unusable, .. } = segment;
    let bits = [(type_, 0), (s, 4), (dpl, 5), (present, 7), (avl, 12), (l, 13), (db, 14), (g, 15)];
    let rights = bits.into_iter().fold(0, |rights, (bits, at)| rights | u32::from(bits) << at);
    rights | when(unusable != 0, UNUSABLE.into()) as u32
}

/// Enters guest mode. KVM takes the entry to be still under way: of an L2 that has been running it would not load EFER.
pub(crate) fn enter(vcpu: &VcpuFd, vmcs: &Vmcs12) -> Result<(), String> {
    let mut state = state(KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_RUN_PENDING, VMXON, VMCS);
    state.size += VMCS12_BYTES as u32;
    let data = kvm_vmx_nested_state_data { vmcs12: vmcs.bytes, shadow_vmcs12: [0; VMCS12_BYTES] };
    state.data = kvm_nested_state__data { vmx: data };
    set(vcpu, &state)
}

/// Back to L1, out of VMX operation.
pub(crate) fn leave(vcpu: &VcpuFd) -> Result<(), String> {
    set(vcpu, &state(0, NOWHERE, NOWHERE))
}

/// The VMCS as L1 can read it, after an exit.
pub(crate) fn read(vcpu: &VcpuFd) -> Result<Vmcs12, String> {
    let mut state = KvmNestedStateBuffer::empty();
    let bytes = vcpu.nested_state(&mut state).map_err(|error| format!("KVM_GET_NESTED_STATE: {error}"))?;
    if bytes.is_none_or(|bytes| bytes.get() < HEADER_BYTES + VMCS12_BYTES) {
        return Err("KVM_GET_NESTED_STATE gave no VMCS12".to_owned());
    }
    // SAFETY: the vCPU has VMX, and said that it filled this member.
    #[allow(unsafe_code, reason = "reading a union")]
    let data = unsafe { state.data.vmx };
    Ok(Vmcs12 { bytes: data.vmcs12 })
}

fn state(flags: u32, vmxon_pa: u64, vmcs12_pa: u64) -> KvmNestedStateBuffer {
    let mut state = KvmNestedStateBuffer::empty();
    state.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
    state.flags = flags as u16;
    state.size = HEADER_BYTES as u32;
    state.hdr.vmx = kvm_vmx_nested_state_hdr { vmxon_pa, vmcs12_pa, ..kvm_vmx_nested_state_hdr::default() };
    state
}

fn set(vcpu: &VcpuFd, state: &KvmNestedStateBuffer) -> Result<(), String> {
    vcpu.set_nested_state(state).map_err(|error| format!("KVM_SET_NESTED_STATE: {error}"))
}
