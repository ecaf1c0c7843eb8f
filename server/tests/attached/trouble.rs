//! The host takes a guest away: the machine is lost with a reason, its calls are refused, the daemon and its other machines
//! live on.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use tempfile::TempDir;
use tonic::Code;

use crate::daemon::{Daemon, refusal};
use crate::guest::Guest;
use crate::judge;

const SOON: Duration = Duration::from_secs(10);

/// A guest that runs, and the socket for the daemon.
pub(crate) fn boot(script: &Path, memory: &str) -> Result<(Guest, PathBuf, TempDir), Failed> {
    let folder = tempfile::tempdir()?;
    let qmp = folder.path().join("qmp");
    let variables = [("PAGEWALK_BED_QMP", qmp.as_os_str()), ("PAGEWALK_BED_MEMORY", OsStr::new(memory))];
    let (guest, _) = Guest::boot_with(script, "5-level", &variables)?;
    Ok((guest, qmp, folder))
}

/// What clients got from a machine while something happened to it.
#[derive(Debug, Default)]
struct Load {
    answered: AtomicU64,
    lost: AtomicU64,
}

/// Asks without pause, from several threads, while `trouble` makes some, and until the machine is lost.
fn under_load(daemon: &Daemon, trouble: impl FnOnce()) -> Load {
    let load = Load::default();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (load, over) = (&load, &over);
            scope.spawn(move || {
                let addresses: Vec<u64> =
                    (0..4096u64).map(|n| 0xffff_8000_0000_0000 + (n << 12) + (thread << 30)).collect();
                while !over.load(Ordering::Relaxed) {
                    let outcomes = [
                        daemon.words("vm", 0, &addresses).map(drop),
                        daemon.translate("vm", 0xffff_ffff_8100_0000).map(drop),
                        daemon.read_physical("vm", 0x10_0000 + (thread << 20), 1 << 20).map(drop),
                        daemon.registers("vm", 1).map(drop),
                    ];
                    for outcome in outcomes {
                        match outcome {
                            Ok(()) => load.answered.fetch_add(1, Ordering::Relaxed),
                            Err(status) => {
                                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                                load.lost.fetch_add(1, Ordering::Relaxed)
                            }
                        };
                    }
                }
            });
        }
        while load.answered.load(Ordering::Relaxed) < 40 {
            std::thread::sleep(Duration::from_millis(5));
        }
        trouble();
        let end = Instant::now() + SOON;
        while load.lost.load(Ordering::Relaxed) < 40 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
    });
    load
}

/// The machine is lost for a reason that says `why`, and the other one is as it was.
fn lost(daemon: &Daemon, load: &Load, why: &str) {
    println!("under load: {load:?}");
    assert!(
        load.answered.load(Ordering::Relaxed) >= 40 && load.lost.load(Ordering::Relaxed) >= 40,
        "{load:?}"
    );
    let machine = daemon.machine("vm");
    assert_eq!(machine.state(), v1::MachineState::Lost);
    assert!(machine.state_reason.contains(why), "{:?}", machine.state_reason);
    println!("the machine is lost: {}", machine.state_reason);
    for refused in [
        daemon.translate("vm", 0).map(drop),
        daemon.read_physical("vm", 0, 1).map(drop),
        daemon.pause("vm").map(drop),
    ] {
        assert_eq!(refusal(refused, why), (Code::Unavailable, "MACHINE_LOST".to_owned()));
    }
    assert_eq!(daemon.machine("other").state(), v1::MachineState::Alive);
    assert!(daemon.translate("other", 0xffff_8000_0001_0000).is_ok());
    daemon.detach("vm").unwrap();
}

fn with_other() -> Result<Daemon, Failed> {
    let daemon = Daemon::start()?;
    daemon.attach("other=demo:plain")?;
    Ok(daemon)
}

pub(crate) fn killed(script: &Path) -> Result<(), Failed> {
    let (mut guest, qmp, _folder) = boot(script, "file")?;
    let daemon = with_other()?;
    daemon.attach_qemu("vm", &qmp)?;
    let load = under_load(&daemon, || guest.kill());
    lost(&daemon, &load, "QMP socket");
    Ok(())
}

pub(crate) fn killed_private(script: &Path) -> Result<(), Failed> {
    let (mut guest, qmp, _folder) = boot(script, "private")?;
    let daemon = with_other()?;
    let machine = daemon.attach_qemu("vm", &qmp)?;
    assert!(machine.description.contains("fetched through /proc"), "{}", machine.description);
    let load = under_load(&daemon, || guest.kill());
    lost(&daemon, &load, "");
    Ok(())
}

pub(crate) fn truncated(script: &Path) -> Result<(), Failed> {
    let (guest, qmp, _folder) = boot(script, "file")?;
    let daemon = with_other()?;
    let machine = daemon.attach_qemu("vm", &qmp)?;
    assert!(machine.description.contains("its memory shared"), "{}", machine.description);
    daemon.pause("vm")?;
    let load = under_load(&daemon, || guest.file().set_len(1 << 20).unwrap());
    lost(&daemon, &load, "truncated");
    Ok(())
}

