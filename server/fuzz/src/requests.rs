//! Arbitrary bytes as the message of a call, through a connection and every layer, to the demo machine in plain memory.
//!
//! The first byte picks the method. Machines are not attached and registers not set: an input has to mean the same every time.

use h2::client::SendRequest;
use http::Request;
use pagewalk_proto::v1;
use pagewalkd::config::{Config, LogFormat};
use pagewalkd::machine::{MachineSpec, Machines};
use pagewalkd::serve::Server;
use prost::Message;
use prost::bytes::Bytes;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// What an input comes to.
pub const CLASSES: [&str; 6] = ["translation", "fault", "explanation", "batch", "other answer", "refused"];
const TRANSLATION: usize = 0;
const FAULT: usize = 1;
const EXPLANATION: usize = 2;
const BATCH: usize = 3;
const OTHER: usize = 4;
const REFUSED: usize = 5;

const METHODS: [&str; 9] = [
    "TranslationService/Translate",
    "TranslationService/TranslateNestedGpa",
    "TranslationService/ExplainFault",
    "TranslationService/BatchTranslate",
    "WalkerService/GetWalkerState",
    "WalkerService/SetNestedMode",
    "VcpuService/ListVcpus",
    "VcpuService/GetRegisters",
    "MachineService/GetMachine",
];

/// A daemon in this process, and a connection to it.
pub struct Bed {
    runtime: Runtime,
    calls: SendRequest<Bytes>,
}

impl Bed {
    /// # Panics
    /// Where the daemon does not start.
    #[must_use]
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let calls = runtime.block_on(async {
            let config = Config {
                listen: vec!["127.0.0.1:0".parse().expect("an address")],
                uds: None,
                tls: None,
                machines: Vec::new(),
                client_files: None,
                log: "off".into(),
                log_format: LogFormat::Human,
                grace: std::time::Duration::from_secs(1),
                max_calls: 16,
            };
            let spec: MachineSpec = "demo:plain".parse().expect("a machine");
            let machine = spec.open().expect("plain memory");
            let machines = Machines::new([machine]).expect("one machine");
            let server = Server::bind(&config, machines).await.expect("a port");
            let address = server.addresses()[0];
            tokio::spawn(server.run(std::future::pending()));
            let stream = TcpStream::connect(address).await.expect("a connection");
            let (calls, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            calls
        });
        Self { runtime, calls }
    }

    /// The status that a call ends with, and its message.
    fn call(&self, method: &str, message: &[u8]) -> (u32, Vec<u8>) {
        self.runtime.block_on(async {
            let mut calls = self.calls.clone().ready().await.expect("the daemon takes calls");
            let head = Request::post(format!("http://daemon/pagewalk.v1.{method}"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("grpc-timeout", "5S")
                .body(())
                .expect("a head");
            let (answer, mut body) = calls.send_request(head, false).expect("a stream");
            let length = u32::try_from(message.len()).expect("inputs are short").to_be_bytes();
            body.send_data([&[0], length.as_slice(), message].concat().into(), true).expect("a message");
            let (head, mut body) = answer.await.expect("an answer").into_parts();
            let mut received = Vec::new();
            while let Some(data) = body.data().await {
                let data = data.expect("data");
                body.flow_control().release_capacity(data.len()).expect("a window");
                received.extend_from_slice(&data);
            }
            let trailers = body.trailers().await.expect("the end");
            let status =
                head.headers.get("grpc-status").or(trailers.as_ref().and_then(|it| it.get("grpc-status")));
            let status = status.expect("a status").to_str().expect("a number").parse().expect("a number");
            (status, received.get(5..).unwrap_or_default().to_vec())
        })
    }

    /// Makes the call that `bytes` describe.
    ///
    /// # Panics
    /// Where the answer is none.
    pub fn check(&self, bytes: &[u8], counts: &mut [u64]) {
        let Some((&method, message)) = bytes.split_first() else { return };
        let method = METHODS[usize::from(method) % METHODS.len()];
        let (status, answer) = self.call(method, message);
        // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS: the daemon's fault, not the request's.
        assert!(!matches!(status, 2 | 4 | 13 | 14 | 15), "{method}: status {status}");
        counts[if status == 0 { class(method, &answer) } else { REFUSED }] += 1;
        if method == "WalkerService/SetNestedMode" && status == 0 {
            let off = v1::set_nested_mode_request::Mode::Off(true);
            let off = v1::SetNestedModeRequest { mode: Some(off), ..Default::default() };
            assert_eq!(self.call(method, &off.encode_to_vec()).0, 0);
        }
    }
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

/// Decodes an answer, which has to say something.
fn class(method: &str, answer: &[u8]) -> usize {
    match method {
        "TranslationService/Translate" => {
            let answer = v1::TranslateResponse::decode(answer).expect("an answer");
            assert!(answer.steps.len() <= 35);
            match answer.outcome.expect("an outcome") {
                v1::translate_response::Outcome::Translation(_) => TRANSLATION,
                v1::translate_response::Outcome::Fault(_) => FAULT,
            }
        }
        "TranslationService/TranslateNestedGpa" => {
            let answer = v1::TranslateNestedGpaResponse::decode(answer).expect("an answer");
            assert!(answer.steps.len() <= 5);
            match answer.outcome.expect("an outcome") {
                v1::translate_nested_gpa_response::Outcome::Translation(_) => TRANSLATION,
                v1::translate_nested_gpa_response::Outcome::Fault(_) => FAULT,
            }
        }
        "TranslationService/ExplainFault" => {
            let answer = v1::ExplainFaultResponse::decode(answer).expect("an answer");
            assert!(!answer.explanation.is_empty());
            assert_eq!(answer.would_fault_now, answer.fault.is_some());
            assert_ne!(answer.fault.is_some(), answer.translation.is_some());
            EXPLANATION
        }
        "TranslationService/BatchTranslate" => {
            assert!(!answer.is_empty());
            BATCH
        }
        "WalkerService/GetWalkerState" => {
            let answer = v1::GetWalkerStateResponse::decode(answer).expect("an answer");
            assert!(answer.gva_walk.is_some());
            OTHER
        }
        _ => OTHER,
    }
}
