//! Puts a vCPU of KVM into guest mode, as if its L1 had entered an L2, takes it out again, and notices when the guest does
//! either.

use std::sync::Arc;

use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs2,
};
use kvm_ioctls::VcpuFd;
use pagewalk::mode::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA};
use pagewalk::{Backing, ControlRegisters, Gpa, Memory as _};

use super::pages::{self, OwnPages, Page};
use super::state::{self, Failure, VcpuState};
use super::{EnterL2, Entered, GuestMode, SecondDimension, svm};
use crate::machine::GuestRam;
use crate::vcpu::command::VcpuError;
use crate::vcpu::registers::Registers;

const MSR_PAT: u32 = 0x277;
const RFLAGS_FIXED: u64 = 1 << 1;
/// The bits that EFER has: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE.
const KNOWN_EFER: u64 = 0x36_fd01;
/// Flag of `kvm_sregs2`.
const PDPTRS_VALID: u64 = 1;

/// What the VM offers a vCPU for nesting.
#[derive(Clone)]
pub(crate) struct NestedOffer {
    /// Pages of our own in memory slots.
    pub(crate) pages: OwnPages,
    /// The guest's memory.
    pub(crate) memory: Arc<GuestRam>,
    /// The MSRs that KVM lists.
    pub(crate) msrs: Vec<u32>,
    /// CPUID has SVM.
    pub(crate) svm: bool,
    /// CPUID has GMET.
    pub(crate) gmet: bool,
}

/// The L2 that a request entered.
struct Entry {
    l1: VcpuState,
    control_structure: u64,
    /// What the page held, where it is the guest's.
    borrowed: Option<Page>,
}

/// Nested mode of one vCPU.
pub(crate) struct Nesting {
    offer: NestedOffer,
    /// `KVM_STATE_NESTED_FORMAT_*`.
    format: u16,
    msrs: Vec<u32>,
    entry: Option<Entry>,
    /// How the L2 of the last entry left by itself, until somebody wants to know.
    left: Option<String>,
}

fn hypervisor((what, error): Failure) -> VcpuError {
    VcpuError::Hypervisor(format!("{what}: {error}"))
}

fn field(field: &'static str, problem: impl Into<String>) -> VcpuError {
    VcpuError::NestedField { field, problem: problem.into() }
}

impl Nesting {
    /// Of a vCPU whose CPUID is set.
    ///
    /// # Errors
    /// Says why there is none.
    pub(crate) fn new(vcpu: &VcpuFd, offer: NestedOffer) -> Result<Self, String> {
        let failed = |(what, error): Failure| format!("{what}: {error}");
        let format = state::nested(vcpu).map_err(failed)?.format;
        state::sregs(vcpu).map_err(failed)?;
        let msrs = state::msrs_of(vcpu, &offer.msrs);
        Ok(Self { offer, format, msrs, entry: None, left: None })
    }

    fn is_svm(&self) -> bool {
        u32::from(self.format) == KVM_STATE_NESTED_FORMAT_SVM
    }

    /// The L2 that the vCPU, which holds `registers`, runs now.
    pub(crate) fn guest_mode(
        &mut self,
        vcpu: &VcpuFd,
        registers: &Registers,
    ) -> Result<Option<GuestMode>, String> {
        let possible = self.is_svm() && registers.efer & svm::EFER_SVME != 0;
        let (control_structure, second) = match possible.then(|| state::nested(vcpu)).transpose() {
            Err((what, error)) => return Err(format!("{what}: {error}")),
            Ok(Some(state)) if u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0 => {
                svm::read(&state, self.offer.gmet)
            }
            Ok(_) => {
                self.note_exit();
                return Ok(None);
            }
        };
        if self.entry.as_ref().is_some_and(|entry| entry.control_structure != control_structure) {
            self.note_exit();
        }
        let entered = if self.entry.is_some() { Entered::ByRequest } else { Entered::ByGuest };
        Ok(Some(GuestMode { second, entered }))
    }

    /// Takes note that the L2 that a request entered has left by itself: its L1 has been running since.
    fn note_exit(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        let page = pages::read(self.memory_of(&entry), entry.control_structure);
        self.left = page.map(|page| svm::describe_exit(&svm::Vmcb(page)));
    }

    /// How the L2 of the last request left by itself, told once.
    pub(crate) fn take_exit(&mut self) -> Option<String> {
        self.left.take()
    }

    fn memory_of(&self, entry: &Entry) -> &GuestRam {
        if entry.borrowed.is_some() { &self.offer.memory } else { self.offer.pages.memory() }
    }

