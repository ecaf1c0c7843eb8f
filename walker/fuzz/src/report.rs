//! The last word of a run in the judges' form: cases, disagreements, seconds; and what the cases came to.
//!
//! libFuzzer ends the process itself, so the word is said as it exits. A panic is the one disagreement that there can be: the
//! driver keeps its input and stops.

use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What is known of this run.
pub struct Report {
    name: &'static str,
    classes: &'static [&'static str],
    /// Cases by class, which make the reader judge whether the hard ones were met.
    pub counts: Vec<u64>,
    /// Inputs so far.
    pub cases: u64,
    started: Instant,
    /// Inputs after which every class must have been met [`MINIMUM`] times.
    enough: u64,
}

/// Outlives all thread-local values, which are gone when the process exits.
static REPORT: Mutex<Option<Report>> = Mutex::new(None);

fn report() -> MutexGuard<'static, Option<Report>> {
    REPORT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often every class must have been met.
const MINIMUM: u64 = 100;

/// Opens the report of this process; it is printed when it exits, and when it panics.
/// After `enough` inputs, every class must have been met.
pub fn begin(name: &'static str, classes: &'static [&'static str], enough: u64) {
    let counts = vec![0; classes.len()];
    *report() = Some(Report { name, classes, counts, cases: 0, started: Instant::now(), enough });
    extern "C" fn at_exit() {
        if !report().as_ref().is_none_or(|report| report.print(0)) {
            // SAFETY: has no preconditions; everything was printed.
            unsafe { libc::_exit(1) };
        }
    }
    // SAFETY: the function takes and returns nothing, and does not unwind.
    unsafe { libc::atexit(at_exit) };
    let driver = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // No lock is held while a case runs.
        if let Some(report) = report().as_ref() {
            report.print(1);
        }
        driver(panic);
    }));
}

/// Runs one case against the counts.
///
/// # Panics
/// Before [`begin`].
pub fn case(check: impl FnOnce(&mut [u64])) {
    let mut counts = {
        let mut report = report();
        let report = report.as_mut().expect("begun before the first case");
        report.cases += 1;
        std::mem::take(&mut report.counts)
    };
    check(&mut counts);
    if let Some(report) = report().as_mut() {
        report.counts = counts;
    }
}

impl Report {
    /// Prints the report; false if some class was met too rarely.
    fn print(&self, disagreements: u32) -> bool {
        for (class, count) in self.classes.iter().zip(&self.counts) {
            println!("  {class:<52} {count:>12}");
        }
        let rare = |count: &u64| self.cases >= self.enough && *count < MINIMUM;
        let starved: Vec<_> = self
            .classes
            .iter()
            .zip(&self.counts)
            .filter(|(_, count)| rare(count))
            .map(|(class, _)| class)
            .collect();
        if !starved.is_empty() {
            println!("STARVED: fewer than {MINIMUM} each of {starved:?}");
        }
        let seconds = self.started.elapsed().as_secs_f64();
        println!("judge {}: {} cases, {disagreements} disagreements, {seconds:.1} s", self.name, self.cases);
        let _ = std::io::stdout().flush();
        starved.is_empty()
    }
}
