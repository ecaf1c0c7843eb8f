//! Virtual machines of KVM, and the guest that a user brings as an ELF file.
//!
//! A bare machine has memory and vCPUs and nothing else: no interrupt controller, no timer, no devices. What the guest's CPUID
//! says is what KVM supports, without the features that need an interrupt controller. A PC has the interrupt controllers and
//! the timer that KVM emulates: see `linux`.
//!
//! `kvm:elf=FILE` is entered at the ELF's entry point in 64-bit mode, on all vCPUs at once, with RDI = index of the vCPU,
//! RSI = number of vCPUs, RSP = end of a 16 KiB stack of its own, flat segments, IF = 0 and no IDT. All of memory is mapped
//! to itself by 2 MiB supervisor leaves (rounded up to whole ones). The first 512 KiB of memory belong to us, and the ELF
//! must not load there: GDT at 0x1000, PML4 at 0x2000, PDPT at 0x3000, page directories from 0x4000, stacks from 0x20000.
#![allow(unsafe_code)] // KVM is given addresses of our memory.

use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_msr_entry, kvm_pit_config, kvm_regs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use pagewalk::{CpuProfile, Gpa, Vendor};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::boot::{CODE_SELECTOR, Entry, GDT};
use super::memory::{GuestRam, MemoryError, Region};
use super::pages::HugePages;
use super::{Capabilities, Health, LocalSource, OpenError, elf};
use crate::vcpu::Vcpu;
use crate::vcpu::console::Console;
use crate::vcpu::devices::Devices;
use crate::vcpu::kvm::{Features, KvmBackend};
use crate::vcpu::nested::entry::{NestedOffer, Nesting};
use crate::vcpu::nested::{OwnPages, own_pages_region};

/// The part of memory that holds what we boot a guest with.
pub(super) const BOOT_AREA_END: u64 = 0x8_0000;
pub(super) const GDT_AT: u64 = 0x1000;
pub(super) const PML4_AT: u64 = 0x2000;
const PDPT_AT: u64 = 0x3000;
const PD_AT: u64 = 0x4000;
const STACKS_AT: u64 = 0x2_0000;
const STACK_SIZE: u64 = 0x4000;

/// Where VMX keeps what it needs for real mode: three pages of a TSS, and one of a table. No memory of the guest's lies there.
const TSS_AT: usize = 0xfffb_d000;
const IDENTITY_MAP_AT: u64 = 0xfffb_c000;

/// Largest memory of a machine of KVM's: its page directories fit between [`PD_AT`] and [`STACKS_AT`].
pub(super) const MEMORY_MAX: u64 = 16 << 30;
/// Most vCPUs of a machine of KVM's: their stacks fit into the boot area.
pub(super) const VCPUS_MAX: u32 = 16;
const _: () = assert!(PD_AT + (MEMORY_MAX >> 30) * 4096 <= STACKS_AT);
const _: () = assert!(STACKS_AT + VCPUS_MAX as u64 * STACK_SIZE <= BOOT_AREA_END);

const PRESENT_WRITE: u64 = 0b11;
const PAGE_SIZE: u64 = 1 << 7;

/// In ECX of CPUID leaf 1.
pub(super) const CPUID_VMX: u32 = 1 << 5;
/// In ECX of CPUID leaf 8000_0001.
pub(super) const CPUID_SVM: u32 = 1 << 2;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {error}: {remedy}")]
    Open {
        /// The host's error.
        error: std::io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
    /// It speaks another version.
    #[error("/dev/kvm speaks API version {0}, not {KVM_API_VERSION}: use a newer kernel")]
    Version(i32),
    /// A system call failed.
    #[error("{what}: {error}; the kernel's log may say more")]
    Call {
        /// The call.
        what: &'static str,
        /// Its error.
        error: kvm_ioctls::Error,
    },
    /// The kernel lacks something that the machine needs.
    #[error("this kernel's KVM offers no {0}: use a newer kernel")]
    Missing(&'static str),
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call { what, error }
}

/// What a machine has beside memory and vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Platform {
    /// Nothing.
    Bare,
    /// PICs, I/O APIC, local APICs and PIT, all in the kernel.
    Pc,
}

/// A virtual machine, kept by each of its vCPUs.
pub(super) struct Vm {
    // Before the memory that it uses.
    fd: VmFd,
    cpuid: CpuId,
    cpu: CpuProfile,
    features: Features,
    /// KVM emulates the timer of the local APIC that compares with the TSC.
    tsc_deadline: bool,
    /// What vCPUs need to enter guest mode, or why they cannot.
    nesting: Result<NestingPages, String>,
    memory: Arc<GuestRam>,
}

