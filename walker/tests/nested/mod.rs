//! The part of the judges `nested-amd-*` and `nested-intel-*` that runs inside the beds.

#![allow(dead_code, reason = "each judge uses its part")]

pub(crate) mod guest_mode;
pub(crate) mod second;
pub(crate) mod tables;
pub(crate) mod translate;
pub(crate) mod vmcs12;
pub(crate) mod vmentry;
pub(crate) mod vmrun;
