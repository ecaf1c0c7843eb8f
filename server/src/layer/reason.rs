//! A reason for the refusals that come from the transport: they carry no `ErrorInfo` of their own.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response};
use pin_project_lite::pin_project;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::status::Error;

/// Adds the reasons to a service.
#[derive(Clone, Copy, Debug)]
pub struct ReasonLayer;

impl<S> Layer<S> for ReasonLayer {
    type Service = ReasonService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ReasonService { inner }
    }
}

/// A service whose refusals have reasons.
#[derive(Clone, Debug)]
pub struct ReasonService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for ReasonService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Reasoned<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Health and reflection speak for themselves, by contracts that are not ours.
        let standard = request.uri().path().starts_with("/grpc.");
        Reasoned { answer: self.inner.call(request), standard }
    }
}

pin_project! {
    /// The answer to a call.
    #[derive(Debug)]
    pub struct Reasoned<F> {
        #[pin]
        answer: F,
        standard: bool,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Reasoned<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let reasoned = self.project();
        let answer = ready!(reasoned.answer.poll(context))?;
        let status = (!*reasoned.standard).then(|| Status::from_header_map(answer.headers())).flatten();
        Poll::Ready(Ok(match status {
            Some(status) if status.code() != Code::Ok && status.details().is_empty() => {
                Status::from(reason(status)).into_http()
            }
            _ => answer,
        }))
    }
}

/// Adds the reason to what an answer ends with: that it is larger than is encoded is found out only once it has begun.
pub(super) fn end_with_reason(trailers: &mut HeaderMap) {
    // Every call ends with some, and a status is made of a copy of them.
    let code = trailers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()));
    if code == Some(Code::OutOfRange)
        && let Some(status) = Status::from_header_map(trailers)
        && status.details().is_empty()
    {
        // What cannot be written as a header leaves it as it was.
        let _ = Status::from(Error::AnswerTooLarge(status.message().to_owned())).add_header(trailers);
    }
}

/// What the transport means by its codes, which tonic documents for its decoder and its router.
pub(crate) fn reason(status: Status) -> Error {
    match status.code() {
        Code::OutOfRange => Error::TooLarge(status.message().to_owned()),
        Code::Internal => Error::Malformed(status.message().to_owned()),
        Code::Unimplemented => Error::NoSuchMethod,
        // Of a request's body, which has this bound alone.
        Code::DeadlineExceeded => Error::Silent,
        _ => Error::Transport(status),
    }
}
