//! The `pagewalk` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    pagewalk_client::cli::run()
}
