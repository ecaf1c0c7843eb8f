//! memflow's ways to translate many addresses, over memory that is mapped, as its documentation sets them up. They check
//! presence and page size. Which is best depends on the guest: all are measured.

use std::hint::black_box;

use ::memflow::architecture::x86::{X86VirtualTranslate, x64};
use ::memflow::cglue::tuple::{CTup2, CTup3};
use ::memflow::connector::MappedPhysicalMemory;
use ::memflow::mem::virt_translate::{VirtualTranslate, VirtualTranslate2};
use ::memflow::mem::{DirectTranslate, MemoryMap, VirtualDma};
use ::memflow::types::{Address, umem};

use crate::guests::{FRAME, Guest, offset};

pub(crate) const LIST: &str = "memflow virt_to_phys_list";
pub(crate) const ITER: &str = "memflow virt_to_phys_iter";

/// Addresses of one call, the best number that was found.
const CALL: usize = 1024;
/// The buffer that was found best for such calls.
const BUFFER: usize = 4 << 20;

type Mapped = MappedPhysicalMemory<&'static [u8], MemoryMap<&'static [u8]>>;

fn memory(guest: &Guest) -> Mapped {
    let mut map = MemoryMap::new();
    map.push_remap(
        Address::null(),
        (guest.words.len() * 8) as umem,
        Address::from(guest.words.as_ptr() as u64),
    );
    // SAFETY: the guest's memory outlives its contestants, and nobody writes while a bench runs.
    #[allow(unsafe_code, reason = "the peer takes its memory by address")]
    unsafe {
        Mapped::from_addrmap(map)
    }
}

fn translator(guest: &Guest) -> X86VirtualTranslate {
    x64::new_translator(Address::from(guest.root))
}

/// What a 4 KiB page's address means.
fn expected(guest: &Guest, gva: u64) -> u64 {
    let load = |gpa: u64| guest.words[(gpa / 8) as usize].load(std::sync::atomic::Ordering::Relaxed) & FRAME;
    (1..=4).rev().fold(guest.root, |table, level| load(table + offset(gva, level))) | gva & 0xfff
}

pub(crate) fn list(guest: &Guest) -> impl FnMut(&[u64]) {
    let mut peer = VirtualDma::new(memory(guest), x64::ARCH, translator(guest));
    let (mut ranges, mut found) = (Vec::with_capacity(CALL), Vec::with_capacity(CALL));
    let mut translate = move |gvas: &[u64], found: &mut Vec<(u64, u64)>| {
        ranges.clear();
        ranges.extend(gvas.iter().map(|gva| CTup2(Address::from(*gva), 1 as umem)));
        let mut out = |page: ::memflow::mem::virt_translate::VirtualTranslation| {
            found.push((page.in_virtual.to_umem(), page.out_physical.address().to_umem()));
            true
        };
        let mut fail = |_| true;
        peer.virt_to_phys_list(&ranges, (&mut out).into(), (&mut fail).into());
    };
    translate(&guest.gvas[..CALL], &mut found);
    check(guest, &mut found);
    move |gvas| {
        for gvas in gvas.chunks(CALL) {
            found.clear();
            translate(gvas, &mut found);
            black_box(&found);
        }
    }
}

pub(crate) fn iter(guest: &Guest) -> impl FnMut(&[u64]) {
    let (mut memory, translator) = (memory(guest), translator(guest));
    let mut direct = DirectTranslate::with_capacity(BUFFER);
    let mut found = Vec::with_capacity(CALL);
    let mut translate = move |gvas: &[u64], found: &mut Vec<(u64, u64)>| {
        let mut out = |page: CTup3<::memflow::types::PhysicalAddress, Address, umem>| {
            found.push((page.1.to_umem(), page.0.address().to_umem()));
            true
        };
        let mut fail = |_| true;
        let addresses = gvas.iter().map(|gva| CTup3(Address::from(*gva), Address::from(*gva), 1 as umem));
        direct.virt_to_phys_iter(
            &mut memory,
            &translator,
            addresses,
            &mut (&mut out).into(),
            &mut (&mut fail).into(),
        );
    };
    translate(&guest.gvas[..CALL], &mut found);
    check(guest, &mut found);
    move |gvas| {
        for gvas in gvas.chunks(CALL) {
            found.clear();
            translate(gvas, &mut found);
            black_box(&found);
        }
    }
}

/// The peer answers what it was asked, in an order of its own. It fails where the page before maps the same frame.
fn check(guest: &Guest, found: &mut [(u64, u64)]) {
    let mut all: Vec<(u64, u64)> =
        guest.gvas[..CALL].iter().map(|gva| (*gva, expected(guest, *gva))).collect();
    all.sort_unstable();
    assert!(found.iter().all(|answer| all.binary_search(answer).is_ok()));
    assert!(found.len() * 2 > CALL, "{} of {CALL} addresses translated", found.len());
}
