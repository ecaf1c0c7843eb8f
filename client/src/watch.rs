//! The stream of a vCPU's walker states.

use pagewalk_proto::v1::GetWalkerStateResponse;
use tonic::Streaming;

use crate::{endpoint::Endpoint, error::Error};

/// Walker states as they change, the newest always among them. Dropping it ends the call.
#[derive(Debug)]
pub struct WalkerUpdates {
    stream: Streaming<GetWalkerStateResponse>,
    endpoint: Endpoint,
}

impl WalkerUpdates {
    pub(crate) fn new(stream: Streaming<GetWalkerStateResponse>, endpoint: Endpoint) -> Self {
        Self { stream, endpoint }
    }

    /// Waits for the next state; `None` when the daemon ended the stream.
    ///
    /// # Errors
    /// If the connection ends, or the machine goes.
    pub async fn next(&mut self) -> Option<Result<GetWalkerStateResponse, Error>> {
        match self.stream.message().await {
            Ok(None) => None,
            Ok(Some(state)) => Some(Ok(state)),
            Err(status) => Some(Err(Error::from_status(&self.endpoint, None, &status))),
        }
    }
}
