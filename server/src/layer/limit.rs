//! Bounds on the calls in flight over all connections, and on how long a call may wait for its client. What comes on top of a
//! bound is refused at once.
//!
//! All calls together have their places, and of these a quarter at most is for each kind of calls that may last. So calls that are
//! answered at once find a place whatever the others do, and so does each kind.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Extensions, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use prost::bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, UdsConnectInfo};
use tower::{Layer, Service};

use super::line::{Line, Peer, STALLED, Unread};
use super::reason::end_with_reason;
use crate::status::Error;

/// Methods whose messages are megabytes.
const BULK: [&str; 2] =
    ["/pagewalk.v1.TranslationService/BatchTranslate", "/pagewalk.v1.TranslationService/StreamTranslate"];
/// Methods whose answers are streams that are sent as fast as they are read.
const LONG: [&str; 4] = [
    "/pagewalk.v1.TranslationService/TranslateRange",
    "/pagewalk.v1.MappingService/ListMappings",
    "/pagewalk.v1.MappingService/FindMappings",
    "/pagewalk.v1.MachineService/SaveImage",
];
/// Methods whose answers are streams without an end, on which nothing may come for days.
const WATCHES: [&str; 4] = [
    "/pagewalk.v1.WalkerService/WatchWalkerState",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
/// Methods whose requests are streams: what is sent next may need a person's thought.
const REQUEST_STREAMS: [&str; 3] = [
    "/pagewalk.v1.TranslationService/StreamTranslate",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
/// How long the rest of any other request may take, once nothing more of it comes.
const WHOLE: Duration = Duration::from_secs(30);
/// Bulk calls in flight. Each holds two requests and two answers at most: 10 MiB where they are as large as can be.
pub(super) const BULK_CALLS: usize = 128;

/// Whether calls of this method carry batches.
pub(crate) fn is_bulk(path: &str) -> bool {
    BULK.contains(&path)
}

/// Adds the bounds to a service.
#[derive(Clone, Debug)]
pub struct LimitLayer {
    calls: Arc<Places>,
    bulk: Arc<Places>,
    long: Arc<Places>,
    watches: Arc<Places>,
}

impl LimitLayer {
    /// `calls` in flight: for each kind that may last a quarter of them, and for those with batches no more than 128.
    #[must_use]
    pub fn new(calls: usize) -> Self {
        let places = |all: usize| Arc::new(Places::new(all.max(1)));
        let kind = calls / 4;
        Self {
            calls: places(calls),
            bulk: places(BULK_CALLS.min(kind)),
            long: places(kind),
            watches: places(kind),
        }
    }

    fn take(&self, path: &str, line: Option<&Line>) -> Option<Taken> {
        let call = self.calls.take()?;
        let shares = if is_bulk(path) {
            Some((&self.bulk, line.map(Line::bulk)))
        } else if LONG.contains(&path) {
            Some((&self.long, line.map(Line::long)))
        } else if WATCHES.contains(&path) {
            Some((&self.watches, line.map(Line::watches)))
        } else {
            None
        };
        let Some((kind, share)) = shares else {
            return Some(Taken { _call: call, _kind: None, _share: None });
        };
        let share = match share {
            Some(share) => Some(share.take()?),
            None => None,
        };
        Some(Taken { _call: call, _kind: Some(kind.take()?), _share: share })
    }
}

#[derive(Debug)]
pub(super) struct Places {
    taken: AtomicUsize,
    all: usize,
}

impl Places {
    pub(super) fn new(all: usize) -> Self {
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

/// The places of a call: among all, among those of its kind, and of its connection's share.
#[derive(Debug)]
struct Taken {
    _call: Place,
    _kind: Option<Place>,
    _share: Option<Place>,
}

impl<S> Layer<S> for LimitLayer {
    type Service = LimitService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        LimitService { inner, places: self.clone() }
    }
}

/// A service with bounds on its calls.
#[derive(Clone, Debug)]
pub struct LimitService<S> {
    inner: S,
    places: LimitLayer,
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
        let line = line(request.extensions());
        let Some(taken) = self.places.take(request.uri().path(), line.as_ref()) else {
            return Limited::Refused;
        };
        let patience = if REQUEST_STREAMS.contains(&request.uri().path()) { STALLED } else { WHOLE };
        let request = request.map(|body| Body::new(Awaited { body, patience, bound: None, waits: false }));
        Limited::Taken { answer: self.inner.call(request), held: Some((taken, line)) }
    }
}

/// The connection of a request. One that this daemon did not accept has none.
fn line(of: &Extensions) -> Option<Line> {
    let tcp = || of.get::<Peer<TcpConnectInfo>>().map(|peer| &peer.line);
    let uds = || of.get::<Peer<UdsConnectInfo>>().map(|peer| &peer.line);
    tcp().or_else(uds).cloned()
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
            held: Option<(Taken, Option<Line>)>,
        },
        /// There was none.
        Refused,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Limited<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            LimitedProjection::Taken { answer, held } => {
                let answer = ready!(answer.poll(context));
                let Some((taken, line)) = held.take() else { return Poll::Ready(answer) };
                let held =
                    |body| Body::new(Held { body, rest: Bytes::new(), unread: None, line, _taken: taken });
                Poll::Ready(answer.map(|answer| answer.map(held)))
            }
            LimitedProjection::Refused => Poll::Ready(Ok(Status::from(Error::Busy).into_http())),
        }
    }
}

