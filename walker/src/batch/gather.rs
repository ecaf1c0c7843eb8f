//! Loads of eight entries at a time.
#![allow(unsafe_code, reason = "entries are gathered by an instruction that this CPU was asked for")]

use core::sync::atomic::{AtomicU64, Ordering};

/// Entries that are loaded together.
pub(crate) const WIDTH: usize = 8;

/// A way to load entries, which is there only where the CPU has the instructions for it.
pub(crate) trait Gather: Copy {
    /// Whether words that lie apart are loaded by one instruction.
    const TOGETHER: bool = false;

    /// The words with these numbers, each in one atomic access, in the guest's order; 0 for those that there are not.
    fn gather(self, words: &[AtomicU64], numbers: &[u64; WIDTH]) -> [u64; WIDTH];

    /// Loads these words, each in one atomic access, in the guest's order.
    fn line(self, words: &[AtomicU64; WIDTH], into: &mut [u64; WIDTH]);
}

/// One load after the other.
#[derive(Clone, Copy)]
pub(super) struct OneByOne;

impl Gather for OneByOne {
    #[inline(always)]
    fn gather(self, words: &[AtomicU64], numbers: &[u64; WIDTH]) -> [u64; WIDTH] {
        numbers.map(|number| {
            let word = usize::try_from(number).ok().and_then(|number| words.get(number));
            word.map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed)))
        })
    }

    #[inline(always)]
    fn line(self, words: &[AtomicU64; WIDTH], into: &mut [u64; WIDTH]) {
        for (own, word) in into.iter_mut().zip(words) {
            *own = u64::from_le(word.load(Ordering::Relaxed));
        }
    }
}

/// Words side by side two at a time, by AVX; others one after the other.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct InPairs(());

#[cfg(target_arch = "x86_64")]
impl InPairs {
    /// For code that runs only where the CPU has AVX.
    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Gather for InPairs {
    #[inline(always)]
    fn gather(self, words: &[AtomicU64], numbers: &[u64; WIDTH]) -> [u64; WIDTH] {
        OneByOne.gather(words, numbers)
    }

    #[inline(always)]
    fn line(self, words: &[AtomicU64; WIDTH], into: &mut [u64; WIDTH]) {
        if !words.as_ptr().addr().is_multiple_of(16) {
            return OneByOne.line(words, into);
        }
        // SAFETY: that there is a `Self` says that this CPU has AVX, and the words are aligned to 16 bytes.
        unsafe { line_avx(words, into) }
    }
}

/// A CPU with AVX reads 16 bytes at once where they are aligned to 16 (Intel SDM volume 3, "Guaranteed Atomic Operations"; AMD APM
/// volume 2, "Access Atomicity"). The compiler knows of no such loads, so that they are written out.
///
/// # Safety
/// `words` have to be aligned to 16 bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx")]
unsafe fn line_avx(words: &[AtomicU64; WIDTH], into: &mut [u64; WIDTH]) {
    use core::arch::asm;

    // SAFETY: these are the 64 bytes of `words`, aligned as the instruction asks for, which are only read, and the 64 bytes of
    // `into`.
    unsafe {
        asm!(
            "vmovdqa {first}, xmmword ptr [{words}]",
            "vmovdqa {second}, xmmword ptr [{words} + 16]",
            "vmovdqa {third}, xmmword ptr [{words} + 32]",
            "vmovdqa {fourth}, xmmword ptr [{words} + 48]",
            "vmovdqu xmmword ptr [{into}], {first}",
            "vmovdqu xmmword ptr [{into} + 16], {second}",
            "vmovdqu xmmword ptr [{into} + 32], {third}",
            "vmovdqu xmmword ptr [{into} + 48], {fourth}",
            first = out(xmm_reg) _,
            second = out(xmm_reg) _,
            third = out(xmm_reg) _,
            fourth = out(xmm_reg) _,
            words = in(reg) words.as_ptr(),
            into = in(reg) into.as_mut_ptr(),
            options(nostack, preserves_flags),
        );
    }
}

/// One instruction of AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Together(());

#[cfg(target_arch = "x86_64")]
impl Together {
    /// For code that runs only where the CPU has AVX-512 F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Gather for Together {
    const TOGETHER: bool = true;

    #[inline(always)]
    fn gather(self, words: &[AtomicU64], numbers: &[u64; WIDTH]) -> [u64; WIDTH] {
        // SAFETY: that there is a `Self` says that this CPU has AVX-512 F.
        unsafe { gather_avx512(words, numbers) }
    }

