//! QEMU's monitor over its QMP socket: commands one at a time, events as they come.
//!
//! QEMU 7.2 documentation, "QEMU Machine Protocol Specification". The peer is trusted with nothing: a line is bounded, an
//! answer has to come in time, and what is no QMP ends the connection. A thread of its own reads; it hands answers to whoever
//! asked, and events to [`Events`]. The typed commands are the crate qapi's, which never sees an event: it knows those of one
//! version of QEMU only, and keeps all of them.

use std::io::{self, BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use qapi::qmp::QmpCommand;
use qapi::{ExecuteError, Qmp, Stream, qmp};
use serde::Deserialize;

use pagewalk_proto::readable_within;

use crate::listen::connect;

/// For QEMU to greet: it serves one client of a socket at a time, and lets others wait without a word.
const GREETING: Duration = Duration::from_secs(3);
/// For an answer while attaching, so that whoever waits is told why, and not only that it took too long.
const FIRST_ANSWERS: Duration = Duration::from_secs(4);
/// For an answer later on: another client's command may keep QEMU busy.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// Longest line that is read. The longest answer asked for, a layout of memory, has some ten thousand bytes.
const LINE_MAX: usize = 16 << 20;
/// Lines that nobody has asked for.
const UNASKED: usize = 8;

/// Why the monitor cannot be asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MonitorError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the QMP socket {path}: {problem}; {}", advice(.problem))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        problem: Arc<io::Error>,
    },
    /// The connection failed, or the peer speaks no QMP.
    #[error("the QMP socket {path}: {problem}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        problem: String,
    },
    /// QEMU refused the command.
    #[error("QEMU refuses `{command}`: {problem}")]
    Refused {
        /// The command.
        command: String,
        /// What it says.
        problem: String,
    },
}

const ANOTHER_CLIENT: &str =
    "another client may hold the socket, which serves one at a time; give QEMU one more -qmp for the daemon";

fn advice(problem: &io::Error) -> &'static str {
    match problem.kind() {
        io::ErrorKind::PermissionDenied => {
            "run the daemon as QEMU's user or as root, or let its user write to the socket"
        }
        io::ErrorKind::WouldBlock => ANOTHER_CLIENT,
        _ => "start QEMU with -qmp unix:PATH,server=on,wait=off",
    }
}

impl MonitorError {
    /// Whether the connection is of no use any more.
    pub(super) fn is_final(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// What QEMU tells without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest was stopped, runs on, or shut down.
    State,
    Reset,
    /// Memory or a device came or went.
    Layout,
}

impl Event {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            // Of a guest that panics, another one of these says whether that stopped it.
            "STOP" | "RESUME" | "SUSPEND" | "WAKEUP" | "SHUTDOWN" => Self::State,
            "RESET" => Self::Reset,
            "ACPI_DEVICE_OST" | "DEVICE_DELETED" | "MEMORY_DEVICE_SIZE_CHANGE" => Self::Layout,
            _ => return None,
        })
    }
}

/// Who hears of events, and of the end of the connection. Called on the reading thread: must neither block nor ask.
pub(super) trait Events: Send + Sync + 'static {
    fn event(&self, event: Event);
    fn ended(&self, problem: &str);
}

/// As much of a line as tells an event from an answer.
#[derive(Deserialize)]
struct Line {
    event: Option<String>,
}

type Wire = Qmp<Stream<Answers, UnixStream>>;

/// The monitor. Commands take turns.
pub(super) struct Monitor {
    path: PathBuf,
    wire: Mutex<Result<Wire, MonitorError>>,
    /// The machine is attached, and QEMU may take its time.
    trusted: AtomicBool,
    socket: UnixStream,
}

impl Monitor {
    /// Connects, and hears QEMU's greeting.
    pub(super) fn connect(path: &Path, events: Arc<dyn Events>) -> Result<Self, MonitorError> {
        let failed = |problem| MonitorError::Connect { path: path.to_owned(), problem: Arc::new(problem) };
        let socket = connect(path).map_err(failed)?;
        socket.set_write_timeout(Some(ANSWER)).map_err(failed)?;
        let reading = socket.try_clone().map_err(failed)?;
        let writing = socket.try_clone().map_err(failed)?;
        let (lines, answers) = sync_channel(UNASKED);
        let ended = Arc::new(OnceLock::new());
        thread::Builder::new()
            .name("qmp".to_owned())
            .spawn({
                let ended = Arc::clone(&ended);
                move || {
                    let problem = read_lines(reading, &lines, &*events);
                    events.ended(ended.get_or_init(|| problem));
                    // Whoever waits for an answer finds out only now, and finds the reason.
                    drop(lines);
                }
            })
            .map_err(failed)?;
        let deadline = Instant::now() + GREETING;
        let answers = Answers { lines: answers, line: Vec::new(), at: 0, deadline, ended };
        let mut monitor = Self {
            path: path.to_owned(),
            wire: Mutex::new(Ok(Qmp::new(Stream::new(answers, writing)))),
            trusted: AtomicBool::new(false),
            socket,
        };
        monitor.greet()?;
        Ok(monitor)
    }

