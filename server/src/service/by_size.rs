//! The translation service, whose batches take megabytes, and whose other calls do not.
//!
//! How large a request may be is a setting of a whole service, and a request that comes only in part holds as much memory. So
//! there are two of this one, and the method says which.

use std::convert::Infallible;
use std::task::{Context, Poll};

use http::{Request, Response};
use pagewalk_proto::v1::translation_service_server::TranslationServiceServer;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::Daemon;
use crate::layer::is_bulk;

type Server = TranslationServiceServer<Daemon>;

#[derive(Clone)]
pub(super) struct BySize {
    pub(super) small: Server,
    pub(super) bulk: Server,
}

impl NamedService for BySize {
    const NAME: &'static str = Server::NAME;
}

impl Service<Request<Body>> for BySize {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = <Server as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // Both are ready at any time.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let server = if is_bulk(request.uri().path()) { &mut self.bulk } else { &mut self.small };
        server.call(request)
    }
}
