//! `WatchWalkerState`.

use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use pagewalk_proto::v1::walker_service_client::WalkerServiceClient;
use pagewalkd::machine::MachineSpec;
use prost::Message as _;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::bed::{Bed, SOON, config, from_plain, nested_off, nested_on, refusal};

type Updates = Streaming<v1::GetWalkerStateResponse>;

async fn watch(bed: &Bed, request: v1::WatchWalkerStateRequest) -> Updates {
    bed.walker().watch_walker_state(request).await.unwrap().into_inner()
}

async fn next(updates: &mut Updates) -> v1::GetWalkerStateResponse {
    timeout(SOON, updates.message()).await.expect("a message in time").unwrap().expect("a message")
}

fn generation(state: &v1::GetWalkerStateResponse) -> u64 {
    state.provenance.as_ref().unwrap().generation
}

async fn toggle(bed: &Bed, times: usize) {
    for time in 0..times {
        let request = if time % 2 == 0 { nested_on() } else { nested_off() };
        bed.walker().set_nested_mode(request).await.unwrap();
    }
}

#[tokio::test]
async fn begins_with_now_and_follows_changes() {
    let bed = Bed::plain().await;
    let mut updates = watch(&bed, v1::WatchWalkerStateRequest::default()).await;
    let first = next(&mut updates).await;
    from_plain(first.provenance.as_ref());
    assert_eq!((generation(&first), first.ngpa_walk), (1, None));
    for generation_wanted in 2..6 {
        let request = if generation_wanted % 2 == 0 { nested_on() } else { nested_off() };
        let set = bed.walker().set_nested_mode(request).await.unwrap().into_inner().state.unwrap();
        let state = next(&mut updates).await;
        assert_eq!(generation(&state), generation_wanted);
        assert_eq!(
            (state.gva_walk, state.ngpa_walk, state.nested),
            (set.gva_walk, set.ngpa_walk, set.nested)
        );
    }
    // What leaves the walkers as they are is no news: the next message is that of the next change.
    let registers = Some(v1::Registers { rax: Some(1), ..Default::default() });
    let request = v1::SetRegistersRequest { registers, ..Default::default() };
    bed.vcpu().set_registers(request).await.unwrap();
    toggle(&bed, 1).await;
    assert_eq!(generation(&next(&mut updates).await), 6);
    drop(updates);
    bed.stop().await;
}

#[tokio::test]
async fn ends_after_max_updates() {
    let bed = Bed::plain().await;
    let request = v1::WatchWalkerStateRequest { max_updates: Some(2), ..Default::default() };
    let mut updates = watch(&bed, request).await;
    next(&mut updates).await;
    toggle(&bed, 1).await;
    next(&mut updates).await;
    assert_eq!(timeout(SOON, updates.message()).await.unwrap().unwrap(), None, "the stream ends well");
    bed.stop().await;
}

#[tokio::test]
async fn keeps_its_interval() {
    const INTERVAL: Duration = Duration::from_millis(300);
    let bed = Bed::plain().await;
    let min_interval = Some(INTERVAL.try_into().unwrap());
    let request = v1::WatchWalkerStateRequest { min_interval, ..Default::default() };
    let mut updates = watch(&bed, request).await;
    next(&mut updates).await;
    let start = Instant::now();
    toggle(&bed, 20).await;
    let second = next(&mut updates).await;
    // The first was sent a little before it was received.
    assert!(start.elapsed() > INTERVAL / 2, "{:?}", start.elapsed());
    assert_eq!(generation(&second), 21, "those in between are skipped");
    drop(updates);
    bed.stop().await;
}

/// The reader does not read while thousands of generations go by: it gets no more old ones than the buffers on the way hold, and
/// then the newest. Those are the stream's window, and what the daemon's HTTP/2 keeps for a stream before it stops asking.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_skips() {
    const GENERATIONS: usize = 2000;
    const WINDOW: u32 = 1 << 16;
    const SEND_BUFFER: usize = 400 << 10;
    // A long name makes long messages, which fill buffers soon.
    let spec: MachineSpec = "demo:plain".parse().unwrap();
    let named = MachineSpec { id: "m".repeat(2000), ..spec }.open().unwrap();
    let bed = Bed::of(config(), vec![named]).await;
    let small = Channel::from_shared(format!("http://{}", bed.address))
        .unwrap()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect()
        .await
        .unwrap();
    let watch = v1::WatchWalkerStateRequest::default();
    let mut updates = WalkerServiceClient::new(small).watch_walker_state(watch).await.unwrap().into_inner();
    let smallest = next(&mut updates).await.encoded_len();
    let room = (WINDOW as usize + SEND_BUFFER) / smallest;
    assert!(room < GENERATIONS / 5, "the buffers hold {room} messages: it takes more of them to fill these");
    toggle(&bed, GENERATIONS).await;
    let newest = GENERATIONS as u64 + 1;
    let (mut last, mut messages) = (1, 0);
    while last < newest {
        let found = generation(&next(&mut updates).await);
        assert!(found > last, "{found} after {last}");
        last = found;
        messages += 1;
    }
    assert_eq!(last, newest);
    // One more was being made, one waited for its place, and one was being sent.
    assert!(messages <= room + 3, "{messages} of {room}");
    drop(updates);
    bed.stop().await;
}

#[tokio::test]
async fn shutdown_ends_it_with_unavailable() {
    let bed = Bed::plain().await;
    let mut updates = watch(&bed, v1::WatchWalkerStateRequest::default()).await;
    next(&mut updates).await;
    let ended = bed.begin_stop();
    let end = timeout(SOON, updates.message()).await.unwrap();
    assert_eq!(refusal(end), (Code::Unavailable, "SHUTTING_DOWN".to_owned()));
    timeout(SOON, ended).await.unwrap().unwrap().unwrap();
}

/// One place in the daemon: a stream that nobody reads any more has given it back.
#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let bed = Bed::with(pagewalkd::config::Config { max_calls: 1, ..config() }, &["demo:plain"]).await;
    let mut updates = watch(&bed, v1::WatchWalkerStateRequest::default()).await;
    next(&mut updates).await;
    let busy = bed.walker().watch_walker_state(v1::WatchWalkerStateRequest::default()).await;
    assert_eq!(refusal(busy), (Code::ResourceExhausted, "BUSY".to_owned()));
    drop(updates);
    let end = Instant::now() + SOON;
    while let Err(status) = bed.translate(crate::bed::read(0)).await {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(Instant::now() < end, "the place is never free again");
        tokio::task::yield_now().await;
    }
    bed.stop().await;
}

#[tokio::test]
async fn refusals() {
    let bed = Bed::plain().await;
    let invalid = (Code::InvalidArgument, "INVALID_FIELD".to_owned());
    let seconds = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    for request in [
        v1::WatchWalkerStateRequest { max_updates: Some(0), ..Default::default() },
        v1::WatchWalkerStateRequest { min_interval: seconds(-1, 0), ..Default::default() },
        v1::WatchWalkerStateRequest { min_interval: seconds(3600, 1), ..Default::default() },
        v1::WatchWalkerStateRequest { min_interval: seconds(i64::MAX, i32::MAX), ..Default::default() },
        v1::WatchWalkerStateRequest { min_interval: seconds(i64::MIN, i32::MIN), ..Default::default() },
    ] {
        let said = format!("{request:?}");
        assert_eq!(refusal(bed.walker().watch_walker_state(request).await), invalid, "{said}");
    }
    bed.unharmed().await;
    bed.stop().await;
}
