//! A vCPU of KVM.
//!
//! Linux, "The Definitive KVM (Kernel-based Virtual Machine) API Documentation". What is at the guest's ports is the machine's
//! [`Devices`]. Most machines have no interrupt controller, so HLT comes out to us. Where KVM emulates one, HLT sleeps inside
//! KVM_RUN, and so does a vCPU that waits for its start-up IPI; a kick brings either out.
#![allow(unsafe_code)] // The union in `kvm_run`, and the byte in it that a signal handler sets.

use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::backend::{Backend, Exit, ImmediateExit};
use super::command::VcpuError;
use super::devices::Devices;
use super::nested::entry::Nesting;
use super::nested::{EnterL2, GuestMode};
use super::registers::{MSR_PAT, RegisterChanges, Registers, Selectors};

const MSR_PKRS: u32 = 0x6e1;
const PKRU_COMPONENT: u32 = 9;
/// Kicks that may interrupt one single step before it is given up.
const STEP_ATTEMPTS: u32 = 64;
/// Kicks, a timer's among them, after which a step that waits for an interrupt is given up.
const SLEEP_ATTEMPTS: u32 = 10;
const LONGEST_INSTRUCTION: u64 = 15;

/// The registers as KVM groups them.
struct Groups {
    regs: kvm_regs,
    sregs: kvm_sregs,
    pat: u64,
}

/// A KVM vCPU, with whatever must outlive it.
pub(crate) struct KvmBackend<K> {
    vcpu: VcpuFd,
    devices: Box<dyn Devices>,
    /// `kvm_run` holds the registers as of now: KVM copied them at the last exit, and nobody wrote any since.
    synced: bool,
    sync_available: bool,
    can_step: bool,
    /// KVM emulates the interrupt controllers, and lets the vCPU sleep.
    irqchip: bool,
    /// What KVM_SET_GUEST_DEBUG is asked for to make a step.
    step: u32,
    /// Offset of PKRU in the XSAVE area, where the vCPU has protection keys.
    pkru_offset: Option<usize>,
    has_pkrs: bool,
    /// Or why there is none.
    nesting: Result<Nesting, String>,
    _keep: Arc<K>,
}

/// What the VM's kernel and CPUID offer its vCPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    pub(crate) sync_regs: bool,
    pub(crate) guest_debug: bool,
    /// Interrupt controllers in the kernel.
    pub(crate) irqchip: bool,
    /// A single step can have interrupts wait until it is over.
    pub(crate) block_interrupts: bool,
    pub(crate) protection_keys: bool,
    /// Keys of supervisor pages, and with them IA32_PKRS.
    pub(crate) supervisor_keys: bool,
}