/// Memory slots and MSRs for nested mode.
struct NestingPages {
    pages: Arc<GuestRam>,
    msrs: Vec<u32>,
}

impl Vm {
    /// A VM with `memory` and without vCPUs.
    pub(super) fn create(memory: &Arc<GuestRam>, platform: Platform) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|e| {
            let remedy = match e.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                    "load the module kvm_intel or kvm_amd, and give the container the device"
                }
                libc::EACCES | libc::EPERM => "add this user to the device's group, usually `kvm`",
                _ => "see the kernel log",
            };
            KvmError::Open { error: e.into(), remedy }
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::Version(version));
        }
        if !kvm.check_extension(Cap::ImmediateExit) {
            return Err(KvmError::Missing("KVM_CAP_IMMEDIATE_EXIT"));
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let irqchip = platform == Platform::Pc;
        if irqchip {
            add_interrupt_controllers(&kvm, &fd)?;
        }
        let read_only_slots = kvm.check_extension(Cap::ReadonlyMem);
        // SAFETY: this VM keeps `memory` alive.
        unsafe { add_slots(&fd, memory, 0, read_only_slots) }?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let sync_regs = kvm.check_extension_int(Cap::SyncRegs) & 0b11 == 0b11;
        // 0 where the kernel does not know the question.
        let debug_flags = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into()).cast_unsigned();
        let features = Features {
            sync_regs,
            guest_debug: kvm.check_extension(Cap::SetGuestDebug),
            irqchip,
            block_interrupts: debug_flags & KVM_GUESTDBG_BLOCKIRQ != 0,
            protection_keys: register(&cpuid, 7, |e| e.ecx) & (1 << 3) != 0,
            supervisor_keys: register(&cpuid, 7, |e| e.ecx) & (1 << 31) != 0,
        };
        let nesting = nesting(&kvm, &fd, memory)?;
        let tsc_deadline = irqchip && kvm.check_extension(Cap::TscDeadlineTimer);
        let cpu = profile(&cpuid);
        Ok(Self { fd, cpuid, cpu, features, tsc_deadline, nesting, memory: Arc::clone(memory) })
    }

    /// What CPUID says to the vCPUs.
    pub(super) fn cpu(&self) -> CpuProfile {
        self.cpu
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        let (real_nested, nested_reason) = match &self.nesting {
            Ok(_) => (true, "KVM_CAP_NESTED_STATE is there"),
            Err(reason) => (false, reason.as_str()),
        };
        Capabilities {
            live: true,
            can_pause: true,
            can_step: self.features.guest_debug,
            can_set_registers: true,
            can_write_memory: true,
            ends_when_detached: true,
            real_nested,
            nested_reason: nested_reason.to_owned(),
        }
    }

    /// What nested mode of vCPU `index` is made of.
    fn offer(&self, of_vm: &NestingPages, index: u32) -> NestedOffer {
        const GMET: u32 = 1 << 17;
        NestedOffer {
            pages: OwnPages::of(&of_vm.pages, index),
            memory: Arc::clone(&self.memory),
            msrs: of_vm.msrs.clone(),
            svm: register(&self.cpuid, 0x8000_0001, |e| e.ecx) & CPUID_SVM != 0,
            gmet: register(&self.cpuid, 0x8000_000a, |e| e.edx) & GMET != 0,
            vmx: register(&self.cpuid, 1, |e| e.ecx) & CPUID_VMX != 0,
        }
    }

    /// Has this eventfd assert interrupt line `line`.
    pub(super) fn interrupt_by(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, line).map_err(failed("KVM_IRQFD"))
    }

    /// Makes a vCPU of a bare machine that starts at `entry`, and its thread.
    pub(super) fn start(
        self: &Arc<Self>,
        machine: &str,
        index: u32,
        entry: &Entry,
    ) -> Result<Arc<Vcpu>, OpenError> {
        let console = Console::new(format!("{machine}/vcpu{index}"));
        self.start_with(machine, index, Some(entry), Box::new(console))
    }

    /// Makes a vCPU with these devices, and its thread. Without an entry it is as after a reset, and waits for its start-up IPI.
    pub(super) fn start_with(
        self: &Arc<Self>,
        machine: &str,
        index: u32,
        entry: Option<&Entry>,
        devices: Box<dyn Devices>,
    ) -> Result<Arc<Vcpu>, OpenError> {
        let vcpu = self.fd.create_vcpu(u64::from(index)).map_err(failed("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&self.cpuid_of(index)).map_err(failed("KVM_SET_CPUID2"))?;
        if self.features.irqchip {
            set_memory_types(&vcpu)?;
        }
        if let Some(entry) = entry {
            enter(&vcpu, entry)?;
        }
        let nesting = match &self.nesting {
            Ok(offer) => Nesting::new(&vcpu, self.offer(offer, index)),
            Err(reason) => Err(reason.clone()),
        };
        let backend = KvmBackend::new(vcpu, devices, self.features, nesting, Arc::clone(self));
        Ok(Vcpu::spawn(machine, index, self.cpu, backend)?)
    }

    /// CPUID as vCPU `index` sees it: its own APIC id, and nothing that needs an interrupt controller where there is none.
    fn cpuid_of(&self, index: u32) -> CpuId {
        const MONITOR: u32 = 1 << 3;
        const X2APIC: u32 = 1 << 21;
        const TSC_DEADLINE: u32 = 1 << 24;
        // Where a hypervisor is said to be, guests take their clock from it.
        const HYPERVISOR: u32 = 1 << 31;
        let (hidden, added) = match (self.features.irqchip, self.tsc_deadline) {
            (false, _) => (MONITOR | X2APIC | TSC_DEADLINE, 0),
            (true, false) => (MONITOR, HYPERVISOR),
            (true, true) => (MONITOR, HYPERVISOR | TSC_DEADLINE),
        };
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
                    entry.ecx = entry.ecx & !hidden | added;
                }
                0xb | 0x1f => entry.edx = index,
                // AMD's extended APIC id.
                0x8000_001e => entry.eax = index,
                _ => {}
            }
        }
        cpuid
    }
}

