//! Who waits for whom: readers of a vCPU that is being controlled, small calls beside a stream of batches, and the memory that
//! a long stream takes.
//!
//! Readers: a thread a processor takes the vCPU's last snapshot and walks by it, again and again. Their rates are by the
//! processor time that they had: the control calls and the vCPU take theirs from the same processors.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[path = "../bed/mod.rs"]
mod bed;
mod churn;
#[path = "../../tests/service/stuck.rs"]
#[allow(dead_code, reason = "each uses its part")]
mod stuck;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bed::child::{Other, Way, Who, serve_if_asked};
use bed::guest::{BATCH, Shape};
use bed::kept::is_test;
use bed::report::Report;
use churn::{PACE, Reads, read};
use pagewalk_proto::v1;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalkd::machine::Machine;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::{StreamExt as _, StreamMap};
use tonic::transport::Channel;

const ABOUT: &str = "Written by `cargo bench -p pagewalkd --bench readers`; `benches/readers/main.rs` says what is compared. \
The ratio is the first figure over the second.\nNothing is kept on a processor of its own: daemon and clients share the machine.";

fn main() {
    serve_if_asked();
    let short = is_test();
    let mut report = Report::new("readers", "Readers", ABOUT);
    lock_freedom(&mut report, short);
    let other = Other::start(&Shape::ALL[..2], None);
    small_calls(&mut report, &other, short);
    long_stream(&mut report, &other, short);
    report.finish(!short);
}

fn lock_freedom(report: &mut Report, short: bool) {
    let demo = bed::open("demo");
    println!("{}", demo.source().description());
    let gate = stuck::Gate::default();
    let _end = stuck::OpenAtEnd(gate.clone());
    let stuck = stuck::machine("stuck", &gate);
    let (rounds, time) = if short { (1, 50) } else { (15, 400) };
    let time = Duration::from_millis(time);
    let readers = thread::available_parallelism().map_or(1, usize::from);
    let (mut quiet, mut churned, mut still, mut hung) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        quiet.push(read(&demo, readers, time, false));
        churned.push(read(&demo, readers, time, true));
        still.push(read(&stuck, readers, time, false));
        hung.push(beside_a_call_that_hangs(&stuck, readers, time));
    }
    let of = |reads: &[Reads], what: fn(&Reads) -> f64| reads.iter().map(what).collect::<Vec<_>>();
    let case = |what: &str| format!("{readers} readers, {what}");
    let by_processor = |reads: &Reads| reads.per_second / 1e6;
    let by_clock = |reads: &Reads| reads.by_the_clock / 1e6;
    let unit = "million reads a second of processor";
    report.add(
        case(&format!("vCPU controlled {PACE} times a second")),
        unit,
        of(&churned, by_processor),
        "undisturbed",
        of(&quiet, by_processor),
    );
    report.add(
        case("the same by the clock"),
        "million reads a second",
        of(&churned, by_clock),
        "undisturbed",
        of(&quiet, by_clock),
    );
    report.add(
        case("beside a control call that hangs"),
        unit,
        of(&hung, by_processor),
        "undisturbed",
        of(&still, by_processor),
    );
    report.add(
        "control calls answered",
        "a second",
        of(&churned, |reads| reads.controls),
        "asked for",
        vec![PACE.into()],
    );
    let generations = of(&churned, |reads| reads.generations as f64 / 0.4);
    report.add("generations published", "a second", generations, "1,000", vec![1000.0]);
}

