//! /dev/kvm: whether it can be used, and what its kernel offers that pagewalk makes use of (the kernel's KVM API document,
//! "KVM_CHECK_EXTENSION" and "KVM_GET_SUPPORTED_CPUID").

use std::{fs, io};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::check::Report;

const DEVICE: &str = "/dev/kvm";
const WITHOUT: &str =
    "until then `pagewalkd demo` serves its guest from plain memory, and `kvm` machines cannot run";

pub(super) fn examine(report: &mut Report) {
    if let Err(error) = fs::metadata(DEVICE) {
        return report.fail(
            DEVICE,
            format!("not there ({error})"),
            format!("enable virtualisation in the firmware and load kvm_intel or kvm_amd; {WITHOUT}"),
        );
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return refused(report, error.errno()),
    };
    report.ok(DEVICE, "there, and this user may open it");
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return report.fail(
            "KVM API",
            format!("version {version}, not {KVM_API_VERSION}"),
            format!("see what {DEVICE} is, and update the kernel; {WITHOUT}"),
        );
    }
    report.ok("KVM API", format!("version {version}"));
    match kvm.create_vm() {
        Ok(_vm) => report.ok("KVM VM", "one can be created"),
        Err(error) => report.fail(
            "KVM VM",
            format!("none can be created ({error})"),
            format!("see the kernel's log; another hypervisor may hold the CPU; {WITHOUT}"),
        ),
    }
    capabilities(report, &kvm);
    match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(cpuid) => features(report, &cpuid),
        Err(error) => {
            report.fail(
                "KVM CPUID",
                format!("the kernel does not tell it ({error})"),
                "see the kernel's log",
            );
        }
    }
}

fn refused(report: &mut Report, errno: i32) {
    let error = io::Error::from_raw_os_error(errno);
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "add this user to the group that owns /dev/kvm (often `kvm`) and log in again"
        }
        _ => "load kvm_intel or kvm_amd, and see the kernel's log",
    };
    report.fail(DEVICE, format!("there, and cannot be opened ({error})"), format!("{advice}; {WITHOUT}"));
}

fn capabilities(report: &mut Report, kvm: &Kvm) {
    for (cap, subject, without) in [
        (Cap::NestedState, "nested state", "`pagewalk nested` switches the walkers alone"),
        (Cap::SyncRegs, "sync regs", "every publication costs more system calls"),
        (Cap::ImmediateExit, "immediate exit", "a kick may be missed and come later"),
        (Cap::SetGuestDebug, "guest debug", "`pagewalk step` cannot work"),
        (Cap::ReadonlyMem, "read-only memory", "the guest cannot have ROM"),
    ] {
        match kvm.check_extension_int(cap) {
            1.. => report.ok(subject, "offered by KVM"),
            _ => report.warn(subject, "not offered by KVM", without),
        }
    }
}

/// A feature of the CPU: CPUID leaf, subleaf, register, bit.
type Feature = (u32, u32, fn(&kvm_bindings::kvm_cpuid_entry2) -> u32, u32);

fn features(report: &mut Report, cpuid: &CpuId) {
    let features: [(&str, Feature, &str); 6] = [
        ("1 GiB pages", (0x8000_0001, 0, |leaf| leaf.edx, 26), "PS in a PDPTE is a reserved bit"),
        ("LA57", (7, 0, |leaf| leaf.ecx, 16), "no 5-level paging on vCPUs here"),
        ("SMEP", (7, 0, |leaf| leaf.ebx, 7), "guests cannot set CR4.SMEP"),
        ("SMAP", (7, 0, |leaf| leaf.ebx, 20), "guests cannot set CR4.SMAP"),
        ("PKU", (7, 0, |leaf| leaf.ecx, 3), "guests cannot set CR4.PKE"),
        ("NX", (0x8000_0001, 0, |leaf| leaf.edx, 20), "guests cannot set EFER.NXE"),
    ];
    for (subject, feature, without) in features {
        if has(cpuid, feature) {
            report.ok(subject, "in the supported CPUID");
        } else {
            report.warn(subject, "not in the supported CPUID", without);
        }
    }
    match leaf(cpuid, 0x8000_0008, 0).map(|leaf| leaf.eax & 0xff) {
        Some(bits @ 32..=52) => report.ok("MAXPHYADDR", format!("{bits} bits")),
        other => report.warn(
            "MAXPHYADDR",
            format!("{other:?}, not 32 to 52 bits"),
            "name one with --maxphyaddr where it matters",
        ),
    }
}

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<&kvm_bindings::kvm_cpuid_entry2> {
    cpuid.as_slice().iter().find(|leaf| leaf.function == function && leaf.index == index)
}

fn has(cpuid: &CpuId, (function, index, register, bit): Feature) -> bool {
    leaf(cpuid, function, index).is_some_and(|leaf| register(leaf) >> bit & 1 != 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn features_are_read_from_their_leaf_register_and_bit() {
        let entries = [
            kvm_cpuid_entry2 { function: 7, index: 0, ecx: 1 << 16, ebx: 1 << 20, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, index: 1, ecx: u32::MAX, ebx: u32::MAX, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_0001, edx: 1 << 20, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_0008, eax: 0x3039, ..Default::default() },
        ];
        let mut report = Report::default();
        features(&mut report, &CpuId::from_entries(&entries).unwrap());
        let json = report.json();
        let standing = |subject: &str| {
            let check = json["checks"].as_array().unwrap().iter().find(|check| check["subject"] == subject);
            check.unwrap()["standing"].as_str().unwrap().to_owned()
        };
        for subject in ["LA57", "SMAP", "NX"] {
            assert_eq!(standing(subject), "ok", "{subject}");
        }
        // 57 bits are more than any CPU has.
        for subject in ["SMEP", "PKU", "1 GiB pages", "MAXPHYADDR"] {
            assert_eq!(standing(subject), "warn", "{subject}");
        }
    }
}
