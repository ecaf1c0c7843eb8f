//! Puts a vCPU of KVM into guest mode, as if its L1 had entered an L2, takes it out again, and notices when the guest does
//! either.

use std::sync::Arc;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GUEST_MODE};
use kvm_ioctls::VcpuFd;
use pagewalk::{Backing, Gpa, Memory as _};

use super::pages::{self, OwnPages, Page};
use super::state::{self, Failure, VcpuState};
use super::vmx_capabilities::VmxCapabilities;
use super::{EnterL2, Entered, GuestMode, SecondDimension, svm, vmx};
use crate::machine::GuestRam;
use crate::vcpu::command::VcpuError;
use crate::vcpu::registers::{MSR_PAT, Registers};

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
    /// CPUID has VMX.
    pub(crate) vmx: bool,
}

/// The L2 that a request entered.
struct Entry {
    l1: VcpuState,
    control_structure: u64,
    /// What the page held, where it is the guest's.
    borrowed: Option<Page>,
    /// What the request says of EPT that VMCS12 does not.
    tables_written: bool,
}

/// Nested mode of one vCPU.
pub(crate) struct Nesting {
    offer: NestedOffer,
    /// `KVM_STATE_NESTED_FORMAT_*`.
    format: u16,
    msrs: Vec<u32>,
    /// What L1's VMX can do, or why there is none.
    vmx: Result<VmxCapabilities, String>,
    entry: Option<Entry>,
    /// How the L2 of the last entry left by itself, until somebody wants to know.
    left: Option<String>,
}

pub(super) fn hypervisor((what, error): Failure) -> VcpuError {
    VcpuError::Hypervisor(format!("{what}: {error}"))
}

pub(super) fn field(field: &'static str, problem: impl Into<String>) -> VcpuError {
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
        let vmx = if offer.vmx {
            VmxCapabilities::read(vcpu)
        } else {
            Err("this kernel's KVM offers its guests no VMX (nested=0)".to_owned())
        };
        Ok(Self { offer, format, msrs, vmx, entry: None, left: None })
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
        let possible = match self.is_svm() {
            true => registers.efer & svm::EFER_SVME != 0,
            false => registers.cr4 & vmx::CR4_VMXE != 0,
        };
        let state = possible.then(|| state::nested(vcpu)).transpose();
        let state = state.map_err(|(what, error)| format!("{what}: {error}"))?;
        let l2 = state.as_deref().and_then(|state| self.l2_in(state));
        let Some((control_structure, second)) = l2 else {
            self.note_exit(state.as_deref());
            return Ok(None);
        };
        if self.entry.as_ref().is_some_and(|entry| entry.control_structure != control_structure) {
            self.note_exit(state.as_deref());
        }
        let entered = if self.entry.is_some() { Entered::ByRequest } else { Entered::ByGuest };
        Ok(Some(GuestMode { second, entered }))
    }

    /// Where the control structure of the L2 that runs in `state` lies, and L2's second dimension.
    fn l2_in(&self, state: &KvmNestedStateBuffer) -> Option<(u64, Option<SecondDimension>)> {
        if u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE == 0 {
            return None;
        }
        if self.is_svm() {
            return Some(svm::read(state, self.offer.gmet));
        }
        let capabilities = self.vmx.as_ref().ok()?.ept;
        let tables_written = self.entry.as_ref().is_some_and(|entry| entry.tables_written);
        Some(vmx::read(state, capabilities, tables_written))
    }

    /// Takes note that the L2 that a request entered has left by itself: its L1 has been running since.
    fn note_exit(&mut self, state: Option<&KvmNestedStateBuffer>) {
        let Some(entry) = self.entry.take() else { return };
        self.left = if self.is_svm() {
            let page = pages::read(self.memory_of(&entry), entry.control_structure);
            page.map(|page| svm::describe_exit(&svm::Vmcb(page)))
        } else {
            // KVM keeps the current VMCS12 to itself.
            let vmcs12 = state.and_then(|state| vmx::current(state, entry.control_structure));
            Some(vmcs12.map_or("its L1 has gone on to another VMCS".to_owned(), |it| vmx::describe_exit(&it)))
        };
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
            SecondDimension::Ept { eptp, controls, capabilities } => match &self.vmx {
                Ok(vmx) => vmx.obstacle(*eptp, controls, capabilities),
                Err(reason) => Some(reason.clone()),
            },
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
        let l1_pat = state::msr(vcpu, MSR_PAT).map_err(hypervisor)?;
        let pages = &self.offer.pages;
        let (in_memory, tables_written) = match (request.second, &self.vmx) {
            (SecondDimension::Npt { ncr3, host, controls }, _) => {
                let vmcb12 = svm::Vmcb12 { at: control_structure, ncr3, host, controls, pages };
                (vmcb12.enter(vcpu, &l1, l1_pat, request)?, false)
            }
            (SecondDimension::Ept { eptp, controls, .. }, Ok(capabilities)) => {
                let launch = vmx::Launch { at: control_structure, eptp, controls, pages, capabilities };
                (launch.enter(vcpu, &l1, l1_pat, request)?, controls.tables_written)
            }
            (SecondDimension::Ept { .. }, Err(reason)) => {
                return Err(VcpuError::Unsupported(reason.clone()));
            }
        };
        let memory = if borrowed.is_some() { &*self.offer.memory } else { pages.memory() };
        pages::write(memory, control_structure, &in_memory)
            .map_err(|error| VcpuError::Hypervisor(error.to_string()))?;
        Ok(Entry { l1, control_structure, borrowed, tables_written })
    }
}
