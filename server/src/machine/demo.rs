//! The demo machine: a small guest with one of everything worth asking a page walker about.
//!
//! On `/dev/kvm` its code really runs, round by round, each ending in HLT. Elsewhere the same memory and the same registers
//! are served as they are before the first instruction.

mod guest;
mod image;

use std::sync::Arc;

use pagewalk::{CpuProfile, Vendor};

use super::boot::{CODE_SELECTOR, Entry};
use super::kvm::{Platform, Vm};
use super::memory::GuestRam;
use super::{Capabilities, Health, LocalSource, OpenError};
use crate::vcpu::{PlainBackend, Vcpu};

pub use image::{
    ADDRESS_SPACES, KERNEL, L2_CR3, L2_KERNEL, NCR3, REMAPPED_FRAMES, ROUND_COUNTER, USER_DATA_FRAMES,
};

/// The CPU of the demo machine where no real one stands behind it.
const PLAIN_CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Amd, maxphyaddr: 48, gib_pages: true, encryption_bit: None };

/// Makes the demo machine: on KVM if that can be used and `plain` does not forbid it.
pub(super) fn open(id: &str, plain: bool) -> Result<LocalSource, OpenError> {
    if plain {
        return open_plain(id, "demo:plain was asked for");
    }
    open_kvm(id).or_else(|problem| {
        tracing::warn!(machine = %id, "the demo guest will not run: {problem}");
        open_plain(id, &problem.to_string())
    })
}

fn open_kvm(id: &str) -> Result<LocalSource, OpenError> {
    let memory = Arc::new(GuestRam::allocate(&image::REGIONS)?);
    let vm = Arc::new(Vm::create(&memory, Platform::Bare)?);
    let cpu = vm.cpu();
    image::write(&memory, &cpu)?;
    let vcpu = vm.start(id, 0, &entry())?;
    Ok(LocalSource {
        kind: "demo",
        description: "demo guest, running on /dev/kvm".to_owned(),
        vcpus: vec![vcpu],
        memory,
        capabilities: vm.capabilities(),
        cpu,
        landmarks: image::landmarks(&cpu),
        health: Health::default(),
    })
}

fn open_plain(id: &str, why: &str) -> Result<LocalSource, OpenError> {
    let memory = Arc::new(GuestRam::allocate(&image::REGIONS)?);
    let cpu = PLAIN_CPU;
    image::write(&memory, &cpu)?;
    let reason = format!("nothing executes here, the demo guest is served from plain memory: {why}");
    let vcpu = Vcpu::spawn(id, 0, cpu, PlainBackend::new(entry().registers(), reason))?;
    Ok(LocalSource {
        kind: "demo",
        description: format!("demo guest, served from plain memory, nothing executes: {why}"),
        vcpus: vec![vcpu],
        memory,
        capabilities: Capabilities {
            live: false,
            can_pause: false,
            can_step: false,
            can_set_registers: true,
            can_write_memory: true,
            ends_when_detached: true,
            real_nested: false,
            nested_reason: "nothing executes in plain memory".to_owned(),
        },
        cpu,
        landmarks: image::landmarks(&cpu),
        health: Health::default(),
    })
}

fn entry() -> Entry {
    Entry {
        cr3: image::ADDRESS_SPACES[0],
        rip: image::KERNEL_TEXT,
        rsp: image::KERNEL_STACK_END,
        arguments: [0, 0],
        gdt: image::GDT_GVA,
        code_selector: CODE_SELECTOR,
    }
}
