//! What the VMX that a vCPU shows its L1 can do: the capability MSRs, and whether firmware has left it switched on.
//!
//! Intel SDM volume 3, "VMX Capability Reporting Facility", "Enabling and Entering VMX Operation".

use kvm_ioctls::VcpuFd;
use pagewalk::{CpuProfile, EptCapabilities, EptControls, NgpaWalk, Vendor};

use super::state;
use super::vmcs12::REVISION;

const IA32_FEATURE_CONTROL: u32 = 0x3a;
const LOCKED: u64 = 1 << 0;
const VMXON_OUTSIDE_SMX: u64 = 1 << 2;

const IA32_VMX_BASIC: u32 = 0x480;
/// In IA32_VMX_BASIC: the MSRs of true controls exist.
const TRUE_CONTROLS: u64 = 1 << 55;
const IA32_VMX_CR0_FIXED0: u32 = 0x486;
const IA32_VMX_CR0_FIXED1: u32 = 0x487;
const IA32_VMX_CR4_FIXED0: u32 = 0x488;
const IA32_VMX_CR4_FIXED1: u32 = 0x489;
const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
/// IA32_VMX_PINBASED_CTLS, IA32_VMX_PROCBASED_CTLS, IA32_VMX_EXIT_CTLS, IA32_VMX_ENTRY_CTLS, and the same with TRUE.
const CONTROLS: [(u32, u32); 4] = [(0x481, 0x48d), (0x482, 0x48e), (0x483, 0x48f), (0x484, 0x490)];

pub(super) const SECONDARY_ENABLE_EPT: u32 = 1 << 1;
pub(super) const SECONDARY_UNRESTRICTED_GUEST: u32 = 1 << 7;
pub(super) const SECONDARY_MODE_BASED_EXECUTE: u32 = 1 << 22;

/// Bits of a control field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowed {
    must: u32,
    may: u32,
}

impl Allowed {
    pub(super) const fn from_msr(value: u64) -> Self {
        Self { must: value as u32, may: (value >> 32) as u32 }
    }

    /// `needed`, what has to be set, and of `wanted` what may be.
    ///
    /// # Errors
    /// The bits of `needed` that may not be set.
    pub(super) fn choose(self, needed: u32, wanted: u32) -> Result<u32, u32> {
        match needed & !self.may {
            0 => Ok(self.must | needed | wanted & self.may),
            missing => Err(missing),
        }
    }

    pub(super) fn may(self, bits: u32) -> bool {
        self.may & bits == bits
    }
}

/// Bits of a control register that VMX operation fixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    /// To 1.
    pub(super) ones: u64,
    /// The others than those to 0.
    pub(super) may: u64,
}

impl Fixed {
    /// What is wrong with `value`; the bits `free` are not fixed to 1.
    pub(super) fn problem(self, value: u64, free: u64) -> Option<String> {
        let (zeros, ones) = (value & !self.may, self.ones & !free & !value);
        match (zeros, ones) {
            (0, 0) => None,
            (1.., _) => Some(format!("has bits set that VMX operation fixes to 0: {zeros:#x}")),
            _ => Some(format!("has bits clear that VMX operation fixes to 1: {ones:#x}")),
        }
    }
}

/// The capability MSRs.
pub(super) struct VmxCapabilities {
    pub(super) pin_based: Allowed,
    pub(super) processor_based: Allowed,
    pub(super) secondary: Allowed,
    pub(super) exit: Allowed,
    pub(super) entry: Allowed,
    pub(super) cr0: Fixed,
    pub(super) cr4: Fixed,
    pub(super) ept: EptCapabilities,
}

impl VmxCapabilities {
    /// Of a vCPU whose CPUID has VMX.
    ///
    /// # Errors
    /// Says why no L2 can be entered there.
    pub(super) fn read(vcpu: &VcpuFd) -> Result<Self, String> {
        Self::of(|index| {
            state::msr(vcpu, index).map_err(|(what, error)| {
                format!("the VMX capability MSR {index:#x} cannot be read: {what}: {error}")
            })
        })
    }

