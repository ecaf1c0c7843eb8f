//! `StreamTranslate`: batches one after another, and clients that do not play along.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use pagewalkd::machine::{Health, LocalSource, Machine};
use pagewalkd::vcpu::{Backend, Exit, RegisterChanges, Registers, Vcpu, VcpuError};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::batch::batch;
use crate::bed::{Bed, SOON, config, connect, open as open_machine, refusal};

type Answers = Streaming<v1::StreamTranslateResponse>;
type Requests = mpsc::Sender<v1::StreamTranslateRequest>;

/// The most streams and batches that are served at a time.
pub(crate) const STREAMS: usize = 128;

fn request(sequence: u64, addresses: &[u64]) -> v1::StreamTranslateRequest {
    v1::StreamTranslateRequest { sequence, batch: Some(batch(addresses)) }
}

pub(crate) async fn open(channel: Channel) -> Result<(Requests, Answers), Status> {
    let (requests, stream) = mpsc::channel(1);
    let mut client = v1::translation_service_client::TranslationServiceClient::new(channel)
        .max_decoding_message_size(16 << 20);
    let answers = client.stream_translate(ReceiverStream::new(stream)).await?.into_inner();
    Ok((requests, answers))
}

async fn next(answers: &mut Answers) -> Result<v1::StreamTranslateResponse, Status> {
    Ok(timeout(SOON, answers.message()).await.expect("an answer")?.expect("an answer"))
}

#[tokio::test]
async fn each_request_is_answered_in_order() {
    let bed = Bed::plain().await;
    let text = bed.landmark("kernel-text");
    let (requests, mut answers) = open(bed.channel.clone()).await.unwrap();
    for (sequence, count) in [(7, 1), (7, 5), (0, 4096), (u64::MAX, 10_001)] {
        let column: Vec<u64> = (0..count).map(|at| text + at % 0x1000).collect();
        requests.send(request(sequence, &column)).await.unwrap();
        let response = next(&mut answers).await.unwrap();
        assert_eq!(response.sequence, sequence);
        let answer = response.answer.unwrap();
        let alone = bed.translation().batch_translate(batch(&column)).await.unwrap().into_inner();
        assert_eq!(answer.column, alone.column);
        assert_eq!(answer.column.len(), Some(column.len()));
    }
    drop(requests);
    assert!(answers.message().await.unwrap().is_none(), "the stream ends when the client has no more to ask");
    bed.stop().await;
}

#[tokio::test]
async fn a_refusal_ends_it_after_the_answers_before() {
    const FIELD: (Code, &str) = (Code::InvalidArgument, "INVALID_FIELD");
    let bed = Bed::plain().await;
    let none = v1::StreamTranslateRequest { sequence: 1, batch: None };
    for bad in [none, request(1, &[]), request(1, &vec![0; (1 << 18) + 1])] {
        let (requests, mut answers) = open(bed.channel.clone()).await.unwrap();
        requests.send(request(0, &[0])).await.unwrap();
        requests.send(bad).await.unwrap();
        assert_eq!(next(&mut answers).await.unwrap().sequence, 0);
        assert_eq!(refusal(next(&mut answers).await), (FIELD.0, FIELD.1.to_owned()));
    }
    let (requests, mut answers) = open(bed.channel.clone()).await.unwrap();
    requests.send(request(0, &vec![0; 1 << 19])).await.unwrap();
    let answer = refusal(next(&mut answers).await);
    assert_eq!(answer, (Code::ResourceExhausted, "MESSAGE_TOO_LARGE".to_owned()));
    bed.unharmed().await;
    bed.stop().await;
}

/// A deadline is the stream's; and a stream ends when the daemon does, though its client says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_never_sends() {
    let bed = Bed::plain().await;
    let (requests, stream) = mpsc::channel(1);
    let mut limited = Request::new(ReceiverStream::new(stream));
    limited.set_timeout(Duration::from_millis(300));
    let mut answers = bed.translation().stream_translate(limited).await.unwrap().into_inner();
    let code = timeout(SOON, answers.message()).await.expect("the stream ends").unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    drop(requests);
    let (_requests, mut answers) = open(bed.channel.clone()).await.unwrap();
    assert!(timeout(Duration::from_millis(200), answers.message()).await.is_err(), "nothing is said");
    bed.unharmed().await;
    let stopped = bed.begin_stop();
    assert_eq!(refusal(next(&mut answers).await), (Code::Unavailable, "SHUTTING_DOWN".to_owned()));
    timeout(SOON, stopped).await.expect("the daemon ends").unwrap().unwrap();
}

/// Whoever does not read is not read from: the daemon takes in what its windows hold and a few batches, and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_never_reads() {
    let bed = Bed::plain().await;
    let (requests, answers) = open(connect(bed.address).await).await.unwrap();
    let large = vec![bed.landmark("kernel-text"); 1 << 18];
    let mut sent = 0;
    while timeout(Duration::from_secs(1), requests.send(request(sent, &large))).await.is_ok_and(|r| r.is_ok())
    {
        sent += 1;
        assert!(sent < 64, "128 MiB are taken in, and nobody has read an answer");
    }
    bed.unharmed().await;
    drop(answers);
    bed.unharmed().await;
    bed.stop().await;
}

