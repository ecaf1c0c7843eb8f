//! Judges `nested-intel-*`: the walker against kvm_intel, which runs inside the bed `nested-intel`
//! (`deploy/beds/nested-intel.sh`).
//!
//! Outside the bed this program builds itself statically, boots the bed, and repeats what it says. Inside the bed it is the
//! judge. Where the bed was not built, it is skipped: building it downloads packages.
//!
//! # `nested-intel-translate-*`, `nested-intel-ept-*`: `KVM_TRANSLATE`
//! Unpaged, 2-level, PAE and 4-level guests, alone and as L2 over 4-level EPT with and without accessed and dirty bits, with
//! leaves of every size in both dimensions, MAXPHYADDR of 36, 52 and the host's, and PCIDs. `KVM_SET_NESTED_STATE` puts the
//! vCPU into guest mode. What `judge_translate` and `judge_nested` say of the ioctl holds here too, and:
//! - KVM takes every access to L2's tables for a write, also where EPT has no accessed and dirty bits and a CPU would read.
//!   So does the walker here, by `EptControls::tables_written`; by rule, counted where the walker would map otherwise.
//! - The access is a read of data: EPT's execute bit is never decided.
//! - Neither a violation nor a misconfiguration has a name: the ioctl answers valid or not.
//! - The emulated CPU has neither 5-level paging nor protection keys.
//!
//! # `nested-intel-vmentry-*`: accesses that an L2 executes
//! What L1 sees of them over EPT, and what they leave in accessed and dirty bits: see `nested/vmentry/mod.rs`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;
mod nested;

use bed::boot::{Boot, boot, inside};
use libtest_mimic::{Arguments, Trial};
use nested::second::Second;
use nested::translate::{Bed, Modes, judge};
use pagewalk::PagingMode;

const MODES: [Modes; 8] = [
    Modes { name: "translate-unpaged", levels: 0, second: None },
    Modes { name: "translate-2", levels: 2, second: None },
    Modes { name: "translate-pae", levels: 3, second: None },
    Modes { name: "translate-4", levels: 4, second: None },
    Modes { name: "ept-unpaged", levels: 0, second: Some(Second::Ept) },
    Modes { name: "ept-2", levels: 2, second: Some(Second::Ept) },
    Modes { name: "ept-pae", levels: 3, second: Some(Second::Ept) },
    Modes { name: "ept-4", levels: 4, second: Some(Second::Ept) },
];

/// Name, and the mode of L2.
const VMENTRY: [(&str, PagingMode); 4] = [
    ("vmentry-unpaged", PagingMode::None),
    ("vmentry-2", PagingMode::TwoLevel),
    ("vmentry-pae", PagingMode::Pae),
    ("vmentry-4", PagingMode::FourLevel),
];

const BED: &str = "nested-intel";

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    // For programs that are run without arguments.
    if let Ok(only) = std::env::var("PAGEWALK_ONLY") {
        (arguments.filter, arguments.nocapture) = (Some(only), true);
    }
    let trials = if inside(BED) { judges() } else { boots() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn judges() -> Vec<Trial> {
    let trial = |modes: Modes| Trial::test(modes.name, move || judge(&Bed::of_intel()?, modes));
    let execution = |(name, mode)| Trial::test(name, move || nested::vmentry::judge(name, mode));
    MODES.into_iter().map(trial).chain(VMENTRY.map(execution)).collect()
}

fn boots() -> Vec<Trial> {
    let judges: Vec<&str> =
        MODES.iter().map(|modes| modes.name).chain(VMENTRY.iter().map(|(name, _)| *name)).collect();
    let run = move || {
        boot(&Boot {
            bed: BED,
            package: "pagewalk",
            program: "judge_nested_intel",
            binaries: &[],
            files: &[],
            parameters: ("PAGEWALK_KVM_INTEL", "nested=1 ept=1"),
            cases: 10_000,
            judges: &judges,
        })
    };
    vec![Trial::test("kvm_intel_agrees", run)]
}