impl<K: Send + Sync + 'static> KvmBackend<K> {
    /// Takes over `vcpu`, whose CPUID and registers are set. `keep` is dropped after it: the VM and its memory.
    pub(crate) fn new(
        mut vcpu: VcpuFd,
        devices: Box<dyn Devices>,
        features: Features,
        nesting: Result<Nesting, String>,
        keep: Arc<K>,
    ) -> Self {
        if features.sync_regs {
            vcpu.set_sync_valid_reg(SyncReg::Register);
            vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        let pkru_offset = features.protection_keys.then(|| {
            // CPUID 0xd.9 gives the component's offset in the standard format, the one that KVM hands out.
            std::arch::x86_64::__cpuid_count(0xd, PKRU_COMPONENT).ebx as usize
        });
        Self {
            vcpu,
            devices,
            synced: false,
            sync_available: features.sync_regs,
            can_step: features.guest_debug,
            irqchip: features.irqchip,
            // An interrupt would have its handler run before the instruction, and whatever that switches to.
            step: KVM_GUESTDBG_ENABLE
                | KVM_GUESTDBG_SINGLESTEP
                | if features.block_interrupts { KVM_GUESTDBG_BLOCKIRQ } else { 0 },
            pkru_offset,
            has_pkrs: features.supervisor_keys,
            nesting,
            _keep: keep,
        }
    }

    fn groups(&self) -> Result<Groups, String> {
        let failed = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let (regs, sregs) = if self.synced {
            let sync = self.vcpu.sync_regs();
            (sync.regs, sync.sregs)
        } else {
            let regs = self.vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
            (regs, self.vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?)
        };
        let mut msrs = pat_msr(0)?;
        match self.vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))? {
            1 => {}
            _ => return Err("KVM_GET_MSRS does not give IA32_PAT".into()),
        }
        let pat = msrs.as_slice().first().map_or(0, |entry| entry.data);
        Ok(Groups { regs, sregs, pat })
    }

    fn pkru(&self) -> Option<u32> {
        let offset = self.pkru_offset?;
        let area = self.vcpu.get_xsave().ok()?.region;
        // XSTATE_BV: a component whose bit is clear is in its initial state, all zeroes.
        let in_use = area.get(512 / 4)? & (1 << PKRU_COMPONENT) != 0;
        if in_use { area.get(offset / 4).copied() } else { Some(0) }
    }

    /// IA32_PKRS, where the kernel gives it: one that offers PKS to guests.
    fn pkrs(&self) -> Option<u32> {
        if !self.has_pkrs {
            return None;
        }
        let entry = kvm_msr_entry { index: MSR_PKRS, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        match self.vcpu.get_msrs(&mut msrs) {
            Ok(1) => msrs.as_slice().first().map(|entry| entry.data as u32),
            _ => None,
        }
    }

    fn write(&mut self, groups: &Groups) -> Result<(), (&'static str, kvm_ioctls::Error)> {
        self.synced = false;
        self.vcpu.set_sregs(&groups.sregs).map_err(|e| ("KVM_SET_SREGS", e))?;
        // Without an interrupt controller in the kernel, each KVM_RUN loads CR8 from here.
        self.vcpu.get_kvm_run().cr8 = groups.sregs.cr8;
        self.vcpu.set_regs(&groups.regs).map_err(|e| ("KVM_SET_REGS", e))?;
        let einval = || kvm_ioctls::Error::new(libc::EINVAL);
        let msrs = pat_msr(groups.pat).map_err(|_| ("KVM_SET_MSRS", einval()))?;
        match self.vcpu.set_msrs(&msrs).map_err(|e| ("KVM_SET_MSRS", e))? {
            1 => Ok(()),
            // KVM stops at the MSR that it refuses and reports how many it took.
            _ => Err(("KVM_SET_MSRS of IA32_PAT", einval())),
        }
    }

    /// Puts everything back, after a write that was not accepted for `reason`.
    fn restore(&mut self, before: &Groups, reason: VcpuError) -> VcpuError {
        match self.write(before) {
            Ok(()) => reason,
            Err((what, e)) => VcpuError::Hypervisor(format!(
                "{reason}; and the previous registers could not be put back ({what}: {e})"
            )),
        }
    }

    fn position(&mut self) -> String {
        match self.groups() {
            Ok(Groups { regs, sregs, .. }) => {
                format!(
                    "RIP {:#x}, RSP {:#x}, CR2 {:#x}, CR3 {:#x}",
                    regs.rip, regs.rsp, sregs.cr2, sregs.cr3
                )
            }
            Err(problem) => problem,
        }
    }

    fn internal_error(&mut self) -> Exit {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member; it is all integers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let meaning = match internal.suberror {
            1 => "an instruction could not be emulated, or lies outside memory",
            2 => "an exception came while another was delivered",
            3 => "an event could not be delivered",
            4 => "the CPU gave an unexpected exit reason",
            _ => "unknown suberror",
        };
        let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        let data = internal.data.get(..count).unwrap_or_default();
        let position = self.position();
        Exit::Failed(format!(
            "KVM internal error, suberror {} ({meaning}) at {position}; data {data:#x?}",
            internal.suberror
        ))
    }

    /// Runs until something other than a port access happens.
    fn run_to_exit(&mut self) -> Exit {
        enum Seen {
            Exit(Exit),
            TripleFault,
            InternalError,
            At(&'static str, String),
        }
        loop {
            let seen = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => match self.devices.write(port, data) {
                    None => continue,
                    Some(exit) => Seen::Exit(exit),
                },
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.devices.read(port, data);
                    continue;
                }
                Ok(VcpuExit::MmioRead(_, data)) if self.devices.open_bus() => {
                    data.fill(0xff);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(..)) if self.devices.open_bus() => continue,
                Ok(VcpuExit::Hlt) => Seen::Exit(Exit::Halted),
                Ok(VcpuExit::Debug(_)) => Seen::Exit(Exit::Stepped),
                Ok(VcpuExit::Intr) => Seen::Exit(Exit::Kicked),
                Err(e) if e.errno() == libc::EINTR => Seen::Exit(Exit::Kicked),
                // Its start-up IPI has come.
                Err(e) if e.errno() == libc::EAGAIN => continue,
                Ok(VcpuExit::Shutdown) => Seen::TripleFault,
                Ok(VcpuExit::InternalError) => Seen::InternalError,
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    Seen::At("read", format!("of {} bytes at GPA {gpa:#x}, which has no memory,", data.len()))
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    let what =
                        format!("of {} bytes at GPA {gpa:#x}, which has no writable memory,", data.len());
                    Seen::At("write", what)
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => Seen::At(
                    "the CPU refused to enter the guest",
                    format!("(reason {reason:#x}, host CPU {cpu})"),
                ),
                Ok(other) => Seen::At("an exit that nobody here handles", format!("{other:?}")),
                Err(e) => Seen::At("KVM_RUN failed", e.to_string()),
            };
            self.synced = self.sync_available;
            return match seen {
                Seen::Exit(exit) => exit,
                Seen::InternalError => self.internal_error(),
                Seen::TripleFault => Exit::Shutdown(format!("triple fault at {}", self.position())),
                Seen::At(what, detail) => Exit::Failed(format!("{what} {detail} at {}", self.position())),
            };
        }
    }

    fn mp_state(&self) -> Result<u32, VcpuError> {
        if !self.irqchip {
            return Ok(KVM_MP_STATE_RUNNABLE);
        }
        let failed = |e: kvm_ioctls::Error| VcpuError::Hypervisor(format!("KVM_GET_MP_STATE: {e}"));
        Ok(self.vcpu.get_mp_state().map_err(failed)?.mp_state)
    }

    fn sleeps(&self) -> bool {
        self.mp_state().is_ok_and(|state| state == KVM_MP_STATE_HALTED)
    }

    fn single_step(&mut self) -> Result<Exit, VcpuError> {
        let before = self.groups().map_err(VcpuError::Hypervisor)?.regs.rip;
        for attempt in 0..STEP_ATTEMPTS {
            self.vcpu.set_kvm_immediate_exit(0);
            match self.run_to_exit() {
                Exit::Kicked if attempt >= SLEEP_ATTEMPTS && self.sleeps() => {
                    let reason = "the vCPU rests in HLT, no interrupt has woken it, and nothing was executed";
                    return Err(VcpuError::Unsupported(reason.to_owned()));
                }
                Exit::Kicked => {}
                Exit::Halted => {
                    // HLT may end a step by itself. Further on, the guest has run freely.
                    let after = self.groups().map_err(VcpuError::Hypervisor)?.regs.rip;
                    if (1..=LONGEST_INSTRUCTION).contains(&after.wrapping_sub(before)) {
                        return Ok(Exit::Stepped);
                    }
                    return Err(VcpuError::Hypervisor(format!(
                        "single step was not honoured: the guest ran from RIP {before:#x} to {after:#x}"
                    )));
                }
                exit => return Ok(exit),
            }
        }
        Err(VcpuError::Hypervisor(format!(
            "a single step at RIP {before:#x} was interrupted {STEP_ATTEMPTS} times"
        )))
    }
}

