//! What a bench found: one Markdown table of `benches/RESULTS.md`, and JSON lines.

use std::fs;

use super::kept::{keep, median, record_file, surroundings};

/// Where each bench has its part.
const RECORD: &str = "RESULTS.md";

/// A line of the table.
enum Row {
    Compared(Comparison),
    /// What could not be compared here, and why.
    Skipped {
        case: String,
        reason: String,
    },
}

/// Two sides of one comparison, a figure a round each.
struct Comparison {
    case: String,
    unit: &'static str,
    ours: Vec<f64>,
    peer: String,
    theirs: Vec<f64>,
}

/// By round where both sides took part in each: what slows a machine down for a while slows both.
fn ratio(row: &Comparison) -> f64 {
    if row.ours.len() != row.theirs.len() {
        return median(&row.ours) / median(&row.theirs);
    }
    let ratios: Vec<f64> = row.ours.iter().zip(&row.theirs).map(|(ours, theirs)| ours / theirs).collect();
    median(&ratios)
}

pub(crate) struct Report {
    bench: &'static str,
    title: &'static str,
    about: &'static str,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(bench: &'static str, title: &'static str, about: &'static str) -> Self {
        Self { bench, title, about, rows: Vec::new() }
    }

    pub(crate) fn add(
        &mut self,
        case: impl Into<String>,
        unit: &'static str,
        ours: Vec<f64>,
        peer: impl Into<String>,
        theirs: Vec<f64>,
    ) {
        let row = Comparison { case: case.into(), unit, ours, peer: peer.into(), theirs };
        self.push(Row::Compared(row));
    }

    /// Has the table say that this host lacks what a case needs.
    pub(crate) fn skip(&mut self, case: impl Into<String>, reason: &str) {
        let reason = reason.replace(['|', '\n'], " ");
        self.push(Row::Skipped { case: case.into(), reason });
    }

    fn push(&mut self, row: Row) {
        println!("{}", line(&row));
        self.rows.push(row);
    }

    /// Prints the table; writes the files, unless this was a trial that each case runs.
    pub(crate) fn finish(self, record: bool) {
        let mut table =
            "| case | pagewalk | unit | next to | its | ratio | rounds |\n|---|---:|---|---|---:|---:|---:|\n"
                .to_owned();
        let mut lines = String::new();
        for row in &self.rows {
            table += &line(row);
            table.push('\n');
            let Row::Compared(row) = row else { continue };
            let (ours, theirs) = (median(&row.ours), median(&row.theirs));
            lines += &format!(
                "{{\"bench\":\"{}\",\"case\":\"{}\",\"ours_ns\":{ours:.3},\"peer\":\"{}\",\"peer_ns\":{theirs:.3},\"ratio\":{:.4}}}\n",
                self.bench,
                row.case,
                row.peer,
                ratio(row),
            );
        }
        println!("\n{table}");
        if !record {
            return;
        }
        let old = fs::read_to_string(record_file(RECORD)).unwrap_or_default();
        let head = format!("# {}\n", self.title);
        let others: Vec<&str> =
            sections(&old).into_iter().filter(|section| !section.starts_with(&head)).collect();
        let own =
            format!("{head}\n{}\n\n{}\n{table}", self.about, surroundings(&["tonic", "prost", "tokio"]));
        let mut all: Vec<String> = others.into_iter().map(|section| section.trim_end().to_owned()).collect();
        all.push(own.trim_end().to_owned());
        all.sort();
        keep(self.bench, RECORD, &(all.join("\n\n") + "\n"), &lines);
    }
}

fn sections(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text.match_indices("# ").map(|(at, _)| at).collect();
    starts.retain(|at| *at == 0 || text[..*at].ends_with('\n'));
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    starts.iter().zip(ends).map(|(start, end)| &text[*start..end]).collect()
}

fn line(row: &Row) -> String {
    let row = match row {
        Row::Compared(row) => row,
        Row::Skipped { case, reason } => return format!("| {case} | SKIPPED | | {reason} | | | |"),
    };
    let (ours, theirs) = (median(&row.ours), median(&row.theirs));
    format!(
        "| {} | {ours:.2} | {} | {} | {theirs:.2} | {:.3} | {} |",
        row.case,
        row.unit,
        row.peer,
        ratio(row),
        row.ours.len(),
    )
}
