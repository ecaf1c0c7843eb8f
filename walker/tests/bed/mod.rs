//! A KVM guest small enough to be rewritten between two instructions: one memory slot at GPA 0, vCPUs of a chosen
//! CPU profile, and a long-mode register file.
//!
//! It knows nothing of the walker but how to hand it the same registers: it is the other side of every comparison.

#![allow(dead_code, reason = "each judge uses its part of the bed")]

pub(crate) mod boot;
pub(crate) mod case;
pub(crate) mod ground;
pub(crate) mod judge;
pub(crate) mod shape;
pub(crate) mod soup;

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVMIO, kvm_cpuid_entry2, kvm_dtable, kvm_segment, kvm_sregs, kvm_sregs2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use pagewalk::{
    Access, AdPolicy, ControlRegisters, CpuProfile, Fault, Gva, PageWalk, Recorder, StateError, Translation,
    Vendor, Walker, Window,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

pub(crate) const PAGE: u64 = 4096;

pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const PAGE_SIZE: u64 = 1 << 7;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;

pub(crate) const CR0_PE: u64 = 1 << 0;
pub(crate) const CR0_NE: u64 = 1 << 5;
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR0_PG: u64 = 1 << 31;
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_LA57: u64 = 1 << 12;
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR4_PKE: u64 = 1 << 22;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const EFER_NXE: u64 = 1 << 11;
pub(crate) const EFER_SVME: u64 = 1 << 12;
pub(crate) const RFLAGS_FIXED: u64 = 1 << 1;
pub(crate) const RFLAGS_IOPL3: u64 = 3 << 12;
pub(crate) const RFLAGS_AC: u64 = 1 << 18;

ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
/// Flag of `kvm_sregs2`.
const PDPTRS_VALID: u64 = 1;

/// `bits` where `on`, nothing otherwise.
pub(crate) fn when(on: bool, bits: u64) -> u64 {
    if on { bits } else { 0 }
}

/// Guest memory from GPA 0 upwards, in 8-byte words. It is never freed: a vCPU may reach it as long as the process
/// lives.
#[derive(Clone, Copy)]
pub(crate) struct Ram(&'static [AtomicU64]);

impl Ram {
    pub(crate) fn new(bytes: u64) -> Ram {
        let words = usize::try_from(bytes / 8).unwrap();
        let spare = (PAGE / 8) as usize;
        let all: &'static [AtomicU64] = Vec::leak((0..words + spare).map(|_| AtomicU64::new(0)).collect());
        let skip = all.as_ptr().align_offset(PAGE as usize);
        Ram(&all[skip..skip + words])
    }

    /// Memory that is somewhere else; it starts at a page.
    pub(crate) fn over(words: &'static [AtomicU64]) -> Ram {
        Ram(words)
    }

    pub(crate) fn words(self) -> &'static [AtomicU64] {
        self.0
    }

    pub(crate) fn bytes(self) -> u64 {
        self.0.len() as u64 * 8
    }

    pub(crate) fn holds(self, gpa: u64) -> bool {
        gpa < self.bytes()
    }

    pub(crate) fn read(self, gpa: u64) -> u64 {
        self.0[(gpa / 8) as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn write(self, gpa: u64, value: u64) {
        self.0[(gpa / 8) as usize].store(value, Ordering::Relaxed);
    }

    pub(crate) fn read_byte(self, gpa: u64) -> u8 {
        (self.read(gpa) >> (gpa % 8 * 8)) as u8
    }

    pub(crate) fn read_u32(self, gpa: u64) -> u32 {
        (self.read(gpa) >> (gpa % 8 * 8)) as u32
    }

    pub(crate) fn write_u32(self, gpa: u64, value: u32) {
        self.write_bytes(gpa, &value.to_le_bytes());
    }

    pub(crate) fn write_byte(self, gpa: u64, value: u8) {
        let shift = gpa % 8 * 8;
        self.write(gpa, self.read(gpa) & !(0xff << shift) | u64::from(value) << shift);
    }

    pub(crate) fn clear(self) {
        for word in self.0 {
            word.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn copy_from(self, other: Ram) {
        for (to, from) in self.0.iter().zip(other.0) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The first address at which two memories of one size differ.
    pub(crate) fn differs_from(self, other: Ram) -> Option<u64> {
        let differs =
            |(a, b): (&AtomicU64, &AtomicU64)| a.load(Ordering::Relaxed) != b.load(Ordering::Relaxed);
        self.0.iter().zip(other.0).position(differs).map(|word| word as u64 * 8)
    }

    pub(crate) fn write_bytes(self, gpa: u64, bytes: &[u8]) {
        for (at, byte) in (gpa..).zip(bytes) {
            self.write_byte(at, *byte);
        }
    }
}

/// The walker's outcome with policy `Set`, whose bits go into `ram` and whose steps into `recorder`.
///
/// Before that it is asked without a trace and with policy `Observe`, which is the way through the fast lane: where that
/// answer is another one, it is a disagreement.
pub(crate) fn walk<R: Recorder>(
    walker: &Walker,
    ram: Ram,
    gva: u64,
    access: &Access,
    recorder: &mut R,
    judge: &mut judge::Judge,
) -> Result<Translation, Fault> {
    let memory = Window::new(ram.words());
    let observed = walker.translate(&memory, Gva(gva), access);
    let set = walker.translate_with(&memory, Gva(gva), access, AdPolicy::Set, recorder);
    if observed != set {
        judge.disagree(|| format!("{gva:#x} {access:?}: Observe says {observed:x?}, Set {set:x?}"));
    }
    set
}

/// Who made the CPU, as CPUID tells the guest: it decides reserved bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    Intel,
    Amd,
}

/// A vCPU, and what its CPUID says of its page tables.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    /// The system registers as they came out of reset.
    pub(crate) reset: kvm_sregs,
    pub(crate) maker: Maker,
    pub(crate) maxphyaddr: u8,
    pub(crate) gib_pages: bool,
}

impl Vcpu {
    /// The walker for this vCPU while it holds `sregs`.
    pub(crate) fn walker(&self, sregs: &kvm_sregs) -> Result<Walker, StateError> {
        Ok(Walker::new(self.gva_walk(sregs, None)?))
    }

    /// `pdptes` are the PDPTE registers, which PAE paging has.
    pub(crate) fn gva_walk(
        &self,
        sregs: &kvm_sregs,
        pdptes: Option<[u64; 4]>,
    ) -> Result<PageWalk, StateError> {
        let (cr0, cr3, cr4, efer) = (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer);
        let registers = ControlRegisters { cr0, cr3, cr4, efer, ..ControlRegisters::default() };
        match pdptes {
            Some(pdptes) => PageWalk::with_pdptes(&registers, pdptes, &self.profile()),
            None => PageWalk::new(&registers, &self.profile()),
        }
    }

    /// Gives the PDPTE registers of PAE paging these values, next to `sregs`.
    pub(crate) fn set_pdptes(&self, sregs: &kvm_sregs, pdptrs: [u64; 4]) -> Result<(), String> {
        let &kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, .. } = sregs;
        let &kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = sregs;
        #[rustfmt::skip]
        let sregs2 = kvm_sregs2 {
            cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base,
            flags: PDPTRS_VALID, pdptrs,
        };
        // SAFETY: the ioctl only reads the structure that it is defined for.
        #[allow(unsafe_code, reason = "kvm-ioctls has no KVM_SET_SREGS2")]
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_SREGS2(), &sregs2) } {
            0 => Ok(()),
            _ => Err(format!("KVM_SET_SREGS2: {}", std::io::Error::last_os_error())),
        }
    }

    pub(crate) fn profile(&self) -> CpuProfile {
        let vendor = match self.maker {
            Maker::Intel => Vendor::Intel,
            Maker::Amd => Vendor::Amd,
        };
        CpuProfile { vendor, maxphyaddr: self.maxphyaddr, gib_pages: self.gib_pages, encryption_bit: None }
    }
}

pub(crate) struct Machine {
    supported: CpuId,
    vm: VmFd,
    pub(crate) ram: Ram,
}

impl Machine {
    /// The reason why there is no machine here is an ordinary answer: the judge is then skipped.
    pub(crate) fn new(bytes: u64) -> Result<Machine, String> {
        let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let vm = kvm.create_vm().map_err(|error| format!("KVM_CREATE_VM: {error}"))?;
        let ram = Ram::new(bytes);
        if !kvm.check_extension(Cap::SyncRegs) {
            return Err("this kernel has no KVM_CAP_SYNC_REGS".to_owned());
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID: {error}"))?;
        let machine = Machine { supported, vm, ram };
        machine.set_slot(bytes)?;
        Ok(machine)
    }

    fn set_slot(&self, memory_size: u64) -> Result<(), String> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: self.ram.words().as_ptr() as u64,
        };
        // SAFETY: the region is page-aligned, at most as long as the RAM, never freed, and made of atomics, so that
        // the kernel's writes race with nothing that the compiler assumes.
        #[allow(unsafe_code, reason = "handing memory to the kernel has no safe form")]
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|error| format!("memory slot: {error}"))
    }

    /// Takes the memory away from the guest and gives it back, which makes KVM forget every shadow of a page table.
    ///
    /// A backend that shadows page tables learns of changes by write-protecting them against the guest; it does not
    /// see ours. Whoever rewrites a table that a vCPU may have run on calls this in between.
    pub(crate) fn renew(&self) -> Result<(), String> {
        self.set_slot(0)?;
        self.set_slot(self.ram.bytes())
    }

    /// A vCPU of this make; `id` is its own.
    pub(crate) fn vcpu(&self, id: u64, maker: Maker, maxphyaddr: u8) -> Result<Vcpu, String> {
        let fd = self.vm.create_vcpu(id).map_err(|error| format!("KVM_CREATE_VCPU: {error}"))?;
        let mut cpuid = self.supported.clone();
        claim(&mut cpuid, maker, maxphyaddr);
        fd.set_cpuid2(&cpuid).map_err(|error| format!("KVM_SET_CPUID2: {error}"))?;
        let reset = fd.get_sregs().map_err(|error| format!("KVM_GET_SREGS: {error}"))?;
        Ok(Vcpu { fd, reset, maker, maxphyaddr, gib_pages: self.gib_pages() })
    }

    fn leaf(&self, function: u32) -> Result<&kvm_cpuid_entry2, String> {
        let entry = self.supported.as_slice().iter().find(|entry| entry.function == function);
        entry.ok_or_else(|| format!("the supported CPUID has no leaf {function:#x}"))
    }

    pub(crate) fn maxphyaddr(&self) -> Result<u8, String> {
        Ok(self.leaf(0x8000_0008)?.eax as u8)
    }

    /// Whether the vCPUs have process-context identifiers.
    pub(crate) fn has_pcid(&self) -> bool {
        self.leaf(1).is_ok_and(|leaf| leaf.ecx >> 17 & 1 != 0)
    }

    /// Whether the vCPUs have protection keys.
    pub(crate) fn has_keys(&self) -> bool {
        self.leaf(7).is_ok_and(|leaf| leaf.ecx >> 3 & 1 != 0)
    }

    /// Gives the vCPU a value of PKRU, which no other ioctl carries.
    pub(crate) fn set_pkru(&self, fd: &VcpuFd, pkru: u32) -> Result<(), String> {
        const HEADER: usize = 512;
        const PKRU: u32 = 9;
        let leaf = self.supported.as_slice().iter().find(|leaf| (leaf.function, leaf.index) == (0xd, PKRU));
        let offset = leaf.ok_or("the supported CPUID has no PKRU state")?.ebx as usize;
        let mut xsave = fd.get_xsave().map_err(|error| format!("KVM_GET_XSAVE: {error}"))?;
        xsave.region[HEADER / 4] |= 1 << PKRU;
        *xsave.region.get_mut(offset / 4).ok_or("PKRU lies outside the XSAVE area")? = pkru;
        // SAFETY: only features without dynamically sized state are enabled.
        #[allow(unsafe_code, reason = "the ioctl's buffer may have to be larger than its type")]
        unsafe { fd.set_xsave(&xsave) }.map_err(|error| format!("KVM_SET_XSAVE: {error}"))
    }

    fn gib_pages(&self) -> bool {
        self.leaf(0x8000_0001).is_ok_and(|leaf| leaf.edx >> 26 & 1 != 0)
    }
}

