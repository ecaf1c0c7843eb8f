//! The daemon as a process, and everything around it that not every machine has: `/dev/kvm`, TLS between network
//! namespaces, grpcurl, Python.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../service/bed.rs"]
mod bed;
mod beds;
mod clients;
#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../demo_landmarks/mod.rs"]
mod demo_landmarks;
mod demo_on_kvm;
mod process;
mod start;
mod stop;
mod tls;

use std::process::ExitCode;

fn main() -> ExitCode {
    beds::main(&[start::TESTS, stop::TESTS, tls::TESTS, clients::TESTS, demo_on_kvm::TESTS].concat())
}
