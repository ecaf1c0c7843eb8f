//! Stopping: SIGTERM and Ctrl-C drain, within a bound.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::walker_service_client::WalkerServiceClient;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::bed::{SOON, connect, refusal};
use crate::beds::Test;
use crate::process::{Daemon, block_on};

pub(crate) const TESTS: &[Test] = &[
    ("stop_drains_within_its_bound", &[], drains_within_its_bound),
    ("stop_at_the_second_signal", &[], stops_at_the_second_signal),
];

fn stops_at_the_second_signal() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("s");
    let uds = socket.to_str().unwrap();
    let mut daemon = Daemon::serve(&["--machine", "demo:plain", "--uds", uds, "--grace-seconds", "3600"]);
    daemon.line();
    block_on(async {
        let mut health = HealthClient::new(connect(daemon.address.parse().unwrap()).await);
        // A stream that never ends by itself.
        let mut stream = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        // At once, they are one.
        daemon.signal("TERM");
        daemon.signal("INT");
        let next = tokio::time::timeout(SOON, stream.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(next.status(), ServingStatus::NotServing);
        assert!(tokio::time::timeout(Duration::from_secs(1), stream.message()).await.is_err());
        daemon.signal("INT");
        assert_eq!(daemon.wait(SOON).code(), Some(0), "{}", daemon.log());
    });
    assert!(daemon.log().contains("a second signal"), "{}", daemon.log());
    assert!(!socket.exists(), "the socket's file is gone");
    Ok(())
}

fn drains_within_its_bound() -> Result<(), Failed> {
    const GRACE: Duration = Duration::from_secs(1);
    for signal in ["TERM", "INT"] {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("s");
        let uds = socket.to_str().unwrap();
        let mut daemon = Daemon::serve(&["--machine", "demo:plain", "--uds", uds, "--grace-seconds", "1"]);
        daemon.line();
        assert!(socket.exists());
        block_on(async {
            let channel = connect(daemon.address.parse().unwrap()).await;
            let watch = |service: &str| {
                let mut health = HealthClient::new(channel.clone());
                let request = HealthCheckRequest { service: service.into() };
                async move { health.watch(request).await.unwrap().into_inner() }
            };
            let mut streams = Vec::new();
            for service in ["", "pagewalk.v1.TranslationService", "pagewalk.v1.WalkerService"] {
                let mut stream = watch(service).await;
                let first = stream.message().await.unwrap().unwrap();
                assert_eq!(first.status(), ServingStatus::Serving, "{service}");
                streams.push(stream);
            }
            let request = v1::WatchWalkerStateRequest::default();
            let mut updates = WalkerServiceClient::new(channel.clone())
                .watch_walker_state(request)
                .await
                .unwrap()
                .into_inner();
            updates.message().await.unwrap().unwrap();

            daemon.signal(signal);
            for stream in &mut streams {
                let next = tokio::time::timeout(SOON, stream.message()).await.unwrap().unwrap().unwrap();
                assert_eq!(next.status(), ServingStatus::NotServing);
            }
            let end = tokio::time::timeout(SOON, updates.message()).await.unwrap();
            assert_eq!(refusal(end), (Code::Unavailable, "SHUTTING_DOWN".to_owned()));
        });
        // The health streams never end by themselves: the daemon cuts them off.
        let start = Instant::now();
        assert_eq!(daemon.wait(SOON).code(), Some(0), "SIG{signal}: {}", daemon.log());
        assert!(start.elapsed() < GRACE + Duration::from_secs(4), "{:?}", start.elapsed());
        assert!(!socket.exists(), "the socket's file is gone");
    }
    // Nothing in flight: no need for the grace period.
    let mut daemon = Daemon::serve(&["--machine", "demo:plain", "--grace-seconds", "600"]);
    daemon.signal("TERM");
    assert_eq!(daemon.wait(SOON).code(), Some(0));
    Ok(())
}
