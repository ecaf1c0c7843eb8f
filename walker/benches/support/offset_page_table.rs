//! `x86_64`'s `OffsetPageTable` beside us. It checks presence and page size only.

use std::hint::black_box;
use std::time::{Duration, Instant};

use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::TranslateResult;
use x86_64::structures::paging::{OffsetPageTable, PageTable, Translate};

use super::guest::Guest;

pub(crate) const NAME: &str = "x86_64 OffsetPageTable";

fn tables(guest: &Guest) -> OffsetPageTable<'_> {
    let memory = guest.ram.words().as_ptr();
    let root = memory.wrapping_add((guest.root / 8) as usize).cast::<PageTable>().cast_mut();
    // SAFETY: the root is one page of the guest's memory, page-aligned, and never freed. Nobody writes while a bench
    // runs, and the peer is used to read only.
    #[allow(unsafe_code, reason = "the peer takes its tables by address")]
    let root = unsafe { &mut *root };
    // SAFETY: all tables lie in the guest's memory, which starts at this address.
    #[allow(unsafe_code, reason = "the peer takes its tables by address")]
    unsafe {
        OffsetPageTable::new(root, VirtAddr::from_ptr(memory))
    }
}

pub(crate) fn chained(guest: &Guest) -> impl FnMut(u64) -> Duration {
    let peer = tables(guest);
    let mut gva = guest.gvas[guest.gvas.len() / 2];
    move |times| {
        let start = Instant::now();
        for _ in 0..times {
            let answer = peer.translate(VirtAddr::new_truncate(gva));
            gva = guest.base
                + match &answer {
                    TranslateResult::Mapped { frame, offset, .. } => frame.start_address().as_u64() + offset,
                    _ => 0,
                };
            black_box(&answer);
        }
        start.elapsed()
    }
}

pub(crate) fn in_a_loop(guest: &Guest) -> impl FnMut(u64) -> Duration {
    let peer = tables(guest);
    for gva in &guest.gvas {
        let theirs = peer.translate_addr(VirtAddr::new_truncate(*gva)).map(x86_64::PhysAddr::as_u64);
        assert_eq!(guest.answer(*gva), theirs, "{gva:#x}");
    }
    let mut at = guest.gvas.len() / 2;
    move |times| {
        let start = Instant::now();
        for _ in 0..times {
            let answer = peer.translate(VirtAddr::new_truncate(guest.gvas[at & (guest.gvas.len() - 1)]));
            black_box(&answer);
            at += 1;
        }
        start.elapsed()
    }
}