pub(crate) fn twice(script: &Path) -> Result<(), Failed> {
    let (guest, qmp, folder) = boot(script, "file")?;
    let daemon = with_other()?;
    daemon.attach_qemu("vm", &qmp)?;
    let exists = |answer, said| {
        assert_eq!(refusal(answer, said), (Code::AlreadyExists, "MACHINE_EXISTS".to_owned()));
    };
    exists(daemon.attach_qemu("again", &qmp), "as machine `vm`");
    // The same socket by another name.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&qmp, &link)?;
    exists(daemon.attach_qemu("again", &link), "as machine `vm`");
    exists(daemon.attach_qemu("vm", &link), "already");
    // Writes are refused, whoever asks.
    let refused = daemon.write_physical("vm", 0x1000, &[0]);
    assert_eq!(refusal(refused, "only read"), (Code::FailedPrecondition, "PRECONDITION".to_owned()));
    // Another daemon waits for a greeting in vain, and says so.
    let another = Daemon::start()?;
    let start = Instant::now();
    let refused = another.attach_qemu("vm", &qmp);
    let path = qmp.display().to_string();
    assert_eq!(refusal(refused, &path).0, Code::FailedPrecondition);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    drop(guest);
    Ok(())
}

pub(crate) fn detached(script: &Path) -> Result<(), Failed> {
    let (mut guest, qmp, _folder) = boot(script, "file")?;
    let daemon = with_other()?;
    for _ in 0..3 {
        daemon.attach_qemu("vm", &qmp)?;
        daemon.detach("vm")?;
        // The socket is free once the last call has let go.
        let end = Instant::now() + SOON;
        while daemon.attach_qemu("vm", &qmp).is_err() {
            assert!(Instant::now() < end, "the socket stays taken");
        }
        daemon.pause("vm")?;
        daemon.detach("vm")?;
        // A guest that was stopped stays stopped, and one that ran runs on.
        assert!(guest.ask(0, "info status")?.contains("paused"));
        guest.run_for(Duration::from_millis(1))?;
        let end = Instant::now() + SOON;
        while daemon.attach_qemu("vm", &qmp).is_err() {
            assert!(Instant::now() < end, "the socket stays taken");
        }
        assert!(daemon.vcpus("vm").iter().all(|vcpu| vcpu.run_state() == v1::RunState::Paused));
        daemon.resume("vm")?;
        daemon.detach("vm")?;
        assert!(guest.ask(0, "info status")?.contains("running"));
        std::thread::sleep(Duration::from_millis(100));
    }
    // Events of others reach the daemon.
    let end = Instant::now() + SOON;
    while daemon.attach_qemu("vm", &qmp).is_err() {
        assert!(Instant::now() < end, "the socket stays taken");
    }
    guest.pause()?;
    let states = || daemon.vcpus("vm").iter().map(v1::VcpuInfo::run_state).collect::<Vec<_>>();
    let end = Instant::now() + SOON;
    while states() != [v1::RunState::Paused; 2] {
        assert!(Instant::now() < end, "{:?}", states());
    }
    // So does a reset, which changes nothing of what it does.
    let roots = || -> Result<Vec<_>, Failed> {
        let latest = |index| daemon.registers_as_of("vm", index, v1::Freshness::Latest);
        (0..2).map(|index| Ok(latest(index)?.registers.and_then(|held| held.cr3))).collect()
    };
    assert!(roots()?.iter().all(|root| root.is_some_and(|root| root != 0)));
    guest.reset()?;
    let end = Instant::now() + SOON;
    while roots()? != [Some(0); 2] {
        assert!(Instant::now() < end, "{:x?}", roots()?);
    }
    Ok(())
}

/// The daemon runs as somebody who may connect to the socket and may not look into QEMU's process.
pub(crate) fn refused(script: &Path) -> Result<(), Failed> {
    use std::os::unix::fs::PermissionsExt as _;
    const NOBODY: &str = "65534";
    let setpriv = |arguments: &[&str]| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--inh-caps=-all", "--"]);
        command.args(arguments);
        command
    };
    if !setpriv(&["true"]).output().is_ok_and(|output| output.status.success()) {
        return judge::skipped("setpriv", "this user cannot become another one");
    }
    let (guest, qmp, folder) = boot(script, "file")?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
    std::fs::set_permissions(&qmp, std::fs::Permissions::from_mode(0o777))?;
    // Where nobody can run it from.
    let daemon = folder.path().join("pagewalkd");
    std::fs::copy(env!("CARGO_BIN_EXE_pagewalkd"), &daemon)?;
    let spec = format!("vm=qemu:qmp={}", qmp.display());
    let output = setpriv(&[
        daemon.to_str().ok_or("a path that is no text")?,
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--machine",
        &spec,
    ])
    .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    println!("{}", said.trim());
    assert!(!output.status.success());
    assert!(said.contains("CAP_SYS_PTRACE") && said.contains("process"), "{said}");
    drop(guest);
    Ok(())
}
