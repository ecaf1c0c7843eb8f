//! The part of `judge_nested` that runs inside the bed.

pub(crate) mod guest_mode;
pub(crate) mod tables;
pub(crate) mod translate;
pub(crate) mod vmrun;
