//! Stopping with a call in flight.

use std::time::Instant;

use pagewalk_proto::v1;
use tokio::time::timeout;

use crate::bed::{Bed, SOON, config, page, read};
use crate::stuck::{self, Gate, OpenAtEnd};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_in_flight_is_answered() {
    let gate = Gate::default();
    let _end = OpenAtEnd(gate.clone());
    let config = pagewalkd::config::Config { max_calls: 1, grace: SOON, ..config() };
    let bed = Bed::of(config, vec![stuck::machine("stuck", &gate)]).await;
    let (address, mut client) = (bed.address, bed.translation());
    let in_flight = tokio::spawn(async move {
        let sync =
            v1::TranslateRequest { freshness: v1::Freshness::Sync.into(), ..read(0xffff_8000_0001_0000) };
        client.translate(sync).await
    });
    // There is one place, and once it is taken the call is in flight.
    let end = Instant::now() + SOON;
    while bed.translate(read(0)).await.is_ok() {
        assert!(Instant::now() < end, "the call does not begin");
    }
    let ended = bed.begin_stop();
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        assert!(Instant::now() < end, "it still takes connections");
        tokio::task::yield_now().await;
    }
    assert!(!ended.is_finished());
    gate.open();
    let answer = timeout(SOON, in_flight).await.unwrap().unwrap().unwrap().into_inner();
    assert_eq!(page(&answer).gpa, 0x1_0000);
    timeout(SOON, ended).await.unwrap().unwrap().unwrap();
}
