//! Judges `attached-tasks-*`: the tasks that address spaces are named by, against what the guest's kernel said of them: each worker
//! of the bed's program said its number and the name that the kernel had taken from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use libtest_mimic::Failed;
use pagewalk_proto::v1;

use crate::announced::{self, IDENTITY};
use crate::daemon::Daemon;
use crate::judge::Judge;
use crate::spaces::gpa;
use crate::symbols::{Booted, boot};

/// How often a guest is paused.
const PAUSES: u64 = 20;

/// Numbers and names of the tasks of each worker's address space.
pub(crate) struct Tasks(BTreeMap<u64, BTreeSet<(u32, String)>>);

impl Tasks {
    pub(crate) fn announced(said: &[String]) -> Result<Self, Failed> {
        let mut tasks = BTreeMap::<_, BTreeSet<_>>::new();
        for (worker, pid, name) in announced::tasks(said)? {
            tasks.entry(worker).or_default().insert((pid, written(&name)));
        }
        Ok(Self(tasks))
    }

    /// Compares.
    pub(crate) fn judge(&self, daemon: &Daemon, judge: &mut Judge) -> Result<(), Failed> {
        let answer = daemon.spaces("vm")?;
        let list = answer.task_list.clone().unwrap_or_default();
        judge.case();
        // The workers, their twin, and the program that they come from.
        if list.state() != v1::TaskListState::Complete || list.count < 6 || !list.reason.is_empty() {
            judge.disagree(|| format!("{list:?}"));
        }
        let mut missing: BTreeSet<u64> = self.0.keys().copied().collect();
        for space in &answer.spaces {
            judge.case();
            let found: BTreeSet<(u32, String)> =
                space.tasks.iter().map(|task| (task.pid, task.name.clone())).collect();
            let Some(worker) = worker_of(daemon, space.cr3)? else {
                judge.count("no worker's", 0);
                // The program that the workers come from, or only the kernel's own tasks.
                if !found.is_empty() && found != BTreeSet::from([(1, "init".to_owned())]) {
                    judge.disagree(|| format!("{space:x?} is of no worker"));
                }
                continue;
            };
            missing.remove(&worker);
            let expected = &self.0[&worker];
            judge.count_if("a worker's that no vCPU was seen in", space.sightings == 0);
            judge.count(if space.user_half { "a worker's, user half" } else { "a worker's" }, 0);
            judge.count_if("shared by two processes", expected.len() == 2);
            judge.count_if(
                "a name that is no text",
                expected.iter().any(|(_, name)| name.starts_with(r"\xff")),
            );
            if (&found, space.tasks_left_out) != (expected, 0) {
                judge.disagree(|| format!("{space:x?} is of {expected:?}"));
            }
            let across = daemon.across("vm", IDENTITY, vec![space.cr3])?;
            if across.first().is_none_or(|across| across.tasks != space.tasks) {
                judge.disagree(|| format!("{space:x?} is {across:x?}"));
            }
        }
        judge.case();
        let init = answer.spaces.iter().any(|space| space.tasks.iter().any(|task| task.pid == 1));
        if !missing.is_empty() || !init {
            judge.disagree(|| {
                format!("workers {missing:?} are missing in {:x?}, or their parent is", answer.spaces)
            });
        }
        Ok(())
    }
}

/// A name, with bytes that are no UTF-8 in hex and control characters by their numbers.
fn written(name: &[u8]) -> String {
    let shown =
        |one: char| if one.is_control() { format!(r"\u{{{:x}}}", u32::from(one)) } else { one.to_string() };
    let byte = |byte: &u8| if byte.is_ascii() { shown(char::from(*byte)) } else { format!(r"\x{byte:02x}") };
    match std::str::from_utf8(name) {
        Ok(text) => text.chars().map(shown).collect(),
        Err(_) => name.iter().map(byte).collect(),
    }
}

/// The worker that lives in an address space, by its page of identity.
fn worker_of(daemon: &Daemon, cr3: u64) -> Result<Option<u64>, Failed> {
    let across = daemon.across("vm", IDENTITY, vec![cr3])?;
    let Some(gpa) = across.first().and_then(gpa) else { return Ok(None) };
    let bytes = daemon.read_physical("vm", gpa, 8)?;
    Ok(bytes.try_into().ok().map(u64::from_le_bytes).and_then(announced::worker))
}

pub(crate) fn finish(judge: Judge) -> Result<(), Failed> {
    judge.finish(&[
        ("a worker's", None, 1),
        ("shared by two processes", None, 1),
        ("a name that is no text", None, 1),
        ("a worker's, user half", None, 1),
        ("a worker's that no vCPU was seen in", None, 1),
    ])
}

pub(crate) fn five_level(script: &Path) -> Result<(), Failed> {
    let booted = boot(script, "5-level", "pti=on -- kallsyms")?;
    let file = tempfile::NamedTempFile::new()?;
    let daemon = attach(&booted, file.path())?;
    let mut judge = Judge::new("attached-tasks-5-level")?;
    for _ in 0..PAUSES {
        daemon.pause("vm")?;
        booted.tasks.judge(&daemon, &mut judge)?;
        daemon.resume("vm")?;
        // No process comes or goes: what is compared stays as it is while the guest runs.
        booted.tasks.judge(&daemon, &mut judge)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    finish(judge)
}

/// Debian's 32-bit kernels tell their functions alone, and are built without BTF: there is nothing to find a kernel by.
pub(crate) fn of_no_kernel(script: &Path) -> Result<(), Failed> {
    let booted = boot(script, "pae", "-- kallsyms")?;
    let file = tempfile::NamedTempFile::new()?;
    let answer = attach(&booted, file.path())?.spaces("vm")?;
    let list = answer.task_list.unwrap_or_default();
    assert_eq!((list.state(), list.count), (v1::TaskListState::Unknown, 0), "{list:?}");
    assert!(list.reason.contains("`linux_banner`"), "{list:?}");
    assert!(!answer.spaces.is_empty() && answer.spaces.iter().all(|space| space.tasks.is_empty()));
    Ok(())
}

/// A daemon that has the guest with its own symbols.
fn attach(booted: &Booted, file: &Path) -> Result<Daemon, Failed> {
    std::fs::write(file, &booted.text)?;
    let daemon = Daemon::start()?;
    daemon.attach(&format!("vm=qemu:qmp={},symbols={}", booted.qmp.display(), file.display()))?;
    Ok(daemon)
}
