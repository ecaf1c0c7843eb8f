//! Answers that come one after another.

use tonic::Streaming;

use crate::{endpoint::Endpoint, error::Error};

/// A stream of answers. Dropping it ends the call.
#[derive(Debug)]
pub struct Answers<T> {
    stream: Streaming<T>,
    endpoint: Endpoint,
}

impl<T> Answers<T> {
    pub(crate) fn new(stream: Streaming<T>, endpoint: Endpoint) -> Self {
        Self { stream, endpoint }
    }

    /// Waits for the next answer; `None` when the daemon ended the stream.
    ///
    /// # Errors
    /// If the connection ends, the machine goes, or the daemon gives up and says why.
    pub async fn next(&mut self) -> Option<Result<T, Error>> {
        match self.stream.message().await {
            Ok(None) => None,
            Ok(Some(answer)) => Some(Ok(answer)),
            Err(status) => Some(Err(Error::from_status(&self.endpoint, None, &status))),
        }
    }
}
