//! The daemon's end of a stream of answers.
//!
//! An answer is made once the transport asks for it, which it does while it still sends the one before, and takes two at most
//! for a client that does not read. Such a client is told so after a while, and its stream ends: the reason waits behind the
//! last answer.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc::{self, OwnedPermit, Permit, Receiver, Sender};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_stream::Stream;
use tonic::Status;

use crate::status::Error;

type Answer<T> = Result<T, Status>;

pub(super) struct Outlet<T> {
    answers: Sender<Answer<T>>,
    /// Has a permit when an answer is asked for.
    asked: Arc<Semaphore>,
    /// Absent only if there was no room for it at the beginning, which there is.
    reason: Option<OwnedPermit<Answer<T>>>,
    patience: Duration,
}

impl<T> Outlet<T> {
    /// One whose client is waited for so long.
    pub(super) fn new(patience: Duration) -> (Self, Answers<T>) {
        // One answer, and the reason.
        let (answers, stream) = mpsc::channel(2);
        let reason = answers.clone().try_reserve_owned().ok();
        let asked = Arc::new(Semaphore::new(0));
        let stream = Answers { answers: stream, asked: Arc::clone(&asked), waits: false };
        (Self { answers, asked, reason, patience }, stream)
    }

    /// A place for the next answer, once it is asked for.
    pub(super) async fn place(&self) -> Result<Place<'_, T>, Error> {
        let place = async { Some((self.asked.acquire().await.ok()?, self.answers.reserve().await.ok()?)) };
        match timeout(self.patience, place).await {
            Ok(Some((asked, place))) => Ok(Place { asked, place }),
            // Whoever serves the stream notices that its client has gone.
            Ok(None) => pending().await,
            Err(_) => Err(Error::Stalled(self.patience)),
        }
    }

    /// Returns once the client has gone.
    pub(super) async fn closed(&self) {
        self.answers.closed().await;
    }

    /// Ends the stream, after the answer that waits, and says why.
    pub(super) fn end(self, error: Error) {
        if let Some(place) = self.reason {
            place.send(Err(error.into()));
        }
    }
}

/// Where an answer goes. Unused, it is there for the next.
pub(super) struct Place<'a, T> {
    asked: SemaphorePermit<'a>,
    place: Permit<'a, Answer<T>>,
}

impl<T> Place<'_, T> {
    pub(super) fn send(self, answer: Answer<T>) {
        self.asked.forget();
        self.place.send(answer);
    }
}

/// The transport's end.
pub(crate) struct Answers<T> {
    answers: Receiver<Answer<T>>,
    asked: Arc<Semaphore>,
    waits: bool,
}

impl<T> Stream for Answers<T> {
    type Item = Answer<T>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.answers.poll_recv(context);
        if next.is_ready() {
            self.waits = false;
        } else if !std::mem::replace(&mut self.waits, true) {
            self.asked.add_permits(1);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::time::{Instant, sleep};
    use tokio_stream::StreamExt as _;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(40);

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_too_late_finds_what_there_was_and_why_it_ended() {
        let (outlet, mut stream) = Outlet::new(PATIENCE);
        let reader = tokio::spawn(async move {
            let first = stream.next().await;
            (first, stream)
        });
        outlet.place().await.unwrap().send(Ok(1));
        let (first, mut stream) = reader.await.unwrap();
        assert_eq!(first.unwrap().unwrap(), 1);
        let since = Instant::now();
        let stalled = outlet.place().await.err().unwrap();
        assert_eq!((since.elapsed(), stalled.to_string().contains("40 s")), (PATIENCE, true));
        outlet.end(stalled);
        assert_eq!(stream.next().await.unwrap().unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_is_waited_for() {
        let (outlet, mut stream) = Outlet::new(PATIENCE);
        let reader = tokio::spawn(async move {
            let mut read = 0;
            loop {
                sleep(PATIENCE - Duration::from_secs(1)).await;
                if stream.next().await.is_none() {
                    return read;
                }
                read += 1;
            }
        });
        for _ in 0..5 {
            outlet.place().await.unwrap().send(Ok(()));
        }
        drop(outlet);
        assert_eq!(reader.await.unwrap(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_is_left_is_there_again() {
        let (outlet, mut stream) = Outlet::new(PATIENCE);
        let reader = tokio::spawn(async move { stream.next().await });
        drop(outlet.place().await.unwrap());
        outlet.place().await.unwrap().send(Ok(2));
        assert_eq!(reader.await.unwrap().unwrap().unwrap(), 2);
    }
}
