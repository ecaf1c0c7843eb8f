//! Streams of batches: each request is answered before the next one is read.
//!
//! One answer is made while the one before is on its way to the client, and waits; then nothing more is read, until the
//! client's window is full and it stops sending.

use std::pin::Pin;
use std::time::Instant;

use pagewalk_proto::v1;
use tokio::time::sleep_until;
use tokio_stream::Stream;
use tonic::{Request, Status, Streaming};

use super::outlet::Outlet;
use super::resolve::{PATIENCE, deadline};
use super::{Daemon, batch};
use crate::layer::{STALLED, reason};
use crate::status::Error;

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::StreamTranslateResponse, Status>> + Send>>;

pub(super) fn translate(daemon: &Daemon, request: Request<Streaming<v1::StreamTranslateRequest>>) -> Answers {
    let (answers, stream) = Outlet::new(STALLED);
    let deadline = deadline(&request);
    tokio::spawn(run(daemon.clone(), request.into_inner(), deadline, answers));
    Box::pin(stream)
}

async fn run(
    daemon: Daemon,
    requests: Streaming<v1::StreamTranslateRequest>,
    deadline: Option<Instant>,
    answers: Outlet<v1::StreamTranslateResponse>,
) {
    let mut draining = daemon.draining.clone();
    let too_late = async {
        match deadline {
            Some(deadline) => sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = answer_all(&daemon, requests, deadline, &answers) => ended,
        () = answers.closed() => return,
        _ = draining.wait_for(|draining| *draining) => Err(Error::ShuttingDown),
        () = too_late => Err(Error::Deadline),
    };
    if let Err(error) = ended {
        answers.end(error);
    }
}

async fn answer_all(
    daemon: &Daemon,
    mut requests: Streaming<v1::StreamTranslateRequest>,
    deadline: Option<Instant>,
    answers: &Outlet<v1::StreamTranslateResponse>,
) -> Result<(), Error> {
    loop {
        // An answer that has nowhere to go is not begun.
        let place = answers.place().await?;
        let Some(request) = requests.message().await.map_err(reason)? else { return Ok(()) };
        let sequence = request.sequence;
        let batch = request.batch.ok_or_else(|| Error::invalid("batch", "required"))?;
        let patience = Instant::now() + PATIENCE;
        let patience = deadline.map_or(patience, |deadline| deadline.min(patience));
        let answer = batch::translate(daemon, batch, patience, deadline).await?;
        place.send(Ok(v1::StreamTranslateResponse { sequence, answer: Some(answer) }));
    }
}
