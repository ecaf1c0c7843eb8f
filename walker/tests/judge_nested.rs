//! Judges `nested-amd-*`: the walker against kvm_amd, which runs inside the bed `nested-amd` (`deploy/beds/nested-amd.sh`).
//!
//! Outside the bed this program builds itself and `judge_execution` statically, boots the bed with each, and repeats what
//! they say. Inside the bed it is the judge. Where the bed was not built, it is skipped: building it downloads packages.
//!
//! # `nested-amd-translate-*`, `nested-amd-npt-*`: `KVM_TRANSLATE`
//! Unpaged, 2-level, PAE, 4-level and 5-level guests, alone and as L2 over 4-level and 5-level NPT, with leaves of every
//! size in both dimensions, MAXPHYADDR of 36, 52 and the host's. `KVM_SET_NESTED_STATE` puts the vCPU into guest mode.
//! What `judge_translate` says of the ioctl holds here too, and:
//! - PKRU is varied: the key's access-disable bit decides.
//! - The access is a read: NPT's R/W is decided for L2's tables only, which NPT takes to be written, and NPT's NX never.
//! - KVM commits accessed and dirty bits of each nested walk as soon as that walk is done, even if the guest's walk is
//!   refused later; policy `Set` commits all or nothing. (A CPU may do either.) By rule: after a refusal, the copy is
//!   given exactly the bits of the nested walks that were finished. Counted.
//! - PDPTEs of PAE paging are registers, set by `KVM_SET_SREGS2`, for L2 too. That a CPU loads L2's from memory under NPT
//!   is not seen.
//! - 2-level paging is judged with a MAXPHYADDR of 36 alone: KVM takes every CPU's 4 MiB pages to have 36-bit addresses.
//! - nGPAs above the width of 4-level NPT are not asked for: KVM ignores these bits.
//! - Outside long mode, addresses are of 32 bits: KVM does not cut longer ones, which a vCPU cannot form.
//! - EXITINFO1 is not seen: the ioctl has no error code.
//!
//! # `nested-amd-vmrun-*`: accesses that an L2 executes
//! An L1 enters L2 by VMRUN, over NPT, both in every paging mode: see `nested/vmrun`. Few cases, which take a millisecond each.
//!
//! # `nested-amd-kvm-execution-*`, `nested-amd-keys-execution-*`: accesses that a vCPU executes
//! In every paging mode, with `npt=0`, where KVM shadows the guest's tables; and under protection keys, with `npt=1`: see
//! `judge_execution`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;
mod nested;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bed::judge::skipped;
use libtest_mimic::{Arguments, Failed, Trial};
use nested::translate::{Bed, Modes, judge};
use pagewalk::PagingMode;

/// Name, the guest's levels, NPT's levels.
const MODES: [(&str, u32, Option<u32>); 15] = [
    ("translate-unpaged", 0, None),
    ("translate-2", 2, None),
    ("translate-pae", 3, None),
    ("translate-4", 4, None),
    ("translate-5", 5, None),
    ("npt-unpagedx4", 0, Some(4)),
    ("npt-unpagedx5", 0, Some(5)),
    ("npt-2x4", 2, Some(4)),
    ("npt-2x5", 2, Some(5)),
    ("npt-paex4", 3, Some(4)),
    ("npt-paex5", 3, Some(5)),
    ("npt-4x4", 4, Some(4)),
    ("npt-4x5", 4, Some(5)),
    ("npt-5x4", 5, Some(4)),
    ("npt-5x5", 5, Some(5)),
];

/// Name, the mode of L2, and L1's, which is NPT's format.
const VMRUN: [(&str, PagingMode, PagingMode); 20] = [
    ("vmrun-unpagedx2", PagingMode::None, PagingMode::TwoLevel),
    ("vmrun-unpagedxpae", PagingMode::None, PagingMode::Pae),
    ("vmrun-unpagedx4", PagingMode::None, PagingMode::FourLevel),
    ("vmrun-unpagedx5", PagingMode::None, PagingMode::FiveLevel),
    ("vmrun-2x2", PagingMode::TwoLevel, PagingMode::TwoLevel),
    ("vmrun-2xpae", PagingMode::TwoLevel, PagingMode::Pae),
    ("vmrun-2x4", PagingMode::TwoLevel, PagingMode::FourLevel),
    ("vmrun-2x5", PagingMode::TwoLevel, PagingMode::FiveLevel),
    ("vmrun-paex2", PagingMode::Pae, PagingMode::TwoLevel),
    ("vmrun-paexpae", PagingMode::Pae, PagingMode::Pae),
    ("vmrun-paex4", PagingMode::Pae, PagingMode::FourLevel),
    ("vmrun-paex5", PagingMode::Pae, PagingMode::FiveLevel),
    ("vmrun-4x2", PagingMode::FourLevel, PagingMode::TwoLevel),
    ("vmrun-4xpae", PagingMode::FourLevel, PagingMode::Pae),
    ("vmrun-4x4", PagingMode::FourLevel, PagingMode::FourLevel),
    ("vmrun-4x5", PagingMode::FourLevel, PagingMode::FiveLevel),
    ("vmrun-5x2", PagingMode::FiveLevel, PagingMode::TwoLevel),
    ("vmrun-5xpae", PagingMode::FiveLevel, PagingMode::Pae),
    ("vmrun-5x4", PagingMode::FiveLevel, PagingMode::FourLevel),
    ("vmrun-5x5", PagingMode::FiveLevel, PagingMode::FiveLevel),
];