    /// Why this vCPU cannot have such a second dimension.
    fn obstacle(&self, second: &SecondDimension) -> Option<String> {
        match second {
            SecondDimension::Npt { .. } if !self.is_svm() => {
                Some("this vCPU has VMX, and NPT is SVM's".to_owned())
            }
            SecondDimension::Npt { .. } if !self.offer.svm => {
                Some("this kernel's KVM offers its guests no SVM (nested=0)".to_owned())
            }
            SecondDimension::Npt { controls, .. } if controls.guest_mode_execute_trap && !self.offer.gmet => {
                Some("this vCPU's CPUID has no GMET".to_owned())
            }
            SecondDimension::Npt { .. } => None,
            SecondDimension::Ept { .. } if self.is_svm() => {
                Some("this vCPU has SVM, and EPT is VMX's".to_owned())
            }
            SecondDimension::Ept { .. } => Some("entering an L2 over EPT is not served yet".to_owned()),
        }
    }

    /// Where the control structure is to lie, and what to give back when it is.
    fn borrow(&self, request: &EnterL2) -> Result<(u64, Option<Page>), VcpuError> {
        let Some(gpa) = request.control_structure else {
            return Ok((self.offer.pages.control_structure(), None));
        };
        let name = if self.is_svm() { "vmcb12" } else { "vmcs12" };
        if gpa % 4096 != 0 {
            return Err(field(name, format!("{gpa:#x} is not 4 KiB-aligned")));
        }
        match (self.offer.memory.backing(Gpa(gpa)), pages::read(&self.offer.memory, gpa)) {
            (Backing::Ram, Some(page)) => Ok((gpa, Some(page))),
            (Backing::ReadOnly, _) => Err(field(name, format!("the memory at {gpa:#x} cannot be written"))),
            _ => Err(field(name, format!("there is no memory at GPA {gpa:#x}"))),
        }
    }

    /// Has the vCPU run the L2 of `request`. Where that fails, everything is as before.
    pub(crate) fn enter(&mut self, vcpu: &VcpuFd, request: &EnterL2) -> Result<(), VcpuError> {
        if let Some(obstacle) = self.obstacle(&request.second) {
            return Err(VcpuError::Unsupported(obstacle));
        }
        let before = VcpuState::read(vcpu, &self.msrs).map_err(hypervisor)?;
        if before.in_guest_mode() && self.entry.is_none() {
            return Err(VcpuError::GuestRunsL2);
        }
        // An L2 of an earlier request gives way, with the page that it holds.
        let earlier = self.entry.take();
        let held =
            earlier.as_ref().and_then(|entry| pages::read(self.memory_of(entry), entry.control_structure));
        let entered = match &earlier {
            Some(entry) => self.restore(vcpu, entry),
            None => Ok(()),
        }
        .and_then(|()| self.enter_from_l1(vcpu, request));
        let problem = match entered {
            Ok(entry) => {
                self.left = None;
                self.entry = Some(entry);
                return Ok(());
            }
            Err(problem) => problem,
        };
        let restored = before.write(vcpu);
        if let (Some(entry), Some(page)) = (&earlier, held) {
            // The page was there, and still is.
            let _ = pages::write(self.memory_of(entry), entry.control_structure, &page);
        }
        self.entry = earlier;
        match restored {
            Ok(()) => Err(problem),
            Err((what, error)) => Err(VcpuError::Hypervisor(format!(
                "{problem}; and the previous state could not be put back ({what}: {error})"
            ))),
        }
    }

    /// Back to L1 as it was when the L2 was entered. `false`: no L2 of a request runs.
    pub(crate) fn leave(&mut self, vcpu: &VcpuFd) -> Result<bool, VcpuError> {
        let Some(entry) = self.entry.take() else { return Ok(false) };
        match self.restore(vcpu, &entry) {
            Ok(()) => Ok(true),
            Err(problem) => {
                self.entry = Some(entry);
                Err(problem)
            }
        }
    }

    fn restore(&self, vcpu: &VcpuFd, entry: &Entry) -> Result<(), VcpuError> {
        entry.l1.write(vcpu).map_err(hypervisor)?;
        let Some(page) = &entry.borrowed else { return Ok(()) };
        pages::write(&self.offer.memory, entry.control_structure, page)
            .map_err(|error| VcpuError::Hypervisor(error.to_string()))
    }

