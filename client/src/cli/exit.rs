//! Exit codes, and how failures are told: as a line, or as JSON on standard error.

use std::{io, process::ExitCode};

use serde_json::{Value, json};

use super::{json, output::Output};
use crate::{ConnectionError, Error, endpoint::EndpointError};

/// The access asked for would fault, a list is not complete, nothing was found, or a check failed.
pub(super) const NEGATIVE: u8 = 1;
/// The command line is wrong.
pub(super) const USAGE: u8 = 2;
/// The question could not be answered.
pub(super) const UNANSWERED: u8 = 3;

/// Why a verb ended without an answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The command line is wrong, in a way that shows late.
    Usage(String),
    /// The daemon could not be asked, or did not answer.
    Client(Error),
    /// This program cannot start, or cannot read the answer.
    Own(String),
    /// The answer cannot be written out.
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl From<EndpointError> for Failure {
    fn from(error: EndpointError) -> Self {
        Self::Client(error.into())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    fn message(&self) -> String {
        match self {
            Self::Usage(message) | Self::Own(message) => message.clone(),
            Self::Client(error) => spelled(error),
            Self::Output(error) => format!("cannot write the answer: {error}"),
        }
    }

    fn code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Client(Error::Endpoint(_)) => USAGE,
            Self::Client(_) | Self::Own(_) | Self::Output(_) => UNANSWERED,
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Usage(message) => json_error("INVALID_ARGUMENT", Some("USAGE"), message),
            Self::Own(message) => json_error("INTERNAL", None, message),
            Self::Output(_) => json_error("INTERNAL", None, &self.message()),
            Self::Client(error) => client_json(error),
        }
    }
}

/// What the daemon says, with the fields that it asks for as they are spelled here.
fn spelled(error: &Error) -> String {
    let message = error.to_string();
    match error.reason() {
        Some("MACHINE_NOT_NAMED") => message.replace("in `machine`", "with --machine"),
        Some("GUEST_WOULD_END") => message.replace("set `end_guest`", "pass --end-guest"),
        _ => message,
    }
}

fn client_json(error: &Error) -> Value {
    let mut value = json_error(code_name(error.code()), error.reason(), &error.to_string());
    match error {
        Error::Connection(ConnectionError { endpoint, problem, cause }) => {
            value["error"]["endpoint"] = json!(endpoint);
            value["error"]["cause"] = json!(cause);
            value["error"]["advice"] = json!(problem.advice());
        }
        Error::Refused(refusal) => {
            if let Some(domain) = &refusal.domain {
                value["error"]["domain"] = json!(domain);
            }
            if !refusal.metadata.is_empty() {
                value["error"]["metadata"] = json!(refusal.metadata);
            }
        }
        _ => {}
    }
    value
}

/// An error for programs.
pub(super) fn json_error(code: &str, reason: Option<&str>, message: &str) -> Value {
    let mut error = json!({ "code": code, "message": message });
    if let Some(reason) = reason {
        error["reason"] = json!(reason);
    }
    json!({ "error": error })
}

/// Tells a failure, and gives the exit code for it.
pub(super) fn report(output: &Output, failure: &Failure) -> ExitCode {
    if let Failure::Output(error) = failure
        && error.kind() == io::ErrorKind::BrokenPipe
    {
        // The reader has seen enough.
        return ExitCode::SUCCESS;
    }
    if output.is_json() {
        output.complain(&json::escaped(format!("{:#}", failure.json())));
    } else {
        output.complain_line(&failure.message());
    }
    ExitCode::from(failure.code())
}

fn code_name(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::Ok => "OK",
        tonic::Code::Cancelled => "CANCELLED",
        tonic::Code::Unknown => "UNKNOWN",
        tonic::Code::InvalidArgument => "INVALID_ARGUMENT",
        tonic::Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        tonic::Code::NotFound => "NOT_FOUND",
        tonic::Code::AlreadyExists => "ALREADY_EXISTS",
        tonic::Code::PermissionDenied => "PERMISSION_DENIED",
        tonic::Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        tonic::Code::FailedPrecondition => "FAILED_PRECONDITION",
        tonic::Code::Aborted => "ABORTED",
        tonic::Code::OutOfRange => "OUT_OF_RANGE",
        tonic::Code::Unimplemented => "UNIMPLEMENTED",
        tonic::Code::Internal => "INTERNAL",
        tonic::Code::Unavailable => "UNAVAILABLE",
        tonic::Code::DataLoss => "DATA_LOSS",
        tonic::Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Refusal;

    #[test]
    fn fields_are_spelled_as_flags() {
        let told = |reason: &str, message: &str| {
            spelled(&Error::Refused(Box::new(Refusal {
                code: tonic::Code::InvalidArgument,
                message: message.into(),
                reason: Some(reason.into()),
                domain: None,
                metadata: BTreeMap::new(),
            })))
        };
        for (reason, message, expected) in [
            (
                "MACHINE_NOT_NAMED",
                "name a machine in `machine`: there are `a`, `b`",
                "name a machine with --machine: there are `a`, `b`",
            ),
            (
                "GUEST_WOULD_END",
                "it would end: set `end_guest` if it may",
                "it would end: pass --end-guest if it may",
            ),
            ("INVALID_FIELD", "in `machine`", "in `machine`"),
        ] {
            assert_eq!(told(reason, message), expected);
        }
    }
}
