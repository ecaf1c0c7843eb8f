//! The guest's serial line on this side: a Unix socket for one person at a time, a log file, and the daemon's own log.
//!
//! What the guest says never waits for anybody. What nobody has read yet is kept, up to a bound, and handed to whoever
//! connects; beyond that, the oldest is lost.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::kernel::LinuxError;
use super::pc::SerialPort;
use crate::listen::{SocketFile, claim};
use crate::vcpu::console::Console as Lines;

/// Bytes kept for whoever connects next.
const KEPT: usize = 64 << 10;
/// Bytes that a log file grows to: the guest decides how much it says.
const LOG_MAX: u64 = 64 << 20;
/// A client that takes nothing for so long is left.
const STALLED: Duration = Duration::from_secs(5);
/// Between two looks whether the guest has read what was typed.
const TYPING: Duration = Duration::from_millis(5);

/// What the two threads of a console and the guest's serial port share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    unread: VecDeque<u8>,
    client: Option<UnixStream>,
    /// Clients so far: the number of this one.
    turn: u64,
    over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection, if it is still this one's turn.
    fn hang_up(&self, turn: u64) {
        let mut state = self.lock();
        if state.turn == turn
            && let Some(client) = state.client.take()
        {
            // It may have gone by itself.
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

/// Where the serial port's bytes go. Nothing here blocks, and nothing fails.
pub(super) struct Output {
    lines: Lines,
    log: Option<Log>,
    shared: Option<Arc<Shared>>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lines.log(bytes);
        if let Some(log) = &mut self.log {
            log.write(bytes);
        }
        if let Some(shared) = &self.shared {
            let mut state = shared.lock();
            state.unread.extend(bytes);
            let lost = state.unread.len().saturating_sub(KEPT);
            state.unread.drain(..lost);
            if state.client.is_some() {
                shared.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Log {
    file: File,
    left: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        // Opening a pipe would wait for its other end, and a link leads to a file that nobody has named.
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENXIO) => {
                    io::Error::other("is a socket, or a pipe that nobody reads: name a file")
                }
                Some(libc::ELOOP) => io::Error::other("is a symbolic link: name the file that it leads to"),
                _ => error,
            })?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("is not a regular file"));
        }
        // What earlier machines said counts as well: else each attach would add as much again.
        match LOG_MAX.saturating_sub(metadata.len()) {
            0 => Err(io::Error::other(format!("has {LOG_MAX} bytes already: move it away, or name another"))),
            left => Ok(Self { file, left }),
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let size = bytes.len() as u64;
        if self.left == 0 {
            return;
        }
        self.left = self.left.saturating_sub(size);
        let written = self.file.write_all(bytes);
        if self.left == 0 || written.is_err() {
            self.left = 0;
            tracing::warn!("the console's log file ends here: {written:?}, {LOG_MAX} bytes at most");
        }
    }
}

/// Ends the threads when the machine goes.
pub(super) struct Console {
    shared: Arc<Shared>,
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
    _file: SocketFile,
}

/// Opens the console of `machine`. Gives what the serial port writes to, and what [`serve`] needs where there is a socket.
pub(super) fn open(
    machine: &str,
    socket: Option<&Path>,
    log: Option<&Path>,
) -> Result<(Output, Option<Pending>), LinuxError> {
    let pending = socket
        .map(|path| {
            let (listener, file) =
                claim(path).map_err(|e| LinuxError::Console(format!("socket {}: {e}", path.display())))?;
            Ok(Pending { listener, file, shared: Arc::default() })
        })
        .transpose()?;
    // After the socket: a console that cannot be had makes no file.
    let log = log
        .map(|path| Log::open(path).map_err(|e| LinuxError::Console(format!("log {}: {e}", path.display()))))
        .transpose()?;
    let shared = pending.as_ref().map(|pending| Arc::clone(&pending.shared));
    Ok((Output { lines: Lines::new(machine.to_owned()), log, shared }, pending))
}

/// A console that nobody serves yet.
pub(super) struct Pending {
    listener: UnixListener,
    file: SocketFile,
    shared: Arc<Shared>,
}

/// Serves the console of `machine`: what is typed goes to `port`.
pub(super) fn serve(machine: &str, pending: Pending, port: &SerialPort) -> io::Result<Console> {
    let Pending { listener, file, shared } = pending;
    let stop = EventFd::new(0)?;
    let callers = Callers::of(listener, &stop)?;
    // Made first, so that a second thread that cannot be had ends the first.
    let mut console = Console { shared: Arc::clone(&shared), stop, threads: Vec::new(), _file: file };
    // The system takes no NUL in a thread's name.
    let named = |what: &str| Builder::new().name(format!("{machine}/{what}").replace('\0', ""));
    let writer = named("console").spawn({
        let shared = Arc::clone(&shared);
        move || write_out(&shared)
    })?;
    console.threads.push(writer);
    let port = Arc::clone(port);
    console.threads.push(named("typing").spawn(move || read_in(&shared, &callers, &port))?);
    Ok(console)
}