    fn of(msr: impl Fn(u32) -> Result<u64, String>) -> Result<Self, String> {
        let basic = msr(IA32_VMX_BASIC)?;
        let revision = basic as u32 & !(1 << 31);
        if revision != REVISION {
            return Err(format!(
                "this kernel's VMCS12 has revision {revision:#x}, and the layout of {REVISION:#x} alone is known"
            ));
        }
        let [pin_based, processor_based, exit, entry] = CONTROLS
            .map(|(plain, with_true)| msr(if basic & TRUE_CONTROLS != 0 { with_true } else { plain }));
        let this = Self {
            pin_based: Allowed::from_msr(pin_based?),
            processor_based: Allowed::from_msr(processor_based?),
            secondary: Allowed::from_msr(msr(IA32_VMX_PROCBASED_CTLS2)?),
            exit: Allowed::from_msr(exit?),
            entry: Allowed::from_msr(entry?),
            cr0: Fixed { ones: msr(IA32_VMX_CR0_FIXED0)?, may: msr(IA32_VMX_CR0_FIXED1)? },
            cr4: Fixed { ones: msr(IA32_VMX_CR4_FIXED0)?, may: msr(IA32_VMX_CR4_FIXED1)? },
            ept: EptCapabilities::from_msr(msr(IA32_VMX_EPT_VPID_CAP)?),
        };
        if !this.secondary.may(SECONDARY_ENABLE_EPT) {
            return Err("this kernel's KVM offers its guests no EPT (ept=0)".to_owned());
        }
        Ok(this)
    }

    /// Why L1 cannot put this under an L2. `wanted` are the capabilities that the request speaks of; all of them are none in
    /// particular.
    pub(super) fn obstacle(
        &self,
        eptp: u64,
        controls: &EptControls,
        wanted: &EptCapabilities,
    ) -> Option<String> {
        if controls.mode_based_execute && !self.secondary.may(SECONDARY_MODE_BASED_EXECUTE) {
            return Some("this vCPU's VMX has no mode-based execute control for EPT".to_owned());
        }
        if *wanted != EptCapabilities::all() && *wanted != self.ept {
            return Some("`ept.capabilities` are not those of this vCPU's IA32_VMX_EPT_VPID_CAP".to_owned());
        }
        // What no CPU accepts has been refused before; MAXPHYADDR among it.
        let any = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 52, gib_pages: true, encryption_bit: None };
        let refused = NgpaWalk::ept(eptp, controls, &self.ept, &any).err()?;
        Some(format!("this vCPU's IA32_VMX_EPT_VPID_CAP does not allow it: {refused}"))
    }
}

/// Why L1's VMXON is refused, going by IA32_FEATURE_CONTROL. Firmware that has not locked it has switched nothing off.
pub(super) fn switched_off(vcpu: &VcpuFd) -> Option<String> {
    let value = state::msr(vcpu, IA32_FEATURE_CONTROL).ok()?;
    off_in(value).then(|| format!("IA32_FEATURE_CONTROL ({value:#x}) is locked with VMX switched off"))
}