    /// The vCPU runs L1. Where this fails, the vCPU's state is anything, and no memory has been changed.
    fn enter_from_l1(&self, vcpu: &VcpuFd, request: &EnterL2) -> Result<Entry, VcpuError> {
        let l1 = VcpuState::read(vcpu, &self.msrs).map_err(hypervisor)?;
        let (control_structure, borrowed) = self.borrow(request)?;
        let SecondDimension::Npt { ncr3, host, controls } = request.second else {
            return Err(VcpuError::Unsupported("entering an L2 over EPT is not served yet".to_owned()));
        };
        let l1_pat = state::msr(vcpu, MSR_PAT).map_err(hypervisor)?;
        let l2 = L2::of(&l1, l1_pat, request, svm::EFER_SVME);
        l2.load(vcpu, &l1.sregs)?;

        let control = svm::control(ncr3, controls, &self.offer.pages);
        let l1_at_vmrun = |host: &ControlRegisters| {
            let sregs = svm::host(&l1.sregs, host);
            let registers = svm::Registers { sregs: &sregs, regs: &l1.regs, pat: l1_pat };
            svm::in_guest_mode(control_structure, &svm::with_save_area(&control, &registers))
        };
        if let Err(refused) = state::set_nested(vcpu, &l1_at_vmrun(&host)) {
            let own = ControlRegisters { cr0: l1.sregs.cr0, cr4: l1.sregs.cr4, efer: l1.sregs.efer, ..host };
            let culprits = [
                ("npt.host_cr4", ControlRegisters { cr4: own.cr4, ..host }),
                ("npt.host_efer", ControlRegisters { efer: own.efer, ..host }),
                ("npt.host_cr0", ControlRegisters { cr0: own.cr0, ..host }),
            ];
            let culprit =
                culprits.iter().find(|(_, host)| state::set_nested(vcpu, &l1_at_vmrun(host)).is_ok());
            let name = culprit.map_or("npt", |(name, _)| name);
            return Err(field(
                name,
                format!("KVM refuses it for an L1 at VMRUN ({}: {})", refused.0, refused.1),
            ));
        }
        if l2.has_pdptes() {
            // Now that they are L2's, they are loaded through NPT.
            state::set_sregs(vcpu, &l2.sregs).map_err(hypervisor)?;
        }
        l2.check(vcpu)?;

        let in_memory =
            svm::with_save_area(&control, &svm::Registers { sregs: &l2.sregs, regs: &l2.regs, pat: l2.pat });
        let memory = if borrowed.is_some() { &*self.offer.memory } else { self.offer.pages.memory() };
        pages::write(memory, control_structure, &in_memory.0)
            .map_err(|error| VcpuError::Hypervisor(error.to_string()))?;
        Ok(Entry { l1, control_structure, borrowed })
    }
}

/// The registers that an L2 starts with.
struct L2 {
    sregs: kvm_sregs2,
    regs: kvm_regs,
    pat: u64,
}

impl L2 {
    /// L1's, with what `request` changes. `efer` are the bits that an entry wants to be set.
    fn of(l1: &VcpuState, l1_pat: u64, request: &EnterL2, efer: u64) -> Self {
        let wanted = &request.l2;
        let mut sregs = l1.sregs;
        sregs.flags &= !PDPTRS_VALID;
        sregs.cr0 = wanted.cr0.unwrap_or(sregs.cr0);
        sregs.cr3 = wanted.cr3.unwrap_or(sregs.cr3);
        sregs.cr4 = wanted.cr4.unwrap_or(sregs.cr4);
        sregs.efer = wanted.efer.unwrap_or(sregs.efer) | efer;
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
        Self { sregs, regs, pat: wanted.pat.unwrap_or(l1_pat) }
    }

    fn has_pdptes(&self) -> bool {
        self.sregs.cr0 & CR0_PG != 0 && self.sregs.cr4 & CR4_PAE != 0 && self.sregs.efer & EFER_LMA == 0
    }

    /// Has the vCPU hold them.
    fn load(&self, vcpu: &VcpuFd, l1: &kvm_sregs2) -> Result<(), VcpuError> {
        // KVM takes any EFER, and the CPU then refuses to enter.
        if let reserved @ 1.. = self.sregs.efer & !KNOWN_EFER {
            return Err(field("l2.efer", format!("has reserved bits set: {reserved:#x}")));
        }
        if let Err((what, error)) = state::set_sregs(vcpu, &self.sregs) {
            // The one that would be taken if it were L1's is the one that is refused.
            let sregs = &self.sregs;
            let culprits = [
                ("l2.cr4", kvm_sregs2 { cr4: l1.cr4, ..*sregs }),
                ("l2.efer", kvm_sregs2 { efer: l1.efer | svm::EFER_SVME, ..*sregs }),
                ("l2.cr0", kvm_sregs2 { cr0: l1.cr0, ..*sregs }),
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
    fn check(&self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
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
