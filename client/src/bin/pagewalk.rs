//! A client for the pagewalk daemon.
fn main() {}
