//! The pagewalk daemon.
fn main() {}
