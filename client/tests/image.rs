//! `save`: from a daemon's machine to two files, and to a machine again.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod daemon;
#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use daemon::Daemon;
use pagewalk_client::{Client, Endpoint, SaveError, SavedImage};
use serde_json::Value;

async fn save(address: &str, machine: &str, file: &Path) -> Result<SavedImage, SaveError> {
    let client = Client::connect(Endpoint::parse(address).unwrap()).await.unwrap();
    let (mut last, mut size) = (0, 0);
    let saved = client
        .save_image(machine, file, |done, all| {
            assert!(last <= done && done <= all, "{last} {done} {all}");
            (last, size) = (done, all);
        })
        .await;
    if saved.is_ok() {
        assert_eq!(last, size);
    }
    saved
}

#[tokio::test]
async fn what_is_no_whole_image_leaves_nothing_behind() {
    let address = scripted::start(None).to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.toml");
    for (machine, problem) in
        [("torn", "it ended before the image was whole"), ("wide", "a piece of 4096 bytes at 0x2000")]
    {
        let error = save(&address, machine, &file).await.unwrap_err();
        assert!(matches!(&error, SaveError::Stream(text) if text.starts_with(problem)), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
    let saved = save(&address, "whole", &file).await.unwrap();
    assert_eq!((saved.memory_bytes, saved.contents_bytes), (0x2000, 0x1000));
    assert_eq!(std::fs::read_to_string(&saved.description).unwrap(), "# guest.mem\n");
    assert_eq!(std::fs::read(&saved.memory).unwrap(), [vec![0; 0x1000], vec![7; 0x1000]].concat());
    // Nothing is written over.
    let error = save(&address, "whole", &file).await.unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    let error = save(&address, "whole", &folder.path().join("guest.mem")).await.unwrap_err();
    assert!(error.to_string().contains("no name for a description"), "{error}");
}

#[tokio::test]
async fn what_is_there_already_stays() {
    let address = scripted::start(None).to_string();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (file, own) = (path("guest.toml"), path("own"));
    std::fs::write(&own, "own").unwrap();
    for name in ["guest.toml.part", "guest.mem.part", "guest.toml", "guest.mem"] {
        // Through a link, one that leads nowhere, and the file itself.
        for link in [Some("own"), Some("nowhere"), None] {
            match link {
                Some(target) => symlink(target, path(name)).unwrap(),
                None => std::fs::write(path(name), "own").unwrap(),
            }
            let error = save(&address, "whole", &file).await.unwrap_err().to_string();
            assert!(error.contains(&format!("{name}: exists already")), "{error}");
            assert_eq!(error.contains("another save is under way"), name.ends_with(".part"), "{error}");
            assert_eq!(std::fs::read_to_string(&own).unwrap(), "own");
            if link.is_none() {
                assert_eq!(std::fs::read_to_string(path(name)).unwrap(), "own");
            }
            std::fs::remove_file(path(name)).unwrap();
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{name} {link:?}");
        }
    }
}

#[tokio::test]
async fn what_comes_meanwhile_stays() {
    let address = scripted::start(None).to_string();
    let client = Client::connect(Endpoint::parse(&address).unwrap()).await.unwrap();
    for name in ["guest.toml", "guest.mem"] {
        let folder = tempfile::tempdir().unwrap();
        let mine = folder.path().join(name);
        let appears = |_, _| std::fs::write(&mine, "mine").unwrap();
        let error = client.save_image("whole", &folder.path().join("guest.toml"), appears).await.unwrap_err();
        assert!(error.to_string().contains(&format!("{name}: exists already")), "{error}");
        assert_eq!(std::fs::read_to_string(&mine).unwrap(), "mine");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{name}");
    }
}

/// A save that has begun, and will not end by itself. Whoever runs the tests may ignore signals, as shells do for what runs in
/// the background: this ignores one, if one is named, and no other.
fn stuck(address: &str, folder: &Path, ignored: Option<&str>) -> Child {
    let saving = Command::new("env")
        .arg("--default-signal=INT,TERM,HUP")
        .args(ignored.map(|signal| format!("--ignore-signal={signal}")))
        .arg(env!("CARGO_BIN_EXE_pagewalk"))
        .args(["--addr", address, "--machine", "stuck", "--timeout", "30", "save", "guest.toml"])
        .current_dir(folder)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    // The description's text is there: the daemon has begun.
    while std::fs::read(folder.join("guest.toml.part")).unwrap_or_default().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    saving
}

fn send(signal: &str, process: &Child) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", process.id())]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn interrupted_it_leaves_nothing_behind() {
    let address = scripted::start(None).to_string();
    let folder = tempfile::tempdir().unwrap();
    for signal in ["INT", "TERM", "HUP"] {
        let mut saving = stuck(&address, folder.path(), None);
        send(signal, &saving);
        assert_eq!(saving.wait().unwrap().code(), Some(3), "{signal}");
        let mut said = String::new();
        saving.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains("interrupted"), "{said}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{signal}");
    }
}

