//! What can be asked of a vCPU's thread, and what can go wrong.

use std::sync::Arc;
use std::time::Duration;

use pagewalk::StateError;
use tokio::sync::oneshot;

use super::registers::RegisterChanges;
use super::snapshot::{NestedMode, RunState, Snapshot};

/// What the thread is to do. Asking for a fresh snapshot is no command: it is a ticket, so that any number of
/// askers share one exit.
#[derive(Debug)]
pub(super) enum Action {
    Pause,
    Resume,
    Step,
    SetRegisters(Box<RegisterChanges>),
    SetNested(Box<NestedMode>),
}

/// The snapshot taken after an action, or why it was not done.
pub(super) type Reply = Result<Arc<Snapshot>, VcpuError>;

/// An action and where its answer goes. A command whose asker has gone is not carried out.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) action: Action,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// Why a vCPU did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// It did not answer before the deadline.
    #[error(
        "vCPU {vcpu} did not come out of the guest within {waited:?}: retry with a longer deadline, or ask for the latest state"
    )]
    Timeout {
        /// Name of the vCPU, such as `demo/vcpu0`.
        vcpu: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Its thread has ended: the machine is going away.
    #[error("vCPU {vcpu} has gone")]
    Gone {
        /// Name of the vCPU.
        vcpu: String,
    },
    /// It has shut down or failed and does not run again.
    #[error("the vCPU does not run any more ({state:?}): {reason}")]
    Stopped {
        /// [`RunState::Shutdown`] or [`RunState::InternalError`].
        state: RunState,
        /// What happened.
        reason: String,
    },
    /// The source executes nothing, or cannot do this.
    #[error("{0}")]
    Unsupported(String),
    /// Nothing to write was given.
    #[error("no register to write was given")]
    NothingToWrite,
    /// The registers select no walk, or the hypervisor calls them invalid.
    #[error("these registers are not accepted: {0}")]
    InvalidRegisters(String),
    /// The hypervisor accepted the write and did not carry it out; everything is as before.
    #[error(
        "the hypervisor did not take {register} = {wanted:#x}: it read back as {found:#x}; nothing was changed"
    )]
    NotTaken {
        /// The register.
        register: &'static str,
        /// The value that should have been there.
        wanted: u64,
        /// The value that was there.
        found: u64,
    },
    /// The described L2 is none that a CPU could enter; the previous mode stays.
    #[error("nested mode is not changed: {0}")]
    InvalidNested(StateError),
    /// The hypervisor failed.
    #[error("the hypervisor failed: {0}")]
    Hypervisor(String),
}