impl<K: Send + Sync + 'static> Backend for KvmBackend<K> {
    fn run(&mut self) -> Exit {
        self.run_to_exit()
    }

    fn step(&mut self) -> Result<Exit, VcpuError> {
        if !self.can_step {
            return Err(VcpuError::Unsupported("this kernel offers no KVM_CAP_SET_GUEST_DEBUG".into()));
        }
        if !matches!(self.mp_state()?, KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_HALTED) {
            let reason = "the vCPU waits for its start-up IPI: the guest has not started it yet";
            return Err(VcpuError::Unsupported(reason.to_owned()));
        }
        let refused = |e: kvm_ioctls::Error| VcpuError::Hypervisor(format!("KVM_SET_GUEST_DEBUG: {e}"));
        let control = self.step;
        self.vcpu.set_guest_debug(&kvm_guest_debug { control, ..Default::default() }).map_err(refused)?;
        let stepped = self.single_step();
        self.vcpu.set_guest_debug(&kvm_guest_debug::default()).map_err(refused)?;
        // Leaving single-step mode takes TF out of RFLAGS, after KVM copied the registers.
        self.synced = false;
        stepped
    }

    fn registers(&mut self) -> Result<Registers, String> {
        let Groups { regs, sregs, pat } = self.groups()?;
        Ok(Registers {
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            pat,
            rip: regs.rip,
            rflags: regs.rflags,
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rbp: regs.rbp,
            rsp: regs.rsp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            pkru: self.pkru(),
            pkrs: self.pkrs(),
            // SS.DPL is the CPL; the RPL of CS may differ from it in real mode.
            pdptes: None,
            cpl: sregs.ss.dpl,
            selectors: Selectors {
                cs: sregs.cs.selector,
                ss: sregs.ss.selector,
                ds: sregs.ds.selector,
                es: sregs.es.selector,
                fs: sregs.fs.selector,
                gs: sregs.gs.selector,
            },
        })
    }

    fn set_registers(&mut self, changes: &RegisterChanges) -> Result<(), VcpuError> {
        if changes.pkru.is_some() {
            return Err(VcpuError::Unsupported("PKRU of a KVM vCPU can only be read".into()));
        }
        // KVM may drop a bit without an error, so what it took is read back and compared.
        let before = self.groups().map_err(VcpuError::Hypervisor)?;
        let current = self.registers().map_err(VcpuError::Hypervisor)?;
        let wanted = changes.applied_to(&current);
        if let Err((what, e)) = self.write(&merged(&before, &wanted)) {
            let refused = VcpuError::InvalidRegisters(format!("{what}: {e}"));
            return Err(self.restore(&before, refused));
        }
        let found = match self.registers() {
            Ok(found) => found,
            Err(problem) => return Err(self.restore(&before, VcpuError::Hypervisor(problem))),
        };
        match wanted.first_difference(&found) {
            None => Ok(()),
            Some((register, wanted, found)) => {
                Err(self.restore(&before, VcpuError::NotTaken { register, wanted, found }))
            }
        }
    }

    fn guest_mode(&mut self, registers: &Registers) -> Result<Option<GuestMode>, String> {
        match &mut self.nesting {
            Ok(nesting) => nesting.guest_mode(&self.vcpu, registers),
            Err(_) => Ok(None),
        }
    }

    fn enter_nested(&mut self, request: &EnterL2) -> Result<(), VcpuError> {
        self.synced = false;
        match &mut self.nesting {
            Ok(nesting) => nesting.enter(&self.vcpu, request),
            Err(reason) => Err(VcpuError::Unsupported(reason.clone())),
        }
    }

    fn leave_nested(&mut self) -> Result<(), VcpuError> {
        self.synced = false;
        match &mut self.nesting {
            Ok(nesting) => nesting.leave(&self.vcpu).map(drop),
            Err(_) => Ok(()),
        }
    }

    fn take_nested_exit(&mut self) -> Option<String> {
        self.nesting.as_mut().ok()?.take_exit()
    }

    fn immediate_exit(&mut self) -> Option<ImmediateExit> {
        let byte = NonNull::from(&mut self.vcpu.get_kvm_run().immediate_exit);
        // SAFETY: `kvm_run` is a mapping that `self.vcpu` owns and never moves.
        Some(unsafe { ImmediateExit::new(byte) })
    }
}

