//! The daemon attached to guests of QEMU's that it did not start: judges `attached-*`, and what happens when the host takes
//! such a guest away.
//!
//! The guests are those of the bed `qemu-linux`. A daemon in this process attaches to each over a QMP socket of its own; the
//! tests ask QEMU over another one. While the guest is paused, every leaf of `info tlb` and thousands of random addresses of
//! `gva2gpa` are compared with `BatchTranslate`, bytes of `ReadMemory` with `memsave` and with what the program in the guest
//! announced. Each way to the guest's memory has its turn. Dumps that QEMU writes of the paused guest are judged by the same words,
//! and by volatility3 and drgn (`dumped.rs`). Kernels are found by their symbols, wherever they were moved to, and processes by their
//! kernels (`tasks.rs`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../../../walker/tests/linux/announced.rs"]
mod announced;
mod daemon;
mod dumped;
mod fake;
mod foreign;
#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../../../walker/tests/linux/guest.rs"]
mod guest;
#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../../../walker/tests/bed/judge.rs"]
mod judge;
mod judged;
mod large;
#[allow(dead_code, reason = "each test target uses its part")]
#[path = "../../../walker/tests/linux/monitor.rs"]
mod monitor;
mod moving;
mod numa;
mod peers;
mod spaces;
mod symbols;
mod tasks;
mod trouble;

use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};

const BED: &str = "qemu";

fn main() {
    let arguments = Arguments::from_args();
    let bedded = |name: &'static str, test: fn(&Path) -> Result<(), Failed>| {
        Trial::test(name, move || match script()? {
            Ok(script) => test(&script),
            Err(reason) => judge::skipped(BED, &reason),
        })
    };
    let mut trials = vec![
        bedded("attached_4_level", |script| judged::run(script, "4-level", "file")),
        bedded("attached_5_level", |script| judged::run(script, "5-level", "file")),
        bedded("attached_2_level", |script| judged::run(script, "2-level", "file")),
        bedded("attached_pae", |script| judged::run(script, "pae", "file")),
        bedded("attached_5_level_private", |script| judged::run(script, "5-level", "private")),
        bedded("attached_at_once", large::at_once),
        bedded("numa_nodes_and_dimms", numa::nodes_and_dimms),
        bedded("attached_symbols", symbols::run),
        bedded("attached_tasks_5_level", tasks::five_level),
        bedded("attached_tasks_pae", tasks::of_no_kernel),
        bedded("killed_under_load", trouble::killed),
        bedded("killed_under_load_private", trouble::killed_private),
        bedded("truncated_under_load", trouble::truncated),
        bedded("attached_twice", trouble::twice),
        bedded("detached_and_back", trouble::detached),
        bedded("refused_by_the_host", trouble::refused),
    ];
    trials.extend(peers::trials());
    trials.extend(moving::trials());
    libtest_mimic::run(&arguments, trials).exit();
}

/// The bed's script, or why there is no bed.
fn script() -> Result<Result<PathBuf, String>, Failed> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/beds/qemu-linux.sh");
    let check = Command::new(&script).arg("check").output()?;
    if check.status.success() {
        return Ok(Ok(script));
    }
    Ok(Err(String::from_utf8_lossy(&check.stderr).trim().to_owned()))
}
