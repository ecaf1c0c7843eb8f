//! Whether a machine is still there.
//!
//! A machine that is attached to can be taken away at any moment: its process ends, its memory file shrinks. It is then
//! *lost*, for good and with a reason. Answers that were under way when that happened are worth nothing, so each is held back
//! until after its walk the machine was asked once more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pagewalk_proto::readable_within;
use tokio::sync::watch;

/// Longest reason: it may quote QEMU, and goes into every list of machines.
const REASON_MAX: usize = 800;

/// Whether a machine is still there, and if not, why.
#[derive(Debug)]
pub struct Health {
    lost: AtomicBool,
    reason: watch::Sender<Option<Arc<str>>>,
}

impl Default for Health {
    fn default() -> Self {
        Self { lost: AtomicBool::new(false), reason: watch::Sender::new(None) }
    }
}

impl Health {
    /// Why the machine is lost; `None` while it is there. Takes no lock while it is.
    #[must_use]
    pub fn lost(&self) -> Option<Arc<str>> {
        if self.lost.load(Ordering::Acquire) { self.reason.borrow().clone() } else { None }
    }

    /// Declares the machine lost. The first reason stays.
    pub fn declare_lost(&self, reason: impl AsRef<str>) {
        self.reason.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(readable_within(reason.as_ref(), REASON_MAX).into());
            }
            first
        });
        self.lost.store(true, Ordering::Release);
    }

    /// Waits until the machine is lost, and says why.
    pub async fn when_lost(&self) -> Arc<str> {
        let mut reason = self.reason.subscribe();
        loop {
            let known = reason.borrow_and_update().clone();
            if let Some(reason) = known {
                return reason;
            }
            // The sender is `self`, which is borrowed: this ends with a change.
            let _ = reason.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_stays() {
        let health = Arc::new(Health::default());
        assert_eq!(health.lost(), None);
        let waiting = tokio::spawn({
            let health = Arc::clone(&health);
            async move { health.when_lost().await }
        });
        health.declare_lost("its process\nhas ended".to_owned() + &"!".repeat(2 * REASON_MAX));
        health.declare_lost("later");
        let lost = health.lost().unwrap_or_default();
        assert!(lost.starts_with(r"its process\u{a}has ended!") && lost.ends_with("!..."), "{lost}");
        assert_eq!(lost.len(), REASON_MAX);
        assert_eq!(waiting.await.ok(), Some(lost));
    }
}
