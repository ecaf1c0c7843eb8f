//! The one table from what went wrong to a gRPC status.
//!
//! Every status carries a `google.rpc.ErrorInfo` whose reason a program can match on, and a message that tells a person what
//! to do. A fault of the guest is no error: it is an answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pagewalk::StateError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::convert::nested::request_field;
use crate::machine::{AttachError, DetachError, LookupError};
use crate::vcpu::VcpuError;
use pagewalk_proto::readable_within;

/// Domain of every `ErrorInfo`.
const DOMAIN: &str = "pagewalk";

/// Why a request could not be answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A field of the request holds what cannot be.
    #[error("{field}: {problem}")]
    Invalid { field: &'static str, problem: String },
    /// A field of the request asks for what this version does not do.
    #[error("{field}: {problem}")]
    Unimplemented { field: &'static str, problem: String },
    /// The request's own walker state selects no walk.
    #[error("the walker state in the request is not usable: {0}")]
    RequestState(StateError),
    /// The second dimension that the request brings is none.
    #[error("{field}: {error}")]
    SecondDimension { field: &'static str, error: StateError },
    /// The vCPU's registers select no walk.
    #[error("the vCPU's registers select no walk: {0}; bring your own walker state in `override`")]
    VcpuState(StateError),
    /// The vCPU is in no state to be asked this.
    #[error("{0}")]
    Precondition(String),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The machine went away.
    #[error("machine `{machine}` is lost: {reason}; detach it, and attach it again once it is back")]
    Lost { machine: String, reason: Arc<str> },
    /// The machine was detached while it was asked.
    #[error("machine `{machine}` was detached meanwhile: attach it again, or name another")]
    Detached { machine: String },
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A client names a file for the daemon to make.
    #[error(
        "spec: {file} is a file for the daemon to make, and it makes none for clients, but for its own user over its Unix socket: have it started with --client-files FOLDER, or with this machine"
    )]
    FileNotAllowed { file: String },
    #[error(transparent)]
    Detach(#[from] DetachError),
    /// Somebody resumed the guest while its image was saved.
    #[error(
        "machine `{machine}` was resumed while its image was saved, which is thus of no one moment: save it again"
    )]
    RanOn { machine: String },
    /// The client does not read its stream.
    #[error(
        "nothing was read of the stream for {} s: read it as it comes, and save to a faster disk or over a faster connection",
        .0.as_secs()
    )]
    Stalled(Duration),
    /// The client does not send what it has begun.
    #[error(
        "the call waited too long for its client to send more: end a call that has nothing to send, and make another when there is"
    )]
    Silent,
    /// A defect of the daemon's.
    #[error("the daemon failed: {0}; its log says more")]
    Failed(String),
    /// The client's deadline has passed.
    #[error("the deadline passed before there was an answer: allow more time, or ask for the latest state")]
    Deadline,
    /// More calls are being served than this daemon takes on.
    #[error("too many calls at once: retry after a moment")]
    Busy,
    /// The request is larger than is decoded.
    #[error(
        "the request is too large: {0}; a batch has at most 262144 addresses, a write 32768 bytes, any other request 64 KiB: send it in parts"
    )]
    TooLarge(String),
    /// The answer is larger than is encoded.
    #[error("the answer is too large: {0}; where the request can be smaller, ask for less")]
    AnswerTooLarge(String),
    /// The request is no message of the contract.
    #[error("the request cannot be decoded: {0}; is the client built from this daemon's contract?")]
    Malformed(String),
    #[error("this daemon has no such method: `grpcurl ADDRESS list` shows what it has")]
    NoSuchMethod,
    /// Anything else that the transport refuses.
    #[error("the transport refused the call: {}", .0.message())]
    Transport(tonic::Status),
    /// The daemon is draining.
    #[error("the daemon is shutting down: retry once it is back")]
    ShuttingDown,
}

impl Error {
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    pub(crate) fn unimplemented(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Unimplemented { field, problem: problem.into() }
    }

