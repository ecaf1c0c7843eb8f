//! Instructions of one walk, alone and in a batch, the bench's loop included, as callgrind counts them: `cargo bench -p pagewalk
//! --bench instructions` runs itself under valgrind, and takes the difference of two runs of which one walks a hundred thousand
//! times more.
//!
//! Batches are those of the bench of that name, in calls of 4096, by the portable lanes and by AVX2: valgrind knows no AVX-512.
//!
//! Times depend on the machine and on how the code happens to lie; these do not. But a compiler that finds a peer too large to
//! inline here, and inlines it into the bench of times, adds a call of a dozen instructions.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[allow(dead_code, reason = "the bench of batches uses more of it")]
#[path = "batch/guests.rs"]
mod guests;
mod support;

use std::env::{args, current_exe};
use std::hint::black_box;
use std::process::Command;

use guests::read;
use pagewalk::{Gva, Instructions, Window};
use support::bed::{PAGE, PAGE_SIZE, Ram};
use support::guest::{Guest, PLAIN};
use support::kept::{is_test, keep, surroundings};
use support::{memflow, offset_page_table};

const ABOUT: &str = "# Instructions

Written by `cargo bench -p pagewalk --bench instructions`, which says what is counted: instructions of one walk, alone or in a batch,
the bench's loop included.";
const PEERS: &[&str] = &["x86_64", "memflow"];
const CASES: &[(&str, &[&str])] = &[
    ("hot", &["pagewalk", "x86_64", "memflow"]),
    ("hot-chained", &["pagewalk", "x86_64"]),
    ("2-MiB-leaf", &["pagewalk", "x86_64"]),
    ("absent-PDE", &["pagewalk", "x86_64"]),
    ("5-level", &["pagewalk"]),
    ("NPT-4x4", &["pagewalk"]),
    ("EPT-4x4", &["pagewalk"]),
    ("batch-hot", &["portable", "avx2", "single walks"]),
    ("batch-near", &["portable", "avx2", "single walks"]),
    ("batch-sparse", &["portable", "avx2", "single walks"]),
    ("batch-mixed", &["portable", "avx2", "single walks"]),
    ("batch-nested", &["portable", "avx2", "single walks"]),
];
const FEW: u64 = CALL as u64;
const MORE: u64 = 25 * CALL as u64;
/// Addresses of one call.
const CALL: usize = 4096;

fn main() {
    let arguments: Vec<String> = args().skip_while(|argument| argument != "--count").collect();
    if let [_, side, case, times, ..] = arguments.as_slice() {
        return walk(side, case, times.parse().unwrap());
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        return println!("SKIPPED valgrind: it is not installed");
    }
    let (mut table, mut lines) =
        ("| case | side | instructions |\n|---|---|---:|\n".to_owned(), String::new());
    for (case, sides) in CASES {
        for side in *sides {
            let each = (collected(side, case, FEW + MORE) - collected(side, case, FEW)) / MORE;
            table += &format!("| {case} | {side} | {each} |\n");
            lines += &format!(
                "{{\"bench\":\"instructions\",\"case\":\"{case}\",\"side\":\"{side}\",\"instructions\":{each}}}\n"
            );
        }
    }
    println!("{table}");
    if !is_test() {
        keep(
            "instructions",
            "INSTRUCTIONS.md",
            &format!("{ABOUT}\n\n{}\n{table}", surroundings(PEERS)),
            &lines,
        );
    }
}

/// What callgrind collects while this program makes so many walks.
fn collected(side: &str, case: &str, times: u64) -> u64 {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(current_exe().unwrap());
    let output = valgrind.args(["--count", side, case, &times.to_string()]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let total = said.split_once("Collected : ").unwrap_or_else(|| panic!("{said}")).1;
    total.lines().next().unwrap().trim().parse().unwrap()
}

fn walk(side: &str, case: &str, times: u64) {
    if let Some(guest) = case.strip_prefix("batch-") {
        return batch(side, guest, times as usize);
    }
    let ram = Ram::new(64 * PAGE);
    let guest = match case {
        "hot" | "hot-chained" => Guest::hot(ram, 4, 1, PLAIN),
        "2-MiB-leaf" => Guest::hot(ram, 4, 2, PLAIN | PAGE_SIZE),
        "absent-PDE" => Guest::absent(ram),
        "5-level" => Guest::hot(ram, 5, 1, PLAIN),
        "NPT-4x4" => Guest::behind_npt(ram),
        "EPT-4x4" => Guest::behind_ept(ram),
        _ => panic!("{case}: no such case"),
    };
    match (side, case.ends_with("-chained")) {
        ("pagewalk", false) => guest.in_a_loop()(times),
        ("pagewalk", true) => guest.chained()(times),
        ("x86_64", false) => offset_page_table::in_a_loop(&guest)(times),
        ("x86_64", true) => offset_page_table::chained(&guest)(times),
        ("memflow", false) => memflow::in_a_loop(&guest)(times),
        _ => panic!("{side}: no such side"),
    };
}

fn batch(side: &str, guest: &str, times: usize) {
    let guest = match guest {
        "hot" => guests::Guest::dense(512),
        "near" => guests::Guest::dense(1 << 14),
        "sparse" => guests::Guest::sparse(1 << 12),
        "mixed" => guests::Guest::mixed(1 << 14),
        "nested" => guests::Guest::nested(1 << 12),
        _ => panic!("{guest}: no such guest"),
    };
    let (memory, access) = (Window::new(guest.words), black_box(read()));
    let mut words = [0; CALL];
    for gvas in guest.gvas[..times].chunks(CALL) {
        let instructions = match side {
            "portable" => Instructions::Portable,
            "avx2" => Instructions::Avx2,
            _ => {
                for gva in gvas {
                    black_box(&guest.walker.translate(&memory, Gva(*gva), &access));
                }
                continue;
            }
        };
        let mut fault = |_, fault| {
            black_box(&fault);
        };
        guest.walker.translate_batch_by(instructions, &memory, &access, gvas, &mut words, &mut fault);
        black_box(&words);
    }
}
