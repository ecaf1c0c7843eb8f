//! How a snapshot gets from the vCPU's thread to those who asked for one, and to those who did not.
//!
//! An asker draws a ticket and kicks the thread. The thread takes note of kicks, then of the highest ticket, and only then
//! reads the registers; what it publishes answers every ticket up to that one. It stores the snapshot before it announces a
//! generation or a ticket, so that whoever hears of one finds a snapshot that is as new. The order to stop is looked for after
//! the kicks, too. `server/tests/model` tries all
//! interleavings of this file and of `kick.rs`.

use super::kick::{Kicker, OnThread};
use super::sync::{Arc, ArcSwap, AtomicBool, AtomicU64, Ordering, watch};

/// What the thread has published, and what it was asked for.
pub(super) struct Published<S> {
    /// The last ticket given out.
    tickets: AtomicU64,
    stop: AtomicBool,
    latest: ArcSwap<S>,
}

impl<S> Published<S> {
    pub(super) fn new(first: S) -> Self {
        Self {
            tickets: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            latest: ArcSwap::from_pointee(first),
        }
    }

    /// What was last published. Takes no lock.
    pub(super) fn latest(&self) -> Arc<S> {
        self.latest.load_full()
    }

    /// A new ticket. What the thread publishes for it was read after this; `kick` it to have that soon.
    pub(super) fn draw_ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Draws a ticket and kicks the thread, in this order, so that the kick is not taken note of before the ticket is there.
    pub(super) fn ask(&self, kicker: &Kicker) -> u64 {
        let ticket = self.draw_ticket();
        kicker.kick();
        ticket
    }

    /// Has the thread end.
    pub(super) fn stop(&self, kicker: &Kicker) {
        self.stop.store(true, Ordering::Release);
        kicker.kick();
    }

    /// Takes note of the kicks so far, and then of the highest ticket, or that the thread is to end (`None`): what comes later
    /// brings a kick of its own.
    pub(super) fn attend(&self, on_thread: &OnThread<'_>) -> Option<u64> {
        on_thread.acknowledge();
        let stopped = self.stop.load(Ordering::Acquire);
        (!stopped).then(|| self.tickets.load(Ordering::Acquire))
    }

    /// Replaces the last snapshot and announces nothing.
    pub(super) fn replace(&self, snapshot: S) {
        self.latest.store(Arc::new(snapshot));
    }
}

/// The thread's side of the announcements.
pub(super) struct Publisher {
    /// The highest ticket that was answered.
    pub(super) served: watch::Sender<u64>,
    /// The generation of the walkers.
    pub(super) generation: watch::Sender<u64>,
}

impl Publisher {
    /// Publishes `snapshot`, which answers `ticket`; `generation` is given where it is a new one.
    pub(super) fn publish<S>(
        &self,
        published: &Published<S>,
        snapshot: Arc<S>,
        ticket: u64,
        generation: Option<u64>,
    ) {
        published.latest.store(snapshot);
        if let Some(generation) = generation {
            self.generation.send_replace(generation);
        }
        self.served.send_if_modified(|served| std::mem::replace(served, ticket) != ticket);
    }
}
