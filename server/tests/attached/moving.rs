//! Guests whose memory, vCPUs and run state change at the moment when it matters, and a QEMU that takes its time: what no real one
//! does on demand.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use pagewalk_proto::v1;
use tonic::Code;
use vm_memory::{FileOffset, MmapRegion};

use crate::daemon::{Daemon, refusal};
use crate::fake::{Fake, Place};
use crate::judge;

const SIZE: u64 = 16 << 12;
const SOON: Duration = Duration::from_secs(10);

/// Its name, and what it does.
type Moving = (&'static str, fn() -> Result<(), Failed>);

pub(crate) fn trials() -> Vec<Trial> {
    let moving: [Moving; 11] = [
        ("files_of_one_inode", files_of_one_inode),
        ("layout_that_moves", layout_that_moves),
        ("another_dimm_at_the_same_place", another_dimm_at_the_same_place),
        ("vcpu_unplugged", vcpu_unplugged),
        ("private_memory_unplugged", private_memory_unplugged),
        ("run_state_follows_qemu", run_state_follows_qemu),
        ("saved_and_runs_on", saved_and_runs_on),
        ("runs_on_after_a_stop_that_was_given_up", runs_on_after_a_stop_that_was_given_up),
        ("runs_on_after_a_stop_that_was_detached", runs_on_after_a_stop_that_was_detached),
        ("gone_in_the_middle", gone_in_the_middle),
        ("an_answer_is_older_than_the_event_behind_it", an_answer_is_older_than_the_event_behind_it),
    ];
    moving.into_iter().map(|(name, test)| Trial::test(format!("moving_{name}"), test)).collect()
}

/// A file of `SIZE` bytes, mapped into this process.
struct Shared {
    _region: MmapRegion,
    place: Place,
}

impl Shared {
    fn new(file: File, start: u64, first: u8) -> Result<Self, Failed> {
        file.set_len(SIZE)?;
        file.write_all_at(&[first], 0)?;
        let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), SIZE as usize)?;
        let place = Place { start, size: SIZE, host: region.as_ptr().addr() as u64 };
        Ok(Self { _region: region, place })
    }
}

fn first_byte(daemon: &Daemon, at: u64) -> Result<u8, Failed> {
    let bytes = daemon.read_physical("vm", at, 1)?;
    Ok(*bytes.first().ok_or("no byte")?)
}

/// Each file is the first of its own file system, and has its inode from that.
fn files_of_one_inode() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let script = "mkdir a b && mount -t tmpfs none a && mount -t tmpfs none b && exec 3<>a/file 4<>b/file && echo ready && read -r _";
    let mut child = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no standard output")?).read_line(&mut line)?;
    if line.trim() != "ready" {
        let said = child.wait_with_output()?.stderr;
        return judge::skipped("mounts", String::from_utf8_lossy(&said).trim());
    }
    let open = |descriptor: u32| {
        File::options().read(true).write(true).open(format!("/proc/{}/fd/{descriptor}", child.id()))
    };
    let (low, high) = (open(3)?, open(4)?);
    let inodes = (low.metadata()?.ino(), high.metadata()?.ino());
    println!("inodes {inodes:?} of devices {:#x} and {:#x}", low.metadata()?.dev(), high.metadata()?.dev());
    assert_eq!(inodes.0, inodes.1, "the files do not show what they are for");
    // The mappings are all that is left of the mounts.
    let (low, high) = (Shared::new(low, 0, 1)?, Shared::new(high, 1 << 20, 2)?);
    let fake = Fake::start(&[low.place, high.place])?;
    let daemon = Daemon::start()?;
    let machine = daemon.attach_qemu("vm", &fake.qmp)?;
    assert!(machine.description.contains("its memory shared"), "{}", machine.description);
    assert_eq!((first_byte(&daemon, 0)?, first_byte(&daemon, 1 << 20)?), (1, 2));
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

/// One stretch of shared memory at 0, and a guest that has it.
fn guest() -> Result<(Daemon, Fake, Shared), Failed> {
    let memory = Shared::new(tempfile::tempfile()?, 0, 1)?;
    let fake = Fake::start(&[memory.place])?;
    let daemon = Daemon::start()?;
    daemon.attach_qemu("vm", &fake.qmp)?;
    Ok((daemon, fake, memory))
}

fn alive(daemon: &Daemon) {
    let machine = daemon.machine("vm");
    assert_eq!(machine.state(), v1::MachineState::Alive, "{}", machine.state_reason);
}

