//! Judge `mutants`: would the judges notice a wrong walker?
//!
//! Each mutant is the walker with one rule broken in its source, one for every slip that walkers are known for. It is
//! built in a scratch folder together with the judges, which run against it with few cases: a mutant that no judge
//! disagrees with is a disagreement here. The unmutated copy runs first and has to pass under the same counts. A judge ends at its
//! twentieth disagreement: the table tells no more.
//!
//! The kernel's walker on this backend has no 5-level, 32-bit or PAE paging, no PKRU and no second dimension. The mutants of
//! those are put before `properties`, `legacy_modes` and `access_checks`, whose tests say what the manual does, and before
//! `judge_oracle`. So are those of EPT, a few of them before `ept`, its worked examples. Batches and maps are put before the
//! single walk, which the other judges have judged: by `batch` and `map`.
//!
//! What an L1 sees of its L2 under EPT is put before kvm_intel, in its bed: these mutants are built for it one by one, and run
//! one after the other in one guest. Without that bed they are skipped.
//!
//! Each CPU works on a copy of its own. `PAGEWALK_MUTANTS=WORDS,WORDS` takes those mutants alone whose slip contains one of the texts.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "mutants/access_checks.rs"]
mod access_checks;
#[path = "mutants/batch.rs"]
mod batch;
mod bed;
#[path = "mutants/ept.rs"]
mod ept;
#[path = "mutants/exits.rs"]
mod exits;
#[path = "mutants/kernel.rs"]
mod kernel;
#[path = "mutants/keys.rs"]
mod keys;
#[path = "mutants/map.rs"]
mod map;
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
use bed::boot::STATIC_TARGET;
use bed::judge::{Judge, skipped};
use libtest_mimic::{Arguments, Failed, Trial};

const CASES: &str = "10000";
/// The oracle's sheets are many, and some mutants show in a few tuples of one alone.
const ORACLE_CASES: &str = "100000";
const KERNEL: &[&str] = &["judge_translate", "judge_execution"];
const RULES: &[&str] = &["properties", "legacy_modes", "access_checks", "judge_oracle"];
const CHECKS: &[&str] = &["access_checks"];
const EPT: &[&str] = &["ept"];
const BATCH: &[&str] = &["batch"];
const MAP: &[&str] = &["map"];
const ORACLE: &[&str] = &["judge_oracle"];
/// Runs in a guest.
const KVM_INTEL: &[&str] = &["judge_nested_intel"];
const BED: &str = "nested-intel";
/// Disagreements after which a judge has seen enough.
const STOP_AT: &str = "20";

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

impl Mutant {
    fn is_for_a_bed(&self) -> bool {
        self.judges == KVM_INTEL
    }
}

