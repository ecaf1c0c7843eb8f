//! What the benches share: guests, the process that serves them, the peer beside it, and the report.
#![allow(dead_code, reason = "each bench uses its part")]

pub(crate) mod child;
pub(crate) mod echo;
pub(crate) mod guest;
#[path = "../../../walker/benches/support/kept.rs"]
pub(crate) mod kept;
pub(crate) mod report;

/// The machine of a specification.
pub(crate) fn open(spec: &str) -> pagewalkd::machine::Machine {
    spec.parse::<pagewalkd::machine::MachineSpec>().unwrap().open().unwrap()
}

/// The daemon's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
