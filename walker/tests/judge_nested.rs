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

use bed::boot::{Boot, boot, inside};
use libtest_mimic::{Arguments, Trial};
use nested::second::Second;
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

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = if inside(BED) { judges() } else { boots() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn judges() -> Vec<Trial> {
    let trial = |(name, levels, npt_levels): (_, _, Option<u32>)| {
        let second = npt_levels.map(Second::Npt);
        Trial::test(name, move || judge(&Bed::of_amd()?, Modes { name, levels, second }))
    };
    let mut trials: Vec<Trial> = MODES.into_iter().map(trial).collect();
    trials
        .extend(VMRUN.map(|(name, l2, npt)| Trial::test(name, move || nested::vmrun::judge(name, l2, npt))));
    trials
}

fn boots() -> Vec<Trial> {
    let run = |trial: &str, program, kvm_amd, cases, judges: Vec<&'static str>| {
        let parameters = ("PAGEWALK_KVM_AMD", kvm_amd);
        Trial::test(trial, move || {
            boot(&Boot {
                bed: BED,
                package: "pagewalk",
                program,
                binaries: &[],
                files: &[],
                parameters,
                cases,
                judges: &judges,
            })
        })
    };
    let translations =
        MODES.iter().map(|(name, ..)| *name).chain(VMRUN.iter().map(|(name, ..)| *name)).collect();
    vec![
        run("kvm_amd_translates_as_we_do", "judge_nested", "nested=1 npt=1", 50_000, translations),
        run("kvm_amd_executes_as_we_do", "judge_execution", "npt=0", 20_000, SHADOWS.to_vec()),
        run("the_emulated_cpu_checks_keys_as_we_do", "judge_execution", "npt=1", 20_000, KEYS.to_vec()),
    ]
}
