//! A reason for the refusals that come from the transport: they carry no `ErrorInfo` of their own.

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::trace::BoxFuture;
use crate::status::Error;

#[derive(Clone, Copy, Debug)]
pub(crate) struct ReasonLayer;

impl<S> Layer<S> for ReasonLayer {
    type Service = ReasonService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ReasonService { inner }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct ReasonService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for ReasonService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Health and reflection speak for themselves, by contracts that are not ours.
        let standard = request.uri().path().starts_with("/grpc.");
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let status = (!standard).then(|| Status::from_header_map(answer.headers())).flatten();
            Ok(match status {
                Some(status) if status.code() != Code::Ok && status.details().is_empty() => {
                    Status::from(reason(status)).into_http()
                }
                _ => answer,
            })
        })
    }
}

/// What the transport means by its codes, which tonic documents for its decoder and its router.
fn reason(status: Status) -> Error {
    match status.code() {
        Code::OutOfRange => Error::TooLarge(status.message().to_owned()),
        Code::Internal => Error::Malformed(status.message().to_owned()),
        Code::Unimplemented => Error::NoSuchMethod,
        _ => Error::Transport(status),
    }
}
