//! What kept an answer away. A fault of the guest is none of these: it is an answer.

use std::{collections::BTreeMap, error::Error as StdError, time::Duration};

use tonic::{Code, Status, TimeoutExpired};
use tonic_types::StatusExt as _;

use crate::{
    connection::{ConnectionError, chain},
    endpoint::{Endpoint, EndpointError},
};

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address or the TLS files are unusable; nothing was sent.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// There is no connection to the daemon.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The client's own deadline passed.
    #[error(
        "no answer from {endpoint} within {:?}; the daemon may be busy, what listens there may be no daemon, or with --sync \
         the vCPU may not come out: allow more time with --timeout", .after
    )]
    Deadline {
        /// Who did not answer.
        endpoint: String,
        /// How long it had.
        after: Duration,
    },
    /// The daemon refused, and says why.
    #[error("{}", .0.message)]
    Refused(Box<Refusal>),
}

/// The daemon's reason not to answer: the status of the call, and its `google.rpc.ErrorInfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Code of the status.
    pub code: Code,
    /// What is wrong and what to do, for people.
    pub message: String,
    /// What is wrong, for programs: ErrorInfo's reason. Absent where the daemon gave none.
    pub reason: Option<String>,
    /// Who coined the reason: ErrorInfo's domain.
    pub domain: Option<String>,
    /// ErrorInfo's details, by key.
    pub metadata: BTreeMap<String, String>,
}

impl Error {
    /// The gRPC code that fits.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Endpoint(_) => Code::InvalidArgument,
            Self::Connection(_) => Code::Unavailable,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Refused(refusal) => refusal.code,
        }
    }

    /// Stable name of the reason, for programs, where there is one.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Endpoint(EndpointError::Address { .. }) => Some("ENDPOINT_ADDRESS"),
            Self::Endpoint(EndpointError::Contradiction(_)) => Some("ENDPOINT_CONTRADICTION"),
            Self::Endpoint(EndpointError::File { .. } | EndpointError::Tls(_)) => Some("ENDPOINT_TLS_FILES"),
            Self::Connection(error) => Some(error.problem.reason()),
            Self::Deadline { .. } => Some("CLIENT_DEADLINE"),
            Self::Refused(refusal) => refusal.reason.as_deref(),
        }
    }

    /// Reads a failed call. A status without a source came over the wire; one with a source was made up by the transport.
    pub(crate) fn from_status(endpoint: &Endpoint, deadline: Option<Duration>, status: &Status) -> Self {
        if let Some(source) = status.source() {
            if let (Some(after), true) = (deadline, is_timeout(source)) {
                return Self::Deadline { endpoint: endpoint.to_string(), after };
            }
            return ConnectionError::from_transport(endpoint, source).into();
        }
        let info = status.get_details_error_info();
        // The other end may look at the clock first, and its library then says no more than a code.
        if let (Some(after), None, Code::DeadlineExceeded | Code::Cancelled) =
            (deadline, &info, status.code())
        {
            return Self::Deadline { endpoint: endpoint.to_string(), after };
        }
        let message = if info.is_none() && status.code() == Code::Unimplemented {
            // A daemon gives a reason even for calls that it does not know.
            format!(
                "what listens at {endpoint} speaks gRPC and does not know this call: check the address, it may be another service"
            )
        } else if status.message().is_empty() {
            format!("the daemon at {endpoint} answered {:?} and gave no reason", status.code())
        } else {
            status.message().to_owned()
        };
        let (reason, domain, metadata) = match info {
            None => (None, None, BTreeMap::new()),
            Some(info) => (Some(info.reason), Some(info.domain), info.metadata.into_iter().collect()),
        };
        Self::Refused(Box::new(Refusal { code: status.code(), message, reason, domain, metadata }))
    }
}

fn is_timeout(error: &(dyn StdError + 'static)) -> bool {
    chain(error).any(<dyn StdError>::is::<TimeoutExpired>)
}
