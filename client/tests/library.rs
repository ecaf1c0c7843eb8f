//! The client library against a daemon of scripted answers, and against things that are no daemon.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use pagewalk_client::{Client, Code, Endpoint, Error, Problem, Tls, v1};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

async fn connect(address: impl ToString) -> Result<Client, Error> {
    Client::connect(Endpoint::parse(&address.to_string())?).await
}

fn request(address: u64) -> v1::TranslateRequest {
    v1::TranslateRequest {
        address: Some(v1::Address { value: Some(v1::address::Value::Number(address)) }),
        explain: true,
        ..v1::TranslateRequest::default()
    }
}

fn problem<T: std::fmt::Debug>(result: Result<T, Error>) -> (Problem, String) {
    match result {
        Err(Error::Connection(error)) => (error.problem, error.to_string()),
        other => panic!("not a connection's error: {other:?}"),
    }
}

/// Something that listens, and does `what` with the first bytes of each connection.
fn listener(what: impl Fn(std::net::TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || listener.incoming().for_each(|stream| what(stream.unwrap())));
    address
}

#[tokio::test]
async fn every_rpc_has_its_method() {
    let client = connect(scripted::start(None)).await.unwrap();
    let answer = client.translate(request(scripted::MAPPED)).await.unwrap();
    let Some(v1::translate_response::Outcome::Translation(found)) = answer.outcome else {
        panic!("no translation: {answer:?}");
    };
    assert_eq!(found.gpa, 0x0010_5000);
    assert_eq!(answer.provenance, Some(scripted::provenance()));

    let answer = client.translate(request(scripted::FAULTS)).await.unwrap();
    assert!(
        matches!(answer.outcome, Some(v1::translate_response::Outcome::Fault(_))),
        "a fault is an answer"
    );

    let explained = client.explain_fault(v1::ExplainFaultRequest::default()).await.unwrap();
    assert!(!explained.explanation.is_empty());
    let state = client.get_walker_state(v1::GetWalkerStateRequest::default()).await.unwrap();
    assert_eq!(state.provenance.unwrap().generation, 7);
    let switched = client.set_nested_mode(v1::SetNestedModeRequest::default()).await.unwrap();
    assert_eq!(switched.effect.unwrap().kind(), v1::NestedEffectKind::WalkerOnly);
    let vcpus = client.list_vcpus(v1::ListVcpusRequest::default()).await.unwrap().vcpus;
    assert_eq!(vcpus.len(), 1);
    let registers =
        client.get_registers(v1::GetRegistersRequest::default()).await.unwrap().registers.unwrap();
    assert_eq!(registers.rip, Some(0x1234));
    let write = v1::Registers { r15: Some(5), ..v1::Registers::default() };
    let set = v1::SetRegistersRequest { registers: Some(write), ..v1::SetRegistersRequest::default() };
    assert_eq!(client.set_registers(set).await.unwrap().registers, Some(write));
    let state = |vcpu: Option<v1::VcpuInfo>| vcpu.unwrap().run_state();
    let paused = client.pause_vcpu(v1::PauseVcpuRequest::default()).await.unwrap();
    assert_eq!(state(paused.vcpu), v1::RunState::Paused);
    let resumed = client.resume_vcpu(v1::ResumeVcpuRequest::default()).await.unwrap();
    assert_eq!(state(resumed.vcpu), v1::RunState::Running);
    let stepped = client.step_vcpu(v1::StepVcpuRequest::default()).await.unwrap();
    assert_eq!(stepped.registers.unwrap().rip, Some(0x1236));
    let machines = client.list_machines(v1::ListMachinesRequest::default()).await.unwrap();
    assert_eq!(machines.daemon_version, "9.9.9");
    let machine = client.get_machine(v1::GetMachineRequest::default()).await.unwrap().machine.unwrap();
    assert_eq!(machine.id, "script");
    assert!(client.is_serving().await.unwrap());
}

#[tokio::test]
async fn a_watch_gives_updates_and_tells_why_it_ends() {
    let client = connect(scripted::start(None)).await.unwrap();
    let bounded =
        v1::WatchWalkerStateRequest { max_updates: Some(3), ..v1::WatchWalkerStateRequest::default() };
    let mut updates = client.watch_walker_state(bounded).await.unwrap();
    for generation in 1..=3 {
        let state = updates.next().await.unwrap().unwrap();
        assert_eq!(state.provenance.unwrap().generation, generation);
    }
    assert!(updates.next().await.is_none());

    let mut updates = client.watch_walker_state(v1::WatchWalkerStateRequest::default()).await.unwrap();
    for _ in 0..2 {
        updates.next().await.unwrap().unwrap();
    }
    let error = updates.next().await.unwrap().unwrap_err();
    assert_eq!((error.code(), error.to_string().as_str()), (Code::Unavailable, "the machine has gone"));
}

