//! Judge `mutants`: would the judges notice a wrong walker?
//!
//! Each mutant is the walker with one rule broken in its source, one for every slip that walkers are known for. It is
//! built in a scratch folder together with the judges, which run against it with few cases: a mutant that no judge
//! disagrees with is a disagreement here. The unmutated copy runs first and has to pass under the same counts.
//!
//! The kernel's walker on this backend has no 5-level, 32-bit or PAE paging, no PKRU and no second dimension. The mutants of
//! those are put before `properties`, `legacy_modes` and `access_checks`, whose tests say what the manual does, and before
//! `judge_oracle`.
//!
//! `PAGEWALK_MUTANTS=WORDS,WORDS` takes those mutants alone whose slip contains one of the texts.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "mutants/access_checks.rs"]
mod access_checks;
mod bed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bed::Machine;
use bed::judge::{Judge, skipped};
use libtest_mimic::{Arguments, Failed, Trial};

const CASES: &str = "10000";
const KERNEL: &[&str] = &["judge_translate", "judge_execution"];
const RULES: &[&str] = &["properties", "legacy_modes", "access_checks", "judge_oracle"];
const CHECKS: &[&str] = &["access_checks"];
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

const MUTANTS: &[Mutant] = &[
    mutant(
        "rights of the levels are OR-ed",
        &[
            (
                "entry.rs",
                "const ALL: Self = Self { withheld: 0 };",
                "const ALL: Self = Self { withheld: u64::MAX };",
            ),
            (
                "entry.rs",
                "Self { withheld: self.withheld | entry ^ LongMode::GRANTING }",
                "Self { withheld: self.withheld & (entry ^ LongMode::GRANTING) }",
            ),
        ],
    ),
    mutant(
        "only the leaf's rights count",
        &[(
            "entry.rs",
            "Self { withheld: self.withheld | entry ^ LongMode::GRANTING }",
            "Self { withheld: entry ^ LongMode::GRANTING }",
        )],
    ),
    mutant(
        "a table entry has no reserved bits",
        &[("reserved.rs", "table: [everywhere, everywhere, everywhere, top, top, 0, 0, 0]", "table: [0; 8]")],
    ),
    mutant(
        "a 4 KiB leaf has no reserved bits",
        &[(
            "reserved.rs",
            "leaf: [everywhere, everywhere | bits(13, 20)",
            "leaf: [0, everywhere | bits(13, 20)",
        )],
    ),
    mutant(
        "a large frame may be misaligned",
        &[("reserved.rs", "leaf: [everywhere, everywhere | bits(13, 20)", "leaf: [everywhere, everywhere")],
    ),
    mutant(
        "address bits above MAXPHYADDR are free",
        &[("reserved.rs", "let everywhere = cpu.address_reserved(51) |", "let everywhere =")],
    ),
    mutant(
        "bit 8 of an AMD PML4E is free",
        &[("reserved.rs", "Vendor::Amd => LongMode::GLOBAL,", "Vendor::Amd => 0,")],
    ),
    mutant(
        "bit 8 of an Intel PML4E is reserved",
        &[("reserved.rs", "Vendor::Intel => 0,", "Vendor::Intel => LongMode::GLOBAL,")],
    ),
    mutant(
        "bit 7 of a PML4E ends the walk",
        &[("reserved.rs", "let no_leaf = top | LongMode::PAGE_SIZE;", "let no_leaf = top;")],
    ),
    mutant(
        "bit 7 of a PDPTE ends the walk without 1 GiB pages",
        &[("reserved.rs", "if cpu.gib_pages {", "if true {")],
    ),
    mutant(
        "bit 7 of a PDE is ignored",
        &[("entry.rs", "let leaf = level == 1 ||", "let leaf = level == 1 || level > 2 &&")],
    ),
    mutant(
        "the offset into a large page is cut to 12 bits",
        &[("descent.rs", "let within = (1 << shift) - 1;", "let within = 0xfff;")],
    ),
    mutant(
        "NX is reserved although it is enabled",
        &[("reserved.rs", "if nxe { 0 } else { 1 << 63 }", "if nxe { 1 << 63 } else { 1 << 63 }")],
    ),
    mutant(
        "NX is free although it is not enabled",
        &[("reserved.rs", "if nxe { 0 } else { 1 << 63 }", "if nxe { 0 } else { 0 }")],
    ),
    mutant("NX is ignored", &[("permission.rs", "!rights.execute() ||", "")]),
    mutant(
        "an absent entry is searched for reserved bits",
        &[(
            "entry.rs",
            "if entry & E::PRESENT == 0 {",
            "if entry & E::PRESENT == 0 && entry & format.reserved_table_at(level) == 0 {",
        )],
    ),
    mutant(
        "CR0.WP is taken to be set",
        &[("format.rs", "write_protect: registers.cr0 & CR0_WP != 0,", "write_protect: true,")],
    ),
    mutant(
        "CR0.WP is taken to be clear",
        &[("format.rs", "write_protect: registers.cr0 & CR0_WP != 0,", "write_protect: false,")],
    ),
    mutant(
        "U/S is ignored",
        &[(
            "permission.rs",
            "if user_access && !rights.user() && !self.supervisor_pages_open {",
            "if false {",
        )],
    ),
    mutant("SMEP is ignored", &[("format.rs", "smep: registers.cr4 & CR4_SMEP != 0,", "smep: false,")]),
    mutant("SMAP is ignored", &[("format.rs", "smap: registers.cr4 & CR4_SMAP != 0,", "smap: false,")]),
    mutant("SMAP ignores AC", &[("permission.rs", "&& index & SMAP_SUSPENDED == 0", "")]),
    mutant(
        "AC helps an implicit supervisor access",
        &[(
            "access.rs",
            "let suspends_smap = ac as u8 & !(self.privilege as u8) & 1;",
            "let suspends_smap = ac as u8;",
        )],
    ),
    mutant(
        "the error code always tells a fetch",
        &[(
            "format.rs",
            "fetch_reported: (nxe && mode != PagingMode::TwoLevel) || smep,",
            "fetch_reported: true,",
        )],
    ),
    mutant(
        "the error code tells a fetch under NXE only",
        &[(
            "format.rs",
            "fetch_reported: (nxe && mode != PagingMode::TwoLevel) || smep,",
            "fetch_reported: nxe,",
        )],
    ),
    mutant(
        "RSVD without P",
        &[(
            "fault.rs",
            "Reason::ReservedBits => PFEC_PRESENT | PFEC_RESERVED,",
            "Reason::ReservedBits => PFEC_RESERVED,",
        )],
    ),
    mutant(
        "CR2 is cut to the page",
        &[(
            "fault.rs",
            "self.into_fault(kind, Dimension::Guest, gva)",
            "self.into_fault(kind, Dimension::Guest, gva & !0xfff)",
        )],
    ),
    mutant(
        "addresses are not tested for being canonical",
        &[("walk.rs", "if format.mode().is_long() && !is_canonical", "if false && !is_canonical")],
    ),
    mutant(
        "a non-canonical stack access is #GP",
        &[("fault.rs", "Reason::NonCanonical if access.is_stack() => FaultKind::StackFault,", "")],
    ),
    mutant(
        "reads set the dirty bit",
        &[(
            "descent.rs",
            "verdict == Verdict::Leaf && purpose.access.is_write() &&",
            "verdict == Verdict::Leaf &&",
        )],
    ),
    mutant(
        "writes set the dirty bit above the leaf",
        &[(
            "descent.rs",
            "verdict == Verdict::Leaf && purpose.access.is_write() &&",
            "purpose.access.is_write() &&",
        )],
    ),
    mutant("the accessed bit is not set", &[("entry.rs", "Self::ACCESSED | if dirties", "if dirties")]),
    mutant(
        "a walk that faults sets accessed bits",
        &[(
            "walker.rs",
            "let translation = self.observe(memory, gva, access, trace)?;",
            "let outcome = self.observe(memory, gva, access, trace);
             if outcome.is_err() { let _ = commit(memory, trace.steps()); }
             let translation = outcome?;",
        )],
    ),
    Mutant {
        slip: "5-level addresses are canonical in 48 bits",
        judges: RULES,
        changes: &[("walk.rs", "is_canonical(masked, format.linear_width())", "is_canonical(masked, 48)")],
    },
    Mutant {
        slip: "LA57 is walked as four levels",
        judges: RULES,
        changes: &[("format.rs", "PagingMode::FiveLevel => (5,", "PagingMode::FiveLevel => (4,")],
    },
    Mutant {
        slip: "the PAE root is cut to 4 KiB",
        judges: RULES,
        changes: &[("walk.rs", "(bits(32, 63), !0x1f)", "(bits(32, 63), !0xfff)")],
    },
    Mutant {
        slip: "PAE 2 MiB frames are cut to 32 bits",
        judges: RULES,
        changes: &[(
            "entry.rs",
            "LongMode::page(level, entry)\n    }\n\n    fn sets(",
            "LongMode::page(level, entry) & 0xffff_ffff\n    }\n\n    fn sets(",
        )],
    },
    Mutant {
        slip: "a PDPTE's bits are taken for rights",
        judges: RULES,
        changes: &[("entry.rs", "if level == PDPTE { grants }", "if false { grants }")],
    },
    Mutant {
        slip: "a walk sets a PDPTE's accessed bit",
        judges: RULES,
        changes: &[("entry.rs", "if level == PDPTE { 0 }", "if false { 0 }")],
    },
    Mutant {
        slip: "PSE is honoured although CR4.PSE is clear",
        judges: RULES,
        changes: &[("format.rs", "let pse = mode != PagingMode::TwoLevel ||", "let pse = true ||")],
    },
    Mutant {
        slip: "PSE-36 is not known",
        judges: RULES,
        changes: &[("entry.rs", "(entry & 0x001f_e000) << 19", "0")],
    },
    Mutant {
        slip: "EFER.NXE reports fetches in 32-bit paging",
        judges: RULES,
        changes: &[("format.rs", "(nxe && mode != PagingMode::TwoLevel) || smep", "nxe || smep")],
    },
    unseen("PKRU is ignored", &[("permission.rs", "& decides) as u8", "& decides & 0) as u8")]),
    unseen(
        "keys guard supervisor pages",
        &[("permission.rs", "else { self.supervisor_keys };", "else { self.user_keys };")],
    ),
    unseen(
        "keys guard instruction fetches",
        &[("permission.rs", "if keys && index & FETCH == 0 {", "if keys {")],
    ),
    unseen(
        "a key's write-disable binds supervisors without CR0.WP",
        &[(
            "permission.rs",
            "index & WRITE != 0 && (user_write || self.write_protect)",
            "index & WRITE != 0 && (true || user_write)",
        )],
    ),
    unseen(
        "a key is reported only where it alone refuses",
        &[("fault.rs", "if self.key {", "if self.key && matches!(self.reason, Reason::ProtectionKey) {")],
    ),
    unseen(
        "the entry nearest to the root is blamed",
        &[("descent.rs", "(from..=format.levels()).find(", "(from..=format.levels()).rev().find(")],
    ),
    unseen(
        "an absent entry grants rights",
        &[("descent.rs", "entry, Rights::NONE, Verdict::NotPresent", "entry, rights, Verdict::NotPresent")],
    ),
    unseen(
        "a guest's table is read, not written, in the nested walk",
        &[(
            "npt.rs",
            "if table { AccessKind::Write } else { access.kind() }",
            "if table { AccessKind::Read } else { access.kind() }",
        )],
    ),
    unseen(
        "the phase does not decide how the second dimension alone is walked",
        &[("npt.rs", "if table { AccessKind::Write } else { access.kind() }", "access.kind()")],
    ),
    unseen(
        "EXITINFO1 takes guest tables for final addresses",
        &[("npt.rs", "if table { EXIT_INFO_1_TABLE }", "if table { EXIT_INFO_1_FINAL }")],
    ),
    unseen(
        "an nGPA's bits above the width are dropped",
        &[("npt.rs", "if ngpa.0 >> (format.linear_width() & 63) != 0 {", "if false {")],
    ),
    unseen(
        "the second dimension's rights do not count in the answer",
        &[("walk.rs", "rights: nested.rights,", "rights: page.rights,")],
    ),
    unseen(
        "a guest's table is read by the supervisor in the nested walk",
        &[("npt.rs", "_ => Privilege::User,", "_ => Privilege::Supervisor,")],
    ),
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
    let mutants: Vec<_> = MUTANTS.iter().chain(access_checks::MUTANTS).filter(wanted).collect();
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
    let copy = Copy::new()?;
    let seed = judge.seed();
    let mutants = mutants()?;
    let all: Vec<_> = [KERNEL, RULES]
        .concat()
        .into_iter()
        .filter(|it| mutants.iter().any(|of| of.judges.contains(it)))
        .collect();
    let verdicts = copy.verdicts(&all, seed)?;
    if !verdicts.iter().all(|verdict| verdict.passed) {
        return Err(format!("the walker itself does not pass: {verdicts:?}").into());
    }
    println!(
        "  {:<82} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12}",
        "mutant", "kvm-translate", "kvm-execution", "properties", "legacy modes", "checks", "oracle"
    );
    for mutant in mutants {
        copy.mutate(mutant)?;
        let verdicts = copy.verdicts(mutant.judges, seed)?;
        copy.restore(mutant)?;
        let column = |name: &str| {
            let at = mutant.judges.iter().position(|judge| *judge == name);
            at.map_or_else(|| "-".to_owned(), |at| verdicts[at].to_string())
        };
        println!(
            "  {:<82} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12}",
            mutant.slip,
            column("judge_translate"),
            column("judge_execution"),
            column("properties"),
            column("legacy_modes"),
            column("access_checks"),
            column("judge_oracle")
        );
        judge.case();
        if !verdicts.iter().any(Verdict::caught) {
            judge.disagree(|| format!("nobody noticed: {}", mutant.slip));
        }
    }
    judge.finish(&[])
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
    fn new() -> Result<Copy, Failed> {
        let copy = Copy { root: Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants") };
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
        for judge in KERNEL.iter().chain(RULES) {
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
        let cargo = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO"));
            command.args(["test", "--quiet", "--offline"]).args(arguments).current_dir(&self.root);
            command.env("CARGO_TARGET_DIR", self.root.join("target")).env_remove("PAGEWALK_FULL");
            command.env("PAGEWALK_JUDGE_CASES", CASES).env("PAGEWALK_SEED", seed.to_string());
            command.output()
        };
        let tests: Vec<&str> = judges.iter().flat_map(|judge| ["--test", judge]).collect();
        let built = cargo(&[&tests[..], &["--no-run"]].concat())?;
        if !built.status.success() {
            return Err(format!("does not build: {}", String::from_utf8_lossy(&built.stderr)).into());
        }
        let verdict = |judge: &&str| {
            let run = cargo(&["--test", judge])?;
            let output = String::from_utf8_lossy(&run.stdout);
            let last_line =
                output.lines().find_map(|line| line.strip_prefix("judge ")?.split_once(" cases, "));
            let disagreements = last_line.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            if disagreements.is_none() && !RULES.contains(judge) {
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
