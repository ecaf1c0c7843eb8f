//! Judges `linux-*-dump` and `volatility-*-dump`: dumps that QEMU wrote of a paused guest, opened as source `dump`.
//!
//! What QEMU said of the guest then, `info tlb`, `gva2gpa` and `memsave`, is what the dump has to mean. The same file is
//! read by volatility3, whose translations are compared as well.
//!
//! By rule: with `paging=true` QEMU leaves out of the file what no vCPU's address space maps, tables included. A walk that
//! ends as *unbacked* at an entry which no segment of the file has is no disagreement, nor is a page that no segment has; the
//! segments are read here on their own. Any other difference is one.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use libtest_mimic::Failed;
use pagewalk_proto::v1::FaultKind;
use tonic::Code;

use crate::daemon::{Daemon, refusal};
use crate::guest::Guest;
use crate::judge::{self, Judge};
use crate::judged::{Said, gpa};

const PAGE: u64 = 4096;
/// Leaves of each vCPU that the other program is asked for.
const LEAVES: usize = 2500;
const LEFT_OUT: &str = "paging=true left it out of the file";

/// Every dump of the guest `name`. It is paused, and `said` was said since.
pub(crate) fn run(
    daemon: &Daemon,
    guest: &mut Guest,
    name: &str,
    memory: &str,
    said: &[Said],
    folder: &Path,
) -> Result<(), Failed> {
    let (row, paging, foreign) = match (name, memory) {
        ("4-level", _) => ("linux-4-level-dump", None, Some("volatility-4-level-dump")),
        ("5-level", "private") => ("linux-5-level-private-dump", None, None),
        ("5-level", _) => {
            ("linux-5-level-dump", Some("linux-5-level-paging-dump"), Some("volatility-5-level-dump"))
        }
        ("2-level", _) => ("linux-2-level-dump", None, None),
        _ => ("linux-pae-dump", Some("linux-pae-paging-dump"), None),
    };
    let file = folder.join("guest.elf");
    write(guest, "", &file)?;
    judge_dump(daemon, row, &file, said, false)?;
    if let Some(row) = foreign {
        judge_foreign(daemon, row, name, &file, said)?;
    }
    daemon.detach("dump")?;
    if let Some(row) = paging {
        write(guest, "-p ", &file)?;
        judge_dump(daemon, row, &file, said, true)?;
        daemon.detach("dump")?;
    }
    if name == "2-level" {
        // Compressed, which is refused.
        write(guest, "-z ", &file)?;
        let (code, _) = refusal(daemon.attach(&format!("dump:{}", file.display())), "no format=kdump-...");
        assert_eq!(code, Code::FailedPrecondition);
    }
    std::fs::remove_file(&file)?;
    Ok(())
}

/// Has QEMU write a dump, through a pipe: most of the guest is zeroes, which the disk need not have.
fn write(guest: &mut Guest, options: &str, file: &Path) -> Result<(), Failed> {
    let start = Instant::now();
    let pipe = file.with_extension("pipe");
    if !Command::new("mkfifo").arg(&pipe).status()?.success() {
        return Err("no pipe".into());
    }
    std::thread::scope(|scope| {
        let written = scope.spawn(|| sparse(&pipe, file));
        let answer = guest.ask(0, &format!("dump-guest-memory {options}{}", pipe.display()));
        // Whoever still waits for QEMU to open it need not.
        drop(File::options().read(true).write(true).open(&pipe)?);
        let answer = answer?;
        if !answer.trim().is_empty() {
            return Err(format!("dump-guest-memory says {answer:?}").into());
        }
        let bytes = written.join().map_err(|_| "the reader panicked")??;
        println!("dumped {} MiB in {:?}", bytes >> 20, start.elapsed());
        std::fs::remove_file(&pipe)?;
        Ok(())
    })
}

fn sparse(pipe: &Path, file: &Path) -> io::Result<u64> {
    let (mut pipe, file) = (File::open(pipe)?, File::create(file)?);
    let mut piece = vec![0; 1 << 16];
    let zeroes = piece.clone();
    let mut bytes = 0;
    loop {
        let length = pipe.read(&mut piece)?;
        if length == 0 {
            file.set_len(bytes)?;
            return Ok(bytes);
        }
        if piece[..length] != zeroes[..length] {
            file.write_all_at(&piece[..length], bytes)?;
        }
        bytes += length as u64;
    }
}

