//! What the wire costs: calls of one address, and batches and streams of 65,536, next to a tonic echo with messages of the same
//! size, and to the same batch in process. What it costs to read and write the messages of a call, whatever they say, a service
//! shows that understands them and has the answer at hand.
//!
//! The daemon and the echoes run in another process, on processor 0 alone; this one, the client, keeps to processor 1. The
//! sides take turns, a round each, and the table holds the medians of the rounds. Figures of `CPU` are what the daemon's
//! process has used, by the scheduler's account, less what the batch takes in process on the same processor.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[path = "../bed/mod.rs"]
mod bed;
mod python;

use std::time::{Duration, Instant};

use bed::child::{Other, Way, Who, pin, serve_if_asked};
use bed::echo::{self, BYTES, COLUMN, Columned, Payload, SIZED, WORDS, Words};
use bed::guest::{BATCH, BATCHES, Shape};
use bed::kept::{is_test, median};
use bed::report::Report;
use pagewalk_proto::v1;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use prost::Message as _;
use prost::bytes::Bytes;
use tokio::task::JoinSet;
use tonic::transport::Channel;

const ABOUT: &str = "Written by `cargo bench -p pagewalkd --bench wire`; `benches/wire/main.rs` says what is compared. \
The ratio is the first time over the second.\nDaemon and echoes in one process on processor 0, the client in another on processor 1.";

const LARGEST: usize = 16 << 20;
/// Addresses of a round of batches.
const ROUND: f64 = (BATCH * BATCHES) as f64;

struct Bench {
    other: Other,
    report: Report,
    rounds: usize,
    calls: usize,
}

