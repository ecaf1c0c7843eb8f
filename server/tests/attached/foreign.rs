//! Judges `volatility-*-dump` and `drgn-*-dump`: what other programs make of the file of machine `dump`.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::Failed;

use crate::daemon::Daemon;
use crate::judge::{self, Judge};
use crate::judged::{Said, gpa};

/// Leaves of each vCPU that the other program is asked for.
const LEAVES: usize = 2500;
/// Pages of the kernel, at least about as many.
const KERNEL_PAGES: usize = 10_000;

/// The address spaces of all vCPUs, by volatility3.
pub(crate) fn volatility(
    daemon: &Daemon,
    row: &'static str,
    name: &str,
    file: &Path,
    said: &[Said],
) -> Result<(), Failed> {
    if let Some(problem) = missing("volatility3.framework")? {
        return judge::skipped("volatility3", &problem);
    }
    let mut judge = Judge::new(row)?;
    for (index, said) in (0..).zip(said) {
        let addresses = asked(name, said);
        let root = format!("{:#x}", said.control.cr3);
        let answers =
            answers("volatility.py", &[file.as_os_str(), name.as_ref(), root.as_ref()], &addresses)?;
        let words = daemon.words("dump", index, &addresses)?;
        compare(&mut judge, "volatility3", &addresses, &answers, &words);
    }
    judge.finish(&[("mapped", None, 20_000), ("not mapped", None, 10_000)])
}

/// The kernel's own address space, by drgn.
pub(crate) fn drgn(
    daemon: &Daemon,
    row: &'static str,
    name: &str,
    file: &Path,
    said: &[Said],
) -> Result<(), Failed> {
    if let Some(problem) = missing("drgn")? {
        return judge::skipped("drgn", &problem);
    }
    let mut judge = Judge::new(row)?;
    let ask = |addresses: &[u64]| -> Result<_, Failed> {
        let mut answers = answers("drgn_dump.py", &[file.as_os_str()], addresses)?.into_iter();
        let root = answers.next().flatten().ok_or("drgn knows no root")?;
        Ok((root, answers.collect::<Vec<_>>()))
    };
    let (root, _) = ask(&[])?;
    // A vCPU that was stopped in user mode has next to nothing of the kernel, under page-table isolation.
    let mut addresses = edges(&daemon.mapped_from("dump", root)?);
    addresses.extend(said.iter().flat_map(|said| asked(name, said)));
    addresses.retain(|gva| gva >> 63 != 0);
    let (_, answers) = ask(&addresses)?;
    let words = daemon.words_from("dump", root, &addresses)?;
    compare(&mut judge, "drgn", &addresses, &answers, &words);
    judge.finish(&[("mapped", None, 20_000), ("not mapped", None, 2_000)])
}

/// Addresses in these extents, evenly, and on either side of each.
fn edges(extents: &[(u64, u64)]) -> Vec<u64> {
    let inside = (KERNEL_PAGES / extents.len().max(1)).max(2) as u64;
    let of = |&(start, bytes): &(u64, u64)| {
        let even = (0..inside).map(move |at| start + bytes / inside * at);
        even.chain([start.wrapping_sub(1), start + (bytes - 1), start.wrapping_add(bytes)])
    };
    extents.iter().flat_map(of).collect()
}

/// Why `python3` has no such module.
fn missing(module: &str) -> Result<Option<String>, Failed> {
    let import = format!("import {module}");
    let there = Command::new("python3").args(["-c", &import]).stderr(Stdio::piped()).output()?;
    let problem = String::from_utf8_lossy(&there.stderr);
    let problem = problem.lines().last().unwrap_or("no python3").to_owned();
    Ok((!there.status.success()).then_some(problem))
}

/// No addresses that no CPU takes: the others have no notion of canonical.
fn asked(name: &str, said: &Said) -> Vec<u64> {
    let unused = if name == "5-level" { 7 } else { 16 };
    let canonical = |gva: &u64| (*gva << unused) as i64 >> unused == *gva as i64;
    let step = said.leaves.len().div_ceil(LEAVES).max(1);
    let leaves = said.leaves.iter().step_by(step).map(|leaf| leaf.gva);
    leaves.chain(said.random.iter().map(|(gva, _)| *gva)).filter(canonical).collect()
}

/// What a script prints to addresses on its standard input, line by line.
fn answers(script: &str, arguments: &[&OsStr], addresses: &[u64]) -> Result<Vec<Option<u64>>, Failed> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attached").join(script);
    let mut child = Command::new("python3")
        .arg(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines: String = addresses.iter().map(|gva| format!("{gva:#x}\n")).collect();
    // It reads all before it says much.
    child.stdin.take().ok_or("no standard input")?.write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(format!("{script}: {}", output.status).into());
    }
    let answer = |line: &str| match line {
        "-" => Ok(None),
        digits => u64::from_str_radix(digits, 16).map(Some),
    };
    Ok(String::from_utf8(output.stdout)?.lines().map(answer).collect::<Result<_, _>>()?)
}

fn compare(judge: &mut Judge, who: &str, addresses: &[u64], answers: &[Option<u64>], words: &[u64]) {
    assert_eq!((answers.len(), words.len()), (addresses.len(), addresses.len()));
    for ((gva, theirs), word) in addresses.iter().zip(answers).zip(words) {
        judge.case();
        judge.count(if theirs.is_some() { "mapped" } else { "not mapped" }, 0);
        if gpa(*word, *gva) != *theirs {
            judge.disagree(|| format!("{gva:#x}: {who} {theirs:x?}, the daemon {word:#x}"));
        }
    }
}
