//! What one executed access goes through: drawn at random, or counted through by an odometer.

use fastrand::Rng;

use super::ground::{Act, RAM_BYTES};
use super::{ACCESSED, DIRTY, Maker, NO_EXECUTE, PAGE_SIZE, PRESENT, USER, WRITE, when};

/// The registers that all cases under one root share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Controls {
    pub(crate) vcpu: usize,
    pub(crate) wp: bool,
    pub(crate) nxe: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) pke: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Present,
    Absent,
    Reserved,
    /// Present, and referring to a table or frame outside memory.
    Outside,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    state: State,
    write: bool,
    user: bool,
    no_execute: bool,
    accessed: bool,
    dirty: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) act: Act,
    pub(crate) cpl: u8,
    pub(crate) ac: bool,
    pub(crate) large: bool,
    /// PML4E first.
    entries: [Entry; 4],
    pub(crate) non_canonical: bool,
    /// Bits that no walk looks at are drawn too.
    noise: bool,
}

impl Controls {
    pub(crate) fn sample(rng: &mut Rng, vcpus: usize) -> Controls {
        Controls {
            vcpu: rng.usize(0..vcpus),
            wp: rng.bool(),
            nxe: rng.u32(0..4) != 0,
            smep: rng.bool(),
            smap: rng.bool(),
            pke: rng.bool(),
        }
    }

    /// Every combination of WP, NXE, SMEP and SMAP.
    pub(crate) fn all() -> impl Iterator<Item = Controls> {
        (0..16).map(|bits| Controls {
            vcpu: 0,
            wp: bits & 1 != 0,
            nxe: bits & 2 != 0,
            smep: bits & 4 != 0,
            smap: bits & 8 != 0,
            pke: false,
        })
    }
}

impl Case {
    /// Biased so that accesses reach the leaf about as often as not, and pass it about as often as not.
    pub(crate) fn sample(rng: &mut Rng) -> Case {
        let act = match rng.u32(0..100) {
            0..28 => Act::Load,
            28..56 => Act::Store,
            56..80 => Act::Fetch,
            80..84 => Act::StackLoad,
            84..88 => Act::StackStore,
            88..94 => Act::DescriptorLoad,
            _ => Act::DescriptorTouch,
        };
        let large = rng.u32(0..5) < 2;
        let outside_leaf = !act.is_implicit() && rng.u32(0..20) == 0;
        let generous = *rng.choice(&[60, 90, 97]).unwrap();
        let supervisor_page = rng.u32(0..3) == 0;
        let leaf = if large { 2 } else { 3 };
        let entries = std::array::from_fn(|level| {
            let mut chance = |percent: u32| rng.u32(0..100) < percent;
            let state = if chance(5) {
                State::Absent
            } else if chance(5) {
                State::Reserved
            } else if if level == leaf { outside_leaf } else { chance(1) } {
                State::Outside
            } else {
                State::Present
            };
            let user = chance(generous) && !(supervisor_page && chance(50));
            Entry {
                state,
                write: chance(generous),
                user,
                no_execute: !chance(generous),
                accessed: chance(50),
                dirty: chance(50),
            }
        });
        Case {
            act,
            cpl: if rng.bool() { 3 } else { 0 },
            ac: rng.bool(),
            large,
            entries,
            non_canonical: !act.is_implicit() && rng.u32(0..40) == 0,
            noise: rng.u32(0..4) == 0,
        }
    }

