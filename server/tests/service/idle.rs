//! Clients that hold a call and do nothing: they are told so, and their places are free again.
//!
//! Nobody waits for minutes here: the clock of the runtime jumps, for daemon and clients alike.

use std::net::SocketAddr;
use std::time::Duration;

use pagewalk_proto::v1;
use pagewalk_proto::v1::mapping_service_client::MappingServiceClient;
use pagewalkd::config::Config;
use prost::bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::{advance, pause, resume, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::batch::batch;
use crate::bed::{Bed, SOON, config, connect, refusal};
use crate::mapping::{all_of_the_bomb, bomb};
use crate::stream::{STREAMS, open};

/// A little longer than a client may do nothing.
const IDLE: Duration = Duration::from_secs(605);
/// A little longer than a request may be sent in part.
const PARTIAL: Duration = Duration::from_secs(35);

fn stalled() -> (Code, String) {
    (Code::DeadlineExceeded, "STREAM_STALLED".to_owned())
}

fn busy() -> (Code, String) {
    (Code::ResourceExhausted, "BUSY".to_owned())
}

async fn jump(time: Duration) {
    // What was sent has arrived, and waits.
    sleep(Duration::from_millis(300)).await;
    pause();
    advance(time).await;
    resume();
    // What was due is done.
    sleep(Duration::from_millis(300)).await;
}

#[tokio::test]
async fn streams_that_never_send_give_their_places_back() {
    let bed = Bed::plain().await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let channel = connect(bed.address).await;
        for _ in 0..STREAMS / 2 {
            streams.push(open(channel.clone()).await.unwrap());
        }
    }
    assert_eq!(refusal(bed.translation().batch_translate(batch(&[0])).await), busy());
    jump(IDLE).await;
    bed.translation().batch_translate(batch(&[0])).await.expect("a place");
    for (requests, mut answers) in streams {
        assert_eq!(refusal(timeout(SOON, answers.message()).await.unwrap()), stalled());
        drop(requests);
    }
    bed.stop().await;
}

#[tokio::test]
async fn one_connection_has_half_of_the_bulk_calls() {
    let bed = Bed::plain().await;
    let greedy = connect(bed.address).await;
    let mut streams = Vec::new();
    while let Ok(stream) = open(greedy.clone()).await {
        streams.push(stream);
        assert!(streams.len() <= STREAMS / 2);
    }
    assert_eq!(streams.len(), STREAMS / 2);
    assert_eq!(refusal(open(greedy).await.map(drop)), busy());
    bed.translation().batch_translate(batch(&[0])).await.expect("a place for others");
    drop(streams);
    bed.stop().await;
}

async fn map(channel: &Channel) -> Result<Streaming<v1::ListMappingsResponse>, Status> {
    let mut client = MappingServiceClient::new(channel.clone());
    Ok(client.list_mappings(all_of_the_bomb()).await?.into_inner())
}

#[tokio::test]
async fn streams_that_are_not_read_leave_room_and_end() {
    let bed = Bed::of(Config { max_calls: 16, ..config() }, vec![bomb()]).await;
    // A small window: what is on the way to the client is soon as much as it takes.
    let narrow = Channel::from_shared(format!("http://{}", bed.address)).unwrap();
    let narrow = narrow.initial_stream_window_size(1 << 16).connect().await.unwrap();
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(map(&narrow).await.unwrap());
    }
    assert_eq!(refusal(map(&bed.channel).await.map(drop)), busy());
    // There are places for others.
    bed.translation().batch_translate(batch(&[0])).await.expect("a place for a batch");
    bed.unharmed().await;
    let health = HealthClient::new(bed.channel.clone()).check(HealthCheckRequest::default()).await;
    assert_eq!(health.unwrap().into_inner().status, 1);

    jump(IDLE).await;
    // Who reads now finds what there was, and why there is no more of it.
    let mut late = unread.pop().unwrap();
    let end = loop {
        match timeout(SOON, late.message()).await.unwrap() {
            Ok(part) => assert!(!part.expect("a reason before the end").last),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal(Err::<(), _>(end)), stalled());
    map(&bed.channel).await.expect("its place");

    // Who does not read even then loses the connection, and with it all that is kept for it.
    jump(IDLE).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(map(&bed.channel).await.expect("a place"));
    }
    for mut stream in unread {
        let cut_off = async {
            while stream.message().await?.is_some() {}
            Ok::<_, Status>(())
        };
        timeout(SOON, cut_off).await.unwrap().expect_err("the connection is closed");
    }
    drop(streams);
    bed.stop().await;
}

/// Watches may say nothing for days: nobody else's place is theirs.
#[tokio::test]
async fn watches_leave_room() {
    let bed = Bed::of(Config { max_calls: 16, ..config() }, vec![bomb()]).await;
    let mut watches = Vec::new();
    for _ in 0..4 {
        watches.push(bed.walker().watch_walker_state(v1::WatchWalkerStateRequest::default()).await.unwrap());
    }
    let another = bed.walker().watch_walker_state(v1::WatchWalkerStateRequest::default()).await;
    assert_eq!(refusal(another.map(drop)), busy());
    map(&bed.channel).await.expect("a place for a map");
    bed.translation().batch_translate(batch(&[0])).await.expect("a place for a batch");
    bed.unharmed().await;
    drop(watches);
    bed.stop().await;
}

/// Sends the beginning of a request, and gives the status of the answer.
async fn half_sent(address: SocketAddr, method: &str) -> Status {
    let (mut client, connection) =
        h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
    let connection = tokio::spawn(connection);
    let head = http::Request::post(format!("http://{address}/pagewalk.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (answer, mut body) = client.send_request(head, false).unwrap();
    // A message of 1000 bytes, of which four come.
    body.send_data(Bytes::from_static(&[0, 0, 0, 3, 0xe8, 1, 2, 3, 4]), false).unwrap();
    let answer = answer.await.unwrap();
    connection.abort();
    Status::from_header_map(answer.headers()).expect("a status in the headers")
}

#[tokio::test]
async fn requests_that_never_come_whole_end() {
    let bed = Bed::plain().await;
    for method in
        ["TranslationService/Translate", "TranslationService/BatchTranslate", "VcpuService/ListVcpus"]
    {
        let call = tokio::spawn(half_sent(bed.address, method));
        jump(PARTIAL).await;
        let status = timeout(SOON, call).await.expect("an answer").unwrap();
        assert_eq!(refusal(Err::<(), _>(status)), stalled(), "{method}");
    }
    bed.stop().await;
}
