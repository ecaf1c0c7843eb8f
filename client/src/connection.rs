//! What kept a connection from coming about or ended it, and what a person can do about it.
//!
//! The transport reports one opaque error for all of these. The causes are found by type in its chain of sources:
//! operating-system errors, TLS alerts, HTTP/2 errors.

use std::{error::Error as StdError, fmt, io};

use rustls::{AlertDescription, CertificateError};

use crate::endpoint::Endpoint;

/// What went wrong between client and daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Nothing listens at the address.
    NotRunning,
    /// There is no such socket file.
    NoSocket,
    /// The socket may not be used by this user.
    Forbidden,
    /// The host's name is unknown.
    UnknownHost,
    /// The host or network cannot be reached.
    Unreachable,
    /// No connection in time.
    ConnectTimeout,
    /// We speak TLS, they do not.
    PeerSpeaksPlainText,
    /// The daemon's certificate is not from the authority that we trust.
    UntrustedDaemon,
    /// The daemon's certificate is for another name.
    WrongName,
    /// The daemon's certificate is not valid now.
    ExpiredCertificate,
    /// The daemon asks for a client certificate, and there is none.
    IdentityRequired,
    /// The daemon does not accept the client certificate.
    IdentityRefused,
    /// What answers does not speak gRPC: another service, or one that wants TLS.
    NotGrpc,
    /// The connection ended before an answer came.
    Closed,
    /// The same over TLS, which is how a refused or missing client certificate looks when its alert is lost.
    ClosedInTls,
    /// Something else; the cause has the transport's words.
    Other,
}

impl Problem {
    /// Stable name for programs, in the form of an ErrorInfo reason.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotRunning => "DAEMON_NOT_RUNNING",
            Self::NoSocket => "SOCKET_MISSING",
            Self::Forbidden => "SOCKET_FORBIDDEN",
            Self::UnknownHost => "HOST_UNKNOWN",
            Self::Unreachable => "HOST_UNREACHABLE",
            Self::ConnectTimeout => "CONNECT_TIMEOUT",
            Self::PeerSpeaksPlainText => "TLS_NOT_SPOKEN",
            Self::UntrustedDaemon => "TLS_UNTRUSTED_DAEMON",
            Self::WrongName => "TLS_WRONG_NAME",
            Self::ExpiredCertificate => "TLS_CERTIFICATE_EXPIRED",
            Self::IdentityRequired => "TLS_CLIENT_CERTIFICATE_REQUIRED",
            Self::IdentityRefused => "TLS_CLIENT_CERTIFICATE_REFUSED",
            Self::NotGrpc => "NOT_GRPC",
            Self::Closed => "CONNECTION_CLOSED",
            Self::ClosedInTls => "TLS_CONNECTION_CLOSED",
            Self::Other => "CONNECTION_FAILED",
        }
    }

    fn says(self) -> &'static str {
        match self {
            Self::NotRunning => "nothing listens there",
            Self::NoSocket => "there is no such socket",
            Self::Forbidden => "this user may not use the socket",
            Self::UnknownHost => "the host's name is unknown",
            Self::Unreachable => "the host cannot be reached",
            Self::ConnectTimeout => "no connection in time",
            Self::PeerSpeaksPlainText => "what listens there does not speak TLS",
            Self::UntrustedDaemon => "the daemon's certificate is not from the authority given",
            Self::WrongName => "the daemon's certificate is for another name",
            Self::ExpiredCertificate => "the daemon's certificate is not valid now",
            Self::IdentityRequired => "the daemon asks for a client certificate",
            Self::IdentityRefused => "the daemon does not accept the client certificate",
            Self::NotGrpc => "what listens there does not speak gRPC in plain text",
            Self::Closed => "the connection ended before an answer came",
            Self::ClosedInTls => "the daemon ended the TLS connection before it answered",
            Self::Other => "the connection failed",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::NotRunning => {
                "start a daemon (cargo run --release -- demo; on a Unix socket: pagewalkd serve --uds PATH), or pass its address with --addr"
            }
            Self::NoSocket => {
                "start a daemon there (pagewalkd serve --uds PATH), or pass another address with --addr (unix:/PATH or HOST:PORT)"
            }
            Self::Forbidden => {
                "ask the daemon's operator for access to the socket and its folder, or use another address"
            }
            Self::UnknownHost => "check the spelling, or write the host as an IP address",
            Self::Unreachable => "check the address and the route to it",
            Self::ConnectTimeout => {
                "check the address and any firewall in between, or allow more time with --timeout"
            }
            Self::PeerSpeaksPlainText => "leave --tls-ca, --tls-cert and --tls-key out, or check the address",
            Self::UntrustedDaemon => "pass the certificate of the daemon's authority with --tls-ca",
            Self::WrongName => "connect by a name or address that the daemon's certificate lists",
            Self::ExpiredCertificate => "renew the daemon's certificate, or set this host's clock",
            Self::IdentityRequired => "pass one with --tls-cert and --tls-key",
            Self::IdentityRefused => {
                "pass one from the authority that the daemon trusts (its --client-ca) with --tls-cert and --tls-key"
            }
            Self::NotGrpc => {
                "check that a pagewalk daemon listens there, and if it speaks TLS pass --tls-ca, --tls-cert and --tls-key"
            }
            Self::Closed => {
                "see the daemon's log and ask again; if it speaks TLS, pass --tls-ca, --tls-cert and --tls-key"
            }
            Self::ClosedInTls => {
                "it may want a client certificate, or not accept this one: pass one from the authority that it trusts \
                 with --tls-cert and --tls-key"
            }
            Self::Other => "check the address with `pagewalk doctor`",
        }
    }
}

