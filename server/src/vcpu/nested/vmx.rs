//! An L2 over EPT: the VMCS12 that `KVM_SET_NESTED_STATE` takes and `KVM_GET_NESTED_STATE` gives.
//!
//! Intel SDM volume 3, "VM Entries", "VM-Exit Controls", "Loading Host State". A VMCS has all of L2's registers but the
//! general ones, and those of L1 that a VM exit loads: an L2 that leaves by itself finds L1 where it was, yet in VMX operation,
//! with the flat segments, the descriptor-table limits and the cleared RFLAGS that every VM exit leaves.

use kvm_bindings::nested::{KvmNestedStateBuffer, kvm_vmx_nested_state_data};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE, KVM_STATE_NESTED_RUN_PENDING,
    kvm_vmx_nested_state_hdr,
};
use kvm_ioctls::VcpuFd;
use pagewalk::mode::{CR0_PE, CR0_PG, EFER_LMA};
use pagewalk::{EptCapabilities, EptControls};

use super::entry::{field, hypervisor};
use super::l2::{Demands, L2};
use super::pages::{OwnPages, Page};
use super::state::{self, VcpuState};
use super::vmcs12::{self, Vmcs12};
use super::vmx_capabilities::{
    SECONDARY_ENABLE_EPT, SECONDARY_MODE_BASED_EXECUTE, SECONDARY_UNRESTRICTED_GUEST, VmxCapabilities,
    switched_off,
};
use super::{EnterL2, SecondDimension};
use crate::vcpu::command::VcpuError;
use crate::vcpu::registers::{CR0_NE, RFLAGS_VM};

pub(super) const CR4_VMXE: u64 = 1 << 13;
/// SCE, LME, LMA, NXE.
const KNOWN_EFER: u64 = 0xd01;
const DEMANDS: Demands = Demands { cr0: CR0_NE, cr4: CR4_VMXE, efer: 0, known_efer: KNOWN_EFER };
const DR7_RESET: u64 = 0x400;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;

/// No GPA.
const NOWHERE: u64 = u64::MAX;
const HEADER_BYTES: u32 = 128;
/// In `launch state`: VMLAUNCH has been executed.
const LAUNCHED: u32 = 1;
/// Requested privilege level and table indicator of a selector, which a VM exit cannot load.
const SELECTOR_FLAGS: u16 = 0b111;
/// TR after a VM exit to an L1 that never loaded it: VMX operation knows no null selector there.
const TR_WHERE_NONE: u16 = 0x18;

// Controls. What else is on in them has to be.
const ACTIVATE_SECONDARY: u32 = 1 << 31;
const USE_MSR_BITMAPS: u32 = 1 << 28;
/// RDTSCP, INVPCID, XSAVES and user wait: instructions that L2 has as L1 has them.
const SECONDARY_INSTRUCTIONS: u32 = 1 << 3 | 1 << 12 | 1 << 20 | 1 << 26;
const EXIT_HOST_IN_64_BIT_MODE: u32 = 1 << 9;
const EXIT_LOADS_EFER: u32 = 1 << 21;
/// Debug controls, PAT and EFER are saved; PAT is loaded.
const EXIT_WANTED: u32 = 1 << 2 | 1 << 18 | 1 << 19 | 1 << 20;
const ENTRY_GUEST_IN_LONG_MODE: u32 = 1 << 9;
const ENTRY_LOADS_EFER: u32 = 1 << 15;
/// Debug controls and PAT are loaded.
const ENTRY_WANTED: u32 = 1 << 2 | 1 << 14;

/// A VMCS12 to make, and where it is to lie.
pub(super) struct Launch<'a> {
    pub(super) at: u64,
    pub(super) eptp: u64,
    pub(super) controls: EptControls,
    pub(super) pages: &'a OwnPages,
    pub(super) capabilities: &'a VmxCapabilities,
}

