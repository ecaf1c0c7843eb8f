//! Arbitrary bytes as the message of a call, through a connection and every layer, to the demo machine in plain memory.
//!
//! The first byte picks the method, and where it is large, the others are not the message but say what is in it: of bytes, few are
//! a request that is answered. Machines are not attached and registers not set: an input has to mean the same every time.

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

/// First bytes from here on have the message built.
const BUILT: u8 = 0x80;

/// Where something of the demo guest is, or nothing can be.
const PLACES: [u64; 8] = [
    0xffff_8000_0001_0000,
    0xffff_8000_0001_3000,
    0xffff_ffff_8100_1000,
    0x40_0000,
    0,
    0x1_0000,
    0x8000_0000_0000,
    0xffff_ffff_ffff_f000,
];

/// What a request is made of, as the bytes of an input choose it.
struct Choices<'a>(std::slice::Iter<'a, u8>);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    fn number(&mut self, below: u8) -> i32 {
        (self.byte() % below).into()
    }

    fn address(&mut self) -> v1::Address {
        let place = PLACES[usize::from(self.byte()) % PLACES.len()];
        let offset = u64::from(self.byte()) << 4 | u64::from(self.byte()) << 12;
        v1::Address { value: Some(v1::address::Value::Number(place.wrapping_add(offset))) }
    }

    fn access(&mut self) -> v1::Access {
        let (kind, privilege) = (self.number(6), self.number(6));
        let more = self.byte();
        v1::Access {
            kind,
            privilege,
            ac: (more & 1 != 0).then_some(more & 2 != 0),
            pkru: (more & 4 != 0).then(|| self.byte().into()),
            pkrs: (more & 8 != 0).then(|| self.byte().into()),
            stack: more & 0x10 != 0,
        }
    }

    /// Walker state in which most registers are the vCPU's own.
    fn walker(&mut self) -> Option<v1::WalkerOverride> {
        use v1::walker_override::SecondDimension;
        let which = self.byte();
        let root = |choices: &mut Self| u64::from(choices.byte() % 32) << 12;
        (which & 0xc0 == 0xc0).then(|| v1::WalkerOverride {
            cr3: (which & 1 != 0).then(|| root(self)),
            cr4: (which & 2 != 0)
                .then(|| 0x20 | u64::from(self.byte()) << 16 | u64::from(self.byte() & 0x10) << 8),
            efer: (which & 4 != 0).then(|| u64::from(self.byte()) << 8),
            maxphyaddr: (which & 8 != 0).then(|| u32::from(self.byte() % 56)),
            second_dimension: match which >> 4 & 3 {
                1 => Some(SecondDimension::Npt(v1::Npt { ncr3: root(self), ..Default::default() })),
                2 => {
                    let eptp = root(self) | u64::from(self.byte());
                    Some(SecondDimension::Ept(v1::Ept { eptp, ..Default::default() }))
                }
                _ => None,
            },
            ..Default::default()
        })
    }
}

/// A message for this method, most fields of which can be; `None` where there is little to say.
fn build(method: &str, choices: &[u8]) -> Option<Vec<u8>> {
    let mut choices = Choices(choices.iter());
    let freshness = choices.number(4);
    let walker = choices.walker();
    Some(match method {
        "TranslationService/Translate" => v1::TranslateRequest {
            address: Some(choices.address()),
            access: Some(choices.access()),
            ad_policy: choices.number(2),
            freshness,
            r#override: walker,
            trace: choices.flag(),
            explain: choices.flag(),
            validate: choices.flag(),
            ..Default::default()
        }
        .encode_to_vec(),
        "TranslationService/TranslateNestedGpa" => v1::TranslateNestedGpaRequest {
            address: Some(choices.address()),
            // Other fields of it are a GVA's.
            access: Some(v1::Access { ac: None, pkru: None, pkrs: None, stack: false, ..choices.access() }),
            phase: choices.number(3),
            ad_policy: choices.number(2),
            freshness,
            r#override: walker,
            trace: choices.flag(),
            explain: choices.flag(),
            validate: choices.flag(),
            ..Default::default()
        }
        .encode_to_vec(),
        "TranslationService/ExplainFault" => {
            use v1::explain_fault_request::Seen;
            let (nested_gpa, bits) = (Some(choices.address()), u64::from(choices.byte()));
            let seen = match choices.number(4) {
                0 => Seen::PageFault(v1::PageFault { error_code: bits as u32, cr2: nested_gpa }),
                1 => Seen::NestedPageFault(v1::NestedPageFault { exit_info_1: bits | 1 << 32, nested_gpa }),
                2 => Seen::EptViolation(v1::EptViolation {
                    exit_qualification: bits,
                    nested_gpa,
                    ..Default::default()
                }),
                _ => Seen::EptMisconfiguration(v1::EptMisconfiguration { nested_gpa }),
            };
            v1::ExplainFaultRequest { seen: Some(seen), freshness, r#override: walker, ..Default::default() }
                .encode_to_vec()
        }
        "TranslationService/BatchTranslate" => {
            let head = v1::BatchTranslateRequestHead {
                access: Some(choices.access()),
                freshness,
                r#override: walker,
                max_faults: choices.flag().then(|| choices.byte().into()),
                validate: choices.flag(),
                ..Default::default()
            };
            let column = (0..choices.byte()).map(|_| match choices.address().value {
                Some(v1::address::Value::Number(gva)) => gva,
                _ => 0,
            });
            v1::BatchTranslateRequest { head, column: column.collect() }.encode_to_vec()
        }
        "WalkerService/SetNestedMode" => {
            use v1::set_nested_mode_request::Mode;
            let root = u64::from(choices.byte() % 32) << 12;
            let mode = match choices.number(3) {
                0 => Mode::Npt(v1::Npt { ncr3: root, ..Default::default() }),
                1 => Mode::Ept(v1::Ept { eptp: root | u64::from(choices.byte()), ..Default::default() }),
                _ => Mode::Off(choices.flag()),
            };
            v1::SetNestedModeRequest { mode: Some(mode), ..Default::default() }.encode_to_vec()
        }
        _ => return None,
    })
}

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
        let Some((&first, message)) = bytes.split_first() else { return };
        let method = METHODS[usize::from(first) % METHODS.len()];
        let built = if first < BUILT { None } else { build(method, message) };
        let message = built.as_deref().unwrap_or(message);
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
            let answer = v1::BatchTranslateResponse::decode(answer).expect("an answer");
            let words = answer.column.len().expect("whole words");
            let (faults, told) = (answer.head.fault_count as usize, answer.head.faults.len());
            assert!(told <= faults && faults <= words && words > 0, "{told} of {faults} faults in {words}");
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
