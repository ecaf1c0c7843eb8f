//! Judges `nested-amd-daemon-*`: the daemon as it ships, inside the bed `nested-amd` (`deploy/beds/nested-amd.sh`), where
//! its vCPUs have every paging mode and really run an L2.
//!
//! Outside the bed this program builds itself and the daemon statically, boots the bed with both, and repeats what is said
//! there. Inside, it starts `pagewalkd`, asks over gRPC, and compares with what the kernel says of a vCPU of its own that
//! holds the same registers over the same memory (`KVM_TRANSLATE`), or with what the guest's program has to do by
//! construction. Where the bed was not built, it is skipped.

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
mod running;
mod translate;

use bed::boot::{Boot, boot, check, inside};
use libtest_mimic::{Arguments, Failed, Trial};

const BED: &str = "nested-amd";

type Judge = (&'static str, fn(&'static str) -> Result<(), Failed>);

const JUDGES: [Judge; 6] = [
    ("daemon-linux", linux::judge),
    ("daemon-restored", running::restored),
    ("daemon-toggled", running::toggled),
    ("daemon-observed", running::observed),
    ("daemon-crashed", running::crashed),
    ("daemon-refused", running::refused),
];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = if inside(BED) { judges() } else { boots() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn judges() -> Vec<Trial> {
    let rows = translate::ROWS.into_iter().map(|row| Trial::test(row.name, move || translate::judge(row)));
    let others = JUDGES.into_iter().map(|(name, judge)| Trial::test(name, move || judge(name)));
    rows.chain(others).collect()
}

fn boots() -> Vec<Trial> {
    let names: Vec<&str> =
        translate::ROWS.iter().map(|row| row.name).chain(JUDGES.iter().map(|(name, _)| *name)).collect();
    let run = move || {
        let folder = tempfile::tempdir()?;
        // Without a bed there is nothing to carry into it, and the boot says so.
        let files = match check(BED)? {
            Ok(()) => linux::files(folder.path())?,
            Err(_) => Vec::new(),
        };
        boot(&Boot {
            bed: BED,
            package: "pagewalkd",
            program: "judge_daemon",
            binaries: &["pagewalkd"],
            files: &files,
            parameters: ("PAGEWALK_KVM_AMD", "nested=1 npt=1"),
            cases: 1_200,
            judges: &names,
        })
    };
    vec![Trial::test("the_daemon_agrees_with_kvm_amd", run)]
}