    /// The entry of `level` (0 is the PML4E), referring to `frame`, which brings its own page-size bit.
    pub(crate) fn entry(&self, rng: &mut Rng, level: usize, frame: u64, maker: Maker, maxphyaddr: u8) -> u64 {
        let Entry { state, write, user, no_execute, accessed, dirty } = self.entries[level];
        let large = frame & PAGE_SIZE;
        let mut entry = frame;
        for (set, bit) in [
            (state != State::Absent, PRESENT),
            (write, WRITE),
            (user, USER),
            (no_execute, NO_EXECUTE),
            (accessed, ACCESSED),
            (dirty, DIRTY),
        ] {
            entry |= when(set, bit);
        }
        if self.noise {
            // PWT, PCD, ignored bits 11:9 and 58:52, the protection key; PAT and G of a leaf, where G is ignored above it.
            entry |= rng.u64(..) & (0b11 << 3 | 0b111 << 9 | 0x7ff << 52);
            let more = match (level, large != 0) {
                (3, _) => 1 << 7 | 1 << 8,
                (_, true) => 1 << 8 | 1 << 12,
                (0, _) if maker == Maker::Amd => 0,
                _ => 1 << 8,
            };
            entry |= rng.u64(..) & more;
        }
        if state == State::Outside {
            let size = if large != 0 { 21 } else { 12 };
            let first = RAM_BYTES >> size;
            let number = if rng.bool() { first } else { rng.u64(first..1 << (maxphyaddr - size)) };
            entry = entry & !0x000f_ffff_ffff_f000 | number << size;
        }
        if state == State::Reserved || state == State::Absent && self.noise {
            entry |= reserved(rng, level, large != 0, maker, maxphyaddr);
        }
        entry
    }
}

/// One bit that the manuals reserve in a present entry of `level`, whatever EFER.NXE says.
fn reserved(rng: &mut Rng, level: usize, large: bool, maker: Maker, maxphyaddr: u8) -> u64 {
    let address = 1 << rng.u32(u32::from(maxphyaddr)..52);
    let below_frame = 1 << rng.u32(13..21);
    let choices = match level {
        0 if maker == Maker::Amd => vec![address, PAGE_SIZE, 1 << 8],
        0 => vec![address, PAGE_SIZE],
        // Where a PDPTE may map 1 GiB, the address of a table is below any frame of one.
        1 => vec![address, PAGE_SIZE],
        _ if large => vec![address, below_frame],
        _ => vec![address],
    };
    *rng.choice(&choices).unwrap()
}

/// Radices of the odometer: load, store or fetch; CPL; AC; accessed bits above the leaf; the leaf's accessed and dirty
/// bit; then the page size together with the entries' rights and states, last because it is not a rectangle.
const WHEELS: [u64; 6] = [3, 2, 2, 2, 2, 2];
/// Present with the eight combinations of W, U and NX; absent; reserved.
const ENTRY: u64 = 10;

#[derive(Default)]
pub(crate) struct Odometer {
    turned: u64,
}

impl Odometer {
    fn cases() -> u64 {
        WHEELS.iter().product::<u64>() * (ENTRY.pow(4) + ENTRY.pow(3))
    }

    pub(crate) fn is_done(&self) -> bool {
        self.turned == Odometer::cases()
    }

    pub(crate) fn next(&mut self) -> Option<Case> {
        if self.is_done() {
            return None;
        }
        let mut rest = self.turned;
        self.turned += 1;
        let mut turn = |radix: u64| {
            let digit = rest % radix;
            rest /= radix;
            digit
        };
        let [act, cpl, ac, upper_accessed, accessed, dirty] = WHEELS.map(&mut turn);
        let large = rest >= ENTRY.pow(4);
        let mut digits = if large { rest - ENTRY.pow(4) } else { rest };
        let leaf = if large { 2 } else { 3 };
        let entries = std::array::from_fn(|level| {
            let digit = digits % ENTRY;
            digits /= ENTRY;
            let state = match digit {
                8 => State::Absent,
                9 => State::Reserved,
                _ => State::Present,
            };
            // Absent and reserved entries grant everything: nothing else must refuse first.
            let rights = if digit < 8 { digit } else { 0b011 };
            Entry {
                state,
                write: rights & 1 != 0,
                user: rights & 2 != 0,
                no_execute: rights & 4 != 0,
                accessed: if level == leaf { accessed } else { upper_accessed } != 0,
                dirty: level == leaf && dirty != 0,
            }
        });
        Some(Case {
            act: [Act::Load, Act::Store, Act::Fetch][act as usize],
            cpl: if cpl == 0 { 0 } else { 3 },
            ac: ac != 0,
            large,
            entries,
            non_canonical: false,
            noise: false,
        })
    }
}
