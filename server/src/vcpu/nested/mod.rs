//! Nested mode: a second dimension under the walk of guest virtual addresses, and who put it there.
//!
//! AMD APM volume 2, "Nested Paging"; Intel SDM volume 3, "VMX Support for Address Translation". A vCPU is *in guest mode*
//! while it runs an L2: because its guest, a hypervisor, entered one, or because a client had it entered. Where it cannot be
//! entered, the walkers alone are switched: an *overlay*, which lasts until it is taken away or the vCPU really enters or
//! leaves guest mode.

pub(crate) mod entry;
mod l2;
mod pages;
mod state;
mod svm;
mod vmcs12;
mod vmx;
mod vmx_capabilities;

use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{
    ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, NptControls, PageWalk, StateError,
    Walker,
};

pub(crate) use pages::{OwnPages, own_pages_region};

/// CR0 of an L1 under NPT, where nobody says.
pub(crate) const HOST_CR0_DEFAULT: u64 = CR0_PE | CR0_WP | CR0_PG;
/// Its CR4.
pub(crate) const HOST_CR4_DEFAULT: u64 = CR4_PAE;
/// Its EFER.
pub(crate) const HOST_EFER_DEFAULT: u64 = EFER_LME | EFER_LMA | EFER_NXE | svm::EFER_SVME;

/// What turns an L2's physical addresses into its L1's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondDimension {
    /// AMD's nested page tables.
    Npt {
        /// nCR3: root of the nested page tables, an L1 GPA.
        ncr3: u64,
        /// L1's control registers at VMRUN: CR4 and EFER select the nested format.
        host: ControlRegisters,
        /// What VMCB12 says beside nCR3.
        controls: NptControls,
    },
    /// Intel's extended page tables.
    Ept {
        /// EPTP, the VMCS12 field.
        eptp: u64,
        /// What VMCS12 says beside EPTP.
        controls: EptControls,
        /// What the CPU's EPT can do.
        capabilities: EptCapabilities,
    },
}

impl SecondDimension {
    /// Its walk.
    ///
    /// # Errors
    /// Names the register that holds a value no CPU accepts.
    pub fn walk(&self, cpu: &CpuProfile) -> Result<NgpaWalk, StateError> {
        match self {
            Self::Npt { ncr3, host, controls } => NgpaWalk::npt_with(*ncr3, host, controls, cpu),
            Self::Ept { eptp, controls, capabilities } => NgpaWalk::ept(*eptp, controls, capabilities, cpu),
        }
    }
}

/// Registers of an L2, where they differ from the vCPU's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Registers {
    /// CR0.
    pub cr0: Option<u64>,
    /// CR3.
    pub cr3: Option<u64>,
    /// CR4.
    pub cr4: Option<u64>,
    /// EFER.
    pub efer: Option<u64>,
    /// PAT.
    pub pat: Option<u64>,
    /// RIP; for a real vCPU.
    pub rip: Option<u64>,
    /// RSP; for a real vCPU.
    pub rsp: Option<u64>,
    /// RFLAGS; for a real vCPU.
    pub rflags: Option<u64>,
}

impl L2Registers {
    /// The control registers that L2's walk is built from.
    #[must_use]
    pub fn over(&self, own: ControlRegisters) -> ControlRegisters {
        ControlRegisters {
            cr0: self.cr0.unwrap_or(own.cr0),
            cr3: self.cr3.unwrap_or(own.cr3),
            cr4: self.cr4.unwrap_or(own.cr4),
            efer: self.efer.unwrap_or(own.efer),
            pat: self.pat.unwrap_or(own.pat),
        }
    }
}

/// Who had the vCPU enter guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// A client.
    ByRequest,
    /// The guest itself.
    ByGuest,
    /// Nobody here: the vCPU was recorded in it.
    BeforeItWasRecorded,
}

/// The L2 that a vCPU runs. Its registers are the vCPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMode {
    /// Its second dimension; `None` where L1 shadows its tables, and its physical addresses are L1's.
    pub second: Option<SecondDimension>,
    /// Who entered it.
    pub entered: Entered,
}