    /// Code and reason: the table.
    fn code(&self) -> (Code, &'static str) {
        use Code::{
            Aborted, AlreadyExists, DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument,
            NotFound, PermissionDenied, ResourceExhausted, Unavailable, Unimplemented,
        };
        match self {
            Self::Invalid { .. } => (InvalidArgument, "INVALID_FIELD"),
            Self::Unimplemented { .. } => (Unimplemented, "NOT_SERVED_YET"),
            Self::RequestState(_)
            | Self::SecondDimension { .. }
            | Self::Vcpu(VcpuError::InvalidNested(_)) => (InvalidArgument, "INVALID_WALKER_STATE"),
            Self::Vcpu(VcpuError::NestedField { .. }) => (InvalidArgument, "INVALID_FIELD"),
            Self::Vcpu(VcpuError::GuestRunsL2) => (FailedPrecondition, "GUEST_RUNS_L2"),
            Self::VcpuState(_) => (FailedPrecondition, "VCPU_HAS_NO_WALK"),
            Self::Precondition(_) => (FailedPrecondition, "PRECONDITION"),
            Self::Lookup(error) | Self::Detach(DetachError::Lookup(error)) => match error {
                LookupError::Unnamed { .. } => (InvalidArgument, "MACHINE_NOT_NAMED"),
                LookupError::NoMachine { .. } => (NotFound, "MACHINE_NOT_FOUND"),
                LookupError::NoVcpu { .. } => (NotFound, "VCPU_NOT_FOUND"),
            },
            Self::Lost { .. } => (Unavailable, "MACHINE_LOST"),
            Self::Detached { .. } => (Unavailable, "MACHINE_DETACHED"),
            Self::Attach(AttachError::DuplicateId { .. } | AttachError::SameGuest { .. }) => {
                (AlreadyExists, "MACHINE_EXISTS")
            }
            Self::Attach(AttachError::TooMany { .. }) => (ResourceExhausted, "TOO_MANY_MACHINES"),
            Self::Attach(AttachError::Open(_)) => (FailedPrecondition, "CANNOT_ATTACH"),
            Self::FileNotAllowed { .. } => (PermissionDenied, "FILE_NOT_ALLOWED"),
            Self::Detach(DetachError::WouldEnd { .. }) => (FailedPrecondition, "GUEST_WOULD_END"),
            Self::Vcpu(VcpuError::Timeout { .. }) => (DeadlineExceeded, "VCPU_UNRESPONSIVE"),
            Self::Vcpu(VcpuError::Unread { .. }) => (FailedPrecondition, "REGISTERS_UNREAD"),
            Self::Vcpu(VcpuError::Gone { .. }) => (Unavailable, "VCPU_GONE"),
            Self::Vcpu(VcpuError::Stopped { .. }) => (FailedPrecondition, "VCPU_STOPPED"),
            Self::Vcpu(VcpuError::Unsupported(_)) => (FailedPrecondition, "SOURCE_CANNOT"),
            Self::Vcpu(VcpuError::NothingToWrite | VcpuError::InvalidRegisters(_)) => {
                (InvalidArgument, "INVALID_REGISTERS")
            }
            Self::Vcpu(VcpuError::NotTaken { .. }) => (FailedPrecondition, "REGISTER_NOT_TAKEN"),
            Self::Vcpu(VcpuError::Hypervisor(_)) => (Internal, "HYPERVISOR"),
            Self::RanOn { .. } => (Aborted, "MACHINE_RAN_ON"),
            Self::Stalled(_) | Self::Silent => (DeadlineExceeded, "STREAM_STALLED"),
            Self::Failed(_) => (Internal, "DAEMON_FAILED"),
            Self::Deadline => (DeadlineExceeded, "DEADLINE"),
            Self::Busy => (ResourceExhausted, "BUSY"),
            Self::TooLarge(_) => (ResourceExhausted, "MESSAGE_TOO_LARGE"),
            Self::AnswerTooLarge(_) => (ResourceExhausted, "ANSWER_TOO_LARGE"),
            Self::Malformed(_) => (InvalidArgument, "MALFORMED_MESSAGE"),
            Self::NoSuchMethod => (Unimplemented, "NO_SUCH_METHOD"),
            Self::Transport(status) => (status.code(), "TRANSPORT"),
            Self::ShuttingDown => (Unavailable, "SHUTTING_DOWN"),
        }
    }
}

/// Longest message. It travels in a header, and a header that is too long ends the connection.
const MESSAGE_MAX: usize = 800;

/// What is told of a message, which may quote a client, a file or a guest.
fn told(message: &str) -> String {
    readable_within(message, MESSAGE_MAX)
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason) = error.code();
        let message = told(&error.to_string());
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
        match &error {
            Error::Invalid { field, problem } | Error::Unimplemented { field, problem } => {
                details.add_bad_request_violation(*field, told(problem));
            }
            Error::SecondDimension { field, error } => {
                details.add_bad_request_violation(*field, told(&error.to_string()));
            }
            Error::Vcpu(VcpuError::InvalidNested(error)) => {
                details.add_bad_request_violation(request_field(error), told(&error.to_string()));
            }
            Error::Vcpu(VcpuError::NestedField { field, problem }) => {
                details.add_bad_request_violation(*field, told(problem));
            }
            _ => {}
        }
        Self::with_error_details(code, message, details)
    }
}
