//! VMCB12 as `KVM_SET_NESTED_STATE` takes it and `KVM_GET_NESTED_STATE` gives it.
//!
//! AMD APM volume 2, "VMCB Layout". KVM is handed L1's control area with a save area of the state that L1 *left*, whose CR4
//! and EFER select NPT's format; L2's registers are those that the vCPU already has. In memory, a VMCB has L2's save area:
//! so that is what the page gets.

use kvm_bindings::nested::{KvmNestedStateBuffer, kvm_svm_nested_state_data};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, kvm_dtable, kvm_regs,
    kvm_segment, kvm_sregs2, kvm_svm_nested_state_hdr,
};
use kvm_ioctls::VcpuFd;
use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{ControlRegisters, NptControls};

use super::entry::{field, hypervisor};
use super::l2::{Demands, L2};
use super::pages::{OwnPages, Page};
use super::state::{self, VcpuState};
use super::{EnterL2, SecondDimension};
use crate::vcpu::command::VcpuError;

pub(super) const EFER_SVME: u64 = 1 << 12;
const HEADER_BYTES: u32 = 128;
const VMCB_BYTES: usize = 4096;

// Control area.
const INTERCEPTS_3: usize = 0x0c;
const INTERCEPT_SHUTDOWN: u64 = 1 << 31;
const INTERCEPTS_4: usize = 0x10;
const INTERCEPT_VMRUN: u64 = 1 << 0;
const IOPM_BASE: usize = 0x40;
const MSRPM_BASE: usize = 0x48;
const GUEST_ASID: usize = 0x58;
const EXIT_CODE: usize = 0x70;
const EXIT_INFO_1: usize = 0x78;
const EXIT_INFO_2: usize = 0x80;
const NESTED_CTL: usize = 0x90;
const NESTED_PAGING: u64 = 1 << 0;
const GMET: u64 = 1 << 3;
const NCR3: usize = 0xb0;
// Save area.
const SEGMENTS: usize = 0x400;
const GDTR: usize = 0x460;
const LDTR: usize = 0x470;
const IDTR: usize = 0x480;
const TR: usize = 0x490;
const CPL: usize = 0x4cb;
const EFER: usize = 0x4d0;
const CR4: usize = 0x548;
const CR3: usize = 0x550;
const CR0: usize = 0x558;
const DR7: usize = 0x560;
const DR6: usize = 0x568;
const RFLAGS: usize = 0x570;
const RIP: usize = 0x578;
const RSP: usize = 0x5d8;
const RAX: usize = 0x5f8;
const CR2: usize = 0x640;
const PAT: usize = 0x668;

const DR7_RESET: u64 = 0x400;
const DR6_RESET: u64 = 0xffff_0ff0;

/// The bits of L1's control registers that a request may choose, because NPT's format or VMRUN depend on them. The others
/// are the vCPU's own.
const CHOSEN_CR0: u64 = CR0_PE | CR0_WP | CR0_PG;
const CHOSEN_CR4: u64 = CR4_PSE | CR4_PAE | CR4_LA57;
const CHOSEN_EFER: u64 = EFER_LME | EFER_LMA | EFER_NXE;

/// The bits that EFER has: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE.
const KNOWN_EFER: u64 = 0x36_fd01;
const DEMANDS: Demands = Demands { cr0: 0, cr4: 0, efer: EFER_SVME, known_efer: KNOWN_EFER };

/// A VMCB.
#[derive(Clone)]
pub(super) struct Vmcb(pub(super) Page);

