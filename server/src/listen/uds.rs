//! A Unix socket: for the daemon's own user and group.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixListener as StdListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::net::UnixListener;

use super::ListenError;

/// Owner and group.
const MODE: u32 = 0o660;
/// What a socket holds that the other end has not read, which the kernel doubles for what it needs itself: as much as Linux lets
/// anybody ask for where nobody has set another bound. Of its own accord it gives half, and the two ends of a batch would wait
/// for one another twice as often.
const SEND_BUFFER: usize = 212_992;

/// Has a Unix socket hold more of what its other end has not read, if it holds less.
pub fn widen(stream: &tokio::net::UnixStream) {
    let socket = SockRef::from(stream);
    // Where it cannot be had, it is as it was.
    if socket.send_buffer_size().is_ok_and(|size| size < 2 * SEND_BUFFER) {
        let _ = socket.set_send_buffer_size(SEND_BUFFER);
    }
}

/// A bound socket; its file goes with it.
#[derive(Debug)]
pub(crate) struct UdsListener {
    pub(crate) listener: UnixListener,
    pub(crate) file: SocketFile,
}

/// Removes the socket's file when the daemon ends, unless another daemon's is in its place by then.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// The file itself: while this is open, no other file gets its inode.
    bound: File,
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        // A socket cannot be opened to be read.
        let bound = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
        Ok(Self { path: path.to_owned(), bound })
    }

    fn is_there(&self) -> io::Result<bool> {
        let (there, bound) = (fs::symlink_metadata(&self.path)?, self.bound.metadata()?);
        Ok((there.dev(), there.ino()) == (bound.dev(), bound.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if matches!(self.is_there(), Ok(true)) {
            // The folder may have gone first.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl UdsListener {
    /// Binds the daemon's own socket.
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |problem| ListenError::Uds { path: path.to_owned(), problem };
        let (listener, file) = claim(path).map_err(|error| match error {
            ClaimError::Failed(problem) => failed(problem),
            ClaimError::Taken => ListenError::UdsTaken(path.to_owned()),
            ClaimError::Occupied => ListenError::UdsOccupied(path.to_owned()),
        })?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener: UnixListener::from_std(listener).map_err(failed)?, file })
    }
}

/// Why a path cannot be bound.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    #[error("cannot be bound: {0}; use a short path in a folder that exists and can be written to")]
    Failed(#[from] std::io::Error),
    #[error("somebody serves it: use another path")]
    Taken,
    #[error("there is a file that is no socket: remove it or use another path")]
    Occupied,
}

/// Binds `path`, and takes the place of a socket that a dead daemon left there.
pub(crate) fn claim(path: &Path) -> Result<(StdListener, SocketFile), ClaimError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(found) if !found.file_type().is_socket() => return Err(ClaimError::Occupied),
        Ok(_) => match connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ClaimError::Taken),
            Err(error) => return Err(error.into()),
            Ok(_) => return Err(ClaimError::Taken),
        },
    }
    let listener = StdListener::bind(path)?;
    let file = SocketFile::at(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    Ok((listener, file))
}

/// Connects at once, or not at all: where as many clients wait to be served as may, one more would wait without end.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    // A path with a NUL would be cut off there, or be no path.
    SocketAddr::from_pathname(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    socket.set_nonblocking(false)?;
    Ok(OwnedFd::from(socket).into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn takes_over_a_dead_socket_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let alive = UdsListener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        assert!(matches!(UdsListener::bind(&path), Err(ListenError::UdsTaken(_))));

        let UdsListener { listener, file } = alive;
        std::mem::forget(file);
        drop(listener);
        let again = UdsListener::bind(&path).unwrap();
        drop(again);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(UdsListener::bind(&path), Err(ListenError::UdsOccupied(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    /// A daemon that ends leaves the socket alone that another one has bound there since.
    #[tokio::test]
    async fn only_its_own_file_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let UdsListener { listener, file } = UdsListener::bind(&path).unwrap();
        // It drains: it takes nobody any more, and has not ended yet.
        drop(listener);
        let next = UdsListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(next);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_that_takes_nobody_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = tokio::net::UnixSocket::new_stream().unwrap();
        socket.bind(&path).unwrap();
        let _listener = socket.listen(0).unwrap();
        let mut waiting = Vec::new();
        while let Ok(client) = connect(&path) {
            waiting.push(client);
        }
        assert!(matches!(claim(&path), Err(ClaimError::Taken)));
        assert_eq!(connect(Path::new("\0s")).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
