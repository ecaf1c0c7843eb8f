//! The client's deadline: told to the services, and enforced here where they do not look at it. The daemon's own bound,
//! which is the same for all: without it, a request that is never sent to its end keeps its place for ever.
//!
//! Both are about the beginning of an answer. How long a stream goes on is its service's business.
//!
//! tonic enforces `grpc-timeout` too, but answers CANCELLED; this layer answers first, with DEADLINE_EXCEEDED.

use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::trace::BoxFuture;
use crate::status::Error;

/// When a call has to be answered; in the extensions of each request that has a deadline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(pub(crate) Instant);

/// How much earlier than tonic this layer answers.
const LEAD: Duration = Duration::from_millis(2);

/// How long any call may take, whatever its client allows.
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = DeadlineService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DeadlineService { inner, longest: LONGEST }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct DeadlineService<S> {
    inner: S,
    longest: Duration,
}

impl<S> Service<Request<Body>> for DeadlineService<S>
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let now = Instant::now();
        let mut at = now + self.longest;
        if let Some(timeout) = timeout(request.headers()) {
            let theirs = now.checked_add(timeout.saturating_sub(LEAD)).unwrap_or(at);
            request.extensions_mut().insert(Deadline(theirs));
            at = at.min(theirs);
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            match tokio::time::timeout_at(at.into(), answer).await {
                Ok(answer) => answer,
                Err(_) => Ok(Status::from(Error::Deadline).into_http()),
            }
        })
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
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn no_call_takes_for_ever() {
        let never = tower::service_fn(|_: Request<Body>| std::future::pending::<Result<_, Infallible>>());
        let mut service = DeadlineService { inner: never, longest: Duration::from_millis(20) };
        for timeout in [None, Some("99999999H")] {
            let request =
                timeout.iter().fold(Request::builder(), |request, t| request.header("grpc-timeout", *t));
            let answer = service.call(request.body(Body::empty()).unwrap()).await.unwrap();
            let status = Status::from_header_map(answer.headers()).unwrap();
            assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        }
    }

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