impl Vmcb {
    fn set(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn get(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|byte| self.0.get(at + byte).copied().unwrap_or_default()))
    }

    fn set_segment(&mut self, at: usize, segment: &kvm_segment) {
        let &kvm_segment { type_, s, dpl, avl, l, db, g, limit, .. } = segment;
        let present = segment.present & !segment.unusable & 1;
        let bits = [(type_, 0), (s, 4), (dpl, 5), (present, 7), (avl, 8), (l, 9), (db, 10), (g, 11)];
        let attributes = bits.into_iter().fold(0, |all, (bits, at)| all | u64::from(bits) << at);
        self.set(at, u64::from(segment.selector) | attributes << 16 | u64::from(limit) << 32);
        self.set(at + 8, segment.base);
    }

    fn set_table(&mut self, at: usize, table: &kvm_dtable) {
        self.set(at, u64::from(table.limit) << 32);
        self.set(at + 8, table.base);
    }

    fn save(&mut self, registers: &Registers<'_>) {
        let Registers { sregs, regs, pat } = registers;
        let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs];
        for (at, segment) in (SEGMENTS..).step_by(16).zip(segments) {
            self.set_segment(at, segment);
        }
        self.set_table(GDTR, &sregs.gdt);
        self.set_segment(LDTR, &sregs.ldt);
        self.set_table(IDTR, &sregs.idt);
        self.set_segment(TR, &sregs.tr);
        self.0[CPL] = sregs.ss.dpl;
        for (at, value) in [
            (EFER, sregs.efer),
            (CR4, sregs.cr4),
            (CR3, sregs.cr3),
            (CR2, sregs.cr2),
            (CR0, sregs.cr0),
            (DR7, DR7_RESET),
            (DR6, DR6_RESET),
            (RFLAGS, regs.rflags),
            (RIP, regs.rip),
            (RSP, regs.rsp),
            (RAX, regs.rax),
            (PAT, *pat),
        ] {
            self.set(at, value);
        }
    }
}

/// What a save area is made of.
struct Registers<'a> {
    sregs: &'a kvm_sregs2,
    regs: &'a kvm_regs,
    pat: u64,
}

/// A VMCB12 to make, and where it is to lie.
pub(super) struct Vmcb12<'a> {
    pub(super) at: u64,
    pub(super) ncr3: u64,
    pub(super) host: ControlRegisters,
    pub(super) controls: NptControls,
    pub(super) pages: &'a OwnPages,
}

impl Vmcb12<'_> {
    /// Has the vCPU, which runs L1, run L2, and says what VMCB12 holds in memory.
    pub(super) fn enter(
        &self,
        vcpu: &VcpuFd,
        l1: &VcpuState,
        l1_pat: u64,
        request: &EnterL2,
    ) -> Result<Page, VcpuError> {
        let l2 = L2::of(l1, l1_pat, request, DEMANDS);
        l2.load(vcpu, &l1.sregs)?;

        let host = self.host;
        let control = control(self.ncr3, self.controls, self.pages);
        let l1_at_vmrun = |wanted: &ControlRegisters| {
            let sregs = self::host(&l1.sregs, wanted);
            let registers = Registers { sregs: &sregs, regs: &l1.regs, pat: l1_pat };
            in_guest_mode(self.at, &with_save_area(&control, &registers))
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
        let registers = Registers { sregs: &l2.sregs, regs: &l2.regs, pat: l2.pat };
        Ok(with_save_area(&control, &registers).0)
    }
}

/// L1's control registers while its L2 runs: the vCPU's own, with what `wanted` says of NPT's format.
fn host(own: &kvm_sregs2, wanted: &ControlRegisters) -> kvm_sregs2 {
    kvm_sregs2 {
        cr0: own.cr0 & !CHOSEN_CR0 | wanted.cr0 & CHOSEN_CR0,
        cr4: own.cr4 & !CHOSEN_CR4 | wanted.cr4 & CHOSEN_CR4,
        efer: own.efer & !CHOSEN_EFER | wanted.efer & CHOSEN_EFER | EFER_SVME,
        ..*own
    }
}

