//! Judges `nested-amd-daemon-*` and `nested-intel-daemon-*`: the daemon as it ships, inside the beds `nested-amd` and
//! `nested-intel` (`deploy/beds`), where its vCPUs have every paging mode of their CPUs and really run an L2.
//!
//! Outside the beds this program builds itself and the daemon statically, boots each bed with both, and repeats what is said
//! there. Inside, it starts `pagewalkd`, asks over gRPC, and compares with what the kernel says of a vCPU of its own that
//! holds the same registers over the same memory (`KVM_TRANSLATE`), or with what the guest's program has to do by
//! construction. A bed that was not built is skipped.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "../../../walker/tests/linux/announced.rs"]
#[allow(dead_code, reason = "a part of it is for other judges")]
mod announced;
#[path = "../../../walker/tests/bed/mod.rs"]
mod bed;
mod daemon;
mod guest;
mod linux;
mod nested;
mod refused;
mod running;
mod svm;
mod translate;
mod vmx;

use bed::Maker;
use bed::boot::{Boot, boot, check, inside};
use libtest_mimic::{Arguments, Failed, Trial};
use translate::Row;

/// A bed, the maker of its CPU, and how many cases its rows make.
struct Bed {
    name: &'static str,
    maker: Maker,
    parameters: (&'static str, &'static str),
    cases: u64,
    /// The test that boots it.
    trial: &'static str,
}

const BEDS: [Bed; 2] = [
    Bed {
        name: "nested-amd",
        maker: Maker::Amd,
        parameters: ("PAGEWALK_KVM_AMD", "nested=1 npt=1"),
        cases: 1_200,
        trial: "the_daemon_agrees_with_kvm_amd",
    },
    Bed {
        name: "nested-intel",
        maker: Maker::Intel,
        parameters: ("PAGEWALK_KVM_INTEL", "nested=1 ept=1"),
        cases: 1_000,
        trial: "the_daemon_agrees_with_kvm_intel",
    },
];

type Judge = (&'static str, fn(&'static str, Maker) -> Result<(), Failed>);

const JUDGES: [Judge; 5] = [
    ("daemon-restored", running::restored),
    ("daemon-toggled", running::toggled),
    ("daemon-observed", running::observed),
    ("daemon-crashed", running::crashed),
    ("daemon-refused", refused::judge),
];

/// A kernel that boots for a while: for the faster bed alone.
const LINUX: Judge = ("daemon-linux", |name, _| linux::judge(name));

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = match BEDS.iter().find(|bed| inside(bed.name)) {
        Some(bed) => judges(bed.maker),
        None => BEDS.iter().map(|bed| Trial::test(bed.trial, move || boots(bed))).collect(),
    };
    libtest_mimic::run(&arguments, trials).exit();
}

fn rows(maker: Maker) -> &'static [Row] {
    match maker {
        Maker::Amd => &translate::AMD,
        Maker::Intel => &translate::INTEL,
    }
}

fn others(maker: Maker) -> impl Iterator<Item = Judge> {
    (maker == Maker::Amd).then_some(LINUX).into_iter().chain(JUDGES)
}

fn judges(maker: Maker) -> Vec<Trial> {
    let rows = rows(maker).iter().map(|row| Trial::test(row.name, move || translate::judge(*row, maker)));
    let others = others(maker).map(|(name, judge)| Trial::test(name, move || judge(name, maker)));
    rows.chain(others).collect()
}

fn boots(bed: &Bed) -> Result<(), Failed> {
    let names: Vec<&str> =
        rows(bed.maker).iter().map(|row| row.name).chain(others(bed.maker).map(|(name, _)| name)).collect();
    let folder = tempfile::tempdir()?;
    // Without a bed there is nothing to carry into it, and the boot says so.
    let files = match check(bed.name)? {
        Ok(()) if names.contains(&LINUX.0) => linux::files(folder.path())?,
        _ => Vec::new(),
    };
    boot(&Boot {
        bed: bed.name,
        package: "pagewalkd",
        program: "judge_daemon",
        binaries: &["pagewalkd"],
        files: &files,
        parameters: bed.parameters,
        cases: bed.cases,
        judges: &names,
    })
}
