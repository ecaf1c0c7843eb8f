//! The pagewalk daemon.

pub mod machine;
pub mod vcpu;
