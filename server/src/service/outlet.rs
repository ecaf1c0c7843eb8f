//! The daemon's end of a stream of answers.
//!
//! Answers wait in a few places for the client to take them. A client that takes none for a while is told so, and its stream
//! ends: the reason has a place of its own, in which it waits together with the last answers.

use std::future::pending;

use tokio::sync::mpsc::{self, OwnedPermit, Permit, Sender};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::layer::STALLED;
use crate::status::Error;

type Answer<T> = Result<T, Status>;

pub(super) struct Outlet<T> {
    answers: Sender<Answer<T>>,
    /// Absent only if there was no room for it at the beginning, which there is.
    reason: Option<OwnedPermit<Answer<T>>>,
}

impl<T> Outlet<T> {
    /// A stream with `places` for answers that wait.
    pub(super) fn new(places: usize) -> (Self, ReceiverStream<Answer<T>>) {
        let (answers, stream) = mpsc::channel(places + 1);
        let reason = answers.clone().try_reserve_owned().ok();
        (Self { answers, reason }, ReceiverStream::new(stream))
    }

    /// A place for the next answer, once there is one.
    pub(super) async fn place(&self) -> Result<Permit<'_, Answer<T>>, Error> {
        match timeout(STALLED, self.answers.reserve()).await {
            Ok(Ok(place)) => Ok(place),
            // Whoever serves the stream notices that its client has gone.
            Ok(Err(_)) => pending().await,
            Err(_) => Err(Error::Stalled),
        }
    }

    /// Returns once the client has gone.
    pub(super) async fn closed(&self) {
        self.answers.closed().await;
    }

    /// Ends the stream, after the answers that wait, and says why.
    pub(super) fn end(self, error: Error) {
        if let Some(place) = self.reason {
            place.send(Err(error.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use tokio::time::{Instant, sleep};
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_too_late_finds_what_there_was_and_why_it_ended() {
        let (outlet, mut stream) = Outlet::new(2);
        for answer in [1, 2] {
            outlet.place().await.unwrap().send(Ok(answer));
        }
        let since = Instant::now();
        let stalled = outlet.place().await.unwrap_err();
        assert_eq!((since.elapsed(), stalled.to_string().contains("30s")), (STALLED, true));
        outlet.end(stalled);
        assert_eq!((stream.next().await.unwrap().unwrap(), stream.next().await.unwrap().unwrap()), (1, 2));
        assert_eq!(stream.next().await.unwrap().unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_is_waited_for() {
        let (outlet, mut stream) = Outlet::new(1);
        let reader = tokio::spawn(async move {
            let mut read = 0;
            loop {
                sleep(STALLED - Duration::from_secs(1)).await;
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
}