fn off_in(feature_control: u64) -> bool {
    feature_control & LOCKED != 0 && feature_control & VMXON_OUTSIDE_SMX == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As KVM shows them on the CPU of the bed `nested-intel`, the revision aside.
    fn msrs(revision: u32) -> impl Fn(u32) -> Result<u64, String> {
        move |index| {
            Ok(match index {
                IA32_VMX_BASIC => 0x00d8_1000_0000_0000 | u64::from(revision),
                IA32_VMX_CR0_FIXED0 => 0x8000_0021,
                IA32_VMX_CR0_FIXED1 => 0xffff_ffff,
                IA32_VMX_CR4_FIXED0 => 1 << 13,
                IA32_VMX_CR4_FIXED1 => 0x37_27ff,
                IA32_VMX_PROCBASED_CTLS2 => 0x0000_00ff_0000_0000,
                IA32_VMX_EPT_VPID_CAP => 0x0000_0f01_0633_4141,
                0x48d => 0x0000_007f_0000_0016,
                0x48e => 0xfff9_fffe_0400_6172,
                0x48f => 0x007f_ffff_0003_6dfb,
                0x490 => 0x0000_ffff_0000_11fb,
                _ => return Err(format!("no MSR {index:#x}")),
            })
        }
    }

    #[test]
    fn a_vmcs_of_another_layout_is_none_of_ours() {
        assert!(VmxCapabilities::of(msrs(REVISION)).is_ok());
        let reason = VmxCapabilities::of(msrs(REVISION + 1)).err().unwrap_or_default();
        assert!(reason.contains("revision 0x11e57ed1"), "{reason}");
    }

    #[test]
    fn controls_are_what_must_be_and_what_may_be() {
        let allowed = Allowed::from_msr(0x0000_00ff_0000_0016);
        assert_eq!(allowed.choose(0, 0), Ok(0x16));
        assert_eq!(allowed.choose(1, 1 << 9), Ok(0x17));
        assert_eq!(allowed.choose(1 << 9 | 1, 0), Err(1 << 9));
    }

    #[test]
    fn fixed_bits_of_control_registers_are_refused() -> Result<(), String> {
        let vmx = VmxCapabilities::of(msrs(REVISION))?;
        assert_eq!(vmx.cr0.problem(0x8001_0033, 0), None);
        // An unrestricted guest may be unpaged, and in real mode.
        assert_eq!(vmx.cr0.problem(0x20, 0x8000_0001), None);
        let unpaged = vmx.cr0.problem(0x21, 0).unwrap_or_default();
        assert!(unpaged.ends_with("fixes to 1: 0x80000000"), "{unpaged}");
        let numeric = vmx.cr0.problem(0x8000_0001, 0x8000_0001).unwrap_or_default();
        assert!(numeric.ends_with("fixes to 1: 0x20"), "{numeric}");
        let high = vmx.cr0.problem(0x8000_0031 | 1 << 40, 0).unwrap_or_default();
        assert!(high.ends_with("fixes to 0: 0x10000000000"), "{high}");
        assert_eq!(vmx.cr4.problem(0x2020, 0), None);
        let off = vmx.cr4.problem(0x20, 0).unwrap_or_default();
        assert!(off.ends_with("fixes to 1: 0x2000"), "{off}");
        let five = vmx.cr4.problem(0x3020, 0).unwrap_or_default();
        assert!(five.ends_with("fixes to 0: 0x1000"), "{five}");
        Ok(())
    }

    #[test]
    fn what_this_ept_cannot_do_is_an_obstacle() -> Result<(), String> {
        let vmx = VmxCapabilities::of(msrs(REVISION))?;
        let (own, all) = (vmx.ept, EptCapabilities::all());
        let plain = EptControls::default();
        let refused = |eptp, controls: &EptControls, wanted: &EptCapabilities| {
            vmx.obstacle(eptp, controls, wanted).unwrap_or_default()
        };
        for eptp in [0x1000 | 3 << 3 | 6, 0x1000 | 3 << 3, 0x1000 | 3 << 3 | 6 | 1 << 6] {
            assert_eq!(vmx.obstacle(eptp, &plain, &all), None, "{eptp:#x}");
            assert_eq!(vmx.obstacle(eptp, &plain, &own), None, "{eptp:#x}");
        }
        let five_levels = refused(0x1000 | 4 << 3 | 6, &plain, &all);
        assert!(five_levels.contains("IA32_VMX_EPT_VPID_CAP does not allow it: EPTP"), "{five_levels}");
        let shadow_stack = refused(0x1000 | 3 << 3 | 6 | 1 << 7, &plain, &all);
        assert!(shadow_stack.contains("does not allow it"), "{shadow_stack}");
        let others = refused(0x1000 | 3 << 3 | 6, &plain, &EptCapabilities { execute_only: false, ..own });
        assert!(others.contains("`ept.capabilities`"), "{others}");
        let mbec = EptControls { mode_based_execute: true, ..plain };
        assert!(refused(0x1000 | 3 << 3 | 6, &mbec, &all).contains("mode-based execute"));
        Ok(())
    }

    #[test]
    fn only_locked_firmware_switches_vmx_off() {
        for (value, off) in [(0, false), (4, false), (1, true), (3, true), (5, false)] {
            assert_eq!(off_in(value), off, "{value:#x}");
        }
    }
}
