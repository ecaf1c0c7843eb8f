//! What a vCPU publishes: one immutable value that readers take without a lock.
//!
//! A snapshot is complete in itself (registers, both walkers, nested mode), so that a reader never mixes two moments.
//! Its generation counts the changes of the walkers, not the exits; its ticket says which requests for a fresh state it
//! answers.

use std::time::Instant;

use pagewalk::{ControlRegisters, CpuProfile, NgpaWalk, PageWalk, StateError, Walker};

use super::registers::Registers;

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Executes guest code.
    Running,
    /// Rests in HLT and will run on by itself.
    Halted,
    /// Stopped on request.
    Paused,
    /// Shut down after a triple fault; does not run again.
    Shutdown,
    /// The hypervisor gave up on it; does not run again.
    InternalError,
    /// Did not come out of the guest in time. Never in a snapshot: see [`super::Vcpu::run_state`].
    Unresponsive,
    /// Nothing executes here: plain memory.
    Static,
}

impl RunState {
    /// Whether the vCPU has stopped for good.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Shutdown | Self::InternalError)
    }
}

/// Control registers of an L2, where they differ from the vCPU's own.
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
}

/// An L2 under NPT, laid over the walkers; the real vCPU stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NptOverlay {
    /// nCR3: root of the nested page tables, an L1 GPA.
    pub ncr3: u64,
    /// L1's control registers at VMRUN: CR4 and EFER select the nested format.
    pub host: ControlRegisters,
    /// L2's control registers; absent ones are the vCPU's own and follow them.
    pub l2: L2Registers,
}

/// Whether the walkers have a second dimension, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NestedMode {
    /// One dimension: guest physical addresses are the machine's.
    #[default]
    Off,
    /// Two dimensions, switched on in the walkers alone.
    Npt(NptOverlay),
}

impl NestedMode {
    /// The control registers that `gva_walk` is built from: the vCPU's own, with L2's over them.
    #[must_use]
    pub fn gva_control(&self, own: ControlRegisters) -> ControlRegisters {
        match self {
            Self::Off => own,
            Self::Npt(NptOverlay { l2, .. }) => ControlRegisters {
                cr0: l2.cr0.unwrap_or(own.cr0),
                cr3: l2.cr3.unwrap_or(own.cr3),
                cr4: l2.cr4.unwrap_or(own.cr4),
                efer: l2.efer.unwrap_or(own.efer),
                pat: l2.pat.unwrap_or(own.pat),
            },
        }
    }

    /// Builds both walkers.
    ///
    /// # Errors
    /// Names the register that holds a value no CPU accepts.
    pub fn walker(&self, own: ControlRegisters, cpu: &CpuProfile) -> Result<Walker, StateError> {
        let gva_walk = PageWalk::new(&self.gva_control(own), cpu)?;
        Ok(match self {
            Self::Off => Walker::new(gva_walk),
            Self::Npt(NptOverlay { ncr3, host, .. }) => {
                Walker::nested(gva_walk, NgpaWalk::npt(*ncr3, host, cpu)?)
            }
        })
    }
}

/// The state of a vCPU at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counts the changes of the walkers, from 1.
    pub generation: u64,
    /// The highest ticket that this snapshot answers: it was taken after that ticket was drawn.
    pub ticket: u64,
    /// When the registers were read.
    pub taken: Instant,
    /// What the vCPU was doing.
    pub run_state: RunState,
    /// More about that; may be empty.
    pub run_state_reason: String,
    /// The vCPU's own registers, also while an L2 is laid over the walkers.
    pub registers: Registers,
    /// What its CPUID says that paging depends on.
    pub cpu: CpuProfile,
    /// Both walkers, or why these registers select none.
    pub walker: Result<Walker, StateError>,
    /// Whether there is a second dimension.
    pub nested: NestedMode,
    /// Registers that could not be read, each with the value assumed: `PKRU=0x0`.
    pub assumed: Vec<String>,
}