impl Drop for Console {
    fn drop(&mut self) {
        let turn = {
            let mut state = self.shared.lock();
            state.over = true;
            state.turn
        };
        self.shared.changed.notify_all();
        self.shared.hang_up(turn);
        if self.stop.write(1).is_err() {
            // One thread is not woken, and is better left behind than waited for.
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Who connects, until the console ends.
struct Callers {
    listener: UnixListener,
    epoll: Epoll,
}

impl Callers {
    fn of(listener: UnixListener, stop: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in [listener.as_raw_fd(), stop.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        // One that hangs up before it is accepted must not hold up the end.
        listener.set_nonblocking(true)?;
        Ok(Self { listener, epoll })
    }

    fn next(&self) -> io::Result<UnixStream> {
        self.epoll.wait(-1, &mut [EpollEvent::default()])?;
        let (client, _) = self.listener.accept()?;
        client.set_nonblocking(false)?;
        client.set_write_timeout(Some(STALLED))?;
        Ok(client)
    }
}

/// Hands what the guest said to whoever is connected.
fn write_out(shared: &Shared) {
    let mut state = shared.lock();
    while !state.over {
        match state.client.as_ref().map(UnixStream::try_clone) {
            Some(Ok(mut client)) if !state.unread.is_empty() => {
                let bytes = Vec::from(std::mem::take(&mut state.unread));
                let turn = state.turn;
                drop(state);
                if client.write_all(&bytes).is_err() {
                    shared.hang_up(turn);
                }
                state = shared.lock();
            }
            _ => state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Takes one client after the other, and hands what is typed to the guest.
fn read_in(shared: &Shared, callers: &Callers, port: &SerialPort) {
    loop {
        let connected = callers.next().and_then(|client| Ok((client.try_clone()?, client)));
        let mut state = shared.lock();
        if state.over {
            return;
        }
        let Ok((for_output, mut client)) = connected else {
            drop(state);
            // Out of descriptors, perhaps: not at once again.
            sleep(TYPING);
            continue;
        };
        state.client = Some(for_output);
        state.turn += 1;
        let turn = state.turn;
        shared.changed.notify_all();
        drop(state);
        let mut bytes = [0; 256];
        while let Ok(size @ 1..) = client.read(&mut bytes) {
            if !type_in(shared, port, bytes.get(..size).unwrap_or_default()) {
                break;
            }
        }
        shared.hang_up(turn);
    }
}

/// Hands these bytes to the guest, as fast as it reads. Says whether the connection is still there.
fn type_in(shared: &Shared, port: &SerialPort, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let taken = port.lock().unwrap_or_else(PoisonError::into_inner).enqueue_raw_bytes(bytes).unwrap_or(0);
        bytes = bytes.get(taken..).unwrap_or_default();
        if !bytes.is_empty() {
            if shared.lock().client.is_none() {
                return false;
            }
            sleep(TYPING);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_log_grows_no_further_with_another_machine() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LOG_MAX - 2).unwrap();
        let mut log = Log::open(file.path()).unwrap();
        for byte in b"abc" {
            log.write(&[*byte]);
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), LOG_MAX);
        let full = Log::open(file.path()).err().unwrap();
        assert!(full.to_string().contains("move it away"), "{full}");
    }

    #[test]
    fn a_link_is_no_log() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        for there in [false, true] {
            if there {
                std::fs::write(&file, "precious").unwrap();
            }
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(&file, &link).unwrap();
            let error = Log::open(&link).err().unwrap().to_string();
            assert!(error.contains("symbolic link"), "{error}");
            assert_eq!(file.exists(), there);
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn what_is_refused_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let one = folder.path().join("x");
        let error = open("vm", Some(&one), Some(&one)).err().unwrap().to_string();
        assert!(error.contains("x: is a socket") && error.contains("name a file"), "{error}");
        assert!(!one.exists());
        let other = folder.path().join("missing/s");
        open("vm", Some(&other), Some(&one)).err().unwrap();
        assert!(!one.exists());
    }

    /// Whoever stops taking what the guest says is noticed late, when the next one may be there already.
    #[test]
    fn the_end_of_one_client_is_not_that_of_the_next() {
        let shared = Shared::default();
        let (client, mut other_end) = UnixStream::pair().unwrap();
        *shared.lock() = State { client: Some(client), turn: 2, ..State::default() };
        shared.hang_up(1);
        other_end.set_nonblocking(true).unwrap();
        assert!(shared.lock().client.is_some());
        assert_eq!(other_end.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        shared.hang_up(2);
        assert!(shared.lock().client.is_none());
        assert_eq!(other_end.read(&mut [0]).unwrap(), 0);
    }
}
