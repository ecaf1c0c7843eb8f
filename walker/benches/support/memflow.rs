//! memflow beside us: its direct translation over memory that is mapped, as its documentation sets it up. It checks presence
//! and page size.

use std::hint::black_box;
use std::time::{Duration, Instant};

use memflow::architecture::x86::{X86VirtualTranslate, x64};
use memflow::connector::MappedPhysicalMemory;
use memflow::mem::virt_translate::VirtualTranslate2;
use memflow::mem::{DirectTranslate, MemoryMap};
use memflow::types::Address;

use super::guest::Guest;

pub(crate) const NAME: &str = "memflow virt_to_phys";

type Mapped = MappedPhysicalMemory<&'static [u8], MemoryMap<&'static [u8]>>;

struct Peer {
    memory: Mapped,
    direct: DirectTranslate,
    translator: X86VirtualTranslate,
}

impl Peer {
    fn new(guest: &Guest) -> Self {
        let mut map = MemoryMap::new();
        let start = Address::from(guest.ram.words().as_ptr() as u64);
        map.push_remap(Address::null(), guest.ram.bytes(), start);
        // SAFETY: the guest's memory is never freed, and nobody writes while a bench runs.
        #[allow(unsafe_code, reason = "the peer takes its memory by address")]
        let memory = unsafe { Mapped::from_addrmap(map) };
        Self {
            memory,
            direct: DirectTranslate::new(),
            translator: x64::new_translator(Address::from(guest.root)),
        }
    }

    #[inline]
    fn translate(&mut self, gva: u64) -> memflow::error::Result<memflow::types::PhysicalAddress> {
        self.direct.virt_to_phys(&mut self.memory, &self.translator, Address::from(gva))
    }
}

pub(crate) fn chained(guest: &Guest) -> impl FnMut(u64) -> Duration {
    let mut peer = Peer::new(guest);
    let mut gva = guest.gvas[guest.gvas.len() / 2];
    move |times| {
        let start = Instant::now();
        for _ in 0..times {
            let answer = peer.translate(gva);
            gva = guest.base + answer.as_ref().map_or(0, |page| page.address().to_umem());
            let _ = black_box(&answer);
        }
        start.elapsed()
    }
}

pub(crate) fn in_a_loop(guest: &Guest) -> impl FnMut(u64) -> Duration {
    let mut peer = Peer::new(guest);
    for gva in guest.gvas.iter().step_by((guest.gvas.len() >> 16).max(1)) {
        let theirs = peer.translate(*gva).ok().map(|page| page.address().to_umem());
        assert_eq!(guest.answer(*gva), theirs, "{gva:#x}");
    }
    let mut at = guest.gvas.len() / 2;
    move |times| {
        let start = Instant::now();
        for _ in 0..times {
            let answer = peer.translate(guest.gvas[at & (guest.gvas.len() - 1)]);
            let _ = black_box(&answer);
            at += 1;
        }
        start.elapsed()
    }
}
