//! A bound on the calls in flight over all connections, and a lower one on those that carry batches. What comes on top is
//! refused at once.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::status::Error;

/// Methods whose messages are megabytes.
const BULK: [&str; 2] =
    ["/pagewalk.v1.TranslationService/BatchTranslate", "/pagewalk.v1.TranslationService/StreamTranslate"];
/// Calls of these methods in flight. Each holds two requests and two answers at most: 10 MiB where they are as large as can be.
const BULK_CALLS: usize = 128;

/// Adds the bound to a service.
#[derive(Clone, Debug)]
pub struct LimitLayer {
    calls: Arc<Places>,
    bulk: Arc<Places>,
}

impl LimitLayer {
    /// `calls` in flight.
    #[must_use]
    pub fn new(calls: usize) -> Self {
        let bulk = BULK_CALLS.min(calls);
        Self { calls: Arc::new(Places::new(calls)), bulk: Arc::new(Places::new(bulk)) }
    }
}

#[derive(Debug)]
struct Places {
    taken: AtomicUsize,
    all: usize,
}

impl Places {
    fn new(all: usize) -> Self {
        Self { taken: AtomicUsize::new(0), all }
    }

    fn take(self: &Arc<Self>) -> Option<Place> {
        let place = Place(Arc::clone(self));
        // The place goes back at once, by its drop, where it is one too many.
        (self.taken.fetch_add(1, Ordering::Relaxed) < self.all).then_some(place)
    }
}

/// A call's place. It guards no memory: the count is all that is shared.
#[derive(Debug)]
struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

type Taken = (Place, Option<Place>);

impl<S> Layer<S> for LimitLayer {
    type Service = LimitService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        LimitService { inner, places: self.clone() }
    }
}

/// A service with a bound on its calls.
#[derive(Clone, Debug)]
pub struct LimitService<S> {
    inner: S,
    places: LimitLayer,
}

impl<S> LimitService<S> {
    fn take(&self, path: &str) -> Option<Taken> {
        let place = self.places.calls.take()?;
        Some((place, if BULK.contains(&path) { Some(self.places.bulk.take()?) } else { None }))
    }
}

impl<S> Service<Request<Body>> for LimitService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Limited<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.take(request.uri().path()) {
            Some(place) => Limited::Taken { answer: self.inner.call(request), place: Some(place) },
            None => Limited::Refused,
        }
    }
}

pin_project! {
    /// The answer to a call, once it has a place.
    #[project = LimitedProjection]
    #[derive(Debug)]
    pub enum Limited<F> {
        /// It has one.
        Taken {
            #[pin]
            answer: F,
            place: Option<Taken>,
        },
        /// There was none.
        Refused,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Limited<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            LimitedProjection::Taken { answer, place } => {
                let answer = ready!(answer.poll(context));
                let place = place.take();
                Poll::Ready(answer.map(|answer| answer.map(|body| Body::new(Held { body, _place: place }))))
            }
            LimitedProjection::Refused => Poll::Ready(Ok(Status::from(Error::Busy).into_http())),
        }
    }
}

/// The body of an answer, whose call is in flight until it has been sent: a stream counts as long as it is open.
struct Held {
    body: Body,
    _place: Option<Taken>,
}

impl http_body::Body for Held {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