    fn greet(&mut self) -> Result<(), MonitorError> {
        let Ok(wire) = self.wire.get_mut().unwrap_or_else(PoisonError::into_inner) else { return Ok(()) };
        let greeted = wire.read_capabilities();
        greeted.map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::TimedOut {
                format!(" and no greeting: {ANOTHER_CLIENT}")
            } else {
                String::new()
            };
            self.broken(format!("{}{hint}", told(&error)))
        })?;
        self.execute(&qmp::qmp_capabilities { enable: None })?;
        Ok(())
    }

    /// From now on, gives QEMU more time for an answer.
    pub(super) fn trust(&self) {
        self.trusted.store(true, Ordering::Relaxed);
    }

    /// The socket, for asking who is behind it.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Executes a command. After an error that is final there is no other.
    pub(super) fn execute<C: QmpCommand>(&self, command: &C) -> Result<C::Ok, MonitorError> {
        self.execute_named(C::NAME, command, self.patience())
    }

    /// [`Self::execute`], with so much time for the answer.
    pub(super) fn execute_within<C: QmpCommand>(
        &self,
        command: &C,
        patience: Duration,
    ) -> Result<C::Ok, MonitorError> {
        self.execute_named(C::NAME, command, patience)
    }

    fn patience(&self) -> Duration {
        if self.trusted.load(Ordering::Relaxed) { ANSWER } else { FIRST_ANSWERS }
    }

    /// Executes a command of the monitor for people, as seen from a vCPU.
    pub(super) fn ask(&self, line: &str, vcpu: i64) -> Result<String, MonitorError> {
        let command = qmp::human_monitor_command { command_line: line.to_owned(), cpu_index: Some(vcpu) };
        self.execute_named(line, &command, self.patience())
    }

    fn execute_named<C: QmpCommand>(
        &self,
        name: &str,
        command: &C,
        patience: Duration,
    ) -> Result<C::Ok, MonitorError> {
        let mut slot = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let wire = slot.as_mut().map_err(|error| error.clone())?;
        wire.inner_mut().get_mut_read().deadline = Instant::now() + patience;
        match wire.execute(command) {
            Ok(answer) => Ok(answer),
            Err(ExecuteError::Qapi(error)) => {
                Err(MonitorError::Refused { command: name.to_owned(), problem: error.desc })
            }
            Err(ExecuteError::Io(error)) => {
                let error = self.broken(format!("`{name}`: {}", told(&error)));
                *slot = Err(error.clone());
                Err(error)
            }
        }
    }

    fn broken(&self, problem: String) -> MonitorError {
        MonitorError::Broken { path: self.path.clone(), problem }
    }
}

/// What is said of an error on the wire. That an answer does not fit is serde's, in words about types.
fn told(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            let error = readable_within(&error.to_string(), 200);
            format!(
                "what is behind it does not answer as QEMU does, or in words that are not known here ({error}); check that it is the \
                 socket of QEMU's own -qmp, not a guest agent's or another program's"
            )
        }
        _ => error.to_string(),
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Ends the reading thread. QEMU takes it as any client's leaving: the guest goes on.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Reads until the connection ends, and says why it did.
fn read_lines(socket: UnixStream, answers: &SyncSender<Vec<u8>>, events: &dyn Events) -> String {
    let mut socket = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match (&mut socket).take(LINE_MAX as u64).read_until(b'\n', &mut line) {
            Ok(0) => break "QEMU closed it".to_owned(),
            Ok(LINE_MAX..) => break format!("a line of more than {LINE_MAX} bytes"),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
        match serde_json::from_slice::<Line>(&line) {
            Ok(Line { event: Some(name) }) => {
                if let Some(event) = Event::named(&name) {
                    events.event(event);
                }
            }
            Ok(Line { event: None }) => {
                // Answers come one at a time: the channel is full only of what nobody has asked for.
                if answers.try_send(line).is_err() {
                    break "answers that nobody has asked for".to_owned();
                }
            }
            Err(error) => {
                let start = String::from_utf8_lossy(line.get(..64).unwrap_or(&line)).trim().to_owned();
                break format!("what it sends is no QMP ({error}): {start:?}");
            }
        }
    }
}

/// The answers, line by line, for a reader that is to be told when it has waited long enough.
struct Answers {
    lines: Receiver<Vec<u8>>,
    line: Vec<u8>,
    at: usize,
    deadline: Instant,
    /// Why the connection has ended.
    ended: Arc<OnceLock<String>>,
}

impl BufRead for Answers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.line.len() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            self.line = self.lines.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
                // Never end of file: qapi panics on that in place of a greeting.
                RecvTimeoutError::Disconnected => {
                    let reason = self.ended.get().map_or("it was closed", String::as_str);
                    io::Error::new(io::ErrorKind::ConnectionAborted, reason)
                }
            })?;
            self.at = 0;
        }
        Ok(self.line.get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl Read for Answers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(into)?;
        self.consume(read);
        Ok(read)
    }
}
