//! What can be asked of a vCPU's thread, and what can go wrong.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::oneshot;

use super::nested::{L2Error, NestedEffect, NestedRequest};
use super::registers::RegisterChanges;
use super::snapshot::{RunState, Snapshot};

/// What the thread is to do. Asking for a fresh snapshot is no command: it is a ticket, so that any number of
/// askers share one exit.
#[derive(Debug)]
pub(super) enum Action {
    Pause,
    /// Stops the vCPU until this is let go of; sets the flag once it does.
    Hold(Arc<AtomicBool>),
    Resume,
    Step,
    SetRegisters(Box<RegisterChanges>),
    SetNested(Box<NestedRequest>),
}

/// The snapshot taken after an action, and what a switch of nested mode did.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) nested: Option<NestedEffect>,
}

/// What became of an action.
pub(super) type Reply = Result<Done, VcpuError>;

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
        "vCPU {vcpu} did not come out of the guest within {waited:.1?}: retry with a longer deadline, or ask for the latest state"
    )]
    Timeout {
        /// Name of the vCPU, such as `demo/vcpu0`.
        vcpu: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Whoever runs it does not tell its registers.
    #[error(
        "the registers of vCPU {vcpu} cannot be read: {problem}; retry, ask for the latest state, or attach the machine again if the vCPU was unplugged"
    )]
    Unread {
        /// Name of the vCPU.
        vcpu: String,
        /// What it says.
        problem: String,
    },
    /// Its thread has ended.
    #[error(
        "vCPU {vcpu} has gone: its machine is being detached, or its thread has failed, of which the daemon's log says more"
    )]
    Gone {
        /// Name of the vCPU.
        vcpu: String,
    },
    /// It has shut down or failed and does not run again.
    #[error(
        "the vCPU does not run any more ({state:?}): {reason}; to start anew, reset the guest where QEMU runs it, else detach the machine and attach it again"
    )]
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
    InvalidNested(L2Error),
    /// A field of the request for nested mode is refused; the previous mode stays.
    #[error("nested mode is not changed: {field}: {problem}")]
    NestedField {
        /// The field, by its name in the contract.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The guest is a hypervisor that runs an L2 on this vCPU.
    #[error(
        "the guest itself runs an L2 on this vCPU, which ends when its hypervisor takes over: ask for `walker_only`, or bring your own walker state in `override`"
    )]
    GuestRunsL2,
    /// The hypervisor failed.
    #[error("the hypervisor failed: {0}")]
    Hypervisor(String),
}
