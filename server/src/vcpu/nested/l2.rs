//! The registers that an L2 starts with, and whether KVM takes them.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use pagewalk::mode::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA};

use super::EnterL2;
use super::entry::{field, hypervisor};
use super::state::{self, VcpuState};
use crate::vcpu::command::VcpuError;
use crate::vcpu::registers::{MSR_PAT, RFLAGS_FIXED};

/// Flag of `kvm_sregs2`.
pub(super) const PDPTRS_VALID: u64 = 1;

/// What an instruction set demands of an L2's registers.
#[derive(Clone, Copy)]
pub(super) struct Demands {
    /// Bits of CR0 that are set besides.
    pub(super) cr0: u64,
    /// Bits of CR4 that are set besides.
    pub(super) cr4: u64,
    /// Bits of EFER that are set besides.
    pub(super) efer: u64,
    /// The bits that EFER has.
    pub(super) known_efer: u64,
}

/// The registers that an L2 starts with.
pub(super) struct L2 {
    pub(super) sregs: kvm_sregs2,
    pub(super) regs: kvm_regs,
    pub(super) pat: u64,
    demands: Demands,
}

impl L2 {
    /// L1's, with what `request` changes and an entry demands.
    pub(super) fn of(l1: &VcpuState, l1_pat: u64, request: &EnterL2, demands: Demands) -> Self {
        let wanted = &request.l2;
        let mut sregs = l1.sregs;
        sregs.flags &= !PDPTRS_VALID;
        sregs.cr0 = wanted.cr0.unwrap_or(sregs.cr0) | demands.cr0;
        sregs.cr3 = wanted.cr3.unwrap_or(sregs.cr3);
        sregs.cr4 = wanted.cr4.unwrap_or(sregs.cr4) | demands.cr4;
        sregs.efer = wanted.efer.unwrap_or(sregs.efer) | demands.efer;
        // Code of L1's mode is none of L2's where the modes differ.
        let mode = |cr0: u64, efer: u64| (cr0 & CR0_PE, efer & EFER_LMA);
        if mode(sregs.cr0, sregs.efer) != mode(l1.sregs.cr0, l1.sregs.efer) {
            flat_segments(&mut sregs);
        }
        let regs = kvm_regs {
            rip: wanted.rip.unwrap_or(l1.regs.rip),
            rsp: wanted.rsp.unwrap_or(l1.regs.rsp),
            rflags: wanted.rflags.unwrap_or(l1.regs.rflags) | RFLAGS_FIXED,
            ..l1.regs
        };
        Self { sregs, regs, pat: wanted.pat.unwrap_or(l1_pat), demands }
    }

    pub(super) fn has_pdptes(&self) -> bool {
        self.sregs.cr0 & CR0_PG != 0 && self.sregs.cr4 & CR4_PAE != 0 && self.sregs.efer & EFER_LMA == 0
    }

    /// Has the vCPU hold them.
    pub(super) fn load(&self, vcpu: &VcpuFd, l1: &kvm_sregs2) -> Result<(), VcpuError> {
        // KVM takes any EFER, and the CPU then refuses to enter.
        if let reserved @ 1.. = self.sregs.efer & !self.demands.known_efer {
            return Err(field("l2.efer", format!("has reserved bits set: {reserved:#x}")));
        }
        if let Err((what, error)) = state::set_sregs(vcpu, &self.sregs) {
            // The one that would be taken if it were L1's is the one that is refused.
            let (sregs, demands) = (&self.sregs, &self.demands);
            let culprits = [
                ("l2.cr4", kvm_sregs2 { cr4: l1.cr4 | demands.cr4, ..*sregs }),
                ("l2.efer", kvm_sregs2 { efer: l1.efer | demands.efer, ..*sregs }),
                ("l2.cr0", kvm_sregs2 { cr0: l1.cr0 | demands.cr0, ..*sregs }),
                ("l2.cr3", kvm_sregs2 { cr3: l1.cr3, ..*sregs }),
            ];
            let culprit = culprits.iter().find(|(_, sregs)| state::set_sregs(vcpu, sregs).is_ok());
            let name = culprit.map_or("l2", |(name, _)| name);
            return Err(field(name, format!("KVM refuses it ({what}: {error})")));
        }
        vcpu.set_regs(&self.regs).map_err(|error| hypervisor(("KVM_SET_REGS", error)))?;
        let pat = kvm_msr_entry { index: MSR_PAT, data: self.pat, ..Default::default() };
        let msrs = Msrs::from_entries(&[pat]).map_err(|_| field("l2.pat", "cannot be handed to KVM"))?;
        match vcpu.set_msrs(&msrs) {
            Ok(1) => Ok(()),
            _ => Err(field("l2.pat", format!("KVM refuses {:#x}", self.pat))),
        }
    }

    /// Whether the vCPU, in guest mode, holds them: KVM drops some bits silently.
    pub(super) fn check(&self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        let sregs = state::sregs(vcpu).map_err(hypervisor)?;
        let regs = vcpu.get_regs().map_err(|error| hypervisor(("KVM_GET_REGS", error)))?;
        let pat = state::msr(vcpu, MSR_PAT).map_err(hypervisor)?;
        let different = [
            ("l2.cr0", self.sregs.cr0, sregs.cr0),
            ("l2.cr3", self.sregs.cr3, sregs.cr3),
            ("l2.cr4", self.sregs.cr4, sregs.cr4),
            ("l2.efer", self.sregs.efer, sregs.efer),
            ("l2.pat", self.pat, pat),
            ("l2.rip", self.regs.rip, regs.rip),
            ("l2.rsp", self.regs.rsp, regs.rsp),
            ("l2.rflags", self.regs.rflags, regs.rflags),
        ]
        .into_iter()
        .find(|(_, wanted, found)| wanted != found);
        match different {
            None => Ok(()),
            Some((name, wanted, found)) => {
                Err(field(name, format!("KVM made {found:#x} of {wanted:#x}; nothing was changed")))
            }
        }
    }
}

/// Segments of the mode that `sregs` selects: flat ones, or in real mode those at 0.
fn flat_segments(sregs: &mut kvm_sregs2) {
    let real_mode = sregs.cr0 & CR0_PE == 0;
    let dpl = if real_mode { 0 } else { sregs.ss.dpl };
    let flat = kvm_segment {
        limit: u32::MAX,
        type_: 3,
        present: 1,
        dpl,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let real = kvm_segment { limit: 0xffff, db: 0, g: 0, ..flat };
    let long = sregs.efer & EFER_LMA != 0;
    let data = if real_mode { real } else { flat };
    let code = kvm_segment { type_: 0xb, l: u8::from(long), db: data.db & u8::from(!long), ..data };
    let with = |segment: kvm_segment, selector| {
        let selector = if real_mode { 0 } else { selector };
        kvm_segment { selector, ..segment }
    };
    sregs.cs = with(code, sregs.cs.selector);
    for register in [&mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *register = with(data, register.selector);
    }
}
