//! Everything of a KVM vCPU that its guest can tell, to be put back later.
//!
//! Linux, "The Definitive KVM (Kernel-based Virtual Machine) API Documentation". Time goes on meanwhile: counters of cycles
//! and clocks are left alone.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE, KVMIO, Msrs, kvm_debugregs, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::l2::PDPTRS_VALID;
use super::{svm, vmx};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// MSRs that measure time, or through which KVM does: putting them back would turn it back.
fn is_time(index: u32) -> bool {
    const TSC: u32 = 0x10;
    const KVM_CLOCK: [u32; 2] = [0x11, 0x12];
    const TSC_ADJUST: u32 = 0x3b;
    const COUNTERS: [u32; 2] = [0xe7, 0xe8];
    const TSC_DEADLINE: u32 = 0x6e0;
    const HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;
    const KVM_OWN: std::ops::Range<u32> = 0x4b56_4d00..0x4b56_4e00;
    matches!(index, TSC | TSC_ADJUST | TSC_DEADLINE)
        || KVM_CLOCK.contains(&index)
        || COUNTERS.contains(&index)
        || HYPER_V.contains(&index)
        || KVM_OWN.contains(&index)
}

/// The MSRs among `listed` that `vcpu` has, time aside.
pub(super) fn msrs_of(vcpu: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let readable = |index: u32| {
        let asked = kvm_msr_entry { index, ..Default::default() };
        Msrs::from_entries(&[asked]).is_ok_and(|mut msrs| matches!(vcpu.get_msrs(&mut msrs), Ok(1)))
    };
    listed.iter().copied().filter(|&index| !is_time(index) && readable(index)).collect()
}

/// A call that failed, and why.
pub(super) type Failure = (&'static str, kvm_ioctls::Error);

/// The state of a vCPU.
pub(super) struct VcpuState {
    pub(super) nested: Box<KvmNestedStateBuffer>,
    pub(super) sregs: kvm_sregs2,
    pub(super) regs: kvm_regs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    xcrs: kvm_xcrs,
    xsave: Box<kvm_xsave>,
    msrs: Vec<kvm_msr_entry>,
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Failure {
    move |error| (what, error)
}

impl VcpuState {
    /// Reads it; `msrs` are those of [`msrs_of`].
    pub(super) fn read(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, Failure> {
        Ok(Self {
            nested: nested(vcpu)?,
            sregs: sregs(vcpu)?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            mp: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?),
            msrs: read_msrs(vcpu, msrs)?,
        })
    }

    /// Whether it runs an L2.
    pub(super) fn in_guest_mode(&self) -> bool {
        u32::from(self.nested.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
    }

    /// One of its MSRs, if it has that.
    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data)
    }

    /// Puts all of it back. An L2 that the vCPU runs meanwhile is left first, as if it had never been entered.
    pub(super) fn write(&self, vcpu: &VcpuFd) -> Result<(), Failure> {
        leave(vcpu)?;
        set_sregs(vcpu, &self.sregs)?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        // A kernel without XSAVE gives none, and takes none back.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // SAFETY: only features without dynamically sized state are enabled.
        #[allow(unsafe_code, reason = "the ioctl's buffer may have to be larger than its type")]
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        self.write_msrs(vcpu)?;
        vcpu.set_debug_regs(&self.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        set_nested(vcpu, &self.nested)?;
        if self.in_guest_mode() && self.sregs.flags & PDPTRS_VALID != 0 {
            // L2's PDPTE registers are its own only now.
            set_sregs(vcpu, &self.sregs)?;
        }
        vcpu.set_vcpu_events(&self.events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp).map_err(failed("KVM_SET_MP_STATE"))
    }

    /// Those MSRs that are not as they were: writing some has effects of its own.
    fn write_msrs(&self, vcpu: &VcpuFd) -> Result<(), Failure> {
        let indices: Vec<u32> = self.msrs.iter().map(|msr| msr.index).collect();
        let now = read_msrs(vcpu, &indices)?;
        let changed: Vec<kvm_msr_entry> = self
            .msrs
            .iter()
            .zip(&now)
            .filter(|(before, now)| before.data != now.data)
            .map(|(before, _)| *before)
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let einval = || ("KVM_SET_MSRS", kvm_ioctls::Error::new(libc::EINVAL));
        let msrs = Msrs::from_entries(&changed).map_err(|_| einval())?;
        match vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))? {
            all if all == changed.len() => Ok(()),
            _ => Err(einval()),
        }
    }
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Failure> {
    let einval = || ("KVM_GET_MSRS", kvm_ioctls::Error::new(libc::EINVAL));
    let asked: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&asked).map_err(|_| einval())?;
    match vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))? {
        all if all == indices.len() => Ok(msrs.as_slice().to_vec()),
        _ => Err(einval()),
    }
}

/// One MSR.
pub(super) fn msr(vcpu: &VcpuFd, index: u32) -> Result<u64, Failure> {
    Ok(read_msrs(vcpu, &[index])?.first().map_or(0, |msr| msr.data))
}

/// The nested state.
pub(super) fn nested(vcpu: &VcpuFd) -> Result<Box<KvmNestedStateBuffer>, Failure> {
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    vcpu.nested_state(&mut state).map_err(failed("KVM_GET_NESTED_STATE"))?;
    Ok(state)
}

pub(super) fn set_nested(vcpu: &VcpuFd, state: &KvmNestedStateBuffer) -> Result<(), Failure> {
    vcpu.set_nested_state(state).map_err(failed("KVM_SET_NESTED_STATE"))
}

/// Back to L1; its registers are anything.
fn leave(vcpu: &VcpuFd) -> Result<(), Failure> {
    let now = nested(vcpu)?;
    let in_guest_mode = u32::from(now.flags) & KVM_STATE_NESTED_GUEST_MODE != 0;
    if u32::from(now.format) == KVM_STATE_NESTED_FORMAT_VMX {
        // Also out of VMX operation, which an entry that failed leaves behind, and which would bind CR0 and CR4.
        set_nested(vcpu, &vmx::outside())?;
        if in_guest_mode {
            // KVM still means to complete the VMCS12 of the L2 that has left, would do so to L1's next one, and forgets it
            // when the state is read.
            set_nested(vcpu, &vmx::blank())?;
            nested(vcpu)?;
            set_nested(vcpu, &vmx::outside())?;
        }
        return Ok(());
    }
    if in_guest_mode { set_nested(vcpu, &svm::outside()) } else { Ok(()) }
}

pub(super) fn sregs(vcpu: &VcpuFd) -> Result<kvm_sregs2, Failure> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the ioctl fills the structure that it is defined for.
    #[allow(unsafe_code, reason = "kvm-ioctls has no KVM_GET_SREGS2")]
    match unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(("KVM_GET_SREGS2", kvm_ioctls::Error::last())),
    }
}

pub(super) fn set_sregs(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Failure> {
    // SAFETY: the ioctl only reads the structure that it is defined for.
    #[allow(unsafe_code, reason = "kvm-ioctls has no KVM_SET_SREGS2")]
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(("KVM_SET_SREGS2", kvm_ioctls::Error::last())),
    }
}
