//! The answers of a stream of batches.

use pagewalk_proto::v1::StreamTranslateResponse;
use tonic::Streaming;

use crate::{endpoint::Endpoint, error::Error};

/// Answers, one a request, in the order of the requests. Dropping it ends the call.
#[derive(Debug)]
pub struct Translations {
    stream: Streaming<StreamTranslateResponse>,
    endpoint: Endpoint,
}

impl Translations {
    pub(crate) fn new(stream: Streaming<StreamTranslateResponse>, endpoint: Endpoint) -> Self {
        Self { stream, endpoint }
    }

    /// Waits for the next answer; `None` when all requests are answered and no more come.
    ///
    /// # Errors
    /// If the daemon refuses a request, or the connection ends.
    pub async fn next(&mut self) -> Option<Result<StreamTranslateResponse, Error>> {
        match self.stream.message().await {
            Ok(None) => None,
            Ok(Some(answer)) => Some(Ok(answer)),
            Err(status) => Some(Err(Error::from_status(&self.endpoint, None, &status))),
        }
    }
}