impl Launch<'_> {
    /// Has the vCPU, which runs L1, run L2, and says what VMCS12 holds in memory.
    pub(super) fn enter(
        &self,
        vcpu: &VcpuFd,
        l1: &VcpuState,
        l1_pat: u64,
        request: &EnterL2,
    ) -> Result<Page, VcpuError> {
        if let Some(obstacle) = switched_off(vcpu).or_else(|| obstacle_in(l1)) {
            return Err(VcpuError::Unsupported(obstacle));
        }
        let vmxon = match vmxon_of(&l1.nested) {
            NOWHERE => self.pages.vmxon_region(),
            own => own,
        };
        if vmxon == self.at {
            return Err(field("vmcs12", format!("L1's VMXON region lies at {vmxon:#x}")));
        }
        let mut l2 = L2::of(l1, l1_pat, request, DEMANDS);
        self.check(l1, &l2)?;
        l2.load(vcpu, &l1.sregs)?;
        let enter = |l2: &L2| {
            let vmcs12 = self.vmcs12(l1, l1_pat, l2)?;
            state::set_nested(vcpu, &in_guest_mode(vmxon, self.at, &vmcs12)).map_err(hypervisor)
        };
        if let Err(refused) = enter(&l2) {
            let own = |change: fn(&mut L2, &VcpuState)| {
                let mut l2 = L2::of(l1, l1_pat, request, DEMANDS);
                change(&mut l2, l1);
                l2
            };
            let culprits = [
                ("l2.cr4", own(|l2, l1| l2.sregs.cr4 = l1.sregs.cr4 | CR4_VMXE)),
                ("l2.cr0", own(|l2, l1| l2.sregs.cr0 = l1.sregs.cr0 | CR0_NE)),
                ("l2.efer", own(|l2, l1| l2.sregs.efer = l1.sregs.efer)),
                ("l2.cr3", own(|l2, l1| l2.sregs.cr3 = l1.sregs.cr3)),
            ];
            let culprit = culprits.iter().find(|(_, l2)| enter(l2).is_ok());
            return Err(culprit.map_or(refused.clone(), |(name, _)| {
                field(name, format!("KVM refuses it for an L2 at VM entry: {refused}"))
            }));
        }
        if l2.has_pdptes() {
            // Now that they are L2's, they are loaded through EPT.
            state::set_sregs(vcpu, &l2.sregs).map_err(hypervisor)?;
            l2.sregs.pdptrs = state::sregs(vcpu).map_err(hypervisor)?.pdptrs;
        }
        l2.check(vcpu)?;
        Ok(self.vmcs12(l1, l1_pat, &l2)?.0)
    }

    /// Whether an L1 on this CPU can enter `l2` at all.
    fn check(&self, l1: &VcpuState, l2: &L2) -> Result<(), VcpuError> {
        let VmxCapabilities { cr0, cr4, secondary, .. } = self.capabilities;
        let unrestricted = secondary.may(SECONDARY_UNRESTRICTED_GUEST);
        let free = if unrestricted { CR0_PE | CR0_PG } else { 0 };
        if let Some(problem) = cr0.problem(l2.sregs.cr0, free) {
            return Err(field("l2.cr0", problem));
        }
        if let Some(problem) = cr4.problem(l2.sregs.cr4, 0) {
            return Err(field("l2.cr4", problem));
        }
        if l2.sregs.efer & EFER_LMA != 0 && l1.sregs.efer & EFER_LMA == 0 {
            return Err(field("l2.efer", "an L2 in long mode needs an L1 in long mode"));
        }
        Ok(())
    }

    fn vmcs12(&self, l1: &VcpuState, l1_pat: u64, l2: &L2) -> Result<Vmcs12, VcpuError> {
        let mut vmcs = Vmcs12::new();
        vmcs.set(vmcs12::LAUNCH_STATE, LAUNCHED);
        self.set_controls(&mut vmcs, l1, l2)?;
        set_guest(&mut vmcs, l1, l2);
        set_host(&mut vmcs, l1, l1_pat);
        Ok(vmcs)
    }

    /// What an L2 leaves for: what always does (CPUID and VMCALL among it), and a triple fault.
    fn set_controls(&self, vmcs: &mut Vmcs12, l1: &VcpuState, l2: &L2) -> Result<(), VcpuError> {
        let capabilities = self.capabilities;
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        let host_64 = bit(l1.sregs.efer & EFER_LMA != 0, EXIT_HOST_IN_64_BIT_MODE);
        let guest_64 = bit(l2.sregs.efer & EFER_LMA != 0, ENTRY_GUEST_IN_LONG_MODE);
        let mbec = bit(self.controls.mode_based_execute, SECONDARY_MODE_BASED_EXECUTE);
        let secondary_wanted = SECONDARY_UNRESTRICTED_GUEST | SECONDARY_INSTRUCTIONS;
        for (name, place, allowed, needed, wanted) in [
            ("pin-based", vmcs12::PIN_BASED_CONTROLS, capabilities.pin_based, 0, 0),
            (
                "processor-based",
                vmcs12::PROCESSOR_BASED_CONTROLS,
                capabilities.processor_based,
                ACTIVATE_SECONDARY,
                USE_MSR_BITMAPS,
            ),
            (
                "secondary",
                vmcs12::SECONDARY_CONTROLS,
                capabilities.secondary,
                SECONDARY_ENABLE_EPT | mbec,
                secondary_wanted,
            ),
            ("exit", vmcs12::EXIT_CONTROLS, capabilities.exit, EXIT_LOADS_EFER | host_64, EXIT_WANTED),
            ("entry", vmcs12::ENTRY_CONTROLS, capabilities.entry, ENTRY_LOADS_EFER | guest_64, ENTRY_WANTED),
        ] {
            let bits = allowed.choose(needed, wanted).map_err(|missing| {
                VcpuError::Unsupported(format!("this vCPU's VMX lacks {name} controls: {missing:#x}"))
            })?;
            vmcs.set(place, bits);
        }
        vmcs.set(vmcs12::MSR_BITMAP, self.pages.msr_permissions());
        vmcs.set(vmcs12::EPT_POINTER, self.eptp);
        Ok(())
    }
}

