//! Mutual TLS: whom to trust, and who we are.
//!
//! The authority is always named, never taken from the system: a daemon's certificate comes from its operator.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use tonic::transport;

use crate::endpoint::EndpointError;

/// A client certificate and its private key, in PEM.
#[derive(Clone)]
pub struct Identity {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Identity {
    /// From PEM text.
    #[must_use]
    pub fn new(certificate: Vec<u8>, key: Vec<u8>) -> Self {
        Self { certificate, key }
    }
}

// The key stays out of logs.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// How to speak TLS: the authority to trust, and the identity to show where the daemon asks for one.
#[derive(Clone, Debug)]
pub struct Tls {
    authority: Vec<u8>,
    identity: Option<Identity>,
}

impl Tls {
    /// Trusts daemons certified by this authority, in PEM.
    #[must_use]
    pub fn new(authority: Vec<u8>) -> Self {
        Self { authority, identity: None }
    }

    /// Shows this identity.
    #[must_use]
    pub fn with_identity(self, identity: Identity) -> Self {
        Self { identity: Some(identity), ..self }
    }

    /// Reads the authority's certificate, and the client's certificate and key, from PEM files.
    ///
    /// # Errors
    /// If a file cannot be read, is no regular one, has more than 1 MiB or holds no PEM.
    pub fn from_files(authority: &Path, identity: Option<(&Path, &Path)>) -> Result<Self, EndpointError> {
        let tls = Self::new(read("the authority's certificate", authority)?);
        Ok(match identity {
            None => tls,
            Some((certificate, key)) => tls.with_identity(Identity::new(
                read("the client's certificate", certificate)?,
                read("the client's key", key)?,
            )),
        })
    }

    pub(crate) fn has_identity(&self) -> bool {
        self.identity.is_some()
    }

    pub(crate) fn transport(&self) -> transport::ClientTlsConfig {
        let config = transport::ClientTlsConfig::new()
            .ca_certificate(transport::Certificate::from_pem(&self.authority));
        match &self.identity {
            None => config,
            Some(Identity { certificate, key }) => {
                config.identity(transport::Identity::from_pem(certificate, key))
            }
        }
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, EndpointError> {
    let unreadable = |cause: String| EndpointError::File { what, path: path.display().to_string(), cause };
    let pem = regular(path).map_err(|error| unreadable(error.to_string()))?;
    // The transport takes a file without PEM for an empty list, and fails much later, with the handshake.
    if pem.windows(BEGIN.len()).any(|window| window == BEGIN) {
        Ok(pem)
    } else {
        Err(unreadable("it holds no PEM (no `-----BEGIN` line)".into()))
    }
}

/// A file of bounded size: what never ends, or waits for somebody to write, is told at once.
fn regular(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for its other end.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file; copy what it gives into one"));
    }
    let mut text = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > FILE_MAX {
        return Err(io::Error::other("it is larger than 1 MiB, which no certificate or key is"));
    }
    Ok(text)
}

const BEGIN: &[u8] = b"-----BEGIN";

/// Largest file that is read. Bundles of all the authorities of the web have a quarter of it.
const FILE_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn files_that_are_missing_or_hold_no_pem_are_named() {
        let missing = Tls::from_files(Path::new("/nonexistent/ca.pem"), None).unwrap_err().to_string();
        assert!(missing.contains("the authority's certificate /nonexistent/ca.pem"), "{missing}");
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let no_pem = Tls::from_files(&manifest, None).unwrap_err().to_string();
        assert!(no_pem.contains("no PEM"), "{no_pem}");
    }

    #[test]
    fn what_does_not_end_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let (pipe, large) = (folder.path().join("pipe"), folder.path().join("large.pem"));
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::fs::write(&large, [BEGIN, &[b'A'; 1 << 20]].concat()).unwrap();
        for (file, reason) in [
            (Path::new("/dev/zero"), "not a regular file"),
            (&pipe, "not a regular file"),
            (folder.path(), "not a regular file"),
            (&large, "larger than 1 MiB"),
        ] {
            let problem = Tls::from_files(file, None).unwrap_err().to_string();
            assert!(problem.contains(reason) && problem.contains(file.to_str().unwrap()), "{problem}");
        }
    }

    #[test]
    fn keys_do_not_show_in_debug_output() {
        let identity = Identity::new(b"certificate".to_vec(), b"secret".to_vec());
        let tls = Tls::new(Vec::new()).with_identity(identity);
        assert!(!format!("{tls:?}").contains(&format!("{:?}", b"secret")));
    }
}
