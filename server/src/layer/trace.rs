//! A span for each call, and one line when it has been answered, where the log is that verbose: a span costs a call several
//! percent of its time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use http::{Request, Response};
use pin_project_lite::pin_project;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::{Level, Span};

/// Adds the span to a service.
#[derive(Clone, Copy, Debug)]
pub struct TraceLayer;

impl<S> Layer<S> for TraceLayer {
    type Service = TraceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        TraceService { inner }
    }
}

/// A service whose calls have spans.
#[derive(Clone, Debug)]
pub struct TraceService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for TraceService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Traced<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let seen = tracing::enabled!(Level::DEBUG)
            .then(|| (tracing::debug_span!("rpc", method = %request.uri().path()), Instant::now()));
        Traced { answer: self.inner.call(request), seen }
    }
}

pin_project! {
    /// The answer to a call.
    #[derive(Debug)]
    pub struct Traced<F> {
        #[pin]
        answer: F,
        seen: Option<(Span, Instant)>,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Traced<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let traced = self.project();
        let Some((span, start)) = traced.seen else { return traced.answer.poll(context) };
        let _in_span = span.enter();
        let answer = ready!(traced.answer.poll(context));
        let status = answer.as_ref().ok().and_then(|r| r.headers().get("grpc-status"));
        // Answers that carry a message put their status, OK, behind it.
        let status = status.and_then(|status| status.to_str().ok()).unwrap_or("0");
        tracing::debug!(status, elapsed = ?start.elapsed(), "answered");
        Poll::Ready(answer)
    }
}
