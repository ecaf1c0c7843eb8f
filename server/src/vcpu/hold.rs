//! Stopping a guest for a while, whatever becomes of whoever wants it stopped.
//!
//! A stop may take its time where another process runs the guest, and be done after nobody waits for it any more. Letting go is
//! therefore no command, which ends with its asker: the thread finds it after the stop, and knows whether there was one.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::Vcpu;
use super::command::{Action, VcpuError};
use super::snapshot::Snapshot;

/// A vCPU that is stopped for a while. Once the last of those that hold a guest is dropped it runs on, if it was stopped for them
/// and nobody has paused, stepped or resumed it since.
#[derive(Debug)]
pub struct Hold {
    vcpu: Arc<Vcpu>,
    holds: Arc<AtomicBool>,
}

impl Hold {
    /// Of a vCPU that [`Hold::pause`] is to stop.
    #[must_use]
    pub fn new(vcpu: Arc<Vcpu>) -> Self {
        Self { vcpu, holds: Arc::default() }
    }

    /// Stops the vCPU. A stopped one stays so afterwards, too.
    ///
    /// # Errors
    /// As [`Vcpu::pause`]. The stop may be under way all the same.
    pub async fn pause(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        self.vcpu.command(Action::Hold(Arc::clone(&self.holds)), deadline).await
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.vcpu.shared.released.add(Arc::clone(&self.holds));
        self.vcpu.look();
    }
}

/// What was let go of and the thread has not seen yet.
#[derive(Default)]
pub(super) struct Released(Mutex<Vec<Arc<AtomicBool>>>);

impl Released {
    fn add(&self, holds: Arc<AtomicBool>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(holds);
    }

    pub(super) fn take(&self) -> Vec<Arc<AtomicBool>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How many hold a guest, and whether it is to run on after the last of them.
#[derive(Debug, Default)]
pub struct Holders {
    count: u32,
    run_on: bool,
}

impl Holders {
    /// Somebody has stopped it, or found it stopped, who may have done `before`.
    pub(super) fn join(&mut self, ran: bool, before: bool) {
        self.count += u32::from(!before);
        self.run_on |= ran;
    }

    /// It could not be let go of: the next one who leaves tries again.
    pub(super) fn owe(&mut self) {
        self.run_on = true;
    }

    /// Somebody has said whether it runs: that stays.
    pub(super) fn overrule(&mut self) {
        self.run_on = false;
    }

    /// One has let go. Says whether the guest is to run on now.
    pub(super) fn leave(&mut self) -> bool {
        self.count -= 1;
        self.count == 0 && std::mem::take(&mut self.run_on)
    }
}