fn main() {
    serve_if_asked();
    let short = is_test();
    pin(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut bench = Bench {
        other: Other::start(if short { &[Shape::Hot] } else { &Shape::ALL }, Some(0)),
        report: Report::new("wire", "The wire", ABOUT),
        rounds: if short { 1 } else { 15 },
        calls: if short { 64 } else { 6400 },
    };
    let shapes = if short { &Shape::ALL[..1] } else { &Shape::ALL };
    runtime.block_on(async {
        bench.unary().await;
        bench.codecs().await;
        for way in [Way::Unix, Way::Tcp] {
            for shape in shapes {
                bench.batches(*shape, way).await;
            }
        }
    });
    drop(runtime);
    python::compare(&mut bench.report, &bench.other, short);
    bench.report.finish(!short);
}

impl Bench {
    async fn unary(&mut self) {
        for (way, flight, rounds) in [(Way::Unix, 64, 21), (Way::Tcp, 64, 21), (Way::Unix, 1, 15)] {
            let daemon = TranslationServiceClient::new(self.other.connect(Who::Daemon, way).await);
            let layered = self.other.connect(Who::Layered, way).await;
            let bare = self.other.connect(Who::Bare, way).await;
            let request = Shape::Hot.single(1);
            let answer = daemon.clone().translate(request.clone()).await.unwrap().into_inner();
            // Key and length take two bytes.
            let mut data = vec![0; request.encoded_len() - 2];
            data[0] = u8::try_from(answer.encoded_len() - 2).unwrap();
            let payload = Payload { data: data.into() };
            echo::know(&layered, answer).await;
            let calls = if flight == 1 { self.calls / 4 } else { self.calls };
            let mut times = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
            let mut cpus = times.clone();
            for _ in 0..if self.rounds == 1 { 1 } else { rounds } {
                for (side, (times, cpus)) in times.iter_mut().zip(&mut cpus).enumerate() {
                    let used = self.other.cpu();
                    times.push(match side {
                        0 => {
                            let call = || {
                                let (mut daemon, request) = (daemon.clone(), request.clone());
                                async move { drop(daemon.translate(request).await.unwrap()) }
                            };
                            in_flight(flight, calls, call).await
                        }
                        1 => {
                            let call = || {
                                let (channel, request) = (layered.clone(), request.clone());
                                async move { drop(echo::known(&channel, request).await) }
                            };
                            in_flight(flight, calls, call).await
                        }
                        _ => {
                            let channel = if side == 2 { &layered } else { &bare };
                            let call = || {
                                let (channel, payload) = (channel.clone(), payload.clone());
                                async move { drop(echo::ask(&channel, SIZED, payload).await) }
                            };
                            in_flight(flight, calls, call).await
                        }
                    });
                    cpus.push((self.other.cpu() - used) / calls as f64);
                }
            }
            let [ours, known, layered, bare] = times;
            let case = format!("Translate, {way:?}, {flight} in flight");
            self.report.add(&case, "ns a call", ours.clone(), "echo behind the same layers", layered.clone());
            self.report.add(&case, "ns a call", ours.clone(), "bare echo", bare.clone());
            self.report.add(&case, "ns a call", ours, "the answer known, same layers", known.clone());
            let floor = format!("the answer known, {way:?}, {flight} in flight");
            self.report.add(&floor, "ns a call", known, "echo behind the same layers", layered.clone());
            self.report.add(
                format!("layers, {way:?}, {flight} in flight"),
                "ns a call",
                layered,
                "bare echo",
                bare,
            );
            let case = format!("Translate, {way:?}, {flight} in flight: the daemon's CPU");
            let [ours, known, layered, bare] = cpus;
            self.report.add(&case, "ns a call", ours.clone(), "echo behind the same layers", layered);
            self.report.add(&case, "ns a call", ours.clone(), "bare echo", bare);
            self.report.add(&case, "ns a call", ours, "the answer known, same layers", known);
        }
    }

    /// Echoes of one column, by how its bytes become a message and back.
    async fn codecs(&mut self) {
        let channel = self.other.connect(Who::Layered, Way::Unix).await;
        let words = Shape::Hot.batch(0);
        let column: Columned = Columned { head: (), column: words.iter().copied().collect() };
        let bytes = Payload { data: Bytes::copy_from_slice(column.column.as_bytes()) };
        let words = Words { words };
        let mut walls = [Vec::new(), Vec::new(), Vec::new()];
        let mut cpus = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..self.rounds {
            for which in 0..3 {
                let (used, start) = (self.other.cpu(), Instant::now());
                for _ in 0..BATCHES {
                    match which {
                        0 => drop(echo::ask(&channel, COLUMN, column.clone()).await),
                        1 => drop(echo::ask(&channel, BYTES, bytes.clone()).await),
                        _ => drop(echo::ask(&channel, WORDS, words.clone()).await),
                    }
                }
                walls[which].push(nanos(start.elapsed()) / ROUND);
                cpus[which].push((self.other.cpu() - used) / ROUND);
            }
        }
        for (what, [column, bytes, words]) in [("wall", walls), ("server CPU", cpus)] {
            let case = format!("echo of 65536, {what}, column");
            self.report.add(&case, "ns an address", column.clone(), "prost `bytes`", bytes);
            self.report.add(&case, "ns an address", column, "prost `Vec<u64>`", words);
        }
    }

    async fn batches(&mut self, shape: Shape, way: Way) {
        let daemon = self.other.connect(Who::Daemon, way).await;
        let layered = self.other.connect(Who::Layered, way).await;
        let client = TranslationServiceClient::new(daemon).max_decoding_message_size(LARGEST);
        let requests = shape.requests();
        let echoes: Vec<Payload> = requests
            .iter()
            .map(|request| Payload { data: Bytes::copy_from_slice(request.column.as_bytes()) })
            .collect();
        let mut rows = Rounds::default();
        for _ in 0..self.rounds {
            rows.in_process.push(self.other.in_process(shape));
            for (flight, walls, cpus) in
                [(1, &mut rows.alone, &mut rows.alone_cpu), (3, &mut rows.several, &mut rows.several_cpu)]
            {
                let (used, start) = (self.other.cpu(), Instant::now());
                batch_round(&client, &requests, flight).await;
                walls.push(nanos(start.elapsed()) / ROUND);
                cpus.push((self.other.cpu() - used) / ROUND);
            }
            let (used, start) = (self.other.cpu(), Instant::now());
            stream_round(&client, &requests).await;
            rows.stream.push(nanos(start.elapsed()) / ROUND);
            rows.stream_cpu.push((self.other.cpu() - used) / ROUND);
            let start = Instant::now();
            echo_round(&layered, &echoes).await;
            rows.echo.push(nanos(start.elapsed()) / ROUND);
            let start = Instant::now();
            echo_stream_round(&layered, &echoes).await;
            rows.echo_stream.push(nanos(start.elapsed()) / ROUND);
        }
        self.tell(shape, way, rows);
    }

    fn tell(&mut self, shape: Shape, way: Way, rows: Rounds) {
        let name = |what: &str| format!("{what}, {}, {way:?}", shape.name());
        let unit = "ns an address";
        let walk = median(&rows.in_process);
        for (what, wall, cpu, echo) in [
            (
                "BatchTranslate, 1 in flight",
                rows.alone,
                rows.alone_cpu,
                Some(("echo of the same column", rows.echo)),
            ),
            ("BatchTranslate, 3 in flight", rows.several, rows.several_cpu, None),
            (
                "StreamTranslate",
                rows.stream,
                rows.stream_cpu,
                Some(("echo of a stream of the same columns", rows.echo_stream)),
            ),
        ] {
            self.report.add(name(what), unit, wall.clone(), "in process", rows.in_process.clone());
            if let Some((peer, echo)) = echo {
                self.report.add(name(what), unit, wall, peer, echo);
            }
            let beyond = cpu.iter().map(|cpu| cpu - walk).collect();
            let case = name(&format!("{what}: CPU beyond the walk"));
            self.report.add(case, unit, beyond, "3.5 ns", vec![3.5]);
        }
    }
}

#[derive(Default)]
struct Rounds {
    in_process: Vec<f64>,
    alone: Vec<f64>,
    alone_cpu: Vec<f64>,
    several: Vec<f64>,
    several_cpu: Vec<f64>,
    stream: Vec<f64>,
    stream_cpu: Vec<f64>,
    echo: Vec<f64>,
    echo_stream: Vec<f64>,
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// Makes `calls` calls, `flight` at a time: nanoseconds a call.
async fn in_flight<F: Future<Output = ()> + Send + 'static>(
    flight: usize,
    calls: usize,
    call: impl Fn() -> F,
) -> f64 {
    let start = Instant::now();
    let mut set = JoinSet::new();
    for _ in 0..flight {
        set.spawn(call());
    }
    for _ in flight..calls {
        set.join_next().await.unwrap().unwrap();
        set.spawn(call());
    }
    set.join_all().await;
    nanos(start.elapsed()) / calls as f64
}

async fn batch_round(
    client: &TranslationServiceClient<Channel>,
    requests: &[v1::BatchTranslateRequest],
    flight: usize,
) {
    let mut set = JoinSet::new();
    for request in requests {
        if set.len() == flight {
            set.join_next().await.unwrap().unwrap();
        }
        let (mut client, request) = (client.clone(), request.clone());
        set.spawn(async move {
            let answer = client.batch_translate(request).await.unwrap().into_inner();
            assert_eq!((answer.column.len(), answer.head.fault_count), (Some(BATCH), 0));
        });
    }
    set.join_all().await;
}

async fn stream_round(client: &TranslationServiceClient<Channel>, requests: &[v1::BatchTranslateRequest]) {
    let requests: Vec<_> = (0..)
        .zip(requests)
        .map(|(sequence, batch)| v1::StreamTranslateRequest { sequence, batch: Some(batch.clone()) })
        .collect();
    let mut answers =
        client.clone().stream_translate(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut answered = 0;
    while let Some(answer) = answers.message().await.unwrap() {
        assert_eq!(answer.answer.unwrap().column.len(), Some(BATCH));
        answered += 1;
    }
    assert_eq!(answered, BATCHES);
}

async fn echo_round(channel: &Channel, payloads: &[Payload]) {
    for payload in payloads {
        assert_eq!(echo::ask(channel, BYTES, payload.clone()).await.data.len(), payload.data.len());
    }
}

async fn echo_stream_round(channel: &Channel, payloads: &[Payload]) {
    let mut answers = echo::stream(channel, tokio_stream::iter(payloads.to_vec())).await;
    for payload in payloads {
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.data.len(), payload.data.len());
    }
    assert_eq!(answers.message().await.unwrap(), None);
}