/// A BAR is moved after it was listed and before it was asked for.
fn layout_that_moves() -> Result<(), Failed> {
    let (daemon, fake, memory) = guest()?;
    let bar = Shared::new(tempfile::tempfile()?, 1 << 20, 2)?;
    {
        let mut state = fake.state();
        state.view.push(bar.place);
        state.placed.push(bar.place);
        state.misses = 2;
    }
    daemon.registers("vm", 0)?;
    assert_eq!(first_byte(&daemon, 1 << 20)?, 2);

    // What does not come to rest fails the call, and what was known is still known.
    let gone = Place { start: 2 << 20, ..bar.place };
    fake.state().view = vec![memory.place, gone];
    let (code, reason) = refusal(daemon.registers("vm", 0), "cannot be read: the QMP socket");
    assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "REGISTERS_UNREAD"));
    alive(&daemon);
    let old = daemon.registers_as_of("vm", 0, v1::Freshness::Latest)?.provenance.unwrap();
    assert!(old.assumed.iter().any(|assumed| assumed.contains("as last read before")), "{:?}", old.assumed);
    assert_eq!((first_byte(&daemon, 0)?, first_byte(&daemon, 1 << 20)?), (1, 2));

    fake.state().view = vec![memory.place];
    let new = daemon.registers("vm", 0)?.provenance.unwrap();
    assert!(!new.assumed.iter().any(|assumed| assumed.contains("as last read before")), "{:?}", new.assumed);
    assert_eq!(new.run_state(), v1::RunState::Running);
    assert!(daemon.read_physical("vm", 1 << 20, 1)?.is_empty());
    Ok(())
}

/// A DIMM goes, and another one of its name comes to its place.
fn another_dimm_at_the_same_place() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    let at = 1 << 20;
    let (one, other) =
        (Shared::new(tempfile::tempfile()?, at, 2)?, Shared::new(tempfile::tempfile()?, at, 3)?);
    fake.state().view.push(one.place);
    fake.state().placed.push(one.place);
    daemon.registers("vm", 0)?;
    assert_eq!(first_byte(&daemon, at)?, 2);
    {
        let mut state = fake.state();
        state.placed.pop();
        state.placed.push(other.place);
        state.tell("DEVICE_DELETED");
    }
    until("the other DIMM", || first_byte(&daemon, at).is_ok_and(|byte| byte == 3));
    Ok(())
}

fn vcpu_unplugged() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    daemon.registers("vm", 1)?;
    fake.state().unplugged = Some(1);
    let (code, reason) = refusal(daemon.registers("vm", 1), "vm/vcpu1");
    assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "REGISTERS_UNREAD"));
    daemon.registers("vm", 0)?;
    alive(&daemon);
    // The others stop and go on without it.
    assert_eq!(daemon.pause("vm")?.run_state(), v1::RunState::Paused);
    assert_eq!(daemon.resume("vm")?.run_state(), v1::RunState::Running);
    alive(&daemon);
    Ok(())
}

/// A DIMM that is not shared is unmapped before QEMU tells.
fn private_memory_unplugged() -> Result<(), Failed> {
    let memory = Shared::new(tempfile::tempfile()?, 0, 1)?;
    // Of a file that is cut, so that nothing else comes to lie at its place.
    let file = tempfile::tempfile()?;
    file.set_len(SIZE)?;
    let backing = FileOffset::new(file.try_clone()?, 0);
    let dimm: MmapRegion =
        MmapRegion::build(Some(backing), SIZE as usize, libc::PROT_READ, libc::MAP_PRIVATE)?;
    let place = Place { start: 1 << 20, size: SIZE, host: dimm.as_ptr().addr() as u64 };
    let fake = Fake::start(&[memory.place, place])?;
    let daemon = Daemon::start()?;
    daemon.attach_qemu("vm", &fake.qmp)?;
    assert_eq!(daemon.read_physical("vm", 1 << 20, 8)?, [0; 8]);
    file.set_len(0)?;
    assert!(daemon.read_physical("vm", 1 << 20, 8)?.is_empty());
    assert_eq!(first_byte(&daemon, 0)?, 1);
    alive(&daemon);
    Ok(())
}