const TABLES: &[&[Mutant]] = &[
    kernel::MUTANTS,
    modes::MUTANTS,
    keys::MUTANTS,
    access_checks::MUTANTS,
    npt::MUTANTS,
    ept::MUTANTS,
    second_dimension::MUTANTS,
    exits::MUTANTS,
    race::MUTANTS,
    batch::MUTANTS,
    map::MUTANTS,
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

/// A mutant's row of the table.
fn print(mutant: &Mutant, verdicts: &[Verdict]) {
    let columns = COLUMNS.map(|(name, _)| {
        let at = mutant.judges.iter().position(|judge| *judge == name);
        format!(" {:>13}", at.map_or_else(|| "-".to_owned(), |at| verdicts[at].to_string()))
    });
    println!("  {:<82}{}", mutant.slip, columns.concat());
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

/// The table: a judge, and what it is called there.
const COLUMNS: [(&str, &str); 10] = [
    ("judge_translate", "kvm-translate"),
    ("judge_execution", "kvm-execution"),
    ("properties", "properties"),
    ("legacy_modes", "legacy modes"),
    ("access_checks", "checks"),
    ("ept", "EPT"),
    ("batch", "batch"),
    ("map", "map"),
    ("judge_oracle", "oracle"),
    ("judge_nested_intel", "kvm_intel"),
];

fn judge() -> Result<(), Failed> {
    let mut judge = Judge::new("mutants")?;
    let mutants = mutants()?;
    let mutants: Vec<_> = match bed::boot::check(BED)? {
        Ok(()) => mutants,
        Err(reason) => {
            if mutants.iter().any(|mutant| mutant.is_for_a_bed()) {
                skipped(BED, &reason)?;
            }
            mutants.into_iter().filter(|mutant| !mutant.is_for_a_bed()).collect()
        }
    };
    let titles = COLUMNS.map(|(_, title)| format!(" {title:>13}"));
    println!("  {:<82}{}", "mutant", titles.concat());
    for (mutant, verdicts) in mutants.iter().zip(verdicts(&mutants, judge.seed())?) {
        judge.case();
        if !verdicts.iter().any(Verdict::caught) {
            judge.disagree(|| format!("nobody noticed: {}", mutant.slip));
        }
    }
    judge.finish(&[])
}

/// What each mutant's judges say, from one copy of the walker for each CPU. The walker itself has to pass first.
fn verdicts(mutants: &[&Mutant], seed: u64) -> Result<Vec<Vec<Verdict>>, Failed> {
    let all: Vec<_> = [KERNEL, RULES, EPT, BATCH, MAP]
        .concat()
        .into_iter()
        .filter(|it| mutants.iter().any(|of| of.judges.contains(it)))
        .collect();
    let results: Vec<Mutex<Vec<Verdict>>> = mutants.iter().map(|_| Mutex::default()).collect();
    let next = AtomicUsize::new(0);
    let work = |number: usize| -> Result<(), Failed> {
        let copy = Copy::new(number)?;
        if number == 0 && !all.is_empty() {
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
            if mutant.is_for_a_bed() {
                fs::copy(copy.build_for_bed()?, program(at))?;
            } else {
                let verdicts = copy.verdicts(mutant.judges, seed)?;
                print(mutant, &verdicts);
                *results[at].lock().unwrap() = verdicts;
            }
            copy.restore(mutant)?;
        }
    };
    let copies = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(8)).min(mutants.len());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..copies).map(|number| scope.spawn(move || work(number))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap())
    })?;
    let for_bed: Vec<usize> = (0..mutants.len()).filter(|at| mutants[*at].is_for_a_bed()).collect();
    for (at, verdict) in for_bed.iter().zip(in_bed(&for_bed, seed)?) {
        print(mutants[*at], std::slice::from_ref(&verdict));
        results[*at].lock().unwrap().push(verdict);
    }
    Ok(results.into_iter().map(|verdicts| verdicts.into_inner().unwrap()).collect())
}

/// Where a mutant's program for the bed is kept until all of them are built.
fn program(at: usize) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutant-{at}"))
}

/// What kvm_intel says of these mutants, in one guest.
fn in_bed(mutants: &[usize], seed: u64) -> Result<Vec<Verdict>, Failed> {
    if mutants.is_empty() {
        return Ok(Vec::new());
    }
    let programs: Vec<_> = mutants.iter().map(|at| program(*at)).collect();
    let run = Command::new(bed::boot::script(BED))
        .arg("run-each")
        .args(&programs)
        .env("PAGEWALK_KVM_INTEL", "nested=1 ept=1")
        .env("PAGEWALK_ONLY", "vmentry")
        .env("PAGEWALK_JUDGE_CASES", "2000")
        .env("PAGEWALK_SEED", seed.to_string())
        .env("PAGEWALK_STOP_AT", "1")
        .output()?;
    programs.iter().try_for_each(fs::remove_file)?;
    let output = String::from_utf8_lossy(&run.stdout);
    // Each program's words end in its exit code.
    let end = format!("{BED}: program ended with ");
    let said: Vec<&str> = output.split(&end).collect();
    if said.len() != programs.len() + 1 {
        return Err(
            format!("{} programs, {} ends in the bed:\n{output}", programs.len(), said.len() - 1).into()
        );
    }
    // The last of its judges: the one that it stopped in.
    Ok(said[..programs.len()].iter().map(|said| Verdict::of(said, false)).collect())
}

