//! What a vCPU publishes: one immutable value that readers take without a lock.
//!
//! A snapshot is complete in itself (registers, both walkers, nested mode), so that a reader never mixes two moments.
//! Its generation counts the changes of the walkers, not the exits; its ticket says which requests for a fresh state it
//! answers.

use std::time::Instant;

use pagewalk::{CpuProfile, StateError, Walker};

use super::nested::NestedMode;
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

/// The state of a vCPU at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counts the changes of the walkers, from 1.
    pub generation: u64,
    /// The highest ticket that this snapshot answers: it was taken after that ticket was drawn.
    pub ticket: u64,
    /// When the registers were read.
    pub taken: Instant,
    /// Why they could not be read again since then, of a guest that runs elsewhere: the next look may find them.
    pub unread: Option<String>,
    /// What the vCPU was doing.
    pub run_state: RunState,
    /// More about that; may be empty.
    pub run_state_reason: String,
    /// The vCPU's own registers: L2's while it is in guest mode, and not those of an L2 that is laid over the walkers.
    pub registers: Registers,
    /// What its CPUID says that paging depends on.
    pub cpu: CpuProfile,
    /// Both walkers, or why these registers select none.
    pub walker: Result<Walker, StateError>,
    /// Whether there is a second dimension.
    pub nested: NestedMode,
    /// More about that; may be empty.
    pub nested_reason: String,
    /// Registers that could not be read, each with the value assumed: `PKRU=0x0`.
    pub assumed: Vec<String>,
}