/// Has the kernel emulate a PC's interrupt controllers and timer, before there are vCPUs.
fn add_interrupt_controllers(kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
    for (capability, name) in
        [(Cap::Irqchip, "KVM_CAP_IRQCHIP"), (Cap::Pit2, "KVM_CAP_PIT2"), (Cap::Irqfd, "KVM_CAP_IRQFD")]
    {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Missing(name));
        }
    }
    vm.set_tss_address(TSS_AT).map_err(failed("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP_AT).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    // With port 0x61, by which a guest measures its TSC.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))
}

/// Memory is write-back, as firmware leaves it: Intel SDM volume 3, "IA32_MTRR_DEF_TYPE MSR".
fn set_memory_types(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    let entry = kvm_msr_entry { index: MTRR_DEF_TYPE, data: ENABLED | WRITE_BACK, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::Missing("room for an MSR"))?;
    vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS")).map(drop)
}

fn enter(vcpu: &VcpuFd, entry: &Entry) -> Result<(), KvmError> {
    let reset = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    vcpu.set_sregs(&entry.system_registers(reset)).map_err(failed("KVM_SET_SREGS"))?;
    let registers = entry.registers();
    let regs = kvm_regs {
        rip: registers.rip,
        rsp: registers.rsp,
        rflags: registers.rflags,
        rdi: registers.rdi,
        rsi: registers.rsi,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

/// Gives `vm` a slot for each region of `memory`, from number `first`.
///
/// # Safety
/// `memory` must live as long as the VM.
unsafe fn add_slots(
    vm: &VmFd,
    memory: &GuestRam,
    first: usize,
    read_only_slots: bool,
) -> Result<(), KvmError> {
    for (slot, region) in memory.map().iter().enumerate() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| KvmError::Missing("mapped memory"))?;
        let start = region.start_addr().0;
        let read_only = memory.regions().iter().any(|r| r.start == Gpa(start) && r.read_only);
        if read_only && !read_only_slots {
            return Err(KvmError::Missing("KVM_CAP_READONLY_MEM"));
        }
        let slot = kvm_userspace_memory_region {
            slot: (first + slot) as u32,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is one region of `memory`, which the caller keeps alive, and regions do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Where this kernel lets vCPUs be put into guest mode: pages for that, in slots behind those of `memory`.
fn nesting(kvm: &Kvm, vm: &VmFd, memory: &GuestRam) -> Result<Result<NestingPages, String>, KvmError> {
    if kvm.check_extension_int(Cap::NestedState) <= 0 {
        return Ok(Err("the kernel offers no KVM_CAP_NESTED_STATE".to_owned()));
    }
    let region = own_pages_region(VCPUS_MAX);
    if memory.regions().iter().any(|r| r.start.0 + r.size > region.start.0) {
        return Ok(Err(format!("the machine has memory above {:#x}", region.start.0)));
    }
    let pages = match GuestRam::allocate(&[region]) {
        Ok(pages) => Arc::new(pages),
        Err(error) => return Ok(Err(error.to_string())),
    };
    // SAFETY: the VM keeps the pages alive.
    unsafe { add_slots(vm, &pages, memory.regions().len(), true) }?;
    let msrs = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(Ok(NestingPages { pages, msrs: msrs.as_slice().to_vec() }))
}

/// A register of CPUID leaf `function`, subleaf 0; 0 where there is none.
fn register(cpuid: &CpuId, function: u32, of: impl Fn(&kvm_bindings::kvm_cpuid_entry2) -> u32) -> u32 {
    cpuid.as_slice().iter().find(|e| e.function == function && e.index == 0).map_or(0, of)
}

fn profile(cpuid: &CpuId) -> CpuProfile {
    const GIB_PAGES: u32 = 1 << 26;
    /// Where CPUID has no leaf 0x80000008: Intel SDM volume 2, "CPUID".
    const MAXPHYADDR_DEFAULT: u8 = 36;
    // EBX of leaf 0: "Auth"enticAMD, "Hygo"nGenuine.
    let vendor = match register(cpuid, 0, |e| e.ebx).to_le_bytes() {
        [b'A', b'u', b't', b'h'] | [b'H', b'y', b'g', b'o'] => Vendor::Amd,
        _ => Vendor::Intel,
    };
    let maxphyaddr = match register(cpuid, 0x8000_0008, |e| e.eax) as u8 {
        0 => MAXPHYADDR_DEFAULT,
        bits => bits,
    };
    CpuProfile {
        vendor,
        maxphyaddr,
        gib_pages: register(cpuid, 0x8000_0001, |e| e.edx) & GIB_PAGES != 0,
        // A guest of KVM sees a C-bit where its memory is private, and such guests are not opened.
        encryption_bit: None,
    }
}

/// Makes the machine `kvm:elf=FILE`, and lets it run.
pub(super) fn open_elf(
    id: &str,
    file: &Path,
    memory_size: u64,
    cpus: u32,
    pages: HugePages,
) -> Result<LocalSource, OpenError> {
    let all = [Region { start: Gpa(0), size: memory_size, read_only: false }];
    let memory = Arc::new(GuestRam::allocate_in(&all, pages)?);
    let entry_point = elf::load(&memory, file, BOOT_AREA_END)?;
    write_boot_area(&memory, CODE_SELECTOR, memory_size)?;
    let vm = Arc::new(Vm::create(&memory, Platform::Bare)?);
    let vcpus = (0..cpus)
        .map(|index| {
            let stack_end = STACKS_AT + u64::from(index + 1) * STACK_SIZE;
            let entry = Entry {
                cr3: PML4_AT,
                rip: entry_point,
                // As after a call: the ABI has RSP + 8 aligned to 16 at a function's first instruction.
                rsp: stack_end - 8,
                arguments: [u64::from(index), u64::from(cpus)],
                gdt: GDT_AT,
                code_selector: CODE_SELECTOR,
            };
            vm.start(id, index, &entry)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(LocalSource {
        kind: "kvm",
        description: format!("guest from {} on /dev/kvm", file.display()),
        vcpus,
        memory,
        capabilities: vm.capabilities(),
        cpu: vm.cpu(),
        landmarks: Vec::new(),
        health: Health::default(),
    })
}

/// Writes a GDT whose code has this selector, and tables that map addresses below `end` to themselves.
pub(super) fn write_boot_area(memory: &GuestRam, code_selector: u16, end: u64) -> Result<(), MemoryError> {
    let shift = u64::from(code_selector - CODE_SELECTOR);
    for (at, descriptor) in (GDT_AT + shift..).step_by(8).zip(GDT) {
        memory.write_u64(Gpa(at), descriptor)?;
    }
    memory.write_u64(Gpa(PML4_AT), PDPT_AT | PRESENT_WRITE)?;
    for leaf in 0..end.div_ceil(1 << 21) {
        let directory = PD_AT + (leaf >> 9) * 4096;
        memory.write_u64(Gpa(PDPT_AT + (leaf >> 9) * 8), directory | PRESENT_WRITE)?;
        memory.write_u64(Gpa(PD_AT + leaf * 8), leaf << 21 | PAGE_SIZE | PRESENT_WRITE)?;
    }
    Ok(())
}
