//! Judge `mutants`: would the judges notice a wrong walker?
//!
//! Each mutant is the walker with one rule broken in its source, one for every slip that walkers are known for. It is
//! built in a scratch folder together with the judges, which run against it with few cases: a mutant that no judge
//! disagrees with is a disagreement here. The unmutated copy runs first and has to pass under the same counts.
//!
//! The kernel's walker on this backend has no 5-level, 32-bit or PAE paging, no PKRU and no second dimension. The mutants of
//! those are put before `properties`, `legacy_modes` and `access_checks`, whose tests say what the manual does, and before
//! `judge_oracle`. So are those of EPT, a few of them before `ept`, its worked examples.
//!
//! Each CPU works on a copy of its own. `PAGEWALK_MUTANTS=WORDS,WORDS` takes those mutants alone whose slip contains one of the texts.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "mutants/access_checks.rs"]
mod access_checks;
mod bed;
#[path = "mutants/ept.rs"]
mod ept;
#[path = "mutants/kernel.rs"]
mod kernel;
#[path = "mutants/keys.rs"]
mod keys;
#[path = "mutants/modes.rs"]
mod modes;
#[path = "mutants/npt.rs"]
mod npt;
#[path = "mutants/race.rs"]
mod race;
#[path = "mutants/second_dimension.rs"]
mod second_dimension;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bed::Machine;
use bed::judge::{Judge, skipped};
use libtest_mimic::{Arguments, Failed, Trial};

const CASES: &str = "10000";
/// The oracle's sheets are many, and some mutants show in a few tuples of one alone.
const ORACLE_CASES: &str = "100000";
const KERNEL: &[&str] = &["judge_translate", "judge_execution"];
const RULES: &[&str] = &["properties", "legacy_modes", "access_checks", "judge_oracle"];
const CHECKS: &[&str] = &["access_checks"];
const EPT: &[&str] = &["ept"];
const ORACLE: &[&str] = &["judge_oracle"];

struct Mutant {
    slip: &'static str,
    judges: &'static [&'static str],
    /// File, what occurs in it exactly once, and what is put in its place.
    changes: &'static [(&'static str, &'static str, &'static str)],
}

const fn mutant(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: KERNEL, changes }
}

/// One that no kernel here can see.
const fn unseen(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: ORACLE, changes }
}

const TABLES: &[&[Mutant]] = &[
    kernel::MUTANTS,
    modes::MUTANTS,
    keys::MUTANTS,
    access_checks::MUTANTS,
    npt::MUTANTS,
    ept::MUTANTS,
    second_dimension::MUTANTS,
    race::MUTANTS,
];

fn main() {
    let arguments = Arguments::from_args();
    let trials = vec![
        Trial::test("each_mutant_changes_the_walker_in_one_place", places),
        Trial::test("mutants_are_caught", || match Machine::new(bed::PAGE) {
            Ok(_) => judge(),
            Err(reason) => skipped("kvm", &reason),
        }),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// All mutants, or those that are asked for.
fn mutants() -> Result<Vec<&'static Mutant>, Failed> {
    let wanted = std::env::var("PAGEWALK_MUTANTS").unwrap_or_default();
    let wanted = |mutant: &&Mutant| wanted.split(',').any(|words| mutant.slip.contains(words));
    let mutants: Vec<_> = TABLES.iter().copied().flatten().filter(wanted).collect();
    if mutants.is_empty() { Err("PAGEWALK_MUTANTS: there is no such mutant".into()) } else { Ok(mutants) }
}

/// A rule that is written in another way now breaks its mutants: without a build, this says which.
fn places() -> Result<(), Failed> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = String::new();
    for mutant in mutants()? {
        for (file, from, _) in mutant.changes {
            let occurrences = fs::read_to_string(source.join(file))?.matches(from).count();
            if occurrences != 1 {
                wrong += &format!("\n\"{}\": {file} has {occurrences} of `{from}`", mutant.slip);
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("say how the rules are written now:{wrong}").into()) }
}

fn judge() -> Result<(), Failed> {
    let mut judge = Judge::new("mutants")?;
    let mutants = mutants()?;
    let verdicts = verdicts(&mutants, judge.seed())?;
    println!(
        "  {:<82} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "mutant", "kvm-translate", "kvm-execution", "properties", "legacy modes", "checks", "EPT", "oracle"
    );
    for (mutant, verdicts) in mutants.iter().zip(verdicts) {
        let column = |name: &str| {
            let at = mutant.judges.iter().position(|judge| *judge == name);
            at.map_or_else(|| "-".to_owned(), |at| verdicts[at].to_string())
        };
        println!(
            "  {:<82} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12} {:>12}",
            mutant.slip,
            column("judge_translate"),
            column("judge_execution"),
            column("properties"),
            column("legacy_modes"),
            column("access_checks"),
            column("ept"),
            column("judge_oracle")
        );
        judge.case();
        if !verdicts.iter().any(Verdict::caught) {
            judge.disagree(|| format!("nobody noticed: {}", mutant.slip));
        }
    }
    judge.finish(&[])
}

/// What each mutant's judges say, from one copy of the walker for each CPU. The walker itself has to pass first.
fn verdicts(mutants: &[&Mutant], seed: u64) -> Result<Vec<Vec<Verdict>>, Failed> {
    let all: Vec<_> = [KERNEL, RULES, EPT]
        .concat()
        .into_iter()
        .filter(|it| mutants.iter().any(|of| of.judges.contains(it)))
        .collect();
    let results: Vec<Mutex<Vec<Verdict>>> = mutants.iter().map(|_| Mutex::default()).collect();
    let next = AtomicUsize::new(0);
    let work = |number: usize| -> Result<(), Failed> {
        let copy = Copy::new(number)?;
        if number == 0 {
            let sound = copy.verdicts(&all, seed)?;
            if !sound.iter().all(|verdict| verdict.passed) {
                // The others need not go on.
                next.store(mutants.len(), Ordering::Relaxed);
                return Err(format!("the walker itself does not pass: {sound:?}").into());
            }
        }
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(mutant) = mutants.get(at) else { return Ok(()) };
            copy.mutate(mutant)?;
            *results[at].lock().unwrap() = copy.verdicts(mutant.judges, seed)?;
            copy.restore(mutant)?;
        }
    };
    let copies = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(8)).min(mutants.len());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..copies).map(|number| scope.spawn(move || work(number))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap())
    })?;
    Ok(results.into_iter().map(|verdicts| verdicts.into_inner().unwrap()).collect())
}