/// Whether the walkers have a second dimension, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NestedMode {
    /// The vCPU runs no L2: guest physical addresses are the machine's.
    #[default]
    Off,
    /// An L2 laid over the walkers alone; the vCPU stays where it is.
    WalkerOnly {
        /// Its second dimension.
        second: SecondDimension,
        /// Its registers; absent ones are the vCPU's own and follow them.
        l2: L2Registers,
    },
    /// The vCPU is in guest mode.
    Guest(GuestMode),
}

/// Why an L2 cannot be walked: which dimension, and which of its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum L2Error {
    /// Its own registers.
    #[error("L2's registers: {0}")]
    Registers(StateError),
    /// The root or the format of NPT.
    #[error("NPT: {0}")]
    Npt(StateError),
    /// EPTP.
    #[error("EPT: {0}")]
    Ept(StateError),
}

impl L2Error {
    /// What is wrong.
    #[must_use]
    pub fn state(&self) -> &StateError {
        match self {
            Self::Registers(error) | Self::Npt(error) | Self::Ept(error) => error,
        }
    }
}

impl NestedMode {
    /// The control registers that `gva_walk` is built from: the vCPU's own, with an overlay's over them.
    #[must_use]
    pub fn gva_control(&self, own: ControlRegisters) -> ControlRegisters {
        match self {
            Self::Off | Self::Guest(_) => own,
            Self::WalkerOnly { l2, .. } => l2.over(own),
        }
    }

    /// The second dimension, where there is one.
    #[must_use]
    pub fn second(&self) -> Option<SecondDimension> {
        match self {
            Self::Off => None,
            Self::WalkerOnly { second, .. } => Some(*second),
            Self::Guest(guest) => guest.second,
        }
    }

    /// Builds both walkers.
    ///
    /// # Errors
    /// Names the register that holds a value no CPU accepts.
    pub fn walker(&self, own: ControlRegisters, cpu: &CpuProfile) -> Result<Walker, L2Error> {
        let gva_walk = PageWalk::new(&self.gva_control(own), cpu).map_err(L2Error::Registers)?;
        Ok(match self.second() {
            None => Walker::new(gva_walk),
            Some(second) => {
                let refused = match second {
                    SecondDimension::Npt { .. } => L2Error::Npt,
                    SecondDimension::Ept { .. } => L2Error::Ept,
                };
                Walker::nested(gva_walk, second.walk(cpu).map_err(refused)?)
            }
        })
    }
}

/// An L2 to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnterL2 {
    /// Its second dimension.
    pub second: SecondDimension,
    /// Its registers; absent ones are L1's.
    pub l2: L2Registers,
    /// The page in L1's memory for VMCB12 or VMCS12, which is given back by leaving; `None` for a page of our own, outside
    /// the guest's memory. For a real vCPU.
    pub control_structure: Option<u64>,
    /// Lay it over the walkers alone, even where the vCPU can be put into guest mode.
    pub walker_only: bool,
}

impl EnterL2 {
    /// An L2 laid over the walkers alone.
    #[must_use]
    pub fn walker_only(second: SecondDimension, l2: L2Registers) -> Self {
        Self { second, l2, control_structure: None, walker_only: true }
    }

    /// The first field that says something to a real vCPU alone.
    pub(super) fn for_a_real_vcpu(&self) -> Option<&'static str> {
        let control_structure = match self.second {
            SecondDimension::Npt { .. } => "vmcb12",
            SecondDimension::Ept { .. } => "vmcs12",
        };
        [
            ("l2.rip", self.l2.rip),
            ("l2.rsp", self.l2.rsp),
            ("l2.rflags", self.l2.rflags),
            (control_structure, self.control_structure),
        ]
        .into_iter()
        .find_map(|(field, value)| value.map(|_| field))
    }
}

/// What nested mode to switch to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "few live at a time")]
pub enum NestedRequest {
    /// No L2.
    Off {
        /// Take away an overlay, and leave a real L2 alone.
        walker_only: bool,
    },
    /// An L2.
    Enter(EnterL2),
}

/// How far a switch of nested mode went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedEffectKind {
    /// The vCPU entered or left guest mode.
    RealVcpu,
    /// The walkers alone were switched.
    WalkerOnly,
    /// It was so already.
    Unchanged,
}

/// What a switch of nested mode did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NestedEffect {
    /// How far it went.
    pub kind: NestedEffectKind,
    /// Why so far and no further, in one sentence.
    pub reason: String,
}
