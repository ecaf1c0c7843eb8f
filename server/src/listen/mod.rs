//! Where clients reach the daemon: TCP, behind mutual TLS wherever it is not loopback, and a Unix socket.

mod incoming;
mod tcp;
mod tls;
mod uds;

pub(crate) use incoming::Incoming;
pub(crate) use tcp::bind as bind_tcp;
pub use tls::{Tls, TlsError};
pub use uds::widen;
pub(crate) use uds::{SocketFile, UdsListener, claim, connect};

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// An address that others can reach, without mutual TLS.
    #[error(
        "{0} is not a loopback address, and without mutual TLS the daemon listens on no other: \
         pass --tls-cert, --tls-key and --client-ca (deploy/make-lab-certs.sh makes a set), or listen on 127.0.0.1"
    )]
    NeedsTls(SocketAddr),
    /// The address cannot be bound.
    #[error(
        "cannot listen on {address}: {problem}; another daemon may have it, pass another --listen (port 0 picks one)"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        problem: std::io::Error,
    },
    /// The socket cannot be bound.
    #[error(
        "cannot listen on unix:{path}: {problem}; pass --uds a short path in a folder that exists and can be written to"
    )]
    Uds {
        /// The path.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// Somebody serves the socket.
    #[error("cannot listen on unix:{0}: another daemon serves it, pass another --uds")]
    UdsTaken(PathBuf),
    /// Something that is no socket is in its place.
    #[error("cannot listen on unix:{0}: there is a file that is no socket, remove it or pass another --uds")]
    UdsOccupied(PathBuf),
}