#[tokio::test]
async fn a_refusal_carries_code_reason_and_message() {
    let client = connect(scripted::start(None)).await.unwrap();
    let error = client.translate(request(scripted::REFUSED)).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(error.reason(), Some("NO_SUCH_THING"));
    assert_eq!(error.to_string(), "there is no vCPU 9; there is `script`");
    let Error::Refused(refusal) = error else { panic!("not a refusal") };
    assert_eq!(refusal.domain.as_deref(), Some("pagewalk"));
    assert_eq!(refusal.metadata.get("known").map(String::as_str), Some("script"));

    let error = client.translate(request(scripted::MUTE_REFUSAL)).await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::Unavailable, None));
    assert!(error.to_string().contains("gave no reason"), "{error}");
}

#[tokio::test]
async fn the_deadline_is_sent_and_kept() {
    let address = scripted::start(None);
    let client = connect(address).await.unwrap();
    let sent = client.translate(request(scripted::MAPPED)).await.unwrap().explanation;
    assert!(sent.starts_with("timeout 10000000u "), "{sent}");

    let client = client.with_deadline(Duration::from_millis(200));
    let start = Instant::now();
    let error = client.translate(request(scripted::SILENT)).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!((error.code(), error.reason()), (Code::DeadlineExceeded, Some("CLIENT_DEADLINE")));
    assert!(error.to_string().contains("200ms") && error.to_string().contains("--timeout"), "{error}");

    let forever = connect(address).await.unwrap().with_deadline(Duration::MAX);
    forever.translate(request(scripted::MAPPED)).await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_an_endpoint() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a socket.sock");
    scripted::start_unix(path.clone());
    let client = connect(format!("unix:{}", path.display())).await.unwrap();
    assert!(client.is_serving().await.unwrap());
}

#[tokio::test]
async fn nothing_there_says_how_to_start_a_daemon() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (kind, text) = problem(connect(address).await);
    assert_eq!(kind, Problem::NotRunning);
    assert!(text.contains("cargo run --release -- demo") && text.contains("--addr"), "{text}");
}

#[tokio::test]
async fn sockets_that_are_missing_dead_or_no_sockets_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("unix:{}", directory.path().join(name).display());
    let (kind, text) = problem(connect(at("missing")).await);
    assert_eq!(kind, Problem::NoSocket, "{text}");

    drop(std::os::unix::net::UnixListener::bind(directory.path().join("dead")).unwrap());
    let (kind, text) = problem(connect(at("dead")).await);
    assert_eq!(kind, Problem::NotRunning, "{text}");

    let (kind, text) = problem(connect(format!("unix:/{}", "x".repeat(200))).await);
    assert_eq!(kind, Problem::Other, "{text}");
    assert!(text.contains("path must be shorter"), "{text}");
}

#[tokio::test]
async fn unknown_hosts_are_named() {
    // A resolver without a network takes its time to give up.
    let endpoint = Endpoint::parse("host.invalid:1").unwrap().with_connect_timeout(Duration::from_secs(60));
    let (kind, text) = problem(Client::connect(endpoint).await);
    assert_eq!(kind, Problem::UnknownHost, "{text}");
}

#[tokio::test]
async fn what_accepts_and_says_nothing_runs_into_the_deadline() {
    let mute = listener(|stream| {
        // Held open, never answered.
        std::mem::forget(stream);
    });
    let client = connect(mute).await.unwrap().with_deadline(Duration::from_millis(200));
    assert_eq!(client.is_serving().await.unwrap_err().code(), Code::DeadlineExceeded);

    let tls = Tls::new(AUTHORITY.into());
    let endpoint = Endpoint::parse(&mute.to_string()).unwrap();
    let endpoint = endpoint.with_tls(tls).with_connect_timeout(Duration::from_millis(200));
    let (kind, text) = problem(Client::connect(endpoint).await);
    assert_eq!(kind, Problem::ConnectTimeout, "{text}");
}

#[tokio::test]
async fn other_services_are_recognised() {
    let web = listener(|mut stream| {
        let _ = stream.read(&mut [0; 64]);
        let _ =
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    });
    let (kind, text) = problem(connect(web).await.unwrap().is_serving().await);
    assert!(matches!(kind, Problem::NotGrpc | Problem::Closed), "{text}");

    let rude = listener(drop);
    let (kind, text) = problem(match connect(rude).await {
        Ok(client) => client.is_serving().await.map(drop),
        Err(error) => Err(error),
    });
    assert_eq!(kind, Problem::Closed, "{text}");
}

/// Any certificate that parses; nobody is certified by it.
const AUTHORITY: &str = "-----BEGIN CERTIFICATE-----\n\
    MIIBdjCCAR2gAwIBAgIUHb\n\
    -----END CERTIFICATE-----\n";

