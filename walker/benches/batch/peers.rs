//! Those that take turns with us.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use ::x86_64::VirtAddr;
use ::x86_64::structures::paging::{OffsetPageTable, PageTable, Translate};

use crate::guests::{FRAME, Guest, offset};

pub(crate) fn x86_64(guest: &Guest) -> impl FnMut(&[u64]) {
    let memory = guest.words.as_ptr();
    let root = memory.wrapping_byte_add(guest.root as usize).cast::<PageTable>().cast_mut();
    // SAFETY: the root is one page of the guest's memory, page-aligned; nobody writes while a bench runs, and the peer is
    // used to read only.
    #[allow(unsafe_code, reason = "the peer takes its tables by address")]
    let root = unsafe { &mut *root };
    // SAFETY: all tables lie in the guest's memory, which starts at this address.
    #[allow(unsafe_code, reason = "the peer takes its tables by address")]
    let peer = unsafe { OffsetPageTable::new(root, VirtAddr::from_ptr(memory)) };
    move |gvas| {
        for gva in gvas {
            black_box(&peer.translate(VirtAddr::new_truncate(*gva)));
        }
    }
}

/// The PDE and the PTE of each address, loaded after having been asked for.
pub(crate) fn floor(guest: &Guest) -> impl FnMut(&[u64]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

    const AHEAD: usize = 32;
    let load = |gpa: u64| guest.words[(gpa / 8) as usize].load(Ordering::Relaxed);
    let known = guest.gvas.iter().map(|gva| {
        let pdpt = load(guest.root + offset(*gva, 4)) & FRAME;
        let pd = load(pdpt + offset(*gva, 3)) & FRAME;
        let pde = pd + offset(*gva, 2);
        let pte = (load(pde) & FRAME) + offset(*gva, 1);
        [pde / 8, pte / 8]
    });
    let known: Vec<[u64; 2]> = known.collect();
    let first = guest.gvas.as_ptr() as usize;
    move |gvas| {
        // The column of known addresses, beside the one of GVAs.
        let at = (gvas.as_ptr() as usize - first) / 8;
        let known = &known[at..at + gvas.len()];
        let word = |number: u64| &guest.words[number as usize];
        let mut sum = 0;
        for (next, [pde, pte]) in known.iter().skip(AHEAD).chain(&known[..AHEAD]).zip(known) {
            for ahead in next {
                let line = guest.words.as_ptr().wrapping_add(*ahead as usize);
                // SAFETY: a hint that reads nothing.
                #[allow(unsafe_code, reason = "there is no safe prefetch")]
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(line.cast());
                }
            }
            sum ^= word(*pde).load(Ordering::Relaxed) ^ word(*pte).load(Ordering::Relaxed);
        }
        black_box(sum);
    }
}