/// Why this L1, where it stands, could not execute VMLAUNCH.
fn obstacle_in(l1: &VcpuState) -> Option<String> {
    let sregs = &l1.sregs;
    if sregs.cr0 & CR0_PE == 0 || sregs.cr0 & CR0_PG == 0 || l1.regs.rflags & RFLAGS_VM != 0 {
        return Some(format!(
            "VMX operation needs an L1 in protected mode with paging; its CR0 is {:#x}",
            sregs.cr0
        ));
    }
    (sregs.ss.dpl != 0).then(|| format!("an L1 enters at CPL 0, and this one is at CPL {}", sregs.ss.dpl))
}

fn set_guest(vmcs: &mut Vmcs12, l1: &VcpuState, l2: &L2) {
    let L2 { sregs, regs, pat, .. } = l2;
    vmcs.set_guest_segments([
        &sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs, &sregs.ldt, &sregs.tr,
    ]);
    vmcs.set_all(vmcs12::GUEST_PDPTES, sregs.pdptrs);
    for (field, value) in [
        (vmcs12::VMCS_LINK_POINTER, NOWHERE),
        (vmcs12::GUEST_PAT, *pat),
        (vmcs12::GUEST_EFER, sregs.efer),
        (vmcs12::GUEST_CR0, sregs.cr0),
        (vmcs12::GUEST_CR3, sregs.cr3),
        (vmcs12::GUEST_CR4, sregs.cr4),
        // That VMXE is on is L1's business.
        (vmcs12::CR4_GUEST_HOST_MASK, CR4_VMXE),
        (vmcs12::CR0_READ_SHADOW, sregs.cr0),
        (vmcs12::CR4_READ_SHADOW, sregs.cr4 & !CR4_VMXE),
        (vmcs12::GUEST_GDTR_BASE, sregs.gdt.base),
        (vmcs12::GUEST_IDTR_BASE, sregs.idt.base),
        (vmcs12::GUEST_DR7, DR7_RESET),
        (vmcs12::GUEST_RSP, regs.rsp),
        (vmcs12::GUEST_RIP, regs.rip),
        (vmcs12::GUEST_RFLAGS, regs.rflags),
        (vmcs12::GUEST_SYSENTER_ESP, l1.msr(SYSENTER_ESP).unwrap_or_default()),
        (vmcs12::GUEST_SYSENTER_EIP, l1.msr(SYSENTER_EIP).unwrap_or_default()),
    ] {
        vmcs.set(field, value);
    }
    vmcs.set(vmcs12::GUEST_GDTR_LIMIT, sregs.gdt.limit.into());
    vmcs.set(vmcs12::GUEST_IDTR_LIMIT, sregs.idt.limit.into());
    vmcs.set(vmcs12::GUEST_SYSENTER_CS, l1.msr(SYSENTER_CS).unwrap_or_default() as u32);
}

