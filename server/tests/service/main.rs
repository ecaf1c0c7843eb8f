//! The services over gRPC, against a daemon in this process that serves the demo machine from plain memory.
#![allow(clippy::unwrap_used)]

mod access_checks;
mod attach;
mod bad_input;
mod batch;
#[allow(dead_code, reason = "each test target uses its part")]
mod bed;
#[path = "../bzimage/mod.rs"]
mod bzimage;
mod client_files;
#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../demo_landmarks/mod.rs"]
mod demo_landmarks;
mod explain;
mod idle;
mod mapping;
mod memory;
mod nested;
mod nested_gpa;
mod property;
mod raw;
mod registers;
mod saved;
mod spaces;
mod stream;
mod stuck;
mod symbols;
mod translate;
mod walker_state;
mod watch;
mod wire;
