//! Linux, booted by us on `/dev/kvm`: `kvm:kernel=bzImage,initrd=FILE,cmdline=TEXT,mem=512M,cpus=2`.
//!
//! A machine to debug, not to work with: a serial line, the interrupt controllers and the timer that KVM emulates, and nothing
//! else. No disk, no network, no PCI, no firmware; the CPUs are found by ACPI. Addresses without memory and ports without a
//! device read as all ones.
//!
//! The kernel is entered by its 64-bit entry point. Memory ends at 3 GiB and goes on at 4 GiB. Below 640 KiB lie GDT and
//! tables (as for an ELF, mapping the first 4 GiB to themselves), the kernel's parameters at 0x15000 and its command line at
//! 0x16000; the tables of ACPI are at 0xe0000, the kernel at 1 MiB, and the initramfs as high as it may be.

mod acpi;
mod console;
mod kernel;
mod pc;

use std::arch::x86_64::__cpuid;
use std::path::PathBuf;
use std::sync::Arc;

use pagewalk::Gpa;

use super::boot::Entry;
use super::kvm::{CPUID_SVM, CPUID_VMX, GDT_AT, PML4_AT, Platform, Vm, write_boot_area};
use super::memory::{GuestRam, Region};
use super::pages::HugePages;
use super::{Health, LocalSource, OpenError};

pub use kernel::{InitrdProblem, KernelProblem, LinuxError};

/// What the kernel is told where nobody says otherwise.
pub(super) const COMMAND_LINE: &str = "console=ttyS0";

/// Memory below the devices of a PC.
const LOW_MEMORY: u64 = 3 << 30;
const DEVICES_END: u64 = 4 << 30;
/// The kernel wants its selectors to be 0x10 and 0x18.
const KERNEL_CODE_SELECTOR: u16 = 0x10;

/// Which Linux to boot, and where its console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxSpec {
    /// The kernel: a bzImage, as distributions ship it.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub command_line: String,
    /// A Unix socket where its console is served.
    pub console: Option<PathBuf>,
    /// A file that what it says is appended to.
    pub log: Option<PathBuf>,
}

/// Makes the machine, and lets it boot.
pub(super) fn open(
    id: &str,
    spec: &LinuxSpec,
    memory_size: u64,
    cpus: u32,
    pages: HugePages,
) -> Result<LocalSource, OpenError> {
    let low_end = memory_size.min(LOW_MEMORY);
    let mut regions = vec![Region { start: Gpa(0), size: low_end, read_only: false }];
    if memory_size > low_end {
        let (start, size) = (Gpa(DEVICES_END), memory_size - low_end);
        regions.push(Region { start, size, read_only: false });
    }
    let memory = Arc::new(GuestRam::allocate_in(&regions, pages)?);
    let rip = kernel::load(&memory, low_end, &spec.kernel, spec.initrd.as_deref(), &spec.command_line)?;
    write_boot_area(&memory, KERNEL_CODE_SELECTOR, DEVICES_END)?;
    acpi::write(&memory, u8::try_from(cpus).unwrap_or(u8::MAX))?;
    let (output, pending) = console::open(id, spec.console.as_deref(), spec.log.as_deref())?;
    let vm = Arc::new(Vm::create(&memory, Platform::Pc)?);

    let (serial, event) = pc::serial_port(output).map_err(LinuxError::Devices)?;
    vm.interrupt_by(&event, pc::SERIAL_LINE)?;
    let console = pending.map(|pending| console::serve(id, pending, &serial)).transpose();
    let console = console.map_err(LinuxError::Devices)?.map(Arc::new);
    let pc = pc::Pc { serial, _console: console };

    let entry = Entry {
        cr3: PML4_AT,
        rip,
        rsp: 0,
        arguments: [0, kernel::PARAMETERS_AT],
        gdt: GDT_AT,
        code_selector: KERNEL_CODE_SELECTOR,
    };
    // The first vCPU comes last: it starts the others.
    let mut vcpus = (0..cpus)
        .rev()
        .map(|index| vm.start_with(id, index, (index == 0).then_some(&entry), Box::new(pc.clone())))
        .collect::<Result<Vec<_>, _>>()?;
    vcpus.reverse();
    if !has_virtualization() {
        tracing::warn!(
            machine = %id,
            "this host's CPU shows neither VMX nor SVM, so its KVM emulates what kernels do early: a stock kernel may not get far; if its vCPU stops, its state says where"
        );
    }
    let reachable = match (&spec.console, &spec.log) {
        (Some(socket), _) => format!("console at unix:{}", socket.display()),
        (None, Some(log)) => format!("console in {}", log.display()),
        (None, None) => "console in the daemon's log".to_owned(),
    };
    Ok(LocalSource {
        kind: "kvm",
        description: format!("Linux from {} on /dev/kvm, {reachable}", spec.kernel.display()),
        vcpus,
        memory,
        capabilities: vm.capabilities(),
        cpu: vm.cpu(),
        landmarks: Vec::new(),
        health: Health::default(),
    })
}

/// Whether this CPU can run a guest by itself.
fn has_virtualization() -> bool {
    __cpuid(1).ecx & CPUID_VMX != 0 || __cpuid(0x8000_0001).ecx & CPUID_SVM != 0
}
