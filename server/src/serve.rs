//! Serving: bind everything, answer until told to stop, drain, end within a bound.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pagewalk_proto::FILE_DESCRIPTOR_SET;
use pagewalk_proto::v1::machine_service_server::MachineServiceServer;
use pagewalk_proto::v1::mapping_service_server::MappingServiceServer;
use pagewalk_proto::v1::memory_service_server::MemoryServiceServer;
use pagewalk_proto::v1::translation_service_server::TranslationServiceServer;
use pagewalk_proto::v1::vcpu_service_server::VcpuServiceServer;
use pagewalk_proto::v1::walker_service_server::WalkerServiceServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::server::{HealthReporter, health_reporter};
use tower::layer::util::{Identity, Stack};

use crate::config::Config;
use crate::layer::{DeadlineLayer, LimitLayer, ReasonLayer, TraceLayer};
use crate::listen::{Incoming, ListenError, TlsError, UdsListener, bind_tcp, widen};
use crate::machine::Machines;
use crate::service::{Daemon, add_to};

/// Streams that one connection may have open.
const STREAMS: u32 = 256;
/// What a client may send on a stream before it is read: the largest batch, nearly.
const STREAM_WINDOW: u32 = 2 << 20;
/// What it may send on all its streams together. It is the most memory that unread requests of a connection take.
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest frame that is taken: fewer frames cost less.
const FRAME: u32 = 1 << 20;
/// How often a silent connection is asked whether it still lives, and how long it has to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(20));

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address or a socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The contract's descriptors.
    #[error("cannot set up server reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport.
    #[error("the server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A listener ended though nobody stopped it.
    #[error("the server stopped by itself: {0}")]
    Ended(String),
}

/// A daemon that has bound its addresses. Dropping it closes them.
pub struct Server {
    tcp: Vec<TcpListener>,
    uds: Option<UdsListener>,
    uds_path: Option<PathBuf>,
    routes: Routes,
    grpc: Grpc<Layers>,
    tls: Option<tonic::transport::ServerTlsConfig>,
    health: HealthReporter,
    draining: watch::Sender<bool>,
    grace: Duration,
}

/// What every call passes through.
pub type Layers = Stack<ReasonLayer, Stack<DeadlineLayer, Stack<TraceLayer, Stack<LimitLayer, Identity>>>>;

impl Server {
    /// Binds what `config` names.
    ///
    /// # Errors
    /// Says which address, socket or certificate is at fault, and what to do.
    pub async fn bind(config: &Config, machines: Machines) -> Result<Self, ServeError> {
        let tls = config.tls.as_ref().map(crate::listen::Tls::config).transpose()?;
        if let Some(tls) = &tls {
            // tonic looks into certificates and keys only now.
            Grpc::builder().tls_config(tls.clone()).map_err(|e| TlsError::Unusable(chain(&e)))?;
        }
        let mut tcp = Vec::new();
        for address in &config.listen {
            tcp.push(bind_tcp(*address, tls.is_some()).await?);
        }
        let uds = config.uds.as_deref().map(UdsListener::bind).transpose()?;
        let (draining, observer) = watch::channel(false);
        let daemon = Daemon::new(machines, host_name(), observer, config.client_files.clone());
        let (health, health_service) = health_reporter();
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // So that clients can read the details of an error.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let routes = Routes::new(health_service)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?);
        let grpc = transport(config.max_calls);
        Ok(Self {
            tcp,
            uds,
            uds_path: config.uds.clone(),
            routes: add_to(routes, &daemon),
            grpc,
            tls,
            health,
            draining,
            grace: config.grace,
        })
    }

    /// The addresses it listens on.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.tcp.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// The Unix socket it listens on.
    #[must_use]
    pub fn uds(&self) -> Option<&PathBuf> {
        self.uds_path.as_ref()
    }

    /// Serves until `stop` is done; then health turns NOT_SERVING, no more calls are taken, and those in flight have the
    /// configured grace to end.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        set_health(&self.health, true).await;
        let mut tasks = JoinSet::new();
        let mut tls_grpc = self.grpc.clone();
        if let Some(tls) = self.tls.take() {
            tls_grpc = tls_grpc.tls_config(tls)?;
        }
        for listener in self.tcp {
            let router: Router<Layers> = tls_grpc.add_routes(self.routes.clone());
            let incoming = Incoming::new(TcpIncoming::from(listener).with_nodelay(Some(true)));
            tasks.spawn(router.serve_with_incoming_shutdown(incoming, drained(&self.draining)));
        }
        let socket_file = self.uds.map(|uds| {
            let router: Router<Layers> = self.grpc.add_routes(self.routes.clone());
            let accepted = UnixListenerStream::new(uds.listener);
            let incoming = Incoming::new(accepted.map(|stream| stream.inspect(widen)));
            tasks.spawn(router.serve_with_incoming_shutdown(incoming, drained(&self.draining)));
            uds.file
        });

        tokio::select! {
            () = stop => {}
            Some(ended) = tasks.join_next() => {
                // A listener does not end by itself: either it failed or its task did.
                return Err(match ended {
                    Ok(Err(error)) => error.into(),
                    Ok(Ok(())) => ServeError::Ended("its listener closed".to_owned()),
                    Err(error) => ServeError::Ended(error.to_string()),
                });
            }
        }
        tracing::info!(grace = ?self.grace, "draining");
        set_health(&self.health, false).await;
        self.draining.send_replace(true);
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(self.grace, all_ended).await.is_err() {
            tracing::warn!("calls are still in flight after the grace period: they are cut off");
        }
        drop(socket_file);
        Ok(())
    }
}

/// A gRPC server with the daemon's settings and layers, for `max_calls` in flight.
#[must_use]
pub fn transport(max_calls: usize) -> Grpc<Layers> {
    Grpc::builder()
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .layer(LimitLayer::new(max_calls))
        .layer(TraceLayer)
        .layer(DeadlineLayer)
        .layer(ReasonLayer)
}

async fn set_health(health: &HealthReporter, serving: bool) {
    macro_rules! set {
        ($($server:ty),*) => {
            $(if serving {
                health.set_serving::<$server>().await;
            } else {
                health.set_not_serving::<$server>().await;
            })*
        };
    }
    set!(
        TranslationServiceServer<Daemon>,
        WalkerServiceServer<Daemon>,
        MappingServiceServer<Daemon>,
        VcpuServiceServer<Daemon>,
        MachineServiceServer<Daemon>,
        MemoryServiceServer<Daemon>
    );
    let whole =
        if serving { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
    health.set_service_status("", whole).await;
}

fn drained(draining: &watch::Sender<bool>) -> impl Future<Output = ()> + use<> {
    let mut draining = draining.subscribe();
    async move {
        // The sender lives as long as the server.
        let _ = draining.wait_for(|draining| *draining).await;
    }
}

fn host_name() -> Arc<str> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().into()
}

/// An error with its causes: tonic's own message says only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
