//! What every bench does with its figures, the daemon's too: medians, where they are kept, and under which circumstances they
//! were measured.

use std::env::{args, consts};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

/// Whether this is a test that each case runs: cargo passes `--bench` for more.
pub(crate) fn is_test() -> bool {
    !args().any(|argument| argument == "--bench") || args().any(|argument| argument == "--test")
}

pub(crate) fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The file of a bench's JSON lines, in a folder that is there.
pub(crate) fn lines_file(bench: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("pagewalk-bench");
    fs::create_dir_all(&target).unwrap();
    target.join(format!("{bench}.jsonl"))
}

/// A record beside the benches.
pub(crate) fn record_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join(name)
}

/// Leaves the JSON lines of a bench under `target/pagewalk-bench`, and its record in `file` beside the benches.
pub(crate) fn keep(bench: &str, file: &str, record: &str, lines: &str) {
    fs::write(lines_file(bench), lines).unwrap();
    fs::write(record_file(file), record).unwrap();
}

/// What a program prints, or `?`.
pub(crate) fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or("?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Where and with what the table was made.
pub(crate) fn surroundings(crates: &[&str]) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("?", |(_, value)| value).to_owned()
    };
    let lock =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock")).unwrap_or_default();
    let manifest =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap_or_default();
    // The lock may have several of one name: the bench's own is the one that the manifest asks for.
    let version = |name: &str| {
        let asked = manifest.lines().find(|line| line.starts_with(&format!("{name} = ")));
        let asked = asked.and_then(|line| line.split('"').nth(1));
        let asked = asked.filter(|text| text.starts_with(|c: char| c.is_ascii_digit())).unwrap_or_default();
        lock.split(&format!("name = \"{name}\"\nversion = \""))
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .find(|version| version.starts_with(asked))
            .unwrap_or("?")
            .to_owned()
    };
    let versions: String = crates.iter().map(|name| format!(", {name} {}", version(name))).collect();
    format!(
        "- machine: {} (family {}, model {}), {} processors, {}, {}\n- date: {}\n- {}; {} {}{versions}\n",
        field("model name"),
        field("cpu family"),
        field("model\t"),
        available_parallelism().map_or(0, usize::from),
        consts::ARCH,
        consts::OS,
        output("date", &["-u"]),
        output("rustc", &["--version"]),
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION"),
    )
}
