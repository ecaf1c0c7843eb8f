//! A real daemon with the demo machine, for as long as a test needs it.

use std::{
    env,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};

const START: Duration = Duration::from_secs(30);

pub(crate) struct Daemon {
    process: Child,
    pub(crate) address: String,
}

impl Daemon {
    /// Starts one on a free port of the loopback.
    pub(crate) fn start() -> Self {
        let mut process = Command::new(executable())
            .args(["serve", "--machine", "demo", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the daemon can be started");
        let stdout = BufReader::new(process.stdout.take().expect("its output is ours"));
        let (sender, receiver) = mpsc::channel();
        // Reads on to the end, so that the daemon never waits for a reader.
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("listening on ") {
                    let _ = sender.send(address.to_owned());
                }
            }
        });
        let address = receiver.recv_timeout(START);
        let mut daemon = Self { process, address: String::new() };
        match address {
            Ok(address) => daemon.address = address,
            Err(error) => panic!("no `listening on` line: {error}; {:?}", daemon.process.try_wait()),
        }
        daemon
    }

    /// Runs the command against it.
    pub(crate) fn pagewalk(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the command can be run")
    }

    /// Starts the command against it, to be read from while it runs.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command can be run")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagewalk"));
        command.args(arguments).env("PAGEWALK_ADDR", &self.address);
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Builds the daemon, so that it is the one of this source tree.
fn executable() -> &'static PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--quiet",
            "--package",
            "pagewalkd",
            "--bin",
            "pagewalkd",
            "--message-format=json",
        ]);
        // What cargo tells this test about its package would have build scripts run again.
        for (key, _) in env::vars_os() {
            if key
                .to_str()
                .is_some_and(|key| key.starts_with("CARGO_PKG_") || key.starts_with("CARGO_MANIFEST_"))
            {
                cargo.env_remove(key);
            }
        }
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let built = cargo.stderr(Stdio::inherit()).output().expect("cargo can be run");
        assert!(built.status.success(), "the daemon does not build");
        let messages = String::from_utf8(built.stdout).expect("cargo writes UTF-8");
        messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == "pagewalkd")
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .expect("cargo names the daemon's executable")
    })
}
