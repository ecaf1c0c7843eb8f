//! Where a daemon listens and how to speak to it.
//!
//! An address is `HOST:PORT`, `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`. One without a scheme speaks TLS as
//! soon as [`Tls`] is given. Name resolution and several addresses for one service are left out.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use tonic::transport;

use crate::tls::Tls;

/// What the daemon may send before it is read: a few answers to the largest batch, in few frames.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:50051";

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an endpoint cannot be used at all, before anything was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// The address is none.
    #[error(
        "`{address}` is not an address: {problem}; \
         write HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:/PATH"
    )]
    Address {
        /// The address, as given.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// TLS was asked for where there is none, or the other way round.
    #[error("{0}")]
    Contradiction(String),
    /// A certificate or key cannot be read.
    #[error("cannot read {what} {path}: {cause}")]
    File {
        /// Which of the files it is.
        what: &'static str,
        /// Its path.
        path: String,
        /// Why not.
        cause: String,
    },
    /// The certificates or the key are not what they should be.
    #[error(
        "the TLS files cannot be used: {0}; each must be PEM, and the key must belong to the certificate"
    )]
    Tls(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// Host and port, and the scheme where one was written.
    Tcp {
        authority: String,
        scheme: Option<Scheme>,
    },
    Unix(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

/// Where a daemon listens, how to speak to it, and how long to wait for a connection.
#[derive(Clone, Debug)]
pub struct Endpoint {
    target: Target,
    tls: Option<Tls>,
    connect_timeout: Duration,
}

impl Endpoint {
    /// Parses an address.
    ///
    /// # Errors
    /// If the text is no address of one of the four forms.
    pub fn parse(address: &str) -> Result<Self, EndpointError> {
        Ok(Self { target: target(address)?, tls: None, connect_timeout: DEFAULT_CONNECT_TIMEOUT })
    }

    /// Speaks TLS.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// How long to wait for a connection, TLS handshake included. Default: 5 s.
    #[must_use]
    pub fn with_connect_timeout(self, connect_timeout: Duration) -> Self {
        Self { connect_timeout, ..self }
    }

    /// How long to wait for a connection.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        match &self.target {
            Target::Tcp { scheme, .. } => *scheme == Some(Scheme::Https) || self.tls.is_some(),
            Target::Unix(_) => false,
        }
    }

    /// Path of the Unix socket, if it is one.
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        match &self.target {
            Target::Unix(path) => Some(path),
            Target::Tcp { .. } => None,
        }
    }

    /// Whether a client certificate would be shown.
    pub(crate) fn has_identity(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::has_identity)
    }

    /// The same, in the transport's terms.
    pub(crate) fn transport(&self) -> Result<transport::Endpoint, EndpointError> {
        let (uri, tls) = match (&self.target, &self.tls) {
            (Target::Unix(_), Some(_)) => {
                return Err(EndpointError::Contradiction(format!(
                    "{self} is a Unix socket, which speaks no TLS; leave the TLS files out"
                )));
            }
            (Target::Tcp { scheme: Some(Scheme::Http), .. }, Some(_)) => {
                return Err(EndpointError::Contradiction(format!(
                    "{self} says plain text, and TLS files are given; write https:// or leave them out"
                )));
            }
            (Target::Tcp { scheme: Some(Scheme::Https), .. }, None) => {
                return Err(EndpointError::Contradiction(format!(
                    "{self} speaks TLS, and no authority is given to trust; \
                     pass the certificate of the daemon's authority (--tls-ca)"
                )));
            }
            // Whoever connects by the socket knows its path.
            (Target::Unix(_), None) => ("http://localhost".to_owned(), None),
            (Target::Tcp { authority, .. }, None) => (format!("http://{authority}"), None),
            (Target::Tcp { authority, .. }, Some(tls)) => (format!("https://{authority}"), Some(tls)),
        };
        let endpoint = transport::Endpoint::from_shared(uri)
            .map_err(|error| self.unusable(&error))?
            .user_agent(concat!("pagewalk/", env!("CARGO_PKG_VERSION")))
            .map_err(|error| self.unusable(&error))?
            .connect_timeout(self.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME);
        match tls {
            None => Ok(endpoint),
            Some(tls) => endpoint
                .tls_config(tls.transport())
                .map_err(|error| EndpointError::Tls(crate::connection::root_cause(&error))),
        }
    }

    fn unusable(&self, error: &transport::Error) -> EndpointError {
        EndpointError::Address { address: self.to_string(), problem: crate::connection::root_cause(error) }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(address: &str) -> Result<Self, EndpointError> {
        Self::parse(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Unix(path) => write!(f, "unix:{}", path.display()),
            Target::Tcp { authority, scheme } => {
                let scheme = match scheme {
                    None => "",
                    Some(Scheme::Http) => "http://",
                    Some(Scheme::Https) => "https://",
                };
                write!(f, "{scheme}{authority}")
            }
        }
    }
}

