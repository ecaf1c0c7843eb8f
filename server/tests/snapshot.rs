//! Snapshots asked for and published by real threads, arc-swap and tokio's channels: what Miri looks at for undefined behaviour
//! and data races. `tests/model` has all interleavings, over stand-ins for these.
//!
//! Signals are what Miri has not got: here a kick unparks the thread, and the guest is a thread that is parked.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../src/vcpu/kick.rs"]
mod kick;
#[allow(dead_code, reason = "nothing ends in a panic here")]
#[path = "../src/vcpu/publication.rs"]
mod publication;
#[path = "../src/vcpu/sync.rs"]
mod sync;

mod backend {
    /// Nothing is handed to KVM_RUN.
    pub(super) enum ImmediateExit {}
}

mod signal {
    use std::thread::{Thread, current};

    use super::backend::ImmediateExit;

    pub(super) struct Target(Thread);

    impl Target {
        pub(super) fn reach(&self) {
            self.0.unpark();
        }
    }

    pub(super) struct Adopted;

    pub(super) fn adopt(_: Option<ImmediateExit>) -> Result<(Target, Adopted), String> {
        Ok((Target(current()), Adopted))
    }

    pub(super) fn clear_immediate_exit() {}
}

use std::thread;

use kick::Kicker;
use publication::{Published, Publisher};
use sync::{Arc, watch};
use tokio::runtime::Builder;

const ASKERS: usize = 3;
const ROUNDS: u64 = if cfg!(miri) { 12 } else { 2_000 };

/// As large as a snapshot is, so that a torn one would be seen.
#[derive(Clone)]
struct Snapshot {
    ticket: u64,
    copies: [u64; 32],
}

#[test]
fn no_snapshot_is_torn_older_than_asked_for_or_forgotten() {
    let (served_by_thread, served) = watch::channel(0);
    let (generation_by_thread, generation) = watch::channel(1);
    let shared = Arc::new((Kicker::default(), Published::new(Snapshot { ticket: 0, copies: [0; 32] })));
    let vcpu = Arc::clone(&shared);
    let vcpu = thread::spawn(move || {
        let (kicker, published) = &*vcpu;
        let publisher = Publisher { served: served_by_thread, generation: generation_by_thread };
        let on_thread = kicker.enter(None).unwrap();
        let mut taken = 0;
        while let Some(ticket) = published.attend(&on_thread) {
            if ticket > published.latest().ticket {
                let snapshot = Arc::new(Snapshot { ticket, copies: [ticket; 32] });
                publisher.publish(published, snapshot, ticket, Some(ticket));
                taken += 1;
            }
            on_thread.wait(None);
        }
        taken
    });
    let askers: Vec<_> = (0..ASKERS)
        .map(|_| {
            let (shared, mut served, generation) = (Arc::clone(&shared), served.clone(), generation.clone());
            thread::spawn(move || {
                let runtime = Builder::new_current_thread().build().unwrap();
                let (kicker, published) = &*shared;
                for _ in 0..ROUNDS {
                    let ticket = published.ask(kicker);
                    runtime.block_on(served.wait_for(|served| *served >= ticket)).unwrap();
                    let announced = *generation.borrow();
                    let snapshot = published.latest();
                    assert!(snapshot.ticket >= ticket && snapshot.ticket >= announced);
                    assert_eq!(snapshot.copies, [snapshot.ticket; 32]);
                }
            })
        })
        .collect();
    for asker in askers {
        asker.join().unwrap();
    }
    let (kicker, published) = &*shared;
    published.stop(kicker);
    let taken: u64 = vcpu.join().unwrap();
    assert!(taken >= 1 && taken <= ASKERS as u64 * ROUNDS, "{taken}");
    assert_eq!(published.latest().ticket, ASKERS as u64 * ROUNDS);
}
