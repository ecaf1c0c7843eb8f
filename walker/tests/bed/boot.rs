//! Runs a test target inside a bed, and repeats what it says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::Failed;

use super::judge::skipped;

/// What a bed's programs are built for.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";
/// The bed gives up after this long.
const SECONDS: &str = "600";

/// One run of a bed.
pub(crate) struct Boot<'a> {
    pub(crate) bed: &'a str,
    /// The package of the test target.
    pub(crate) package: &'a str,
    /// The test target.
    pub(crate) program: &'a str,
    /// Programs of the package that the guest finds next to it, in its root folder.
    pub(crate) binaries: &'a [&'a str],
    /// Other files that it finds there.
    pub(crate) files: &'a [PathBuf],
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

/// Where a bed's script is.
pub(crate) fn script(bed: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../deploy/beds/{bed}.sh"))
}

/// Whether the bed was built, or why it cannot be used.
pub(crate) fn check(bed: &str) -> Result<Result<(), String>, Failed> {
    let check = Command::new(script(bed)).arg("check").output()?;
    let said = || String::from_utf8_lossy(&check.stderr).trim().to_owned();
    Ok(if check.status.success() { Ok(()) } else { Err(said()) })
}

/// The variable by which cargo takes flags for [`STATIC_TARGET`] alone.
pub(crate) fn static_flags() -> String {
    format!("CARGO_TARGET_{}_RUSTFLAGS", STATIC_TARGET.to_uppercase().replace('-', "_"))
}

/// The executable that a message of cargo's names, if it names one.
pub(crate) fn executable(message: &str) -> Option<PathBuf> {
    let (path, _) = message.split_once("\"executable\":\"")?.1.split_once('"')?;
    Some(PathBuf::from(path))
}

/// The program has to pass, and each of its judges to end without a disagreement.
pub(crate) fn boot(wanted: &Boot<'_>) -> Result<(), Failed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    if let Err(reason) = check(wanted.bed)? {
        return skipped(wanted.bed, &reason);
    }
    let program = build(&root, wanted.package, wanted.program)?;
    let beside = program.parent().and_then(Path::parent).unwrap();
    let mut files: Vec<_> =
        wanted.binaries.iter().map(|name| beside.join(name).display().to_string()).collect();
    files.extend(wanted.files.iter().map(|file| file.display().to_string()));
    files.extend(std::env::var("PAGEWALK_BED_FILES").ok());
    let cases = std::env::var("PAGEWALK_JUDGE_CASES").unwrap_or_else(|_| wanted.cases.to_string());
    let (variable, value) = wanted.parameters;
    let mut run = Command::new(script(wanted.bed))
        .arg("run")
        .arg(program)
        .arg("--nocapture")
        .env(variable, value)
        .env("PAGEWALK_BED_SECONDS", SECONDS)
        .env("PAGEWALK_JUDGE_CASES", cases)
        .env("PAGEWALK_REQUIRE", "kvm")
        .env("PAGEWALK_BED_FILES", files.join(":"))
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

/// Links a test target of a package, and with it the package's programs, statically, and says where it is.
fn build(root: &Path, package: &str, test: &str) -> Result<PathBuf, Failed> {
    let output = Command::new(env!("CARGO"))
        .args([
            "test",
            "--no-run",
            "--quiet",
            "--release",
            "--locked",
            "-p",
            package,
            "--target",
            STATIC_TARGET,
        ])
        .args(["--test", test, "--message-format", "json-render-diagnostics"])
        .current_dir(root)
        .env(static_flags(), "-C target-feature=+crt-static -C strip=symbols")
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("{test} cannot be built for {STATIC_TARGET}: {}", output.status).into());
    }
    let messages = String::from_utf8(output.stdout)?;
    // A program of the package has its own message, and lies one folder higher.
    let is_test = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&format!("{test}-")))
    };
    let program = messages.lines().filter_map(executable).find(is_test);
    program.ok_or_else(|| format!("cargo names no executable of {test}").into())
}
