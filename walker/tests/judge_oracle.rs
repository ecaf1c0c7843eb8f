//! Judge `oracle`: the walker against a second implementation that was written from the manuals and shares nothing with it.
//!
//! An odometer in the manner of kvm-unit-tests' `access.c`, in sheets ([`oracle::trial::sheets`] says what each turns and why
//! it leaves the rest alone), and random tables. For each case the complete outcome must be equal: every field of the
//! translation or of the fault, with policy `Observe` untraced and traced, and with `Set`; every step of the trace; and
//! memory after `Set`, which may have changed in the oracle's bits and nowhere else. After one in so many cases the guest changes
//! an entry between the walk and the setting of its bits, and the access has to come out as on the changed memory.
//!
//! A case is one access to one set of tables under one set of registers. The default is five million of them, spread over
//! each sheet; `PAGEWALK_FULL=1` turns every sheet through, six thousand million cases, in two to three hours.
//!
//! # What is the project's and not the manuals'
//! Here the oracle follows the walker's documentation, so agreement says that the walker does what it documents:
//! - which entry is blamed for a missing right, and which of several reasons is named;
//! - what an exempt access is: nothing refuses it but absence and reserved bits; its #PF would be a supervisor's, its NPF a
//!   user's, like all of those; its dirty bits are set, but for a shadow-stack write's;
//! - a shadow-stack access where CR4.CET is clear, which no CPU makes, is an ordinary one;
//! - a step's rights where an entry is absent (none) or has reserved bits (its own included), a step for a PDPTE register;
//! - a fault tells the GVA as it was asked for, even with bits above the 32 that count outside long mode;
//! - accessed and dirty bits after success only, and not in read-only memory;
//! - bits of an EPT violation's exit qualification that the manual leaves undefined are 0; where EPT lets a table be read only and a
//!   flag is to be set in it, the violation comes as soon as the entry is known to be used, and tells a read and a write;
//! - GMET as KVM reads the manual: U/S keeps nobody out, EXITINFO1 tells the CPL of a final access, and a fetch always;
//! - LAM masks the addresses of implicit accesses, which the manual does not except and which are canonical anyhow.
//!
//! # Not judged
//! - What `Set` leaves where a walk meets one word as an entry of four bytes and of eight, or as the guest's and as EPT's: the dirty
//!   bit of the one is another bit of the other, and the order in which a CPU notices is its own. Counted, as compared by rule.
//! - Memory that changes while it is walked, PDPTE registers with reserved bits (no CPU loads them), registers that no CPU accepts.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[allow(dead_code, reason = "this judge needs no bed")]
#[path = "bed/judge.rs"]
mod judge;
mod oracle;

use fastrand::Rng;
use judge::{Judge, cases, full};
use libtest_mimic::{Arguments, Failed, Trial};
use oracle::trial::answers;
use oracle::trial::classes::{MINIMA, MINIMA_FOR, classify};
use oracle::trial::ground::Ground;
use oracle::trial::odometer::{Odometer, Reading};
use oracle::trial::setup::Setup;
use oracle::trial::{race, sheets, soup};
use oracle::{Answer, Purpose, Request};
use pagewalk::{AdPolicy, Fault, Gva, NestedGpa, NestedPhase, NoTrace, Recorder, Trace, Translation};

