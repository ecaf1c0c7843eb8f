//! The client's deadline: told to the services, and enforced here where they do not look at it.
//!
//! tonic enforces `grpc-timeout` too, but answers CANCELLED; this layer answers first, with DEADLINE_EXCEEDED.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http::{HeaderMap, Request, Response};
use pin_project_lite::pin_project;
use tokio::time::{Timeout, timeout_at};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::status::Error;

/// When a call has to be answered; in the extensions of each request that has a deadline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(pub(crate) Instant);

/// How much earlier than tonic this layer answers.
const LEAD: Duration = Duration::from_millis(2);

/// Adds the deadline to a service.
#[derive(Clone, Copy, Debug)]
pub struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = DeadlineService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DeadlineService { inner }
    }
}

/// A service that keeps to deadlines.
#[derive(Clone, Debug)]
pub struct DeadlineService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for DeadlineService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Bounded<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let timeout = timeout(request.headers());
        let Some(at) = timeout.and_then(|t| Instant::now().checked_add(t.saturating_sub(LEAD))) else {
            return Bounded::Without { answer: self.inner.call(request) };
        };
        request.extensions_mut().insert(Deadline(at));
        Bounded::With { answer: timeout_at(at.into(), self.inner.call(request)) }
    }
}

pin_project! {
    /// The answer to a call, in time.
    #[project = BoundedProjection]
    #[derive(Debug)]
    pub enum Bounded<F> {
        /// The client set no deadline.
        Without {
            #[pin]
            answer: F,
        },
        /// It did.
        With {
            #[pin]
            answer: Timeout<F>,
        },
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Bounded<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            BoundedProjection::Without { answer } => answer.poll(context),
            BoundedProjection::With { answer } => Poll::Ready(match ready!(answer.poll(context)) {
                Ok(answer) => answer,
                Err(_) => Ok(Status::from(Error::Deadline).into_http()),
            }),
        }
    }
}

/// `grpc-timeout`: at most eight digits and a unit. What does not parse is no deadline, as the protocol's servers do.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &'static str) -> Option<Duration> {
        timeout(&HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-timeout"),
            http::HeaderValue::from_static(text),
        )]))
    }

    #[test]
    fn timeouts() {
        assert_eq!(parse("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for text in ["", "m", "1", "1x", "123456789m", "-1m", "+1m"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