/// Rewrites the supported CPUID so that it names `maker` and `maxphyaddr`, and claims the features whose paging rules
/// the judges vary. 1 GiB pages stay as the host has them.
fn claim(cpuid: &mut CpuId, maker: Maker, maxphyaddr: u8) {
    let (ebx, edx, ecx): (&[u8; 4], &[u8; 4], &[u8; 4]) = match maker {
        Maker::Intel => (b"Genu", b"ineI", b"ntel"),
        Maker::Amd => (b"Auth", b"enti", b"cAMD"),
    };
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0 | 0x8000_0000, _) => {
                entry.ebx = u32::from_le_bytes(*ebx);
                entry.edx = u32::from_le_bytes(*edx);
                entry.ecx = u32::from_le_bytes(*ecx);
            }
            (7, 0) => {
                entry.ebx |= 1 << 7 | 1 << 20;
                entry.ecx |= 1 << 3;
            }
            (0x8000_0001, _) => entry.edx |= 1 << 20,
            (0x8000_0008, _) => entry.eax = entry.eax & !0xff | u32::from(maxphyaddr),
            _ => {}
        }
    }
}

/// What a segment register holds in 64-bit mode at privilege level `cpl`.
pub(crate) fn code_segment(selector: u16, cpl: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: selector | u16::from(cpl),
        type_: 11,
        present: 1,
        dpl: cpl,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

pub(crate) fn data_segment(selector: u16, cpl: u8) -> kvm_segment {
    kvm_segment { type_: 3, db: 1, l: 0, ..code_segment(selector, cpl) }
}

/// Puts `sregs` into 64-bit mode with 4-level paging rooted at `cr3`.
pub(crate) fn long_mode(sregs: &mut kvm_sregs, cr3: u64) {
    sregs.cr0 = CR0_PE | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA | EFER_NXE;
    sregs.cs = code_segment(0x08, 0);
    let data = data_segment(0x10, 0);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
}

pub(crate) fn table_register(base: u64, limit: u16) -> kvm_dtable {
    kvm_dtable { base, limit, ..kvm_dtable::default() }
}