/// What one judge said of one walker.
#[derive(Debug)]
struct Verdict {
    passed: bool,
    /// From its last line, where it has one.
    disagreements: Option<u64>,
}

impl Verdict {
    /// A judge that fails for another reason than disagreement has noticed nothing.
    fn caught(&self) -> bool {
        self.disagreements.map_or(!self.passed, |count| count > 0)
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.disagreements {
            Some(count) => f.pad(&count.to_string()),
            None if self.passed => f.pad("passed"),
            None => f.pad("failed"),
        }
    }
}

/// The walker and its judges, in a workspace of their own.
struct Copy {
    root: PathBuf,
}

impl Copy {
    fn new(number: usize) -> Result<Copy, Failed> {
        let copy = Copy { root: Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutants-{number}")) };
        let walker = Path::new(env!("CARGO_MANIFEST_DIR"));
        for folder in ["src", "tests"] {
            let folder_in_copy = copy.root.join(folder);
            if folder_in_copy.exists() {
                fs::remove_dir_all(&folder_in_copy)?;
            }
        }
        for folder in ["src", "tests/bed", "tests/execution", "tests/oracle"] {
            copy_folder(&walker.join(folder), &copy.root.join(folder))?;
        }
        for judge in KERNEL.iter().chain(RULES).chain(EPT) {
            let file = format!("tests/{judge}.rs");
            fs::copy(walker.join(&file), copy.root.join(&file))?;
        }
        // Part of the walker's documentation.
        fs::copy(walker.join("RULES.md"), copy.root.join("RULES.md"))?;
        // The lock file has the versions.
        fs::copy(walker.join("../Cargo.lock"), copy.root.join("Cargo.lock"))?;
        fs::write(copy.root.join("Cargo.toml"), MANIFEST)?;
        Ok(copy)
    }

    fn mutate(&self, mutant: &Mutant) -> Result<(), Failed> {
        for (file, from, to) in mutant.changes {
            let path = self.root.join("src").join(file);
            let source = fs::read_to_string(&path)?;
            let occurrences = source.matches(from).count();
            if occurrences != 1 {
                return Err(format!(
                    "mutant \"{}\": {file} has {occurrences} of `{from}`; say in tests/mutants.rs how the rule is written now",
                    mutant.slip
                )
                .into());
            }
            fs::write(&path, source.replace(from, to))?;
        }
        Ok(())
    }

    fn restore(&self, mutant: &Mutant) -> Result<(), Failed> {
        for (file, ..) in mutant.changes {
            let original = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file))?;
            fs::write(self.root.join("src").join(file), original)?;
        }
        Ok(())
    }

    fn verdicts(&self, judges: &[&str], seed: u64) -> Result<Vec<Verdict>, Failed> {
        let cargo = |cases: &str, arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO"));
            command.args(["test", "--quiet", "--offline"]).args(arguments).current_dir(&self.root);
            command.env("CARGO_TARGET_DIR", self.root.join("target")).env_remove("PAGEWALK_FULL");
            command.env("PAGEWALK_JUDGE_CASES", cases).env("PAGEWALK_SEED", seed.to_string());
            command.output()
        };
        let tests: Vec<&str> = judges.iter().flat_map(|judge| ["--test", judge]).collect();
        let built = cargo(CASES, &[&tests[..], &["--no-run"]].concat())?;
        if !built.status.success() {
            return Err(format!("does not build: {}", String::from_utf8_lossy(&built.stderr)).into());
        }
        let verdict = |judge: &&str| {
            let cases = if ORACLE.contains(judge) { ORACLE_CASES } else { CASES };
            let run = cargo(cases, &["--test", judge])?;
            let output = String::from_utf8_lossy(&run.stdout);
            let last_line =
                output.lines().find_map(|line| line.strip_prefix("judge ")?.split_once(" cases, "));
            let disagreements = last_line.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            if disagreements.is_none() && KERNEL.contains(judge) {
                return Err(Failed::from(format!("{judge} came to no end:\n{output}")));
            }
            Ok(Verdict { passed: run.status.success(), disagreements })
        };
        judges.iter().map(verdict).collect()
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<(), Failed> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

const MANIFEST: &str = r#"
[workspace]

[package]
name = "pagewalk"
version = "0.0.0"
edition = "2024"

[dev-dependencies]
fastrand = "2"
kvm-bindings = { version = "0.14", features = ["fam-wrappers"] }
kvm-ioctls = "0.25"
libtest-mimic = "0.8"
vmm-sys-util = "0.15"
proptest = { version = "1", default-features = false, features = ["std"] }

[[test]]
name = "judge_execution"
harness = false

[[test]]
name = "judge_oracle"
harness = false

[[test]]
name = "judge_translate"
harness = false

[profile.dev]
debug = false
"#;