const SHADOWS: [&str; 5] =
    ["kvm-execution-unpaged", "kvm-execution-2", "kvm-execution-pae", "kvm-execution-4", "kvm-execution-5"];
const KEYS: [&str; 2] = ["keys-execution-4", "keys-execution-5"];

const BED: &str = "nested-amd";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The bed gives up after this long.
const SECONDS: &str = "600";

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let inside = std::env::var("PAGEWALK_BED").is_ok_and(|bed| bed == BED);
    let trials = if inside { judges() } else { boots() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn judges() -> Vec<Trial> {
    let trial = |(name, levels, npt_levels)| {
        Trial::test(name, move || judge(&Bed::new()?, Modes { name, levels, npt_levels }))
    };
    let mut trials: Vec<Trial> = MODES.into_iter().map(trial).collect();
    trials
        .extend(VMRUN.map(|(name, l2, npt)| Trial::test(name, move || nested::vmrun::judge(name, l2, npt))));
    trials
}

fn boots() -> Vec<Trial> {
    let names = MODES.iter().map(|(name, ..)| *name).chain(VMRUN.iter().map(|(name, ..)| *name));
    let in_bed = |name: &str| format!("{BED}-{name}");
    let translations: Vec<String> = names.map(in_bed).collect();
    let shadows = SHADOWS.map(in_bed);
    let keys = KEYS.map(in_bed);
    vec![
        Trial::test("kvm_amd_translates_as_we_do", move || {
            boot("judge_nested", "nested=1 npt=1", 50_000, &translations)
        }),
        Trial::test("kvm_amd_executes_as_we_do", move || boot("judge_execution", "npt=0", 20_000, &shadows)),
        Trial::test("the_emulated_cpu_checks_keys_as_we_do", move || {
            boot("judge_execution", "npt=1", 20_000, &keys)
        }),
    ]
}

/// Runs the test target `program` inside the bed; it has to pass, and each of `judges` to end without a disagreement.
/// `cases` is how many each of them makes where the environment does not say.
fn boot(program: &str, kvm_amd: &str, cases: u64, judges: &[String]) -> Result<(), Failed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let script = root.join("deploy/beds/nested-amd.sh");
    let check = Command::new(&script).arg("check").output()?;
    if !check.status.success() {
        return skipped(BED, String::from_utf8_lossy(&check.stderr).trim());
    }
    let program = build(&root, program)?;
    let cases = std::env::var("PAGEWALK_JUDGE_CASES").unwrap_or_else(|_| cases.to_string());
    let mut run = Command::new(&script)
        .arg("run")
        .arg(program)
        .arg("--nocapture")
        .env("PAGEWALK_KVM_AMD", kvm_amd)
        .env("PAGEWALK_BED_SECONDS", SECONDS)
        .env("PAGEWALK_JUDGE_CASES", cases)
        .env("PAGEWALK_REQUIRE", "kvm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut missing: Vec<&str> = judges.iter().map(String::as_str).collect();
    for line in BufReader::new(run.stdout.take().unwrap()).lines() {
        let line = line?;
        println!("{line}");
        let Some((name, (_, said))) = line
            .strip_prefix("judge ")
            .and_then(|rest| Some((rest.split_once(": ")?.0, rest.split_once(" cases, ")?)))
        else {
            continue;
        };
        if said.starts_with("0 disagreements,") {
            missing.retain(|judge| *judge != name);
        }
    }
    let status = run.wait()?;
    if !status.success() {
        return Err(format!("the run in the bed ended with {status}").into());
    }
    if !missing.is_empty() {
        return Err(format!("no agreement was reported by {missing:?}").into());
    }
    Ok(())
}

/// Links a test target of this package statically, and says where it is.
fn build(root: &Path, test: &str) -> Result<PathBuf, Failed> {
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", TARGET.to_uppercase().replace('-', "_"));
    let output = Command::new(env!("CARGO"))
        .args(["test", "--no-run", "--quiet", "--release", "--locked", "-p", "pagewalk", "--target", TARGET])
        .args(["--test", test, "--message-format", "json-render-diagnostics"])
        .current_dir(root)
        .env(flags, "-C target-feature=+crt-static")
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("{test} cannot be built for {TARGET}: {}", output.status).into());
    }
    let messages = String::from_utf8(output.stdout)?;
    let path = messages.lines().find_map(|message| {
        let (path, _) = message.split_once("\"executable\":\"")?.1.split_once('"')?;
        Some(PathBuf::from(path))
    });
    path.ok_or_else(|| format!("cargo names no executable of {test}").into())
}
