//! The peer: a tonic service that sends back what it gets, and understands nothing.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};

use http::uri::PathAndQuery;
use pagewalk_proto::{WithColumn, v1};
use prost::Message;
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService, UnaryService};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

const LARGEST: usize = 16 << 20;

/// Bytes; the first one of a request to [`Sized`] says how many are wanted back.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Payload {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) data: Bytes,
}

/// A column as prost decodes it by default.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Words {
    #[prost(fixed64, repeated, tag = "1")]
    pub(crate) words: Vec<u64>,
}

/// A column as the contract's messages hold it.
pub(crate) type Columned = WithColumn<(), 1>;

pub(crate) const SIZED: &str = "/pagewalk.bench.Echo/Sized";
pub(crate) const BYTES: &str = "/pagewalk.bench.Echo/Bytes";
pub(crate) const WORDS: &str = "/pagewalk.bench.Echo/Words";
pub(crate) const COLUMN: &str = "/pagewalk.bench.Echo/Column";
pub(crate) const STREAM: &str = "/pagewalk.bench.Echo/Stream";
const KNOWN: &str = "/pagewalk.bench.Echo/Known";
const KNOW: &str = "/pagewalk.bench.Echo/Know";

/// The answer that [`KNOWN`] gives.
static ANSWER: OnceLock<v1::TranslateResponse> = OnceLock::new();

#[derive(Clone)]
pub(crate) struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "pagewalk.bench.Echo";
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            SIZED => Box::pin(async { Ok(grpc::<Payload>().unary(OfSize, request).await) }),
            BYTES => Box::pin(async { Ok(grpc::<Payload>().unary(Same::new(), request).await) }),
            WORDS => Box::pin(async { Ok(grpc::<Words>().unary(Same::new(), request).await) }),
            COLUMN => Box::pin(async { Ok(grpc::<Columned>().unary(Same::new(), request).await) }),
            KNOW => Box::pin(async { Ok(grpc::<v1::TranslateResponse>().unary(Know, request).await) }),
            KNOWN => Box::pin(async {
                let codec = ProstCodec::<v1::TranslateResponse, v1::TranslateRequest>::default();
                Ok(Grpc::new(codec).unary(Known, request).await)
            }),
            STREAM => Box::pin(async { Ok(grpc::<Payload>().streaming(Same::new(), request).await) }),
            other => panic!("no method {other}"),
        }
    }
}

fn grpc<T: Message + Default + 'static>() -> Grpc<ProstCodec<T, T>> {
    Grpc::new(ProstCodec::default()).apply_max_message_size_config(Some(LARGEST), Some(LARGEST))
}

struct OfSize;

impl UnaryService<Payload> for OfSize {
    type Response = Payload;
    type Future = std::future::Ready<Result<Response<Payload>, Status>>;

    fn call(&mut self, request: Request<Payload>) -> Self::Future {
        const ZEROS: &[u8] = &[0; 255];
        let data = &ZEROS[..usize::from(request.get_ref().data[0])];
        std::future::ready(Ok(Response::new(Payload { data: Bytes::from_static(data) })))
    }
}

/// Takes the answer to give from now on.
struct Know;

impl UnaryService<v1::TranslateResponse> for Know {
    type Response = v1::TranslateResponse;
    type Future = std::future::Ready<Result<Response<Self::Response>, Status>>;

    fn call(&mut self, request: Request<v1::TranslateResponse>) -> Self::Future {
        let answer = ANSWER.get_or_init(|| request.into_inner());
        std::future::ready(Ok(Response::new(answer.clone())))
    }
}

/// Understands `Translate`'s question and has the answer at hand.
struct Known;

impl UnaryService<v1::TranslateRequest> for Known {
    type Response = v1::TranslateResponse;
    type Future = std::future::Ready<Result<Response<Self::Response>, Status>>;

    fn call(&mut self, request: Request<v1::TranslateRequest>) -> Self::Future {
        drop(request);
        std::future::ready(Ok(Response::new(ANSWER.get().unwrap().clone())))
    }
}

struct Same<T>(PhantomData<T>);

impl<T> Same<T> {
    fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static> UnaryService<T> for Same<T> {
    type Response = T;
    type Future = std::future::Ready<Result<Response<T>, Status>>;

    fn call(&mut self, request: Request<T>) -> Self::Future {
        std::future::ready(Ok(Response::new(request.into_inner())))
    }
}

impl<T: Message + 'static> StreamingService<T> for Same<T> {
    type Response = T;
    type ResponseStream = Streaming<T>;
    type Future = std::future::Ready<Result<Response<Streaming<T>>, Status>>;

    fn call(&mut self, request: Request<Streaming<T>>) -> Self::Future {
        std::future::ready(Ok(Response::new(request.into_inner())))
    }
}

/// Asks the echo.
pub(crate) async fn ask<T: Message + Default + 'static>(
    channel: &Channel,
    path: &'static str,
    message: T,
) -> T {
    let mut client = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(LARGEST);
    client.ready().await.unwrap();
    let codec = ProstCodec::<T, T>::default();
    client.unary(Request::new(message), PathAndQuery::from_static(path), codec).await.unwrap().into_inner()
}

/// Says what [`known`] answers.
pub(crate) async fn know(channel: &Channel, answer: v1::TranslateResponse) {
    drop(ask(channel, KNOW, answer).await);
}

/// Asks for the known answer to a question.
pub(crate) async fn known(channel: &Channel, question: v1::TranslateRequest) -> v1::TranslateResponse {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = PathAndQuery::from_static(KNOWN);
    client.unary(Request::new(question), path, ProstCodec::default()).await.unwrap().into_inner()
}

/// Opens a stream of echoes.
pub(crate) async fn stream(
    channel: &Channel,
    requests: impl tokio_stream::Stream<Item = Payload> + Send + 'static,
) -> Streaming<Payload> {
    let mut client = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(LARGEST);
    client.ready().await.unwrap();
    let codec = ProstCodec::<Payload, Payload>::default();
    let path = PathAndQuery::from_static(STREAM);
    client.streaming(Request::new(requests), path, codec).await.unwrap().into_inner()
}
