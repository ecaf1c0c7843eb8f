//! Which vector instructions the lanes use: the one place where that is decided.
//!
//! The lanes are compiled once for each set of instructions that pays, out of the same source: the loops that judge entries
//! become vector instructions of the width there is. Entries are gathered by AVX-512 alone: by AVX2 that is no faster than
//! one by one, and on many of the CPUs that have no more than that, slower by far.
#![allow(
    unsafe_code,
    reason = "code for instructions that not every CPU has is entered, after having asked the CPU"
)]

use crate::batch::gather::{Gather, OneByOne};
#[cfg(target_arch = "x86_64")]
use crate::batch::gather::{InPairs, Together};

/// A set of vector instructions that lanes are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// What every CPU of the target has.
    Portable,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
cpufeatures::new!(cpu_avx2, "avx2");
#[cfg(all(target_arch = "x86_64", not(miri)))]
cpufeatures::new!(cpu_avx512, "avx512f", "avx512bw", "avx512dq", "avx512vl");

impl Instructions {
    /// All sets.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The best set that this CPU has.
    #[must_use]
    pub fn best() -> Self {
        let [portable, others @ ..] = Self::ALL;
        others.into_iter().rev().find(|set| set.available()).unwrap_or(portable)
    }

    /// Whether this CPU has these instructions.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx2 => cpu_avx2::get(),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 => cpu_avx512::get(),
            #[cfg(not(all(target_arch = "x86_64", not(miri))))]
            _ => false,
        }
    }
}

/// What is compiled for each set.
pub(crate) trait Work {
    /// Does it, with entries loaded by `gather`. Always inlined.
    fn run(self, gather: impl Gather);
}

/// [`Work::run`], by these instructions, or where this CPU has not got them, by the portable ones.
#[inline(always)]
pub(crate) fn run<W: Work>(instructions: Instructions, work: W) {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 if instructions.available() => {
            // SAFETY: this CPU has AVX2.
            unsafe { run_avx2(work) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 if instructions.available() => {
            // SAFETY: this CPU has the four parts of AVX-512.
            unsafe { run_avx512(work) }
        }
        _ => work.run(OneByOne),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2<W: Work>(work: W) {
    work.run(InPairs::new());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<W: Work>(work: W) {
    work.run(Together::new());
}

/// Lanes, and what they know of a batch.
pub(super) trait Walks {
    /// A word for each address; `alone` is asked for those that no lane accepts, by place and in order. Always inlined.
    fn run(
        &self,
        gather: impl Gather,
        gvas: &[u64],
        words: &mut [u64],
        alone: &mut dyn FnMut(usize, u64) -> u64,
    );
}

/// [`Walks::run`] on these columns.
pub(super) struct Batch<'a, W> {
    pub(super) lanes: &'a W,
    pub(super) gvas: &'a [u64],
    pub(super) words: &'a mut [u64],
    pub(super) alone: &'a mut dyn FnMut(usize, u64) -> u64,
}

impl<W: Walks> Work for Batch<'_, W> {
    #[inline(always)]
    fn run(self, gather: impl Gather) {
        self.lanes.run(gather, self.gvas, self.words, self.alone);
    }
}
