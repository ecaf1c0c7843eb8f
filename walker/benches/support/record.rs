//! Rounds of two sides in turn, and what becomes of them: a table, and JSON lines.

use std::time::Duration;

use criterion::{Criterion, SamplingMode};

use super::kept::{keep, median, surroundings};

const MINIMUM_ROUNDS: usize = 31;

/// Two sides of one comparison, nanoseconds an element, round by round.
struct Row {
    case: String,
    peer: String,
    ours: Vec<f64>,
    theirs: Vec<f64>,
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
