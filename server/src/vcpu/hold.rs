//! Stopping a vCPU for a while, whatever becomes of whoever wants it stopped.
//!
//! A stop may take its time where another process runs the guest, and be done after nobody waits for it any more. Letting go is
//! therefore no command, which ends with its asker: the thread finds it after the stop, and knows whether that stopped anything.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::Vcpu;
use super::command::{Action, VcpuError};
use super::snapshot::Snapshot;

/// A vCPU that is stopped for a while. Once this is dropped it runs on, if it was this that stopped it.
#[derive(Debug)]
pub struct Hold {
    vcpu: Arc<Vcpu>,
    stopped: Arc<AtomicBool>,
}

impl Hold {
    /// Of a vCPU that [`Hold::pause`] is to stop.
    #[must_use]
    pub fn new(vcpu: Arc<Vcpu>) -> Self {
        Self { vcpu, stopped: Arc::default() }
    }

    /// Stops the vCPU. A stopped one stays so afterwards, too.
    ///
    /// # Errors
    /// As [`Vcpu::pause`]. The stop may be under way all the same.
    pub async fn pause(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        self.vcpu.command(Action::Pause(Arc::clone(&self.stopped)), deadline).await
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.vcpu.shared.released.add(Arc::clone(&self.stopped));
        self.vcpu.look();
    }
}

/// What was let go of and the thread has not seen yet.
#[derive(Default)]
pub(super) struct Released(Mutex<Vec<Arc<AtomicBool>>>);

impl Released {
    fn add(&self, stopped: Arc<AtomicBool>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(stopped);
    }

    pub(super) fn take(&self) -> Vec<Arc<AtomicBool>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
