//! What is known of a connection while its calls are served: which of its answers wait for the client to read them, and since
//! when.
//!
//! The transport asks an answer for its next part once the client has room for the one before, however long that takes, and
//! nothing but the end of the connection makes it let go of an answer whose client has none. So a connection ends on which an
//! answer has waited for too long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::limit::{BULK_CALLS, Places};

/// How long a stream waits for its client, to send more or to read what there is: a person may think about what came before, and a
/// client that was forgotten does not hold its place for ever.
pub(crate) const STALLED: Duration = Duration::from_secs(600);
/// How often it is looked whether a connection's answers wait.
pub(crate) const LOOK: Duration = Duration::from_secs(60);
/// How long an answer may wait on a connection. Longer than [`STALLED`], so that there is time to say why a stream ends.
const UNREAD: Duration = STALLED.saturating_add(LOOK);

/// Of maps and images, and of watches, on one connection: half of what there is by default.
const SHARE: usize = 128;

/// A connection; in the extensions of its requests, within a [`Peer`]. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// Since when answers wait. A slot without one is free.
    unread: Arc<Mutex<Vec<Option<Instant>>>>,
    /// Of the calls that may last, no one connection has more than so many of each kind.
    pub(super) bulk: Arc<Places>,
    pub(super) long: Arc<Places>,
    pub(super) watches: Arc<Places>,
}

impl Line {
    pub(crate) fn new() -> Self {
        let share = |places| Arc::new(Places::new(places));
        let (bulk, long, watches) = (share(BULK_CALLS / 2), share(SHARE), share(SHARE));
        Self { unread: Arc::default(), bulk, long, watches }
    }

    /// An answer waits from now on, until what this returns is dropped.
    pub(super) fn unread(&self) -> Unread {
        let mut slots = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Some(Instant::now());
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        match slots.get_mut(slot) {
            Some(free) => *free = now,
            None => slots.push(now),
        }
        drop(slots);
        Unread { line: self.clone(), slot }
    }

    /// Whether an answer has waited for too long.
    pub(crate) fn is_stalled(&self) -> bool {
        let slots = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().any(|since| since.elapsed() > UNREAD)
    }
}

/// An answer that waits for its client.
#[derive(Debug)]
pub(super) struct Unread {
    line: Line,
    slot: usize,
}

impl Drop for Unread {
    fn drop(&mut self) {
        let mut slots = self.line.unread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(self.slot) {
            *slot = None;
        }
    }
}

/// Who is at the other end of a connection, and the connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer<I> {
    pub(crate) info: I,
    pub(crate) line: Line,
}
