//! Runs a test target of this package inside a bed, and repeats what it says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::Failed;

use super::judge::skipped;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The bed gives up after this long.
const SECONDS: &str = "600";

/// One run of a bed.
pub(crate) struct Boot<'a> {
    pub(crate) bed: &'a str,
    /// The test target.
    pub(crate) program: &'a str,
    /// A variable that the bed's script reads, and its value.
    pub(crate) parameters: (&'a str, &'a str),
    /// How many cases each judge makes where the environment does not say.
    pub(crate) cases: u64,
    /// The judges' names, without the bed's.
    pub(crate) judges: &'a [&'a str],
}

/// Whether this process runs inside the bed.
pub(crate) fn inside(bed: &str) -> bool {
    std::env::var("PAGEWALK_BED").is_ok_and(|it| it == bed)
}

/// The program has to pass, and each of its judges to end without a disagreement.
pub(crate) fn boot(wanted: &Boot<'_>) -> Result<(), Failed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let script = root.join(format!("deploy/beds/{}.sh", wanted.bed));
    let check = Command::new(&script).arg("check").output()?;
    if !check.status.success() {
        return skipped(wanted.bed, String::from_utf8_lossy(&check.stderr).trim());
    }
    let program = build(&root, wanted.program)?;
    let cases = std::env::var("PAGEWALK_JUDGE_CASES").unwrap_or_else(|_| wanted.cases.to_string());
    let (variable, value) = wanted.parameters;
    let mut run = Command::new(&script)
        .arg("run")
        .arg(program)
        .arg("--nocapture")
        .env(variable, value)
        .env("PAGEWALK_BED_SECONDS", SECONDS)
        .env("PAGEWALK_JUDGE_CASES", cases)
        .env("PAGEWALK_REQUIRE", "kvm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut missing: Vec<String> =
        wanted.judges.iter().map(|judge| format!("{}-{judge}", wanted.bed)).collect();
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
            missing.retain(|judge| judge != name);
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
        .env(flags, "-C target-feature=+crt-static -C strip=symbols")
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
