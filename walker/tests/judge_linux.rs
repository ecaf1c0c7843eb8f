//! Judges `linux-*`: the walker against QEMU's own MMU, over the page tables of stock Linux guests.
//!
//! The bed `qemu-linux` (`deploy/beds/qemu-linux.sh`) boots Debian's kernels under TCG with two vCPUs: amd64 under 4-level
//! paging with page-table isolation and under 5-level paging, i386 under 2-level and under PAE paging. A program in the
//! guest keeps both vCPUs busy, in user space and in the kernel. Again and again the guest is paused, and for each vCPU the
//! walker, given that vCPU's registers and the guest's memory, is compared with what QEMU says. Where the bed was not
//! built, all this is skipped: building it downloads packages.
//!
//! # `linux-*-info-tlb`
//! Every leaf that `info tlb` finds: address, flags and size, and every kind of access by user and supervisor. Between
//! two leaves nothing may be mapped: three addresses of each gap. Effective R/W and U/S are `info mem`'s, where
//! there is one. No command prints effective NX: it is the leaf's, and Linux's only other use of NX is known (see
//! `linux/space.rs`).
//!
//! # `linux-*-map`
//! The map of the whole address space, page by page, against `info tlb` from its first line to its last: as many pages, each at
//! its address, with the same frame and flags, and the effective rights as above. An extent was accessed, or is dirty, where
//! one of its pages is.
//!
//! # `linux-*-info-mem`
//! The extents of `info mem`, with their effective R/W and U/S, against those that the walker makes of the same leaves.
//! Page sizes have to add up. Not under 5-level paging, where QEMU 7.2 prints nothing and takes half a minute for it.
//!
//! # `linux-*-gva2gpa`
//! Random addresses: mapped ones, their neighbours, holes, and addresses that are not canonical.
//!
//! # `linux-*-user`
//! What the program in the guest announced, against walks from the root of the worker that a vCPU was running: every page
//! has to hold what the worker wrote, with the rights, size and key that it asked for; what it gave up has to be absent.
//! Here QEMU's monitor has no say. Under PAE the announced NX is not asked for: Debian 12's kernel leaves it out of user pages, as `info tlb` shows.
//!
//! No command of QEMU's judges an access: its expected outcome follows from the effective rights, by the few rules in
//! `linux/expected.rs`. Linux sets no reserved bit. Other judges have both executed.
//!
//! PDPTEs of PAE paging are given to the walker as registers, without the bit that TCG sets in them: by rule, counted.
//! A seed repeats the random choices, not the guest.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;
#[allow(dead_code, reason = "the daemon's judge uses the rest")]
mod linux;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bed::judge::{Judge, cases, skipped};
use fastrand::Rng;
use libtest_mimic::{Arguments, Failed, Trial};
use linux::announced;
use linux::guest::Guest;
use linux::monitor;
use linux::space::{Judges, Kind, Space, size_name};
use pagewalk::{PageSize, PagingMode};

const BED: &str = "qemu";
const VCPUS: usize = 2;
/// How often a guest is paused.
const PAUSES: u64 = 16;

const KINDS: [Kind; 4] = [
    Kind {
        name: "4-level",
        mode: PagingMode::FourLevel,
        isolated: true,
        large: &[PageSize::Size2M, PageSize::Size1G],
        tlb: "linux-4-level-info-tlb",
        map: "linux-4-level-map",
        mem: Some("linux-4-level-info-mem"),
        gva2gpa: "linux-4-level-gva2gpa",
        user: "linux-4-level-user",
    },
    Kind {
        name: "5-level",
        mode: PagingMode::FiveLevel,
        isolated: false,
        large: &[PageSize::Size2M],
        tlb: "linux-5-level-info-tlb",
        map: "linux-5-level-map",
        mem: None,
        gva2gpa: "linux-5-level-gva2gpa",
        user: "linux-5-level-user",
    },
    Kind {
        name: "2-level",
        mode: PagingMode::TwoLevel,
        isolated: false,
        large: &[PageSize::Size4M],
        tlb: "linux-2-level-info-tlb",
        map: "linux-2-level-map",
        mem: Some("linux-2-level-info-mem"),
        gva2gpa: "linux-2-level-gva2gpa",
        user: "linux-2-level-user",
    },
    Kind {
        name: "pae",
        mode: PagingMode::Pae,
        isolated: true,
        large: &[PageSize::Size2M],
        tlb: "linux-pae-info-tlb",
        map: "linux-pae-map",
        mem: Some("linux-pae-info-mem"),
        gva2gpa: "linux-pae-gva2gpa",
        user: "linux-pae-user",
    },
];

fn main() {
    let arguments = Arguments::from_args();
    let trial = |kind: &'static Kind| Trial::test(format!("linux_{}", kind.name), move || run(kind));
    libtest_mimic::run(&arguments, KINDS.iter().map(trial).collect()).exit();
}