/// One answer is on its way to the client and one waits: a third is not made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_two_answers() {
    let made = Arc::new(AtomicUsize::new(0));
    let bed = Bed::of(config(), vec![counting(&made)]).await;
    // Registers that are asked for anew tell of each answer that is begun.
    let large = vec![bed.landmark("kernel-text"); 1 << 18];
    let mut request = request(0, &large);
    request.batch.as_mut().unwrap().head.freshness = v1::Freshness::Sync.into();
    let narrow = Channel::from_shared(format!("http://{}", bed.address)).unwrap();
    // One answer fits, and the beginning of another.
    let window = (2 << 20) + (1 << 16);
    let narrow = narrow.initial_stream_window_size(window).initial_connection_window_size(8 << 20);
    let narrow = narrow.connect().await.unwrap();
    let before = made.load(Ordering::Relaxed);
    let (requests, answers) = open(narrow).await.unwrap();
    let sending = tokio::spawn(async move { while requests.send(request.clone()).await.is_ok() {} });
    let end = Instant::now() + SOON;
    while made.load(Ordering::Relaxed) < before + 2 {
        assert!(Instant::now() < end, "nothing is answered");
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(made.load(Ordering::Relaxed) - before, 2);
    drop(answers);
    sending.abort();
}

/// The demo machine, with a vCPU that counts how often its registers are read.
fn counting(reads: &Arc<AtomicUsize>) -> Machine {
    struct Counting(Registers, Arc<AtomicUsize>);
    impl Backend for Counting {
        fn static_reason(&self) -> Option<String> {
            Some("it is plain memory".into())
        }
        fn run(&mut self) -> Exit {
            Exit::Halted
        }
        fn step(&mut self) -> Result<Exit, VcpuError> {
            Err(VcpuError::Unsupported("no steps here".into()))
        }
        fn registers(&mut self) -> Result<Registers, String> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Ok(self.0.clone())
        }
        fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
            Err(VcpuError::Unsupported("registers stay".into()))
        }
    }
    let demo = open_machine("demo:plain");
    let source = demo.source();
    let registers = demo.vcpu(0).unwrap().latest().registers.clone();
    let vcpu = Vcpu::spawn("demo", 0, source.cpu(), Counting(registers, Arc::clone(reads))).unwrap();
    let source = LocalSource {
        kind: "counting",
        description: "a vCPU that counts".into(),
        vcpus: vec![vcpu],
        memory: source.memory(),
        capabilities: source.capabilities().clone(),
        cpu: source.cpu(),
        landmarks: source.landmarks().to_vec(),
        health: Health::default(),
    };
    Machine::new("demo", Arc::new(source))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_reset_half_way() {
    let bed = Bed::plain().await;
    let large = vec![bed.landmark("kernel-text"); 1 << 18];
    // Three times as many as there are places: each must be given back.
    for at in 0..3 * STREAMS {
        let (requests, mut answers) = until_there_is_a_place(&bed).await;
        requests.send(request(0, if at % 16 == 0 { &large } else { &large[..100] })).await.unwrap();
        if at % 3 == 0 {
            next(&mut answers).await.unwrap();
        }
    }
    bed.unharmed().await;
    bed.stop().await;
}

async fn until_there_is_a_place(bed: &Bed) -> (Requests, Answers) {
    let end = Instant::now() + SOON;
    loop {
        match open(bed.channel.clone()).await {
            Ok(opened) => return opened,
            Err(status) => assert!(Instant::now() < end, "the places are never free again: {status:?}"),
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_at_once() {
    let bed = Bed::plain().await;
    let text = bed.landmark("kernel-text");
    let mut held = Vec::new();
    let mut refused = 0;
    for connection in 0..5 {
        let channel = connect(bed.address).await;
        for _ in 0..200 {
            match open(channel.clone()).await {
                Ok(opened) => held.push(opened),
                Err(status) => {
                    assert_eq!(
                        refusal(Err::<(), _>(status)),
                        (Code::ResourceExhausted, "BUSY".to_owned()),
                        "{connection}"
                    );
                    refused += 1;
                }
            }
        }
    }
    assert_eq!((held.len(), refused), (STREAMS, 1000 - STREAMS));
    let busy = refusal(bed.translation().batch_translate(batch(&[text])).await);
    assert_eq!(busy, (Code::ResourceExhausted, "BUSY".to_owned()));
    // Small calls have places of their own, and the streams that are open work.
    bed.unharmed().await;
    for (requests, answers) in &mut held {
        requests.send(request(1, &[text])).await.unwrap();
        assert_eq!(next(answers).await.unwrap().answer.unwrap().column.len(), Some(1));
    }
    held.clear();
    until_there_is_a_place(&bed).await;
    bed.stop().await;
}
