//! A bound on the calls in flight over all connections. What comes on top is refused at once.

use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::trace::BoxFuture;
use crate::status::Error;

#[derive(Clone, Debug)]
pub(crate) struct LimitLayer {
    places: Arc<Semaphore>,
}

impl LimitLayer {
    pub(crate) fn new(calls: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(calls.min(Semaphore::MAX_PERMITS))) }
    }
}

impl<S> Layer<S> for LimitLayer {
    type Service = LimitService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        LimitService { inner, places: Arc::clone(&self.places) }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct LimitService<S> {
    inner: S,
    places: Arc<Semaphore>,
}

impl<S> Service<Request<Body>> for LimitService<S>
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
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Box::pin(async { Ok(Status::from(Error::Busy).into_http()) });
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            drop(place);
            answer
        })
    }
}
