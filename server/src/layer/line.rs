//! What is known of a connection while its calls are served: which of its answers wait for the client to read them, and for how
//! long.
//!
//! The transport asks an answer for its next part once the client has room for the one before, however long that takes, and
//! nothing but the end of the connection makes it let go of an answer whose client has none. So a connection ends on which an
//! answer has waited for too long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::limit::{BULK_CALLS, Places};

/// How long a stream waits for its client, to send more or to read what there is: a person may think about what came before, and a
/// client that was forgotten does not hold its place for ever.
pub(crate) const STALLED: Duration = Duration::from_secs(600);
/// How often it is looked whether a connection's answers wait.
pub(crate) const LOOK: Duration = Duration::from_secs(60);
/// At how many looks an answer may be found waiting. It takes them longer than [`STALLED`], so that there is time to say why a
/// stream ends.
const LOOKS: u64 = STALLED.as_secs() / LOOK.as_secs() + 2;

/// Of maps and images, and of watches, on one connection: half of what there is by default.
const SHARE: usize = 128;

/// A connection; in the extensions of its requests, within a [`Peer`]. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Line(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// At how many looks answers were found waiting. A slot without a number is free.
    unread: Mutex<Vec<Option<u64>>>,
    /// Of the calls that may last, no one connection has more than so many of each kind.
    bulk: Arc<Places>,
    long: Arc<Places>,
    watches: Arc<Places>,
}

impl Line {
    pub(crate) fn new() -> Self {
        let share = |places| Arc::new(Places::new(places));
        let (bulk, long, watches) = (share(BULK_CALLS / 2), share(SHARE), share(SHARE));
        Self(Arc::new(Shared { unread: Mutex::default(), bulk, long, watches }))
    }

    pub(super) fn bulk(&self) -> &Arc<Places> {
        &self.0.bulk
    }

    pub(super) fn long(&self) -> &Arc<Places> {
        &self.0.long
    }

    pub(super) fn watches(&self) -> &Arc<Places> {
        &self.0.watches
    }

    /// An answer waits from now on, until what this returns is dropped.
    pub(super) fn unread(&self) -> Unread {
        let mut slots = self.0.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        match slots.get_mut(slot) {
            Some(free) => *free = Some(0),
            None => slots.push(Some(0)),
        }
        drop(slots);
        Unread { line: self.clone(), slot }
    }

    /// Looks, once every [`LOOK`], whether an answer has waited for too long.
    pub(crate) fn is_stalled(&self) -> bool {
        let mut slots = self.0.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stalled = false;
        for looks in slots.iter_mut().flatten() {
            *looks += 1;
            stalled |= *looks >= LOOKS;
        }
        stalled
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
        let mut slots = self.line.0.unread.lock().unwrap_or_else(PoisonError::into_inner);
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