fn run(kind: &Kind) -> Result<(), Failed> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/beds/qemu-linux.sh");
    let check = Command::new(&script).arg("check").output()?;
    if !check.status.success() {
        return skipped(BED, String::from_utf8_lossy(&check.stderr).trim());
    }
    let mut judges = Judges {
        tlb: Judge::new(kind.tlb)?,
        map: Judge::new(kind.map)?,
        mem: kind.mem.map(Judge::new).transpose()?,
        gva2gpa: Judge::new(kind.gva2gpa)?,
        user: Judge::new(kind.user)?,
    };
    let mut rng = Rng::with_seed(judges.tlb.seed());
    let addresses = cases(20_000)?.div_ceil(PAUSES * VCPUS as u64);
    let (mut guest, said) = Guest::boot(&script, kind.name)?;
    let (cpu, mappings) = announced::read(&said)?;
    let mut roots = BTreeSet::new();
    guest.pause()?;
    for _ in 0..PAUSES {
        let registers = monitor::registers(&guest.ask(0, "info registers -a")?)?;
        if registers.len() != VCPUS {
            return Err(format!("QEMU reports {} vCPUs", registers.len()).into());
        }
        for (vcpu, registers) in registers.iter().enumerate() {
            let space = Space::look(kind, &cpu, &mut guest, vcpu, registers)?;
            judges.tlb.count_if("a root seen for the first time", roots.insert(registers.control.cr3));
            judges.tlb.count("vCPU paused at CPL", registers.cpl);
            space.judge_leaves(&mut rng, &guest.ram()?, &mut judges);
            space.judge_map(&guest.ram()?, &mut judges.map);
            space.judge_addresses(&mut rng, &mut guest, addresses, &mut judges.gva2gpa)?;
            space.judge_worker(&mut rng, &guest.ram()?, &mappings, &mut judges.user);
        }
        guest.run_for(Duration::from_millis(rng.u64(5..60)))?;
    }
    let minima = Minima::of(kind);
    // All of them print their lines, even where the first one fails.
    let outcomes = [
        judges.tlb.finish(&minima.tlb),
        judges.map.finish(&minima.map),
        judges.mem.map_or(Ok(()), |mem| mem.finish(&minima.mem)),
        judges.gva2gpa.finish(&minima.gva2gpa),
        judges.user.finish(&minima.user),
    ];
    outcomes.into_iter().collect()
}

type Minimum = (&'static str, Option<u64>, u64);

/// How much of each class has to be seen, written for 200,000 cases.
struct Minima {
    tlb: Vec<Minimum>,
    map: Vec<Minimum>,
    mem: Vec<Minimum>,
    gva2gpa: Vec<Minimum>,
    user: Vec<Minimum>,
}

impl Minima {
    fn of(kind: &Kind) -> Minima {
        let mut minima = Minima {
            tlb: vec![
                ("a root seen for the first time", None, 3),
                ("vCPU paused at CPL", Some(0), 4),
                ("vCPU paused at CPL", Some(3), 4),
                ("page of 4 KiB", None, 40_000),
                ("page of the user", None, 1_000),
                ("page of the supervisor", None, 40_000),
                ("writable", None, 40_000),
                ("executable", None, 2_000),
                ("access allowed", None, 200_000),
                ("access refused", None, 200_000),
                ("address between leaves", None, 1_000),
            ],
            map: vec![
                ("page of 4 KiB", None, 40_000),
                ("extent of one page", None, 1_000),
                ("extent of several pages", None, 500),
            ],
            mem: vec![
                ("extent of the user", None, 10_000),
                ("extent of the supervisor", None, 40_000),
                ("extent, read-only", None, 20_000),
                ("extent, writable", None, 40_000),
            ],
            gva2gpa: vec![
                ("page of 4 KiB", None, 40_000),
                ("not present, level", Some(1), 400),
                ("not present, level", Some(2), 8_000),
            ],
            user: vec![
                ("page of 4 KiB", None, 60_000),
                ("absent", None, 20_000),
                ("writable", None, 40_000),
                ("read-only", None, 40_000),
            ],
        };
        for size in kind.large {
            let (tlb, gva2gpa, user) = match size {
                PageSize::Size1G => (20, 400, 1_000),
                _ => (3_000, 5_000, 20_000),
            };
            minima.tlb.push((size_name(*size), None, tlb));
            minima.map.push((size_name(*size), None, tlb));
            minima.gva2gpa.push((size_name(*size), None, gva2gpa));
            minima.user.push((size_name(*size), None, user));
        }
        if kind.mode.is_long() {
            minima.gva2gpa.push(("not canonical", None, 8_000));
            minima.gva2gpa.push(("not present, level", Some(3), 3_000));
            minima.gva2gpa.push(("not present, level", Some(4), 3_000));
            minima.user.push(("executable", None, 4_000));
            minima.user.push(("no-execute", None, 40_000));
            minima.user.push(("with a protection key", None, 4_000));
            if kind.isolated {
                minima.tlb.push(("NX in a table, not in the leaf", None, 100));
            }
        }
        if kind.mode == PagingMode::FiveLevel {
            minima.gva2gpa.push(("not present, level", Some(5), 3_000));
        }
        minima
    }
}