/// The control area: VMRUN and a triple fault leave for L1, nothing else does by itself.
fn control(ncr3: u64, controls: NptControls, pages: &OwnPages) -> Vmcb {
    let mut vmcb = Vmcb(Box::new([0; VMCB_BYTES]));
    let nested_ctl = NESTED_PAGING | if controls.guest_mode_execute_trap { GMET } else { 0 };
    vmcb.set(INTERCEPTS_3, INTERCEPT_SHUTDOWN);
    for (at, value) in [
        (INTERCEPTS_4, INTERCEPT_VMRUN),
        (IOPM_BASE, pages.io_permissions()),
        (MSRPM_BASE, pages.msr_permissions()),
        (GUEST_ASID, 1),
        (NESTED_CTL, nested_ctl),
        (NCR3, ncr3),
    ] {
        vmcb.set(at, value);
    }
    vmcb
}

/// `control` with the save area of `registers`.
fn with_save_area(control: &Vmcb, registers: &Registers<'_>) -> Vmcb {
    let mut vmcb = control.clone();
    vmcb.save(registers);
    vmcb
}

/// The nested state of a vCPU that runs an L2.
fn in_guest_mode(vmcb_pa: u64, vmcb12: &Vmcb) -> Box<KvmNestedStateBuffer> {
    let mut state = outside();
    state.flags |= KVM_STATE_NESTED_GUEST_MODE as u16;
    state.size += VMCB_BYTES as u32;
    state.hdr.svm = kvm_svm_nested_state_hdr { vmcb_pa };
    state.data.svm = kvm_svm_nested_state_data { vmcb12: *vmcb12.0 };
    state
}

/// The nested state of a vCPU that runs none.
pub(super) fn outside() -> Box<KvmNestedStateBuffer> {
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    state.format = KVM_STATE_NESTED_FORMAT_SVM as u16;
    state.flags = KVM_STATE_NESTED_GIF_SET as u16;
    state.size = HEADER_BYTES;
    state
}

/// Where VMCB12 lies, and L2's second dimension, in the nested state of a vCPU that runs an L2. `gmet`: the vCPU has that.
pub(super) fn read(state: &KvmNestedStateBuffer, gmet: bool) -> (u64, Option<SecondDimension>) {
    // SAFETY: the format is SVM's, for which KVM fills this member; it is all integers.
    #[allow(unsafe_code, reason = "reading a union")]
    let vmcb_pa = unsafe { state.hdr.svm.vmcb_pa };
    // SAFETY: as above, and the vCPU is in guest mode.
    #[allow(unsafe_code, reason = "reading a union")]
    let vmcb = Vmcb(Box::new(unsafe { state.data.svm.vmcb12 }));
    let nested_ctl = vmcb.get(NESTED_CTL);
    let second = (nested_ctl & NESTED_PAGING != 0).then(|| SecondDimension::Npt {
        ncr3: vmcb.get(NCR3),
        host: ControlRegisters {
            cr0: vmcb.get(CR0),
            cr3: vmcb.get(CR3),
            cr4: vmcb.get(CR4),
            efer: vmcb.get(EFER),
            ..ControlRegisters::default()
        },
        controls: NptControls { guest_mode_execute_trap: gmet && nested_ctl & GMET != 0 },
    });
    (vmcb_pa, second)
}

/// How L2 left, as VMCB12 in memory says.
pub(super) fn describe_exit(vmcb: &Vmcb) -> String {
    let (code, info_1, info_2) = (vmcb.get(EXIT_CODE), vmcb.get(EXIT_INFO_1), vmcb.get(EXIT_INFO_2));
    let meaning = match code {
        0x40..=0x5f => " (an exception)",
        0x7f => " (shutdown: a triple fault)",
        0x80 => " (VMRUN)",
        0x400 => " (a nested page fault)",
        u64::MAX => " (an invalid state)",
        _ => "",
    };
    format!("VM exit {code:#x}{meaning}, EXITINFO1 {info_1:#x}, EXITINFO2 {info_2:#x}")
}