fn beside_a_call_that_hangs(stuck: &Machine, readers: usize, time: Duration) -> Reads {
    let vcpu = Arc::clone(stuck.vcpu(0).unwrap());
    let deadline = Instant::now() + time + Duration::from_millis(100);
    let call = thread::spawn(move || {
        let answer = runtime().block_on(vcpu.pause(deadline));
        assert!(answer.is_err(), "the call hung until its deadline");
    });
    let reads = read(stuck, readers, time, false);
    call.join().unwrap();
    reads
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Latencies of unary calls, alone and beside streams of batches that never pause.
fn small_calls(report: &mut Report, other: &Other, short: bool) {
    let calls = if short { 50 } else { 4000 };
    let alone = latencies(other, calls);
    for streams in [1, 8] {
        let stop = AtomicBool::new(false);
        let answered = AtomicU64::new(0);
        let (beside, elapsed) = thread::scope(|scope| {
            scope.spawn(|| saturate(other, streams, &stop, &answered));
            while answered.load(Ordering::Relaxed) < 4 {
                thread::sleep(Duration::from_millis(1));
            }
            let (before, start) = (answered.load(Ordering::Relaxed), Instant::now());
            let beside = latencies(other, calls);
            let elapsed = start.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            (beside, (answered.load(Ordering::Relaxed) - before) as f64 * BATCH as f64 / elapsed / 1e6)
        });
        println!("{streams} streams: {elapsed:.1} million addresses a second meanwhile");
        for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            let of = |latencies: &[f64]| vec![latencies[(latencies.len() as f64 * share) as usize]];
            let case = format!("Translate, Unix, {name}, beside {streams} saturating streams");
            report.add(case, "us", of(&beside), "alone", of(&alone));
        }
    }
}

/// Microseconds of `calls` calls, one after another, in ascending order.
fn latencies(other: &Other, calls: usize) -> Vec<f64> {
    let mut latencies: Vec<f64> = runtime().block_on(async {
        let mut client = TranslationServiceClient::new(other.connect(Who::Daemon, Way::Unix).await);
        let mut latencies = Vec::new();
        for at in 0..calls {
            let request = Shape::Hot.single(at);
            let start = Instant::now();
            client.translate(request).await.unwrap();
            latencies.push(start.elapsed().as_nanos() as f64 / 1000.0);
        }
        latencies
    });
    latencies.sort_by(f64::total_cmp);
    latencies
}

fn saturate(other: &Other, streams: usize, stop: &AtomicBool, answered: &AtomicU64) {
    runtime().block_on(async {
        let channel = other.connect(Who::Daemon, Way::Unix).await;
        let requests = Arc::new(Shape::Dense.requests());
        // Whichever has an answer: read in turn, one that runs ahead would fill the connection's window while another is waited for.
        let mut all = StreamMap::new();
        for stream in 0..streams {
            all.insert(stream, open(&channel, Arc::clone(&requests), u64::MAX).await);
        }
        while !stop.load(Ordering::Relaxed) {
            let (_, answer) = all.next().await.unwrap();
            answer.unwrap();
            answered.fetch_add(1, Ordering::Relaxed);
        }
    });
}

async fn open(
    channel: &Channel,
    requests: Arc<Vec<v1::BatchTranslateRequest>>,
    count: u64,
) -> tonic::Streaming<v1::StreamTranslateResponse> {
    let requests = (0..count).map(move |sequence| v1::StreamTranslateRequest {
        sequence,
        batch: Some(requests[sequence as usize % requests.len()].clone()),
    });
    let mut client = TranslationServiceClient::new(channel.clone());
    client.stream_translate(tokio_stream::iter(requests)).await.unwrap().into_inner()
}

/// What the daemon's memory grows by while 64 Mi addresses go through one stream.
fn long_stream(report: &mut Report, other: &Other, short: bool) {
    let batches = if short { 4 } else { 1024 };
    other.reset_peak();
    let before = other.memory("VmRSS");
    let start = Instant::now();
    runtime().block_on(async {
        let channel = other.connect(Who::Daemon, Way::Unix).await;
        let mut answers = open(&channel, Arc::new(Shape::Dense.requests()), batches).await;
        let mut sequence = 0;
        while let Some(answer) = answers.message().await.unwrap() {
            assert_eq!(answer.sequence, sequence);
            sequence += 1;
        }
        assert_eq!(sequence, batches);
    });
    let rate = batches as f64 * BATCH as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("{} addresses at {rate:.1} million a second", batches * BATCH as u64);
    let peak = other.memory("VmHWM");
    report.add(
        format!("peak resident memory, stream of {} Mi addresses", (batches * BATCH as u64) >> 20),
        "MiB",
        vec![peak as f64 / 1024.0],
        "before it, guests and all",
        vec![before as f64 / 1024.0],
    );
}