fn target(address: &str) -> Result<Target, EndpointError> {
    let wrong = |problem: &str| EndpointError::Address { address: address.into(), problem: problem.into() };
    if let Some(path) = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")) {
        if path.is_empty() {
            return Err(wrong("the socket's path is missing"));
        }
        if path.contains('\0') {
            return Err(wrong("a path holds no NUL"));
        }
        return Ok(Target::Unix(PathBuf::from(path)));
    }
    let (scheme, rest) = match address.split_once("://") {
        None => (None, address),
        Some(("http", rest)) => (Some(Scheme::Http), rest),
        Some(("https", rest)) => (Some(Scheme::Https), rest),
        Some((other, _)) => return Err(wrong(&format!("nothing speaks `{other}`"))),
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.is_empty() {
        return Err(wrong("it is empty"));
    }
    if authority.starts_with('/') || authority.starts_with('.') {
        return Err(wrong("a socket's path starts with unix:"));
    }
    let uri: transport::Uri =
        format!("http://{authority}").parse().map_err(|error| wrong(&format!("{error}")))?;
    if uri.path() != "/" || uri.query().is_some() || authority.contains('@') || authority.contains('#') {
        return Err(wrong("it takes a host and a port, nothing more"));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(wrong("the host is missing"));
    }
    match uri.port_u16() {
        Some(1..) => Ok(Target::Tcp { authority: authority.into(), scheme }),
        Some(0) => Err(wrong("nothing listens on port 0")),
        None => Err(wrong("the port is missing or no number from 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn problem(address: &str) -> String {
        Endpoint::parse(address).unwrap_err().to_string()
    }

    #[test]
    fn the_four_forms_parse_and_show_themselves_again() {
        for address in [
            "127.0.0.1:50051",
            "localhost:1",
            "[::1]:50051",
            "http://127.0.0.1:50051",
            "https://vmhost.example:443",
            "unix:/run/pagewalk.sock",
            "unix:relative.sock",
        ] {
            assert_eq!(Endpoint::parse(address).unwrap().to_string(), address);
        }
        assert_eq!(Endpoint::parse("unix:///run/x").unwrap().to_string(), "unix:/run/x");
        assert_eq!(Endpoint::parse("http://127.0.0.1:1/").unwrap().to_string(), "http://127.0.0.1:1");
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (address, reason) in [
            ("", "empty"),
            ("http://", "empty"),
            ("unix:", "path is missing"),
            ("127.0.0.1", "port is missing"),
            ("[::1]", "port is missing"),
            ("127.0.0.1:99999", "no number from 1 to 65535"),
            ("127.0.0.1:0", "port 0"),
            (":50051", "host is missing"),
            ("ftp://127.0.0.1:1", "nothing speaks `ftp`"),
            ("127.0.0.1:1/path", "nothing more"),
            ("user@127.0.0.1:1", "nothing more"),
            ("/run/pagewalk.sock", "starts with unix:"),
            ("two words:1", "not an address"),
        ] {
            let text = problem(address);
            assert!(text.contains(reason), "{address}: {text}");
            assert!(text.contains("unix:/PATH"), "{address}: {text}");
        }
    }

    #[test]
    fn contradictions_of_scheme_and_tls_are_refused() {
        let tls = Tls::new(b"unread".to_vec());
        for (address, tls, reason) in [
            ("unix:/run/x", Some(tls.clone()), "speaks no TLS"),
            ("http://127.0.0.1:1", Some(tls), "says plain text"),
            ("https://127.0.0.1:1", None, "no authority is given"),
        ] {
            let mut endpoint = Endpoint::parse(address).unwrap();
            endpoint.tls = tls;
            let text = endpoint.transport().unwrap_err().to_string();
            assert!(text.contains(reason), "{address}: {text}");
        }
    }
}
