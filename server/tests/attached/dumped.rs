//! Judges `linux-*-dump`: dumps that QEMU wrote of a paused guest, opened as source `dump`.
//!
//! What QEMU said of the guest then, `info tlb`, `gva2gpa` and `memsave`, is what the dump has to mean. The same file is
//! read by others, whose translations are compared as well (`foreign.rs`).
//!
//! By rule: with `paging=true` QEMU leaves out of the file what no vCPU's address space maps, tables included. A walk that
//! ends as *unbacked* at an entry which no segment of the file has is no disagreement, nor is a page that no segment has; the
//! segments are read here on their own. Any other difference is one.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use libtest_mimic::Failed;
use pagewalk_proto::v1::FaultKind;
use tonic::Code;

use crate::daemon::{Daemon, refusal};
use crate::foreign;
use crate::guest::Guest;
use crate::judge::Judge;
use crate::judged::{Said, gpa};

const PAGE: u64 = 4096;
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
        ("4-level", _) => {
            ("linux-4-level-dump", None, Some(["volatility-4-level-dump", "drgn-4-level-dump"]))
        }
        ("5-level", "private") => ("linux-5-level-private-dump", None, None),
        ("5-level", _) => (
            "linux-5-level-dump",
            Some("linux-5-level-paging-dump"),
            Some(["volatility-5-level-dump", "drgn-5-level-dump"]),
        ),
        ("2-level", _) => ("linux-2-level-dump", None, None),
        _ => ("linux-pae-dump", Some("linux-pae-paging-dump"), None),
    };
    let file = folder.join("guest.elf");
    write(guest, "", &file)?;
    judge_dump(daemon, row, &file, said, false)?;
    if let Some([volatility, drgn]) = foreign {
        foreign::volatility(daemon, volatility, name, &file, said)?;
        foreign::drgn(daemon, drgn, name, &file, said)?;
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
