//! Turns: how bulk work shares the processors with small calls.
//!
//! A batch of addresses keeps a worker of the runtime busy for milliseconds. It does so in turns of a fraction of one, and
//! between two of them lets the worker do what has become ready meanwhile. A map is made in turns, too, of about a millisecond,
//! on threads of their own. At most all processors but one are taken by turns at the same time, first come, first served: a
//! small call finds a worker that is free or soon will be, and a processor for it.

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::yield_now;

/// How long a turn is, give or take a slice of the work.
const TURN: Duration = Duration::from_micros(200);

#[derive(Debug)]
pub(crate) struct Turns(Arc<Semaphore>);

impl Turns {
    /// Turns on a runtime with as many workers as the host has processors, which is tokio's default.
    pub(crate) fn new() -> Self {
        let workers = available_parallelism().map_or(1, NonZero::get);
        Self(Arc::new(Semaphore::new(workers.saturating_sub(1).max(1))))
    }

    /// Where a turn is to be had that is taken elsewhere than on the runtime.
    pub(super) fn places(&self) -> &Arc<Semaphore> {
        &self.0
    }

    /// Repeats `slice`, a small part of the work, until it says that it was the last one. Where the future is dropped, the
    /// work ends.
    pub(crate) async fn take(&self, mut slice: impl FnMut() -> Slice) {
        loop {
            // Nobody closes the semaphore.
            let turn = self.0.acquire().await;
            let start = Instant::now();
            while start.elapsed() < TURN {
                if slice() == Slice::Last {
                    return;
                }
            }
            drop(turn);
            yield_now().await;
        }
    }
}

/// What a slice of work says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slice {
    /// There is more to do.
    More,
    /// All is done.
    Last,
}