/// The body of a request, which fails when nothing more of it has come for too long.
struct Awaited {
    body: Body,
    patience: Duration,
    bound: Option<Pin<Box<Sleep>>>,
    waits: bool,
}

impl http_body::Body for Awaited {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let awaited = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut awaited.body).poll_frame(context) {
            awaited.waits = false;
            return Poll::Ready(frame);
        }
        let until = Instant::now() + awaited.patience;
        let bound = awaited.bound.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if !std::mem::replace(&mut awaited.waits, true) {
            bound.as_mut().reset(until);
        }
        bound.as_mut().poll(context).map(|()| Some(Err(Error::Silent.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The last of a message, by itself: the transport takes a piece whole where the client has room for its first byte, and lets go
/// of the call once it has the last one, which nobody counts any more.
const LAST: usize = 1 << 16;

/// The body of an answer, whose call is in flight until it has been sent: a stream counts as long as it is open.
struct Held {
    body: Body,
    /// What has not been handed on of the message in hand.
    rest: Bytes,
    /// The client has to read before the transport asks for more.
    unread: Option<Unread>,
    line: Option<Line>,
    _taken: Taken,
}

impl Held {
    fn piece(&mut self) -> Bytes {
        let size = self.rest.len();
        self.rest.split_to(if size > LAST { size - LAST } else { size })
    }
}

impl http_body::Body for Held {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let held = &mut *self;
        held.unread = None;
        let frame = if held.rest.is_empty() {
            match ready!(Pin::new(&mut held.body).poll_frame(context)) {
                Some(Ok(mut frame)) => {
                    if let Some(trailers) = frame.trailers_mut() {
                        end_with_reason(trailers);
                    }
                    frame.map_data(|data| {
                        held.rest = data;
                        held.piece()
                    })
                }
                ended => return Poll::Ready(ended),
            }
        } else {
            Frame::data(held.piece())
        };
        // With trailers, the transport lets go of the call.
        if frame.is_data() {
            held.unread = held.line.as_ref().map(Line::unread);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // Nobody needs one, and the body's own does not know of the rest.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;
    use std::future::poll_fn;

    use http_body::Body as _;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[tokio::test]
    async fn the_last_of_an_answer_is_handed_on_by_itself() {
        let message: String = (0..200_000_u32).map(|at| char::from(b'a' + (at % 26) as u8)).collect();
        let body = Body::new(message.clone());
        let taken = LimitLayer::new(4).take(LONG[0], None).unwrap();
        let mut held =
            Held { body, rest: Bytes::new(), unread: None, line: Some(Line::new()), _taken: taken };
        let mut got = Vec::new();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut held).poll_frame(context)).await {
            let piece = frame.unwrap().into_data().unwrap();
            got.extend_from_slice(&piece);
            assert_eq!(held.is_end_stream(), got.len() == message.len());
            assert!(!held.is_end_stream() || piece.len() == LAST);
        }
        assert_eq!(got, message.into_bytes());
    }

    #[test]
    fn one_connection_has_half_of_the_streams_at_most() {
        let limit = LimitLayer::new(1024);
        for path in [LONG[0], WATCHES[0]] {
            let (greedy, other) = (Line::new(), Line::new());
            let taken: Vec<_> = (0..300).map_while(|_| limit.take(path, Some(&greedy))).collect();
            assert_eq!(taken.len(), 128, "{path}");
            assert!(limit.take(path, Some(&other)).is_some(), "{path}");
        }
    }

    /// A stream that is taken for a small call has the places of small calls.
    #[test]
    fn every_stream_is_known_as_one() {
        let (mut streams, mut of_requests) = (BTreeSet::new(), BTreeSet::new());
        for set in [
            pagewalk_proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            for file in FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    for method in &service.method {
                        let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                        if method.client_streaming() {
                            of_requests.insert(path.clone());
                        }
                        if method.client_streaming() || method.server_streaming() {
                            streams.insert(path);
                        }
                    }
                }
            }
        }
        streams.retain(|stream| !is_bulk(stream));
        let known: BTreeSet<String> = LONG.iter().chain(&WATCHES).map(|path| (*path).to_owned()).collect();
        assert_eq!(streams, known);
        assert_eq!(of_requests, REQUEST_STREAMS.map(str::to_owned).into());
    }
}