fn main() {
    let arguments = Arguments::from_args();
    let examples = oracle::worked::EXAMPLES.iter().map(|&(name, example)| {
        Trial::test(format!("worked::{name}"), move || {
            example();
            Ok(())
        })
    });
    let trials = examples
        .chain([Trial::test("the_memory_types_agree", memory_types), Trial::test("the_oracle_agrees", run)])
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// EPT's type with each type that a PAT can select.
fn memory_types() -> Result<(), Failed> {
    use pagewalk::{EptMemoryType, MemoryType};
    let of_ept = [
        MemoryType::Uncacheable,
        MemoryType::WriteCombining,
        MemoryType::WriteThrough,
        MemoryType::WriteProtected,
        MemoryType::WriteBack,
    ];
    for memory_type in of_ept {
        for pat in of_ept.into_iter().chain([MemoryType::UncacheableMinus]) {
            for ignore_pat in [false, true] {
                let ours = EptMemoryType { memory_type, ignore_pat }.effective(pat);
                let [ept, pat, ours] = [memory_type, pat, ours].map(answers::ept_type);
                let oracle = oracle::memory_type::effective(ept, ignore_pat, pat);
                if ours != oracle {
                    return Err(
                        format!("EPT {ept}, PAT {pat}, IPAT {ignore_pat}: {ours}, oracle {oracle}").into()
                    );
                }
            }
        }
    }
    Ok(())
}

/// Cases of a default run.
const CASES: u64 = 5_000_000;
/// After one in so many cases, its access loses a race.
const RACES: u64 = 16;
/// One in so many cases of a default run is soup.
const SOUP: u64 = 5;

fn run() -> Result<(), Failed> {
    let wanted = cases(CASES)?;
    let mut bench = Bench::new(Judge::new("oracle")?);
    bench.odometer(wanted - wanted / SOUP);
    bench.soup(wanted.saturating_sub(bench.judge.cases()).max(wanted / SOUP));
    // A full run turns its sheets in other proportions, but no sheet less than a default run does.
    let cases = bench.judge.cases().min(CASES);
    let minima: Vec<_> = MINIMA
        .iter()
        .flat_map(|&(class, details, count)| details.iter().map(move |&detail| (class, Some(detail), count)))
        .map(|(class, detail, count)| (class, detail, count * (cases / MINIMA_FOR).max(1)))
        // Of few cases a rare class may rightly have next to none.
        .filter(|(_, _, count)| count * cases / MINIMA_FOR >= 20)
        .collect();
    bench.judge.finish(&minima)
}

struct Bench {
    judge: Judge,
    ground: Ground,
    rng: Rng,
    trace: Trace,
}

impl Bench {
    fn new(judge: Judge) -> Bench {
        let rng = Rng::with_seed(judge.seed());
        Bench { judge, ground: Ground::new(), rng, trace: Trace::new() }
    }

    fn odometer(&mut self, wanted: u64) {
        let sheets = sheets::all(&mut self.rng);
        let shares: u64 = sheets.iter().map(|sheet| sheet.share).sum();
        let tuples: u64 = sheets.iter().map(|sheet| sheet.wheels.iter().product::<u64>()).sum();
        println!("  {} sheets of {tuples} tuples in all", sheets.len());
        let mut reading = Reading::default();
        for sheet in &sheets {
            let odometer = Odometer::new(&sheet.wheels, self.rng.u64(..));
            let turns = if full() { odometer.tuples() } else { wanted * sheet.share / shares };
            for turn in 0..turns.min(odometer.tuples()) {
                odometer.read(turn, &mut reading);
                let (number, request) =
                    (sheet.lay)(&mut reading, &sheet.setups, &mut self.ground, &mut self.rng);
                self.judge.count(sheet.name, 0);
                self.put(&sheet.setups[number], request);
                self.ground.clear();
            }
        }
    }

    fn soup(&mut self, wanted: u64) {
        for _ in 0..64 {
            soup::stir(&self.ground, &mut self.rng);
        }
        let mut setup = soup::setup(&mut self.rng);
        for n in 0..wanted {
            if n % 16 == 0 {
                setup = soup::setup(&mut self.rng);
            }
            if n % 512 == 0 {
                soup::stir(&self.ground, &mut self.rng);
            }
            let request = soup::request(&mut self.rng, &setup);
            self.judge.count("soup", 0);
            if setup.system.second.is_some() && n % 4 == 0 {
                self.put_nested(&setup, request);
            } else {
                self.put(&setup, request);
            }
        }
    }

    fn put(&mut self, setup: &Setup, request: Request) {
        let Bench { judge, ground, trace, .. } = self;
        judge.case();
        let answer = oracle::translate(&setup.system, ground, request);
        let access = answers::access(&request);
        let gva = Gva(request.linear);
        let walker = &setup.walker;

        let untraced = walker.translate(ground, gva, &access);
        let observed = walker.translate_with(ground, gva, &access, AdPolicy::Observe, trace);
        let steps = trace.steps().to_vec();
        let touched = ground.settle(&[]);
        let set = walker.translate_with(ground, gva, &access, AdPolicy::Set, &mut NoTrace);
        let settled = ground.settle(&answer.written);

        let expected = Some(answer.outcome);
        let skipped = |of: &Result<Translation, Fault>| of.as_ref().is_ok_and(Translation::ad_skipped);
        let differs = [
            ("the untraced outcome", answers::outcome(&untraced) != expected || skipped(&untraced)),
            ("the traced outcome", observed != untraced),
            ("the steps", !answers::same_steps(&steps, &answer.visits)),
            ("memory after Observe", touched.is_err()),
            ("the outcome of Set", answers::outcome(&set) != expected && !answer.overlap),
            ("the entries that Set skipped", skipped(&set) != answer.skipped && !answer.overlap),
            ("memory after Set", settled.is_err() && !answer.overlap),
        ];
        if answer.overlap {
            judge.exempt("Set where entries of different formats overlap");
        }
        let differing: Vec<_> = differs.iter().filter(|(_, it)| *it).map(|(what, _)| *what).collect();
        if !differing.is_empty() {
            judge.disagree(|| {
                format!(
                    "in {differing:?}\n  {request:x?}\n  {:x?}\n  oracle   {:x?}\n  untraced {untraced:x?}\n  traced   \
                     {observed:x?}\n  Set      {set:x?}\n  oracle's visits {:x?}\n  walker's steps  {steps:x?}\n  \
                     oracle writes {:x?}, skips {}\n  walker wrote {touched:x?} {settled:x?}",
                    setup.system, answer.outcome, answer.visits, answer.written, answer.skipped
                )
            });
        }
        classify(judge, setup, &request, &answer);
        if judge.cases() % RACES == 0 && !answer.overlap {
            self.put_race(setup, request, &answer);
        }
    }

    /// The same access again, while the guest changes an entry.
    fn put_race(&mut self, setup: &Setup, request: Request, answer: &Answer) {
        let Bench { judge, ground, rng, .. } = self;
        let Some(race) = race::lose(setup, ground, request, answer, rng) else { return };
        judge.case();
        judge.count(if race.allowed { "lost race, then allowed" } else { "lost race, then refused" }, 0);
        if !race.agrees {
            judge.disagree(|| {
                format!(
                    "in a race for {:x?}\n  {request:x?}\n  {:x?}\n  oracle {:x?}, writes {:x?}\n  Set    {:x?}",
                    race.changed, setup.system, race.answer.outcome, race.answer.written, race.outcome
                )
            });
        }
    }

    /// The second dimension alone.
    fn put_nested(&mut self, setup: &Setup, request: Request) {
        let Bench { judge, ground, trace, rng } = self;
        judge.case();
        let (purpose, phase) = [
            (Purpose::Table, NestedPhase::Table),
            (Purpose::PdpteRegister, NestedPhase::Pdpte),
            (Purpose::Final, NestedPhase::Final),
        ][rng.usize(..3)];
        let answer = oracle::translate_nested(&setup.system, ground, request, purpose);
        let second = setup.walker.ngpa_walk().unwrap();
        let access = answers::access(&request);
        trace.clear();
        let outcome = second.translate(ground, NestedGpa(request.linear), &access, phase, trace);
        let agree = answers::outcome(&outcome) == Some(answer.outcome)
            && answers::same_steps(trace.steps(), &answer.visits)
            && ground.settle(&[]).is_ok();
        if !agree {
            judge.disagree(|| {
                format!(
                    "for {purpose:?}\n  {request:x?}\n  {:x?}\n  oracle {:x?}\n  walker {outcome:x?}\n  oracle's visits \
                     {:x?}\n  walker's steps  {:x?}",
                    setup.system,
                    answer.outcome,
                    answer.visits,
                    trace.steps()
                )
            });
        }
        judge.count("second dimension alone", 0);
        classify(judge, setup, &request, &answer);
    }
}
