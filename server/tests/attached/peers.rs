//! Peers that are no QEMU: silent, talking nonsense, talking without end. Each is refused in time, by an error that names the
//! socket.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use tonic::Code;

use crate::daemon::{Daemon, refusal};
use crate::judge;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;
const BOUND: Duration = Duration::from_secs(12);

/// Its name, what is said of it, and what it does.
type Peer = (&'static str, &'static str, fn(UnixStream));

pub(crate) fn trials() -> Vec<Trial> {
    let peers: [Peer; 11] = [
        ("silent", "no greeting", |stream| drop(BufReader::new(stream).read_line(&mut String::new()))),
        ("closes", "closed", drop),
        ("garbage", "no QMP", |mut stream| drop(stream.write_all(&[0xff; 100_000]))),
        ("another_protocol", "no QMP", |mut stream| {
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        }),
        ("no_line_ends", "bytes", |mut stream| while stream.write_all(&[b' '; 1 << 16]).is_ok() {}),
        ("deeply_nested", "no QMP", |mut stream| {
            drop(stream.write_all("[".repeat(1 << 20).as_bytes()));
            drop(stream.write_all(b"\n"));
        }),
        ("greets_and_is_silent", "no answer in time", |mut stream| {
            drop(writeln!(stream, "{GREETING}"));
            let mut lines = BufReader::new(stream);
            while lines.read_line(&mut String::new()).is_ok_and(|read| read > 0) {}
        }),
        ("answers_unasked", "", |mut stream| while writeln!(stream, "{GREETING}").is_ok() {}),
        ("greets_as_nobody", "does not answer as QEMU does", |mut stream| {
            drop(writeln!(stream, "{{}}"));
            drop(BufReader::new(stream).read_line(&mut String::new()));
        }),
        ("answers_nothing", "`query-kvm`: what is behind it does not answer as QEMU does", |mut stream| {
            drop(writeln!(stream, "{GREETING}"));
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            while lines.read_line(&mut String::new()).is_ok_and(|read| read > 0) {
                drop(writeln!(stream, r#"{{"return": {{}}}}"#));
            }
        }),
        ("answers_nonsense", "does not answer as QEMU does", |mut stream| {
            drop(writeln!(stream, "{GREETING}"));
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
                let answer = if line.contains("qmp_capabilities") { "{}" } else { r#""nonsense""# };
                // An event before each answer.
                drop(writeln!(stream, r#"{{"event": "NO_SUCH_EVENT", "data": {{}}, "timestamp": 1}}"#));
                drop(writeln!(stream, r#"{{"return": {answer}}}"#));
                line.clear();
            }
        }),
    ];
    let mut trials: Vec<Trial> = peers
        .into_iter()
        .map(|(name, said, peer)| Trial::test(format!("peer_{name}"), move || refuses(said, peer)))
        .collect();
    trials.push(Trial::test("peer_names_another_users_process", names_another_users_process));
    trials.push(Trial::test("peer_is_not_there", || {
        let daemon = Daemon::start()?;
        let folder = tempfile::tempdir()?;
        let missing = folder.path().join("nothing.qmp");
        let refused = daemon.attach_qemu("vm", &missing);
        assert_eq!(refusal(refused, &missing.display().to_string()).0, Code::FailedPrecondition);
        Ok(())
    }));
    trials
}

/// Somebody without rights has the daemon, which has all, attach to a socket of theirs, and names a process that is not theirs.
fn names_another_users_process() -> Result<(), Failed> {
    const SCRIPT: &str = r#"
use IO::Socket::UNIX;
my $listener = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 1) or die $!;
chmod 0777, $ARGV[0];
$| = 1;
print "ready\n";
while (my $stream = $listener->accept()) {
    print $stream "$ARGV[1]\n";
    while (<$stream>) { print $stream /qmp_capabilities/ ? '{"return": {}}' : '{"return": 1}', "\n" }
}
"#;
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777))?;
    let path = folder.path().join("peer.qmp");
    let child = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--", "perl", "-e", SCRIPT])
        .args([path.as_os_str(), GREETING.as_ref()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut peer = match child {
        Ok(child) => Killed(child),
        Err(problem) => return judge::skipped("setpriv", &problem.to_string()),
    };
    let mut line = String::new();
    BufReader::new(peer.0.stdout.take().ok_or("no standard output")?).read_line(&mut line)?;
    if line.trim() != "ready" {
        let mut said = String::new();
        peer.0.stderr.take().ok_or("no standard error")?.read_to_string(&mut said)?;
        return judge::skipped("setpriv", said.trim());
    }
    let daemon = Daemon::start()?;
    let attach = |pid: u32| daemon.attach(&format!("vm=qemu:qmp={},pid={pid}", path.display()));
    let own = std::process::id();
    let (code, reason) = refusal(attach(own), &format!("process {own} is user 0's"));
    assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "CANNOT_ATTACH"));
    // Of its own process it may say what it likes.
    refusal(attach(peer.0.id()), "query-kvm");
    Ok(())
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refuses(said: &str, peer: fn(UnixStream)) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("peer.qmp");
    let listener = UnixListener::bind(&path)?;
    let peer = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // One that never stops talking must not outlive the test.
        stream.set_write_timeout(Some(BOUND)).unwrap();
        peer(stream);
    });
    let daemon = Daemon::start()?;
    daemon.attach("other=demo:plain")?;
    let start = Instant::now();
    let status = daemon.attach_qemu("vm", &path).unwrap_err();
    let took = start.elapsed();
    println!("{took:?}: {}", status.message());
    assert!(status.message().contains(&path.display().to_string()), "{status:?}");
    assert_eq!(refusal(Err::<(), _>(status), said).0, Code::FailedPrecondition);
    assert!(took < BOUND, "{took:?}");
    assert!(daemon.translate("other", 0xffff_8000_0001_0000).is_ok());
    peer.join().unwrap();
    Ok(())
}