#[test]
fn an_ignored_signal_stays_ignored() {
    let address = scripted::start(None).to_string();
    let folder = tempfile::tempdir().unwrap();
    let mut saving = stuck(&address, folder.path(), Some("HUP"));
    send("HUP", &saving);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(saving.try_wait().unwrap(), None);
    send("TERM", &saving);
    assert_eq!(saving.wait().unwrap().code(), Some(3));
}

#[tokio::test]
async fn two_saves_under_one_name_do_not_mix() {
    let address = scripted::start(None).to_string();
    let folder = tempfile::tempdir().unwrap();
    let mut first = stuck(&address, folder.path(), None);
    let error = save(&address, "whole", &folder.path().join("guest.toml")).await.unwrap_err();
    assert!(error.to_string().contains("guest.toml.part: exists already: another save"), "{error}");
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["guest.mem.part", "guest.toml.part"]);
    first.kill().unwrap();
    first.wait().unwrap();
}

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let output = daemon.pagewalk(&[&["--json"], arguments].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Every landmark of the demo machine means the same in its image.
#[test]
fn the_demo_machine_travels() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("demo.toml");
    let name = file.to_str().unwrap();
    let runs = json(&daemon, &["machines"])["machines"][0]["capabilities"]["live"] == true;
    if runs {
        // So that nothing changes between the image and the questions.
        assert!(daemon.pagewalk(&["pause"]).status.success());
    }
    let saved = daemon.pagewalk(&["--machine", "demo", "save", name]);
    assert!(saved.status.success(), "{saved:?}");
    let text = String::from_utf8(saved.stdout).unwrap();
    assert!(text.contains("demo.toml and ") && text.contains("8.02 MiB of memory"), "{text}");
    let memory = std::fs::metadata(folder.path().join("demo.mem")).unwrap();
    assert!(
        memory.blocks() * 512 < memory.size() / 2,
        "{} of {} bytes",
        memory.blocks() * 512,
        memory.size()
    );

    let attached = daemon.pagewalk(&["attach", &format!("copy=image:{name}")]);
    assert!(attached.status.success(), "{attached:?}");
    let machine = |id| json(&daemon, &["--machine", id, "machines"])["machine"].clone();
    let (original, copy) = (machine("demo"), machine("copy"));
    for same in ["memoryBytes", "regions", "landmarks", "maxphyaddr", "vcpus"] {
        assert_eq!(original[same], copy[same], "{same}");
    }
    assert_eq!(copy["source"], "image");
    let mut compared = 0;
    for landmark in original["landmarks"].as_array().unwrap() {
        let address = landmark["address"].as_str().unwrap();
        for access in [["--access", "read"], ["--access", "write"], ["--access", "fetch"]] {
            for privilege in [["--as", "user"], ["--as", "supervisor"]] {
                let ask = |id| {
                    let mut answer = json(
                        &daemon,
                        &[&["--machine", id, "translate", address, "--trace"], &access[..], &privilege]
                            .concat(),
                    );
                    answer.as_object_mut().unwrap().remove("provenance");
                    answer
                };
                assert_eq!(ask("demo"), ask("copy"), "{landmark} {access:?} {privilege:?}");
                compared += 1;
            }
        }
    }
    assert!(compared > 60, "{compared}");
    let registers = |id| json(&daemon, &["--machine", id, "regs"])["registers"].clone();
    assert_eq!(registers("demo"), registers("copy"));
}

/// Who was running runs on afterwards, and who was paused does not.
#[test]
fn a_guest_is_left_as_it_was() {
    let daemon = Daemon::start();
    if json(&daemon, &["machines"])["machines"][0]["capabilities"]["live"] != true {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let state = || json(&daemon, &["vcpus"])["vcpus"][0]["runState"].as_str().unwrap().to_owned();
    for (name, paused) in [("running.toml", false), ("paused.toml", true)] {
        if paused {
            assert!(daemon.pagewalk(&["pause"]).status.success());
        }
        let file = folder.path().join(name);
        assert!(daemon.pagewalk(&["save", file.to_str().unwrap()]).status.success());
        assert_eq!(state() == "RUN_STATE_PAUSED", paused, "{}", state());
    }
}

#[test]
fn the_example_of_the_help_works() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_pagewalk"))
        .args(["--json", "save", "demo.toml"])
        .current_dir(folder.path())
        .env("PAGEWALK_ADDR", &daemon.address)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["contentsBytes"].is_string());
    let again = daemon.pagewalk(&["save", folder.path().join("demo.toml").to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(3), "{again:?}");
    assert!(String::from_utf8(again.stderr).unwrap().contains("exists already"));
}