fn pat_msr(data: u64) -> Result<Msrs, String> {
    let entry = kvm_msr_entry { index: MSR_PAT, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|e| format!("MSR list: {e:?}"))
}

/// `before` with the values of `wanted`; segments and pending interrupts stay.
fn merged(before: &Groups, wanted: &Registers) -> Groups {
    let mut sregs = before.sregs;
    sregs.cr0 = wanted.cr0;
    sregs.cr2 = wanted.cr2;
    sregs.cr3 = wanted.cr3;
    sregs.cr4 = wanted.cr4;
    sregs.cr8 = wanted.cr8;
    sregs.efer = wanted.efer;
    sregs.fs.base = wanted.fs_base;
    sregs.gs.base = wanted.gs_base;
    let regs = kvm_regs {
        rip: wanted.rip,
        rflags: wanted.rflags,
        rax: wanted.rax,
        rbx: wanted.rbx,
        rcx: wanted.rcx,
        rdx: wanted.rdx,
        rsi: wanted.rsi,
        rdi: wanted.rdi,
        rbp: wanted.rbp,
        rsp: wanted.rsp,
        r8: wanted.r8,
        r9: wanted.r9,
        r10: wanted.r10,
        r11: wanted.r11,
        r12: wanted.r12,
        r13: wanted.r13,
        r14: wanted.r14,
        r15: wanted.r15,
    };
    Groups { regs, sregs, pat: wanted.pat }
}
