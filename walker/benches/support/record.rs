//! Rounds of two sides in turn, and what becomes of them: a table, JSON lines, a heading that says where and with what.

use std::env::{args, consts};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::Duration;

use criterion::{Criterion, SamplingMode};

const MINIMUM_ROUNDS: usize = 31;

/// Whether this is a test that each case runs: cargo passes `--bench` for more.
pub(crate) fn is_test() -> bool {
    !args().any(|argument| argument == "--bench") || args().any(|argument| argument == "--test")
}

/// Two sides of one comparison, nanoseconds an element, round by round.
struct Row {
    case: String,
    peer: String,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// One bench: its name in the JSON lines, and the comparisons made so far.
pub(crate) struct Bench {
    name: &'static str,
    criterion: Criterion,
    rows: Vec<Row>,
    asked: usize,
}

impl Bench {
    pub(crate) fn new(name: &'static str) -> Self {
        let criterion = Criterion::default().configure_from_args().without_plots();
        Self { name, criterion, rows: Vec::new(), asked: 0 }
    }

    /// Lets both sides take turns of `round` elements each. A side takes how many to do, and says how long it took.
    ///
    /// A round is long enough for the clock, and short enough that the scheduler rarely falls into it.
    pub(crate) fn compare(
        &mut self,
        case: &str,
        peer: &str,
        round: u64,
        mut ours: impl FnMut(u64) -> Duration,
        mut theirs: impl FnMut(u64) -> Duration,
    ) {
        self.asked += 1;
        let mut row =
            Row { case: case.to_owned(), peer: peer.to_owned(), ours: Vec::new(), theirs: Vec::new() };
        let mut group = self.criterion.benchmark_group(self.name);
        group.sampling_mode(SamplingMode::Flat).sample_size(40).nresamples(2_000);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        group.bench_function(format!("{case} next to {peer}"), |bencher| {
            bencher.iter_custom(|times| {
                let mut total = Duration::ZERO;
                let mut left = times;
                while left > 0 {
                    let now = left.min(round);
                    let (our_time, their_time) = (ours(now), theirs(now));
                    if now == round {
                        row.ours.push(our_time.as_nanos() as f64 / round as f64);
                        row.theirs.push(their_time.as_nanos() as f64 / round as f64);
                    }
                    total += our_time;
                    left -= now;
                }
                total
            });
        });
        group.finish();
        if row.ours.len() >= MINIMUM_ROUNDS {
            self.rows.push(row);
        }
    }

    /// Prints the table; and where every case ran, leaves the JSON lines under `target/pagewalk-bench` and the table in
    /// `file` beside the benches, under `title` and with the versions of `crates`.
    pub(crate) fn record(&self, file: &str, title: &str, crates: &[&str]) {
        let mut table =
            "| case | pagewalk, ns | next to | ns | ratio | rounds |\n|---|---:|---|---:|---:|---:|\n"
                .to_owned();
        let mut lines = String::new();
        for row in &self.rows {
            let (ours, theirs) = (median(&row.ours), median(&row.theirs));
            let Row { case, peer, .. } = row;
            let (name, ratio, rounds) = (self.name, ours / theirs, row.ours.len());
            table += &format!("| {case} | {ours:.2} | {peer} | {theirs:.2} | {ratio:.3} | {rounds} |\n");
            lines += &format!(
                "{{\"bench\":\"{name}\",\"case\":\"{case}\",\"ours_ns\":{ours:.3},\"peer\":\"{peer}\",\"peer_ns\":{theirs:.3},\"ratio\":{ratio:.4}}}\n"
            );
        }
        println!("\n{table}");
        // A run of a few cases must not replace the record of all.
        if self.rows.len() == self.asked {
            keep(self.name, file, &format!("{title}\n\n{}\n{table}", surroundings(crates)), &lines);
        }
    }
}

/// Leaves the JSON lines of a bench under `target/pagewalk-bench`, and its record in `file` beside the benches.
pub(crate) fn keep(bench: &str, file: &str, record: &str, lines: &str) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("pagewalk-bench");
    fs::create_dir_all(&target).unwrap();
    fs::write(target.join(format!("{bench}.jsonl")), lines).unwrap();
    fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join(file), record).unwrap();
}

/// Where and with what the table was made.
pub(crate) fn surroundings(crates: &[&str]) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("?", |(_, value)| value).to_owned()
    };
    let output = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        output.map_or("?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let lock =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock")).unwrap_or_default();
    let manifest =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap_or_default();
    // The lock may have several of one name: the bench's own is the one that the manifest asks for.
    let version = |name: &str| {
        let asked = manifest.lines().find(|line| line.starts_with(&format!("{name} = ")));
        let asked = asked.and_then(|line| line.split('"').nth(1)).unwrap_or_default();
        lock.split(&format!("name = \"{name}\"\nversion = \""))
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .find(|version| version.starts_with(asked))
            .unwrap_or("?")
            .to_owned()
    };
    let versions: String = crates.iter().map(|name| format!(", {name} {}", version(name))).collect();
    format!(
        "- machine: {} (family {}, model {}), {} cores, {}, {}\n- date: {}\n- {}; pagewalk {}{versions}\n",
        field("model name"),
        field("cpu family"),
        field("model\t"),
        available_parallelism().map_or(0, usize::from),
        consts::ARCH,
        consts::OS,
        output("date", "-u"),
        output("rustc", "--version"),
        env!("CARGO_PKG_VERSION"),
    )
}
