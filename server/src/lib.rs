//! The pagewalk daemon as a library, so that a VMM can serve its own guest next to its own vCPUs.
//!
//! A request travels one way: listener, layers, service, the vCPU's last snapshot, the walker, guest memory, and back as an
//! answer. A VMM implements [`machine::Source`], puts it into [`machine::Machines`], and runs a [`serve::Server`].

pub mod config;
mod convert;
pub mod layer;
pub mod listen;
pub mod machine;
mod render;
pub mod serve;
mod service;
mod small_file;
mod status;
pub mod symbols;
mod tasks;
pub mod tour;
pub mod vcpu;
