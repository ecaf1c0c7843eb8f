//! QMP sockets that are named: whether a QEMU greets there (QEMU's "QEMU Machine Protocol Specification").

use std::{
    io::{self, BufRead as _, BufReader, Read as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use super::check::Report;

/// For a greeting.
const PATIENCE: Duration = Duration::from_secs(2);
/// A greeting has some two hundred bytes.
const GREETING_MAX: u64 = 1 << 16;
const SUBJECT: &str = "QMP socket";

pub(super) fn examine(report: &mut Report, sockets: &[PathBuf]) {
    for path in sockets {
        let shown = path.display();
        match version(path) {
            Ok(version) => report.ok(SUBJECT, format!("{shown}: QEMU {version} greets")),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => report
                .warn(
                    SUBJECT,
                    format!("{shown}: no greeting"),
                    "it serves one client at a time: another one, perhaps the daemon, holds it; give QEMU one more -qmp",
                ),
            Err(error) => report.fail(
                SUBJECT,
                format!("{shown}: {error}"),
                "start QEMU with -qmp unix:PATH,server=on,wait=off, and let the daemon's user write to the socket",
            ),
        }
    }
}

fn version(path: &Path) -> io::Result<String> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(socket.take(GREETING_MAX)).read_line(&mut line)?;
    let greeting: Value =
        serde_json::from_str(&line).map_err(|_| io::Error::other("what greets is no QMP"))?;
    let qemu = &greeting["QMP"]["version"]["qemu"];
    match (qemu["major"].as_u64(), qemu["minor"].as_u64(), qemu["micro"].as_u64()) {
        (Some(major), Some(minor), Some(micro)) => Ok(format!("{major}.{minor}.{micro}")),
        _ => Err(io::Error::other("what greets is no QMP")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{io::Write as _, os::unix::net::UnixListener};

    use super::*;

    #[test]
    fn a_greeting_is_told_from_all_else() {
        let path = std::env::temp_dir().join(format!("pagewalk-doctor-{}.qmp", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}"#;
            for answer in [greeting, r#"{"QMP": {}}"#, "nonsense"] {
                writeln!(listener.accept().unwrap().0, "{answer}").unwrap();
            }
            // And one that is held open without a word.
            listener.accept().unwrap()
        });
        assert_eq!(version(&path).unwrap(), "7.2.22");
        assert!(version(&path).is_err() && version(&path).is_err());
        let mut report = Report::default();
        examine(&mut report, &[path.clone(), "/nonexistent/x.qmp".into()]);
        let json = report.json();
        assert_eq!(json["checks"][0]["standing"], "warn");
        assert_eq!(json["checks"][1]["standing"], "fail");
        drop(server.join().unwrap());
        std::fs::remove_file(&path).unwrap();
    }
}
