//! A span for each call, and one line when it has been answered.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Instrument as _;

pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

#[derive(Clone, Copy, Debug)]
pub(crate) struct TraceLayer;

impl<S> Layer<S> for TraceLayer {
    type Service = TraceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        TraceService { inner }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct TraceService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for TraceService<S>
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
        let span = tracing::info_span!("rpc", method = %request.uri().path());
        let start = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(
            async move {
                let answer = answer.await;
                let status = answer.as_ref().ok().and_then(|r| r.headers().get("grpc-status"));
                // Answers that carry a message put their status, OK, behind it.
                let status = status.and_then(|status| status.to_str().ok()).unwrap_or("0");
                tracing::debug!(status, elapsed = ?start.elapsed(), "answered");
                answer
            }
            .instrument(span),
        )
    }
}
