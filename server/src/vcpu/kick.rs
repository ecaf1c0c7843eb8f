//! Making a vCPU's thread look up: from a wait, or from inside KVM_RUN.
//!
//! Kicks coalesce: while one is pending, others cost one atomic operation and send nothing. What wakes the thread and brings it
//! out of the guest is in `signal.rs`; `server/tests/model` tries all interleavings of what is here.

use std::time::Instant;

use super::backend::ImmediateExit;
use super::signal::{Adopted, Target, adopt, clear_immediate_exit};
use super::sync::{AtomicBool, Mutex, Ordering, PoisonError, thread};

/// The way to reach a vCPU's thread.
#[derive(Default)]
pub(super) struct Kicker {
    pending: AtomicBool,
    /// The thread while it lives. Held while it is signalled, so that it cannot end meanwhile.
    target: Mutex<Option<Target>>,
}

impl Kicker {
    /// Has the thread come out and look. What was written before is seen by it.
    pub(super) fn kick(&self) {
        if self.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = target.as_ref() {
            target.reach();
        }
    }

    /// Makes the calling thread the one that kicks reach.
    pub(super) fn enter(&self, immediate_exit: Option<ImmediateExit>) -> Result<OnThread<'_>, String> {
        let (target, adopted) = adopt(immediate_exit)?;
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
        Ok(OnThread { kicker: self, _adopted: adopted })
    }
}

/// Held by the thread that kicks reach, and dropped by it before its backend.
pub(super) struct OnThread<'a> {
    kicker: &'a Kicker,
    _adopted: Adopted,
}

impl OnThread<'_> {
    /// Takes note of the kicks so far. What was written before any of them is visible afterwards.
    pub(super) fn acknowledge(&self) {
        self.kicker.pending.swap(false, Ordering::AcqRel);
        // A kick that comes between these two lines is seen by the caller, who looks for work only after both.
        clear_immediate_exit();
    }

    /// Whether there was a kick that nobody has taken note of.
    pub(super) fn pending(&self) -> bool {
        self.kicker.pending.load(Ordering::Acquire)
    }

    /// Sleeps until a kick, or until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) {
        while !self.pending() {
            match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(left) if left.is_zero() => return,
                Some(left) => thread::park_timeout(left),
            }
        }
    }
}

impl Drop for OnThread<'_> {
    fn drop(&mut self) {
        *self.kicker.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
