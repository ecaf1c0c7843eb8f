//! Mutual TLS: the daemon shows its certificate and asks every client for one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::small_file;

/// How long a client may take to shake hands: until then it keeps a place without having shown who it is.
const HANDSHAKE_BOUND: Duration = Duration::from_secs(10);

/// Where the certificates lie; all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The daemon's certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority that clients' certificates come from.
    pub client_ca: PathBuf,
}

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Only a part of the three files is named.
    #[error("--tls-cert, --tls-key and --client-ca go together: {0} is missing")]
    Incomplete(&'static str),
    /// A file cannot be read.
    #[error("cannot read {option} {path}: {problem}")]
    Read {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// The files are no usable certificates and key.
    #[error("the certificates or the key are not usable: {0}; all three files are PEM, the key unencrypted")]
    Unusable(String),
}

impl Tls {
    /// Puts the three options together: all or none.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub fn from_options(
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        client_ca: Option<PathBuf>,
    ) -> Result<Option<Self>, TlsError> {
        match (cert, key, client_ca) {
            (None, None, None) => Ok(None),
            (Some(cert), Some(key), Some(client_ca)) => Ok(Some(Self { cert, key, client_ca })),
            (None, ..) => Err(TlsError::Incomplete("--tls-cert")),
            (_, None, _) => Err(TlsError::Incomplete("--tls-key")),
            (_, _, None) => Err(TlsError::Incomplete("--client-ca")),
        }
    }

    pub(crate) fn config(&self) -> Result<ServerTlsConfig, TlsError> {
        let identity = Identity::from_pem(read("--tls-cert", &self.cert)?, read("--tls-key", &self.key)?);
        let authority = Certificate::from_pem(read("--client-ca", &self.client_ca)?);
        Ok(ServerTlsConfig::new().identity(identity).client_ca_root(authority).timeout(HANDSHAKE_BOUND))
    }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    small_file::read(path).map_err(|problem| TlsError::Read { option, path: path.to_owned(), problem })
}