/// Attaches the dump, and leaves it attached as machine `dump`.
fn judge_dump(
    daemon: &Daemon,
    row: &'static str,
    file: &Path,
    said: &[Said],
    paging: bool,
) -> Result<(), Failed> {
    let mut judge = Judge::new(row)?;
    let machine = daemon.attach(&format!("dump=dump:{}", file.display()))?;
    assert_eq!((machine.source.as_str(), machine.vcpus as usize), ("dump", said.len()));
    let segments = segments(&File::open(file)?)?;
    let in_file = |gpa: u64| segments.iter().any(|(start, size)| gpa.wrapping_sub(*start) < *size);

    for (index, said) in (0..).zip(said) {
        let held = daemon.registers("dump", index)?.registers.unwrap();
        let control = said.control;
        assert_eq!((held.cr0, held.cr3, held.cr4), (Some(control.cr0), Some(control.cr3), Some(control.cr4)));

        let leaves = said.leaves.iter().map(|leaf| ("leaf of info tlb", leaf.gva, Some(leaf.gpa)));
        let random = said.random.iter().map(|&(gva, gpa)| {
            (if gpa.is_some() { "random, mapped" } else { "random, not mapped" }, gva, gpa)
        });
        let asked: Vec<_> = leaves.chain(random).collect();
        let addresses: Vec<u64> = asked.iter().map(|(_, gva, _)| *gva).collect();
        let (words, faults) = daemon.batch("dump", index, &addresses)?;
        let mut faults = faults.into_iter().peekable();
        for ((place, (class, gva, qemu)), word) in (0..).zip(asked).zip(words) {
            judge.case();
            judge.count(class, 0);
            let fault = faults.next_if(|fault| fault.index == place).and_then(|fault| fault.fault);
            if gpa(word, gva) == qemu {
                continue;
            }
            let left_out = fault.as_ref().is_some_and(|fault| {
                paging && fault.kind() == FaultKind::Unbacked && !in_file(fault.entry_gpa)
            });
            if left_out {
                judge.exempt(LEFT_OUT);
            } else {
                let found = format!("the dump {word:#x} {fault:x?}");
                judge.disagree(|| format!("vCPU {index}: {gva:#x}: QEMU {qemu:x?}, {found}"));
            }
        }

        for (leaf, theirs) in &said.pages {
            judge.case();
            judge.count("page of memsave", 0);
            let ours = match daemon.read_physical("dump", leaf.gpa, PAGE) {
                Ok(ours) => ours,
                Err(status) if paging && !in_file(leaf.gpa) => {
                    assert!(status.message().contains("no memory"), "{status:?}");
                    judge.exempt(LEFT_OUT);
                    continue;
                }
                Err(status) => return Err(status.into()),
            };
            let by_gva = daemon.read("dump", index, leaf.gva, PAGE)?;
            let stopped = by_gva.stop.as_ref().and_then(|stop| stop.fault.as_ref());
            let table_left_out = paging && stopped.is_some_and(|fault| !in_file(fault.entry_gpa));
            if ours != *theirs || by_gva.data != *theirs && !table_left_out {
                judge.disagree(|| format!("bytes of {leaf:x?} differ: {:?}", by_gva.stop));
            }
        }
    }
    judge.finish(&[
        // With page-table isolation, a vCPU in user mode may have but a few of them.
        ("leaf of info tlb", None, 2_000),
        ("random, mapped", None, 10_000),
        ("random, not mapped", None, 10_000),
        ("page of memsave", None, 100),
    ])
}

/// What volatility3 makes of the file of machine `dump`.
fn judge_foreign(
    daemon: &Daemon,
    row: &'static str,
    name: &str,
    file: &Path,
    said: &[Said],
) -> Result<(), Failed> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attached/volatility.py");
    let mut python = Command::new("python3");
    let there = python.args(["-c", "import volatility3.framework"]).stderr(Stdio::piped()).output()?;
    if !there.status.success() {
        let problem = String::from_utf8_lossy(&there.stderr);
        return judge::skipped("volatility3", problem.lines().last().unwrap_or("no python3"));
    }
    let mut judge = Judge::new(row)?;
    // It is not asked for what no CPU takes: it has no notion of canonical.
    let unused = if name == "5-level" { 7 } else { 16 };
    let canonical = |gva: &u64| (*gva << unused) as i64 >> unused == *gva as i64;
    for (index, said) in (0..).zip(said) {
        let step = said.leaves.len().div_ceil(LEAVES).max(1);
        let leaves = said.leaves.iter().step_by(step).map(|leaf| leaf.gva);
        let random = said.random.iter().map(|(gva, _)| *gva);
        let addresses: Vec<u64> = leaves.chain(random).filter(canonical).collect();
        let mut child = Command::new("python3")
            .args([script.as_os_str(), file.as_os_str(), name.as_ref()])
            .arg(format!("{:#x}", said.control.cr3))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines: String = String::new();
        addresses.iter().for_each(|gva| lines.push_str(&format!("{gva:#x}\n")));
        // It reads all before it says anything.
        child.stdin.take().ok_or("no standard input")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("volatility3: {}", output.status).into());
        }
        let answers = String::from_utf8(output.stdout)?;
        let answers: Vec<&str> = answers.lines().collect();
        assert_eq!(answers.len(), addresses.len());
        let words = daemon.words("dump", index, &addresses)?;
        for ((gva, word), answer) in addresses.into_iter().zip(words).zip(answers) {
            judge.case();
            let theirs = match answer {
                "-" => None,
                digits => Some(u64::from_str_radix(digits, 16)?),
            };
            judge.count(if theirs.is_some() { "mapped" } else { "not mapped" }, 0);
            if gpa(word, gva) != theirs {
                judge.disagree(|| {
                    format!("vCPU {index}: {gva:#x}: volatility3 {theirs:x?}, the daemon {word:#x}")
                });
            }
        }
    }
    judge.finish(&[("mapped", None, 20_000), ("not mapped", None, 10_000)])
}

/// Address and size of every piece of memory that the file has, by its program headers.
fn segments(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let word = |at: u64, bytes: usize| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word[..bytes], at).map(|()| u64::from_le_bytes(word))
    };
    let wide = word(4, 1)? == 2;
    let (table, size, count) =
        if wide { (word(0x20, 8)?, 56, word(0x38, 2)?) } else { (word(0x1c, 4)?, 32, word(0x2c, 2)?) };
    // Above 65534 segments the first section header counts them.
    let count = match count {
        0xffff if wide => word(word(0x28, 8)? + 0x2c, 4)?,
        0xffff => word(word(0x20, 4)? + 0x1c, 4)?,
        count => count,
    };
    let mut segments = Vec::new();
    for at in (0..count).map(|number| table + number * size) {
        if word(at, 4)? == 1 {
            segments.push(if wide {
                (word(at + 0x18, 8)?, word(at + 0x20, 8)?)
            } else {
                (word(at + 0xc, 4)?, word(at + 0x10, 4)?)
            });
        }
    }
    Ok(segments)
}