    #[inline(always)]
    fn line(self, words: &[AtomicU64; WIDTH], into: &mut [u64; WIDTH]) {
        // A CPU with AVX-512 has AVX.
        InPairs(()).line(words, into);
    }
}

/// A gather is one access for each element, and each element is a quadword at its natural alignment, which the manuals
/// guarantee to be read at once (Intel SDM volume 3, "Guaranteed Atomic Operations"; AMD APM volume 2, "Access
/// Atomicity"). The compiler knows of no atomic gather, so that it is written out.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn gather_avx512(words: &[AtomicU64], numbers: &[u64; WIDTH]) -> [u64; WIDTH] {
    use core::arch::asm;
    use core::arch::x86_64::{__m512i, _mm512_cmplt_epu64_mask, _mm512_set1_epi64, _mm512_setzero_si512};
    use core::mem::transmute;

    // SAFETY: both are 64 bytes, and all of them mean something to either.
    let numbers = unsafe { transmute::<[u64; WIDTH], __m512i>(*numbers) };
    let inside = _mm512_cmplt_epu64_mask(numbers, _mm512_set1_epi64(words.len() as i64));
    let mut gathered = _mm512_setzero_si512();
    // SAFETY: elements whose bit in `inside` is clear are not accessed; those of the others are words of `words`, which are
    // only read. The mask is the instruction's to clear.
    unsafe {
        asm!(
            "vpgatherqq {gathered}{{{inside}}}, qword ptr [{words} + 8*{numbers}]",
            gathered = inout(zmm_reg) gathered,
            inside = inout(kreg) inside => _,
            words = in(reg) words.as_ptr(),
            numbers = in(zmm_reg) numbers,
            options(nostack, readonly, preserves_flags),
        );
    }
    // SAFETY: as above.
    unsafe { transmute::<__m512i, [u64; WIDTH]>(gathered) }
}

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests {
    use super::*;
    use std::eprintln;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    cpufeatures::new!(cpu_avx512f, "avx512f");

    fn together() -> Option<Together> {
        if !cpu_avx512f::get() {
            eprintln!("SKIPPED: this CPU has no AVX-512");
            return None;
        }
        // SAFETY: this CPU has AVX-512 F.
        Some(unsafe { Together::new() })
    }

    #[test]
    fn words_that_there_are_not_are_absent() {
        let words: [AtomicU64; 20] = core::array::from_fn(|number| AtomicU64::new(number as u64 + 1));
        let numbers = [0, 19, 20, 1 << 32, 1 << 61, u64::MAX, 7, 7];
        let expected = [1, 20, 0, 0, 0, 0, 8, 8];
        assert_eq!(OneByOne.gather(&words, &numbers), expected);
        assert_eq!(OneByOne.gather(&[], &numbers), [0; WIDTH]);
        let Some(together) = together() else { return };
        assert_eq!(together.gather(&words, &numbers), expected);
        assert_eq!(together.gather(&[], &numbers), [0; WIDTH]);
    }

    #[test]
    fn a_line_is_its_words_wherever_it_lies() {
        let Some(together) = together() else { return };
        let words: [AtomicU64; 24] = core::array::from_fn(|number| AtomicU64::new(number as u64 + 1));
        for start in 0..16 {
            let line = words[start..].first_chunk().expect("there are more words");
            let expected = core::array::from_fn(|number| (start + number) as u64 + 1);
            let mut loaded = [[0; WIDTH]; 2];
            OneByOne.line(line, &mut loaded[0]);
            together.line(line, &mut loaded[1]);
            assert_eq!(loaded, [expected; 2]);
        }
    }

    /// Halves of a word that is written all the time are never of two writes.
    #[test]
    fn words_are_gathered_whole() {
        let Some(together) = together() else { return };
        let words: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
        let done = AtomicBool::new(false);
        let whole = |word: u64| word >> 32 == word & 0xffff_ffff;
        let mut changes = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    value = value.wrapping_add(0x1_0000_0001) & 0x7fff_ffff_7fff_ffff;
                    words.iter().for_each(|word| word.store(value, Ordering::Relaxed));
                }
            });
            let mut last = [0; WIDTH];
            for round in 0..2_000_000_u64 {
                let numbers = core::array::from_fn(|lane| (round + 9 * lane as u64) % 64);
                let gathered = together.gather(&words, &numbers);
                assert!(gathered.iter().all(|word| whole(*word)), "{gathered:x?}");
                let mut line = [0; WIDTH];
                together.line(words[round as usize % 57..].first_chunk().expect("more words"), &mut line);
                assert!(line.iter().all(|word| whole(*word)), "{line:x?}");
                changes += u32::from(gathered != last);
                last = gathered;
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(changes > 1_000, "nobody wrote meanwhile: {changes} changes");
    }
}
