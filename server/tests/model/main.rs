//! A model of how snapshots are asked for and published: `server/src/vcpu/kick.rs` and `publication.rs` themselves, in every
//! interleaving that loom finds, over stand-ins for what they are synchronised by.
//!
//! What must hold: whoever asks gets a snapshot that was read after it asked; whoever hears of a generation finds it published;
//! no kick is lost, whether the vCPU executes or waits, and none keeps it from stopping. A lost kick is a deadlock here, which
//! loom reports.
//!
//! A model that cannot fail shows nothing: each of [`slips::SLIPS`] is built into a copy of the two files, and must be noticed.
//!
//! Not in the model: commands (they wait in tokio's channel), the refresh timer, and waits with an end.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod protocol;
mod signal;
mod slips;
mod sync;

#[path = "../../src/vcpu/kick.rs"]
mod kick;
#[allow(dead_code, reason = "the model does not end in a panic")]
#[path = "../../src/vcpu/publication.rs"]
mod publication;

mod backend {
    /// Nothing is handed to the stand-in for KVM_RUN.
    pub(super) enum ImmediateExit {}
}

use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let trials = vec![
        Trial::test("the_protocol_holds", protocol::judge),
        Trial::test("slips_are_caught", slips::judge),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}
