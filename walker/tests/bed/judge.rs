//! What every judge shares: its settings, its counts, its first disagreements, its last line.
//!
//! Environment: `PAGEWALK_SEED` (decimal or `0x`) repeats a run, `PAGEWALK_JUDGE_CASES` asks for more or fewer cases,
//! `PAGEWALK_FULL=1` for a full enumeration where a judge has one, and `PAGEWALK_REQUIRE=kvm,...` turns a skipped bed
//! into a failure. `PAGEWALK_STOP_AT` ends a judge, and its process, at that many disagreements. Inside a bed, `PAGEWALK_BED` is its name, and comes first in the judge's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;

/// Minimum counts are written for this many cases; where fewer were run, fewer are asked for.
const MINIMA_FOR: u64 = 200_000;
const SHOWN: u64 = 20;

pub(crate) struct Judge {
    name: String,
    seed: u64,
    started: Instant,
    cases: u64,
    disagreements: u64,
    classes: BTreeMap<(&'static str, u64), u64>,
    exemptions: BTreeMap<&'static str, u64>,
    stop_at: Option<u64>,
}

impl Judge {
    pub(crate) fn new(name: &'static str) -> Result<Judge, Failed> {
        let clock =
            || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
        let seed = number("PAGEWALK_SEED")?.unwrap_or_else(clock);
        let name = match std::env::var("PAGEWALK_BED") {
            Ok(bed) => format!("{bed}-{name}"),
            Err(_) => name.to_owned(),
        };
        println!("\njudge {name}: PAGEWALK_SEED={seed:#x} repeats this run");
        Ok(Judge {
            name,
            seed,
            started: Instant::now(),
            cases: 0,
            disagreements: 0,
            classes: BTreeMap::new(),
            exemptions: BTreeMap::new(),
            stop_at: number("PAGEWALK_STOP_AT")?,
        })
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn cases(&self) -> u64 {
        self.cases
    }

    pub(crate) fn case(&mut self) {
        self.cases += 1;
    }

    /// Counts one case into a class; `detail` is an error code, a level, or 0 where the name says it all.
    pub(crate) fn count(&mut self, class: &'static str, detail: u64) {
        *self.classes.entry((class, detail)).or_default() += 1;
    }

    pub(crate) fn count_if(&mut self, class: &'static str, seen: bool) {
        if seen {
            self.count(class, 0);
        }
    }

    /// Counts one case that was compared under a rule of the judge's own instead of by plain equality.
    pub(crate) fn exempt(&mut self, rule: &'static str) {
        *self.exemptions.entry(rule).or_default() += 1;
    }

    pub(crate) fn disagree(&mut self, describe: impl FnOnce() -> String) {
        self.disagreements += 1;
        if self.disagreements <= SHOWN {
            println!(
                "DISAGREEMENT {} (seed {:#x}, case {}): {}",
                self.disagreements,
                self.seed,
                self.cases,
                describe()
            );
        }
        if self.stop_at == Some(self.disagreements) {
            self.last_line();
            std::process::exit(1);
        }
    }

    fn last_line(&self) {
        let Judge { name, cases, disagreements, started, .. } = self;
        let seconds = started.elapsed().as_secs_f64();
        println!("judge {name}: {cases} cases, {disagreements} disagreements, {seconds:.1} s");
    }

    /// Prints the table and the last line. It fails on a disagreement, and on a class that had too few cases for its
    /// agreement to mean anything: `minima` names classes, summed over their details, or one detail alone.
    pub(crate) fn finish(self, minima: &[(&'static str, Option<u64>, u64)]) -> Result<(), Failed> {
        if !self.classes.is_empty() {
            println!("  {:<44} {:>10}", "class", "cases");
        }
        for ((class, detail), count) in &self.classes {
            println!("  {:<44} {count:>10}", label(class, Some(*detail)));
        }
        for (rule, count) in &self.exemptions {
            println!("  {:<44} {count:>10}", format!("by rule: {rule}"));
        }
        let mut starved = String::new();
        for &(class, detail, minimum) in minima {
            let minimum = minimum * self.cases.min(MINIMA_FOR) / MINIMA_FOR;
            let matching = self
                .classes
                .iter()
                .filter(|((name, with), _)| *name == class && detail.is_none_or(|it| it == *with));
            let seen: u64 = matching.map(|(_, count)| count).sum();
            if seen < minimum.max(1) {
                let _ = write!(starved, " {}: {seen} of at least {minimum};", label(class, detail));
            }
        }
        if !starved.is_empty() {
            println!("STARVED{starved}");
        }
        self.last_line();
        if self.disagreements > 0 {
            return Err(format!("{} disagreements", self.disagreements).into());
        }
        if !starved.is_empty() {
            return Err(format!("starved classes:{starved}").into());
        }
        Ok(())
    }
}

fn label(class: &str, detail: Option<u64>) -> String {
    match detail {
        Some(code) if class.ends_with("code") => format!("{class} {code:#04x}"),
        Some(detail) if detail != 0 || class.ends_with("CPL") => format!("{class} {detail}"),
        _ => class.to_owned(),
    }
}

/// How many cases to run where the environment does not say.
pub(crate) fn cases(default: u64) -> Result<u64, Failed> {
    Ok(number("PAGEWALK_JUDGE_CASES")?.unwrap_or(default))
}

pub(crate) fn full() -> bool {
    std::env::var("PAGEWALK_FULL").is_ok_and(|value| value == "1")
}

/// A bed that is not there: said aloud, and a failure where the environment requires it.
pub(crate) fn skipped(bed: &str, reason: &str) -> Result<(), Failed> {
    println!("\nSKIPPED {bed}: {reason}");
    let required = std::env::var("PAGEWALK_REQUIRE").unwrap_or_default();
    if required.split(',').any(|name| name.trim() == bed) {
        return Err(format!("PAGEWALK_REQUIRE names {bed}, and it is not usable: {reason}").into());
    }
    Ok(())
}

fn number(variable: &str) -> Result<Option<u64>, Failed> {
    let Ok(text) = std::env::var(variable) else { return Ok(None) };
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map(Some).map_err(|error| format!("{variable}={text}: {error}").into())
}