fn set_host(vmcs: &mut Vmcs12, l1: &VcpuState, l1_pat: u64) {
    let (sregs, regs) = (&l1.sregs, &l1.regs);
    let loadable = |selector: u16| if selector & SELECTOR_FLAGS == 0 { selector } else { 0 };
    let tr = match loadable(sregs.tr.selector) {
        0 => TR_WHERE_NONE,
        selector => selector,
    };
    let data = [sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs].map(|segment| loadable(segment.selector));
    let [ss, ds, es, fs, gs] = data;
    // CPL is 0.
    let cs = sregs.cs.selector & !SELECTOR_FLAGS;
    vmcs.set_all(vmcs12::HOST_SELECTORS, [es, cs, ss, ds, fs, gs, tr]);
    for (field, value) in [
        (vmcs12::HOST_PAT, l1_pat),
        (vmcs12::HOST_EFER, sregs.efer),
        (vmcs12::HOST_CR0, sregs.cr0 | CR0_NE),
        (vmcs12::HOST_CR3, sregs.cr3),
        (vmcs12::HOST_CR4, sregs.cr4 | CR4_VMXE),
        (vmcs12::HOST_FS_BASE, sregs.fs.base),
        (vmcs12::HOST_GS_BASE, sregs.gs.base),
        (vmcs12::HOST_TR_BASE, sregs.tr.base),
        (vmcs12::HOST_GDTR_BASE, sregs.gdt.base),
        (vmcs12::HOST_IDTR_BASE, sregs.idt.base),
        (vmcs12::HOST_SYSENTER_ESP, l1.msr(SYSENTER_ESP).unwrap_or_default()),
        (vmcs12::HOST_SYSENTER_EIP, l1.msr(SYSENTER_EIP).unwrap_or_default()),
        (vmcs12::HOST_RSP, regs.rsp),
        (vmcs12::HOST_RIP, regs.rip),
    ] {
        vmcs.set(field, value);
    }
    vmcs.set(vmcs12::HOST_SYSENTER_CS, l1.msr(SYSENTER_CS).unwrap_or_default() as u32);
}

/// The nested state of a vCPU that runs an L2. The entry is still under way: of an L2 that has been running, KVM would not
/// load EFER, PAT and the debug controls.
fn in_guest_mode(vmxon_pa: u64, vmcs12_pa: u64, vmcs12: &Vmcs12) -> Box<KvmNestedStateBuffer> {
    let mut state = outside();
    state.flags = (KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_RUN_PENDING) as u16;
    state.size += vmcs12::BYTES as u32;
    state.hdr.vmx = kvm_vmx_nested_state_hdr { vmxon_pa, vmcs12_pa, ..kvm_vmx_nested_state_hdr::default() };
    state.data.vmx = kvm_vmx_nested_state_data { vmcs12: *vmcs12.0, shadow_vmcs12: [0; vmcs12::BYTES] };
    state
}

/// The nested state of a vCPU in VMX operation whose current VMCS12 holds nothing. KVM looks at neither page.
pub(super) fn blank() -> Box<KvmNestedStateBuffer> {
    const PAGES: (u64, u64) = (0x1000, 0x2000);
    let mut state = in_guest_mode(PAGES.0, PAGES.1, &Vmcs12::new());
    state.flags = 0;
    state
}

/// The nested state of a vCPU that is not in VMX operation.
pub(super) fn outside() -> Box<KvmNestedStateBuffer> {
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    state.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
    state.size = HEADER_BYTES;
    state.hdr.vmx = kvm_vmx_nested_state_hdr {
        vmxon_pa: NOWHERE,
        vmcs12_pa: NOWHERE,
        ..kvm_vmx_nested_state_hdr::default()
    };
    state
}

fn header(state: &KvmNestedStateBuffer) -> kvm_vmx_nested_state_hdr {
    // SAFETY: the format is VMX's, for which KVM fills this member; it is all integers.
    #[allow(unsafe_code, reason = "reading a union")]
    unsafe {
        state.hdr.vmx
    }
}

fn vmxon_of(state: &KvmNestedStateBuffer) -> u64 {
    header(state).vmxon_pa
}

/// The current VMCS12, where it is the one at `at`.
pub(super) fn current(state: &KvmNestedStateBuffer, at: u64) -> Option<Vmcs12> {
    if header(state).vmcs12_pa != at || (state.size as usize) < HEADER_BYTES as usize + vmcs12::BYTES {
        return None;
    }
    // SAFETY: the format is VMX's, and the size says that KVM filled this member; it is all integers.
    #[allow(unsafe_code, reason = "reading a union")]
    Some(Vmcs12(Box::new(unsafe { state.data.vmx.vmcs12 })))
}

/// Where VMCS12 lies, and L2's second dimension, in the nested state of a vCPU that runs an L2.
pub(super) fn read(
    state: &KvmNestedStateBuffer,
    capabilities: EptCapabilities,
    tables_written: bool,
) -> (u64, Option<SecondDimension>) {
    let at = header(state).vmcs12_pa;
    let second = current(state, at).and_then(|vmcs| second_dimension(&vmcs, capabilities, tables_written));
    (at, second)
}

