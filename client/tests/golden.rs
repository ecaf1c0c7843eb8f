//! The command's output, held against files that a person can review. `TRYCMD=overwrite cargo test` rewrites them.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use trycmd::TestCases;

/// Nothing listens here: the port is reserved, and its service long gone.
const NOBODY: &str = "127.0.0.1:1";

fn cases(files: &str, address: &str) -> TestCases {
    let cases = TestCases::new();
    cases.env("PAGEWALK_ADDR", address).env("COLUMNS", "100").env("NO_COLOR", "1").case(files);
    cases
}

#[test]
fn help_usage_errors_and_no_daemon() {
    cases("tests/golden/alone/*.trycmd", NOBODY).run();
}

#[test]
fn answers_of_a_scripted_daemon() {
    cases("tests/golden/scripted/*.trycmd", &scripted::start(None).to_string()).run();
}
