//! Rows of a run, and the record of all cases, which may come from several runs.

use std::fs;

use crate::support::kept::{lines_file, median, output, record_file, surroundings};

/// Every pair of "batch" and another contestant.
pub(crate) struct Rows {
    lines: Vec<String>,
    short: bool,
}

impl Rows {
    pub(crate) fn new(short: bool) -> Self {
        Self { lines: Vec::new(), short }
    }

    /// The first two contestants, where they are batches, next to each of the others.
    pub(crate) fn add(&mut self, case: &str, names: &[&str], times: &[Vec<f64>]) {
        let batches = names.iter().take_while(|name| name.starts_with("batch")).count();
        for ours in 0..batches {
            for theirs in 0..names.len() {
                if theirs == ours || theirs < batches && ours > 0 {
                    continue;
                }
                let (our, their) = (&times[ours], &times[theirs]);
                let ratios: Vec<f64> = our.iter().zip(their).map(|(our, their)| our / their).collect();
                let ratio = median(&ratios);
                let row = if names[ours] == "batch" { case.to_owned() } else { format!("{case}, portable") };
                let (peer, rounds) = (names[theirs], our.len());
                let (our, their) = (median(our), median(their));
                self.lines.push(format!(
                    "{{\"bench\":\"batch\",\"case\":\"{row}\",\"ours_ns\":{our:.3},\"peer\":\"{peer}\",\"peer_ns\":{their:.3},\"ratio\":{ratio:.4},\"rounds\":{rounds},\"date\":\"{}\"}}",
                    output("date", &["-u", "+%F %H:%M"]),
                ));
            }
        }
    }
}

/// One field of a line that [`Rows::add`] has written.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let rest = line.split_once(&format!("\"{name}\":")).map_or("", |(_, rest)| rest);
    match rest.strip_prefix('"') {
        Some(text) => text.split('"').next().unwrap_or_default(),
        None => rest.split([',', '}']).next().unwrap_or_default(),
    }
}

/// Prints the rows, and puts them into the record in the place of those of the same cases.
pub(crate) fn record(rows: &Rows, short: bool) {
    let table = |lines: &[String]| {
        let mut table = "| case | batch, ns | next to | ns | ratio | times faster | rounds | date |\n|---|---:|---|---:|---:|---:|---:|---|\n".to_owned();
        for line in lines {
            let of = |name| field(line, name);
            let faster = 1.0 / of("ratio").parse::<f64>().unwrap_or(f64::NAN);
            table += &format!(
                "| {} | {} | {} | {} | {} | {faster:.2} | {} | {} |\n",
                of("case"),
                of("ours_ns"),
                of("peer"),
                of("peer_ns"),
                of("ratio"),
                of("rounds"),
                of("date")
            );
        }
        table
    };
    println!("{}", table(&rows.lines));
    if short || rows.short || rows.lines.is_empty() {
        return;
    }
    let file = lines_file("batch");
    let case = |line: &str| field(line, "case").split(',').next().unwrap_or_default().to_owned();
    let ran: Vec<String> = rows.lines.iter().map(|line| case(line)).collect();
    let before = fs::read_to_string(&file).unwrap_or_default();
    let mut lines: Vec<String> =
        before.lines().filter(|line| !ran.contains(&case(line))).map(str::to_owned).collect();
    lines.extend(rows.lines.iter().cloned());
    fs::write(&file, lines.join("\n") + "\n").unwrap();
    let cases = ["hot", "near", "dense", "mixed", "sparse", "nested"];
    if cases.iter().any(|wanted| !lines.iter().any(|line| case(line) == *wanted)) {
        println!("the record wants every case once; missing ones can be run by name");
        return;
    }
    lines.sort_by_key(|line| cases.iter().position(|name| *name == case(line)));
    fs::write(record_file("BATCH.md"), format!("{}\n{}", heading(), table(&lines))).unwrap();
}

fn heading() -> String {
    format!(
        "# Batches\n\nWritten by `cargo bench -p pagewalk --bench batch`; `benches/batch.rs` says what is compared. Nanoseconds an address, medians\n\
         of rounds in turns; the ratio is the batch's time over the other's, the median of the rounds' ratios.\n\n\
         - the batch uses {:?}\n- load average meanwhile: {} (a bench wants the machine alone)\n{}",
        pagewalk::Instructions::best(),
        fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or("?"),
        surroundings(&["x86_64", "memflow"]),
    )
}