fn second_dimension(
    vmcs: &Vmcs12,
    capabilities: EptCapabilities,
    tables_written: bool,
) -> Option<SecondDimension> {
    let secondary = match vmcs.get(vmcs12::PROCESSOR_BASED_CONTROLS) & ACTIVATE_SECONDARY {
        0 => 0,
        _ => vmcs.get(vmcs12::SECONDARY_CONTROLS),
    };
    (secondary & SECONDARY_ENABLE_EPT != 0).then(|| SecondDimension::Ept {
        eptp: vmcs.get(vmcs12::EPT_POINTER),
        controls: EptControls {
            mode_based_execute: secondary & SECONDARY_MODE_BASED_EXECUTE != 0,
            tables_written,
        },
        capabilities,
    })
}

/// How L2 left, as VMCS12 says.
pub(super) fn describe_exit(vmcs: &Vmcs12) -> String {
    const ENTRY_FAILED: u32 = 1 << 31;
    let (reason, qualification) = (vmcs.get(vmcs12::EXIT_REASON), vmcs.get(vmcs12::EXIT_QUALIFICATION));
    let meaning = match reason & 0xffff {
        0 => " (an exception)",
        2 => " (a triple fault)",
        10 => " (CPUID)",
        18 => " (VMCALL)",
        28 => " (a write to a control register)",
        33 => " (an invalid guest state)",
        48 => " (an EPT violation)",
        49 => " (an EPT misconfiguration)",
        _ => "",
    };
    let what = if reason & ENTRY_FAILED != 0 { "VM entry failed" } else { "VM exit" };
    format!("{what} {reason:#x}{meaning}, exit qualification {qualification:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmcs(processor_based: u32, secondary: u32, eptp: u64) -> Vmcs12 {
        let mut vmcs = Vmcs12::new();
        vmcs.set(vmcs12::PROCESSOR_BASED_CONTROLS, processor_based);
        vmcs.set(vmcs12::SECONDARY_CONTROLS, secondary);
        vmcs.set(vmcs12::EPT_POINTER, eptp);
        vmcs
    }

    #[test]
    fn a_state_of_kvms_is_read_back() {
        let vmcs12 = vmcs(ACTIVATE_SECONDARY, SECONDARY_ENABLE_EPT, 0x701e);
        let state = in_guest_mode(0x1000, 0x2000, &vmcs12);
        assert_eq!((state.format, state.flags, state.size), (0, 0b11, 128 + 4096));
        let (at, second) = read(&state, EptCapabilities::all(), true);
        let controls = EptControls { mode_based_execute: false, tables_written: true };
        let ept = SecondDimension::Ept { eptp: 0x701e, controls, capabilities: EptCapabilities::all() };
        assert_eq!((at, second), (0x2000, Some(ept)));
        assert!(current(&state, 0x2000).is_some());
        assert!(current(&state, 0x3000).is_none());
        let outside = outside();
        assert_eq!((outside.flags, outside.size, vmxon_of(&outside)), (0, 128, u64::MAX));
        assert!(current(&outside, u64::MAX).is_none());
    }

    #[test]
    fn an_l2_without_ept_has_no_second_dimension() {
        let all = EptCapabilities::all();
        assert_eq!(second_dimension(&vmcs(0, SECONDARY_ENABLE_EPT, 0x701e), all, false), None);
        assert_eq!(second_dimension(&vmcs(ACTIVATE_SECONDARY, 0, 0x701e), all, false), None);
        let secondary = SECONDARY_ENABLE_EPT | SECONDARY_MODE_BASED_EXECUTE;
        let with_mbec = second_dimension(&vmcs(ACTIVATE_SECONDARY, secondary, 0x701e), all, false);
        assert!(
            matches!(with_mbec, Some(SecondDimension::Ept { controls, .. }) if controls.mode_based_execute)
        );
    }

    #[test]
    fn exits_are_named() {
        let mut vmcs = Vmcs12::new();
        vmcs.set(vmcs12::EXIT_REASON, 48);
        vmcs.set(vmcs12::EXIT_QUALIFICATION, 0x182);
        assert_eq!(describe_exit(&vmcs), "VM exit 0x30 (an EPT violation), exit qualification 0x182");
        vmcs.set(vmcs12::EXIT_REASON, 0x8000_0021);
        assert!(describe_exit(&vmcs).starts_with("VM entry failed 0x80000021 (an invalid guest state)"));
    }
}