/// A connection that did not come about, or ended too early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionError {
    /// Where it went.
    pub endpoint: String,
    /// What went wrong.
    pub problem: Problem,
    /// The transport's own words.
    pub cause: String,
}

impl fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, problem, cause } = self;
        write!(f, "cannot reach the daemon at {endpoint}: {} ({cause}); {}", problem.says(), problem.advice())
    }
}

impl StdError for ConnectionError {}

impl ConnectionError {
    /// Reads the transport's error.
    pub(crate) fn from_transport(endpoint: &Endpoint, error: &(dyn StdError + 'static)) -> Self {
        Self { endpoint: endpoint.to_string(), problem: problem(endpoint, error), cause: root_cause(error) }
    }

    /// No connection within the endpoint's bound.
    pub(crate) fn timeout(endpoint: &Endpoint) -> Self {
        Self {
            endpoint: endpoint.to_string(),
            problem: Problem::ConnectTimeout,
            cause: format!("gave up after {:?}", endpoint.connect_timeout()),
        }
    }
}

/// The innermost words of an error.
pub(crate) fn root_cause(error: &(dyn StdError + 'static)) -> String {
    chain(error).last().unwrap_or(error).to_string()
}

fn problem(endpoint: &Endpoint, error: &(dyn StdError + 'static)) -> Problem {
    let of_links = |of: &dyn Fn(&(dyn StdError + 'static)) -> Option<Problem>| chain(error).find_map(of);
    let found = of_links(&|link| of_tls(endpoint, link))
        .or_else(|| of_links(&|link| of_io(endpoint, link.downcast_ref()?)))
        .or_else(|| of_links(&|link| of_words(&link.to_string())));
    match found {
        Some(Problem::Closed) if endpoint.is_tls() => Problem::ClosedInTls,
        Some(problem) => problem,
        None => Problem::Other,
    }
}

fn of_tls(endpoint: &Endpoint, link: &(dyn StdError + 'static)) -> Option<Problem> {
    let inner = link.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let error = link.downcast_ref::<rustls::Error>().or_else(|| inner?.downcast_ref());
    match error {
        Some(rustls::Error::InvalidMessage(_)) => Some(Problem::PeerSpeaksPlainText),
        Some(rustls::Error::InvalidCertificate(error)) => Some(of_certificate(error)),
        Some(rustls::Error::AlertReceived(alert)) => Some(of_alert(endpoint, *alert)),
        Some(_) => Some(Problem::Other),
        // Once HTTP/2 is spoken, it keeps of an alert the words alone.
        None => ALERTS
            .into_iter()
            .find(|alert| link.to_string().contains(&rustls::Error::AlertReceived(*alert).to_string()))
            .map(|alert| of_alert(endpoint, alert)),
    }
}

fn of_certificate(error: &CertificateError) -> Problem {
    match error {
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            Problem::WrongName
        }
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => Problem::ExpiredCertificate,
        _ => Problem::UntrustedDaemon,
    }
}

/// The alerts by which a daemon refuses a client (RFC 8446, "Error Alerts").
const ALERTS: [AlertDescription; 10] = [
    AlertDescription::CertificateRequired,
    AlertDescription::HandshakeFailure,
    AlertDescription::UnknownCA,
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateUnknown,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
];

fn of_alert(endpoint: &Endpoint, alert: AlertDescription) -> Problem {
    match alert {
        AlertDescription::CertificateRequired => Problem::IdentityRequired,
        // An older TLS version has no alert of its own for a missing certificate.
        AlertDescription::HandshakeFailure if !endpoint.has_identity() => Problem::IdentityRequired,
        refused if ALERTS.contains(&refused) => Problem::IdentityRefused,
        _ => Problem::Other,
    }
}

fn of_io(endpoint: &Endpoint, error: &io::Error) -> Option<Problem> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Some(Problem::NotRunning),
        io::ErrorKind::NotFound if endpoint.socket().is_some() => Some(Problem::NoSocket),
        io::ErrorKind::PermissionDenied => Some(Problem::Forbidden),
        io::ErrorKind::TimedOut => Some(Problem::ConnectTimeout),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Some(Problem::Unreachable),
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => Some(Problem::Closed),
        _ => None,
    }
}

/// Causes whose types the transport keeps to itself, by their words.
fn of_words(words: &str) -> Option<Problem> {
    if words.contains("dns error") {
        Some(Problem::UnknownHost)
    } else if words.contains("http2 error") || words.contains("frame with invalid size") {
        Some(Problem::NotGrpc)
    } else if words.contains("connection closed") || words.contains("connection error") {
        Some(Problem::Closed)
    } else {
        None
    }
}

/// An error and what caused it, outermost first.
pub(crate) fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |link| (*link).source())
}