/// Waits until both vCPUs do this, for this reason.
fn settles(daemon: &Daemon, state: v1::RunState, reason: &str) {
    let end = Instant::now() + SOON;
    let is_so = |vcpu: &v1::VcpuInfo| vcpu.run_state() == state && vcpu.run_state_reason == reason;
    loop {
        let vcpus = daemon.vcpus("vm");
        if vcpus.len() == 2 && vcpus.iter().all(is_so) {
            return;
        }
        assert!(Instant::now() < end, "{state:?} ({reason}) is wanted of {vcpus:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn run_state_follows_qemu() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    settles(&daemon, v1::RunState::Running, "");
    let told = |status, events: &[&str]| {
        let mut state = fake.state();
        state.status = status;
        for event in events {
            state.tell(event);
        }
    };
    // A guest that panics and runs on (`-action panic=none`): the event says no more than that.
    told("running", &["GUEST_PANICKED"]);
    // What follows is seen after it.
    told("guest-panicked", &["GUEST_PANICKED", "STOP"]);
    settles(&daemon, v1::RunState::Paused, "stopped in QEMU: guest-panicked");
    told("running", &["RESUME", "GUEST_PANICKED"]);
    settles(&daemon, v1::RunState::Running, "");
    daemon.registers("vm", 0)?;
    settles(&daemon, v1::RunState::Running, "");
    // Under -no-shutdown QEMU stops what has shut down, and stays.
    told("shutdown", &["SHUTDOWN", "STOP"]);
    settles(&daemon, v1::RunState::Shutdown, "the guest shut down");
    daemon.registers("vm", 0)?;
    settles(&daemon, v1::RunState::Shutdown, "the guest shut down");
    // Nothing but this says that it has come back.
    told("prelaunch", &["RESET"]);
    settles(&daemon, v1::RunState::Paused, "stopped in QEMU: prelaunch");
    assert_eq!(daemon.resume("vm")?.run_state(), v1::RunState::Running);
    settles(&daemon, v1::RunState::Running, "");
    Ok(())
}

/// Somebody stops the guest just after QEMU has said that it runs.
fn an_answer_is_older_than_the_event_behind_it() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    for _ in 0..50 {
        fake.state().then = Some(("paused", "STOP"));
        daemon.resume("vm")?;
        settles(&daemon, v1::RunState::Paused, "stopped in QEMU");
    }
    Ok(())
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < end, "{what} does not come about");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn saved_and_runs_on() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    daemon.save("vm", SOON)?;
    assert_eq!(fake.count("cont"), 1, "by the one vCPU that stopped it");
    settles(&daemon, v1::RunState::Running, "");
    // Somebody has stopped it, and the daemon has not heard of it yet.
    fake.state().status = "paused";
    daemon.save("vm", SOON)?;
    assert_eq!(fake.count("cont"), 1, "{:?}", fake.state().done);
    settles(&daemon, v1::RunState::Paused, "stopped in QEMU");
    Ok(())
}

/// QEMU's `stop` takes longer than the client waits, and longer than the daemon does for the guest to run on.
fn runs_on_after_a_stop_that_was_given_up() -> Result<(), Failed> {
    for paused in [false, true] {
        let (daemon, fake, _memory) = guest()?;
        if paused {
            daemon.pause("vm")?;
        }
        let stops = fake.count("stop begins");
        fake.state().gate_closed = true;
        let start = Instant::now();
        let status = daemon.save("vm", Duration::from_millis(300)).unwrap_err();
        println!("after {:?}: {}", start.elapsed(), status.message());
        assert_eq!(fake.count("stop begins"), stops + 1);
        std::thread::sleep(Duration::from_secs(7).saturating_sub(start.elapsed()));
        assert_eq!(fake.count("cont"), 0);
        fake.open_gate();
        if paused {
            settles(&daemon, v1::RunState::Paused, "stopped in QEMU");
            daemon.registers("vm", 0)?;
            assert_eq!(fake.count("cont"), 0, "it was somebody else who stopped it");
        } else {
            until("cont", || fake.count("cont") == 1);
            settles(&daemon, v1::RunState::Running, "");
        }
    }
    Ok(())
}

fn runs_on_after_a_stop_that_was_detached() -> Result<(), Failed> {
    let (daemon, fake, _memory) = guest()?;
    fake.state().gate_closed = true;
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| daemon.save("vm", SOON));
        until("stop", || fake.count("stop begins") == 1);
        daemon.detach("vm").unwrap();
        let status = saving.join().unwrap().unwrap_err();
        assert!(status.message().contains("detached"), "{status:?}");
    });
    fake.open_gate();
    until("cont", || fake.count("cont") == 1);
    Ok(())
}

/// QEMU ends in place of an answer.
fn gone_in_the_middle() -> Result<(), Failed> {
    for command in ["stop", "cont", "query-status", "human-monitor-command"] {
        for _ in 0..10 {
            let (daemon, fake, _memory) = guest()?;
            fake.state().ends_at = command;
            let refused = match command {
                "stop" => daemon.pause("vm").map(drop),
                "human-monitor-command" => daemon.registers("vm", 0).map(drop),
                _ => daemon.resume("vm").map(drop),
            };
            let what = refusal(refused, "is lost");
            assert_eq!(what, (Code::Unavailable, "MACHINE_LOST".to_owned()), "{command}");
            assert_eq!(daemon.machine("vm").state(), v1::MachineState::Lost);
        }
        if command == "cont" {
            // By then the image is whole.
            continue;
        }
        let (daemon, fake, _memory) = guest()?;
        fake.state().ends_at = command;
        let what = refusal(daemon.save("vm", SOON), "is lost");
        assert_eq!(what, (Code::Unavailable, "MACHINE_LOST".to_owned()), "{command} while saving");
    }
    Ok(())
}