struct Laboratory(tempfile::TempDir);

impl Laboratory {
    /// Certificates as an operator would make them, for these names.
    fn new(names: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/make-lab-certs.sh");
        let made = Command::new(script).arg(directory.path().join("certs")).args(names).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self(directory)
    }

    fn pem(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.path().join("certs").join(name)).unwrap()
    }

    fn start(&self) -> SocketAddr {
        let identity = Identity::from_pem(self.pem("server.pem"), self.pem("server.key"));
        let authority = Certificate::from_pem(self.pem("ca.pem"));
        scripted::start(Some(ServerTlsConfig::new().identity(identity).client_ca_root(authority)))
    }

    fn tls(&self) -> Tls {
        Tls::new(self.pem("ca.pem"))
    }

    fn mutual_tls(&self) -> Tls {
        self.tls()
            .with_identity(pagewalk_client::Identity::new(self.pem("client.pem"), self.pem("client.key")))
    }
}

async fn ask(address: impl ToString, tls: Tls) -> Result<bool, Error> {
    let endpoint = Endpoint::parse(&address.to_string())?.with_tls(tls);
    Client::connect(endpoint).await?.is_serving().await
}

#[tokio::test]
async fn mutual_tls_works_and_each_mismatch_is_told() {
    let ours = Laboratory::new(&["127.0.0.1"]);
    let theirs = Laboratory::new(&["127.0.0.1"]);
    let daemon = ours.start();
    assert!(ask(daemon, ours.mutual_tls()).await.unwrap());
    assert!(ask(format!("https://{daemon}"), ours.mutual_tls()).await.unwrap());

    let (kind, text) = problem(ask(daemon, ours.tls()).await);
    // The alert races with the end of the connection.
    assert!(matches!(kind, Problem::IdentityRequired | Problem::ClosedInTls), "{text}");
    assert!(text.contains("--tls-cert"), "{text}");

    let stranger = ours
        .tls()
        .with_identity(pagewalk_client::Identity::new(theirs.pem("client.pem"), theirs.pem("client.key")));
    let (kind, text) = problem(ask(daemon, stranger).await);
    assert!(matches!(kind, Problem::IdentityRefused | Problem::ClosedInTls), "{text}");
    assert!(text.contains("--tls-cert"), "{text}");

    let (kind, text) = problem(ask(daemon, theirs.mutual_tls()).await);
    assert_eq!(kind, Problem::UntrustedDaemon, "{text}");

    let (kind, text) =
        problem(ask(daemon.to_string().replace("127.0.0.1", "localhost"), ours.mutual_tls()).await);
    assert_eq!(kind, Problem::WrongName, "{text}");

    let (kind, text) = problem(match connect(daemon).await {
        Ok(client) => client.is_serving().await,
        Err(error) => Err(error),
    });
    // Its complaint races with the end of the connection.
    assert!(matches!(kind, Problem::NotGrpc | Problem::Closed), "{text}");
    assert!(text.contains("--tls-ca"), "{text}");

    let plain = scripted::start(None);
    let (kind, text) = problem(ask(plain, ours.mutual_tls()).await);
    assert_eq!(kind, Problem::PeerSpeaksPlainText, "{text}");

    let mixed = ours
        .tls()
        .with_identity(pagewalk_client::Identity::new(ours.pem("client.pem"), theirs.pem("client.key")));
    let error = ask(daemon, mixed).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
}

#[tokio::test]
async fn batches_alone_and_in_a_stream() {
    let client = connect(scripted::start(None)).await.unwrap();
    let batch = |addresses: &[u64]| v1::BatchTranslateRequest {
        head: v1::BatchTranslateRequestHead::default(),
        column: addresses.into(),
    };
    let alone = client.batch_translate(batch(&[0x2000, 0x1000])).await.unwrap();
    assert_eq!((alone.column.len(), alone.head.fault_count), (Some(2), 1));
    assert_eq!(alone.column.iter().map(|word| word & 1).collect::<Vec<_>>(), [1, 0]);

    let requests = (0..5).map(|sequence| v1::StreamTranslateRequest {
        sequence,
        batch: Some(batch(&[0x2000 + sequence * 0x2000])),
    });
    let mut answers =
        client.stream_translate(tokio_stream::iter(requests.collect::<Vec<_>>())).await.unwrap();
    for sequence in 0..5 {
        let answer = answers.next().await.unwrap().unwrap();
        assert_eq!(answer.sequence, sequence);
        let word = answer.answer.unwrap().column.iter().next().unwrap();
        assert_eq!(word & 0xff_f000, 0x2000 + sequence * 0x2000);
    }
    assert!(answers.next().await.is_none());
}
