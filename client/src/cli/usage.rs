//! Wrong command lines.

use std::{env, process::ExitCode};

use pagewalk_proto::readable_lines;

use super::exit::{USAGE, json_error};
use super::json;

/// Prints help or a complaint. Parsing has failed, so whether JSON is wanted is read from the arguments themselves.
pub(super) fn report(error: &clap::Error) -> ExitCode {
    let wants_json =
        || env::args_os().take_while(|argument| argument != "--").any(|argument| argument == "--json");
    if error.use_stderr() && wants_json() {
        let text = error.render().to_string();
        let message = text.trim_start_matches("error: ");
        let message = message.split_once("\n\nFor more").map_or(message, |(message, _)| message).trim();
        let error = format!("{:#}", json_error("INVALID_ARGUMENT", Some("USAGE"), message));
        anstream::eprintln!("{}", json::escaped(error));
        return ExitCode::from(USAGE);
    }
    if error.use_stderr() {
        // It quotes the arguments.
        anstream::eprint!("{}", readable_lines(&error.render().to_string()));
        return ExitCode::from(USAGE);
    }
    // Nobody is left to tell if even this cannot be written.
    let _ = error.print();
    ExitCode::SUCCESS
}
