//! The parts of `judge_linux`.

pub(crate) mod announced;
pub(crate) mod expected;
pub(crate) mod guest;
pub(crate) mod monitor;
pub(crate) mod space;
