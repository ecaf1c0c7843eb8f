//! The daemon as a process of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::bed::SOON;

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_pagewalkd");

/// A command without what the developer's environment says to the daemon.
pub(crate) fn hermetic(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PAGEWALK_")) {
            command.env_remove(name);
        }
    }
    command.env_remove("XDG_RUNTIME_DIR").env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// A running daemon, ended with its handle.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) address: String,
    lines: mpsc::Receiver<String>,
    folder: TempDir,
}

impl Daemon {
    /// `pagewalkd serve` with `arguments`, on a port that the system picks.
    pub(crate) fn serve(arguments: &[&str]) -> Self {
        Self::spawn(hermetic(DAEMON).args(["serve", "--listen", "127.0.0.1:0"]).args(arguments))
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let lines = read_lines(child.stdout.take().unwrap());
        let mut daemon = Self { child, address: String::new(), lines, folder };
        let line = daemon.line();
        daemon.address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        daemon
    }

    /// The next line of its standard output.
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(SOON).unwrap_or_else(|_| panic!("it says no more; its log: {}", self.log()))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let kill = Command::new("sh").arg("-c").arg(format!("kill -{signal} {}", self.pid())).status();
        assert!(kill.unwrap().success());
    }

    /// Waits for its end, `bound` at most.
    pub(crate) fn wait(&mut self, bound: Duration) -> ExitStatus {
        wait(&mut self.child, bound).unwrap_or_else(|| panic!("it does not end; its log: {}", self.log()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

fn wait(child: &mut Child, bound: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + bound;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// What a program that ends by itself prints, and whether it succeeds.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs `command` to its end, which must come in time.
pub(crate) fn run(command: &mut Command) -> Ended {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    command.stdout(File::create(path("out")).unwrap()).stderr(File::create(path("err")).unwrap());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let status = wait(&mut child, SOON * 6);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let read = |name| String::from_utf8_lossy(&std::fs::read(path(name)).unwrap()).into_owned();
    let (out, err) = (read("out"), read("err"));
    let status = status.unwrap_or_else(|| panic!("{command:?} does not end: {out}{err}"));
    Ended { code: status.code(), out, err }
}

/// Runs `command`, which must succeed, and gives what it prints.
pub(crate) fn output(command: &mut Command) -> String {
    let ended = run(command);
    assert_eq!(ended.code, Some(0), "{command:?}: {}{}", ended.out, ended.err);
    ended.out
}

/// The `pagewalk` command. `cargo test --workspace` has built it; tests of one package alone are given no binaries of
/// another, so it is built where there is none.
pub(crate) fn pagewalk() -> PathBuf {
    let folder = Path::new(DAEMON).parent().unwrap();
    if folder.join("pagewalk").exists() {
        return folder.join("pagewalk");
    }
    let mut build = Command::new(env!("CARGO"));
    build.args([
        "build",
        "--quiet",
        "--offline",
        "-p",
        "pagewalk-client",
        "--bin",
        "pagewalk",
        "--target-dir",
    ]);
    build.arg(folder.parent().unwrap());
    if folder.ends_with("release") {
        build.arg("--release");
    }
    output(build.current_dir(env!("CARGO_MANIFEST_DIR")));
    folder.join("pagewalk")
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}
