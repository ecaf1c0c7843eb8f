//! The key `nested` of a vCPU: the second dimension under its walk, where it ran an L2.
//!
//! AMD APM volume 2, "Nested Paging"; Intel SDM volume 3, "VMX Support for Address Translation". The keys are those that
//! `SetNestedMode` has. What is left out of `npt` and `ept` is nothing that a walk could do without: no default hides a
//! register that somebody forgot, but for L1's CR0, of which NPT needs no bit.

use pagewalk::{ControlRegisters, EptCapabilities, EptControls, NptControls};
use serde::{Deserialize, Serialize};

use super::number::Number;
use crate::vcpu::nested::HOST_CR0_DEFAULT;
use crate::vcpu::{Entered, GuestMode, L2Registers, NestedMode, SecondDimension};

/// The second dimension of a vCPU: `npt` or `ept`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NestedEntry {
    /// AMD's nested page tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub npt: Option<NptEntry>,
    /// Intel's extended page tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ept: Option<EptEntry>,
    /// L2's registers where they differ from the vCPU's, which are L1's: the L2 was laid over the walkers alone. Default: the
    /// vCPU was in guest mode, and its registers are L2's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l2: Option<L2Entry>,
}

/// NPT, and what selects its format.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NptEntry {
    /// nCR3: root of the nested page tables, an L1 GPA.
    pub ncr3: Number,
    /// CR0 of L1 at VMRUN. Default: PE, WP and PG.
    #[serde(default = "host_cr0")]
    pub host_cr0: Number,
    /// CR4 of L1 at VMRUN: PAE and LA57 select the format.
    pub host_cr4: Number,
    /// EFER of L1 at VMRUN: LMA selects the format, and NXE its NX bit.
    pub host_efer: Number,
    /// Guest Mode Execute Trap (GMET). Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_mode_execute_trap: bool,
}

/// EPT, and what VMCS12 says beside EPTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EptEntry {
    /// EPTP, as in VMCS12.
    pub eptp: Number,
    /// Mode-based execute control. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mode_based_execute: bool,
    /// Accesses to L2's tables are writes even without accessed and dirty bits, as for the L1s of KVM. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tables_written: bool,
    /// `IA32_VMX_EPT_VPID_CAP`: what the CPU's EPT can do. Default: everything.
    #[serde(default = "capabilities")]
    pub capabilities: Number,
}

/// Registers of an L2 that is laid over the walkers. What is left out is as the vCPU's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct L2Entry {
    /// CR0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cr0: Option<Number>,
    /// CR3, an nGPA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cr3: Option<Number>,
    /// CR4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cr4: Option<Number>,
    /// IA32_EFER.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub efer: Option<Number>,
    /// IA32_PAT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pat: Option<Number>,
}

fn host_cr0() -> Number {
    Number(HOST_CR0_DEFAULT)
}

fn capabilities() -> Number {
    Number(EptCapabilities::all().msr())
}

impl NestedEntry {
    /// What is recorded of a nested mode; `None` where there is no second dimension.
    #[must_use]
    pub fn of(mode: &NestedMode) -> Option<Self> {
        let mut entry = Self::default();
        match mode.second()? {
            SecondDimension::Npt { ncr3, host, controls } => {
                entry.npt = Some(NptEntry {
                    ncr3: Number(ncr3),
                    host_cr0: Number(host.cr0),
                    host_cr4: Number(host.cr4),
                    host_efer: Number(host.efer),
                    guest_mode_execute_trap: controls.guest_mode_execute_trap,
                });
            }
            SecondDimension::Ept { eptp, controls, capabilities } => {
                entry.ept = Some(EptEntry {
                    eptp: Number(eptp),
                    mode_based_execute: controls.mode_based_execute,
                    tables_written: controls.tables_written,
                    capabilities: Number(capabilities.msr()),
                });
            }
        }
        if let NestedMode::WalkerOnly { l2, .. } = mode {
            let L2Registers { cr0, cr3, cr4, efer, pat, .. } = *l2;
            entry.l2 = Some(L2Entry {
                cr0: cr0.map(Number),
                cr3: cr3.map(Number),
                cr4: cr4.map(Number),
                efer: efer.map(Number),
                pat: pat.map(Number),
            });
        }
        Some(entry)
    }

    /// The nested mode.
    ///
    /// # Errors
    /// Where it names no second dimension, or two.
    pub fn mode(&self) -> Result<NestedMode, &'static str> {
        let second = match (&self.npt, &self.ept) {
            (Some(npt), None) => SecondDimension::Npt {
                ncr3: npt.ncr3.0,
                host: ControlRegisters {
                    cr0: npt.host_cr0.0,
                    cr4: npt.host_cr4.0,
                    efer: npt.host_efer.0,
                    ..ControlRegisters::default()
                },
                controls: NptControls { guest_mode_execute_trap: npt.guest_mode_execute_trap },
            },
            (None, Some(ept)) => SecondDimension::Ept {
                eptp: ept.eptp.0,
                controls: EptControls {
                    mode_based_execute: ept.mode_based_execute,
                    tables_written: ept.tables_written,
                },
                capabilities: EptCapabilities::from_msr(ept.capabilities.0),
            },
            (None, None) => return Err("has neither npt nor ept: leave it out where there is no L2"),
            (Some(_), Some(_)) => return Err("has npt and ept: one of them is the second dimension"),
        };
        let value = |number: Option<Number>| number.map(|number| number.0);
        Ok(match &self.l2 {
            None => {
                NestedMode::Guest(GuestMode { second: Some(second), entered: Entered::BeforeItWasRecorded })
            }
            Some(l2) => NestedMode::WalkerOnly {
                second,
                l2: L2Registers {
                    cr0: value(l2.cr0),
                    cr3: value(l2.cr3),
                    cr4: value(l2.cr4),
                    efer: value(l2.efer),
                    pat: value(l2.pat),
                    ..L2Registers::default()
                },
            },
        })
    }
}