/// What one judge said of one walker.
#[derive(Debug)]
struct Verdict {
    passed: bool,
    /// From its last line, where it has one.
    disagreements: Option<u64>,
}

impl Verdict {
    /// From what a program said: the last word of its last judge.
    fn of(output: &str, passed: bool) -> Verdict {
        let last_line =
            output.lines().rev().find_map(|line| line.strip_prefix("judge ")?.split_once(" cases, "));
        let disagreements = last_line.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        Verdict { passed, disagreements }
    }

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
        for folder in ["src", "tests", "fuzz"] {
            let folder_in_copy = copy.root.join(folder);
            if folder_in_copy.exists() {
                fs::remove_dir_all(&folder_in_copy)?;
            }
        }
        for folder in ["src", "fuzz/src", "tests/bed", "tests/execution", "tests/nested", "tests/oracle"] {
            copy_folder(&walker.join(folder), &copy.root.join(folder))?;
        }
        for judge in KERNEL.iter().chain(RULES).chain(EPT).chain(BATCH).chain(MAP).chain(KVM_INTEL) {
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
        let programs = self.build(judges, &[], None)?;
        let verdict = |(judge, program): (&&str, PathBuf)| {
            let cases = if ORACLE.contains(judge) { ORACLE_CASES } else { CASES };
            let run = Command::new(program)
                .current_dir(&self.root)
                .env_remove("PAGEWALK_FULL")
                .env("PAGEWALK_JUDGE_CASES", cases)
                .env("PAGEWALK_SEED", seed.to_string())
                .env("PAGEWALK_STOP_AT", STOP_AT)
                .output()?;
            let output = String::from_utf8_lossy(&run.stdout);
            let verdict = Verdict::of(&output, run.status.success());
            if verdict.disagreements.is_none() && KERNEL.contains(judge) {
                return Err(Failed::from(format!("{judge} came to no end:\n{output}")));
            }
            Ok(verdict)
        };
        judges.iter().zip(programs).map(verdict).collect()
    }

    /// The judge of the bed, linked statically.
    fn build_for_bed(&self) -> Result<PathBuf, Failed> {
        let flags = "-C target-feature=+crt-static -C strip=symbols -C opt-level=1";
        let programs = self.build(KVM_INTEL, &["--target", STATIC_TARGET], Some(flags))?;
        programs.into_iter().next().ok_or_else(|| "no program was built".into())
    }

    /// Builds tests, and says where they are, in this order.
    fn build(&self, tests: &[&str], arguments: &[&str], flags: Option<&str>) -> Result<Vec<PathBuf>, Failed> {
        let mut command = Command::new(env!("CARGO"));
        command.args([
            "test",
            "--quiet",
            "--offline",
            "--no-run",
            "--message-format",
            "json-render-diagnostics",
        ]);
        command.args(arguments).args(tests.iter().flat_map(|test| ["--test", test]));
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", self.root.join("target"));
        if let Some(flags) = flags {
            command.env(bed::boot::static_flags(), flags);
        }
        let built = command.output()?;
        if !built.status.success() {
            return Err(format!("does not build: {}", String::from_utf8_lossy(&built.stderr)).into());
        }
        let messages = String::from_utf8_lossy(&built.stdout);
        let programs: Vec<PathBuf> = messages.lines().filter_map(bed::boot::executable).collect();
        let program = |test: &&str| {
            let prefix = format!("{test}-");
            let is_it = |it: &&PathBuf| {
                it.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            };
            let found = programs.iter().find(is_it).cloned();
            found.ok_or_else(|| Failed::from(format!("cargo names no executable of {test}")))
        };
        tests.iter().map(program).collect()
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

[dependencies]
cpufeatures = "0.3"

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
name = "judge_nested_intel"
harness = false

[[test]]
name = "judge_oracle"
harness = false

[[test]]
name = "judge_translate"
harness = false

# Little of a mutant is compiled anew, and most of the time goes into running its judges.
[profile.dev]
debug = false
opt-level = 1
"#;
