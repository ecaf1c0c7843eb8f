//! What one executed access goes through: drawn at random, or counted through by an odometer.

use fastrand::Rng;

use pagewalk::PagingMode;

use super::ground::{Act, RAM_BYTES};
use super::shape::Shape;
use super::{ACCESSED, DIRTY, Maker, NO_EXECUTE, PAGE_SIZE, PRESENT, USER, Vcpu, WRITE, when};

/// The registers that all cases under one root share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Controls {
    pub(crate) vcpu: usize,
    pub(crate) wp: bool,
    pub(crate) nxe: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) pke: bool,
    /// Decides in 32-bit paging alone.
    pub(crate) pse: bool,
    pub(crate) pkru: u32,
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

impl Entry {
    const UNUSED: Entry = Entry {
        state: State::Absent,
        write: false,
        user: false,
        no_execute: false,
        accessed: false,
        dirty: false,
    };
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) act: Act,
    pub(crate) cpl: u8,
    pub(crate) ac: bool,
    /// The level of the case's leaf.
    pub(crate) leaf: u32,
    /// By level, the PTE first. Above the highest level of the mode, unused.
    entries: [Entry; 5],
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
            pse: rng.u32(0..3) != 0,
            pkru: 0,
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
            pse: false,
            pkru: 0,
        })
    }
}

impl Case {
    /// Biased so that accesses reach the leaf about as often as not, and pass it about as often as not. `largest` is the
    /// highest level that may hold a leaf.
    pub(crate) fn sample(rng: &mut Rng, shape: Shape, largest: u32) -> Case {
        let act = match rng.u32(0..100) {
            0..28 => Act::Load,
            28..56 => Act::Store,
            56..80 => Act::Fetch,
            80..84 => Act::StackLoad,
            84..88 => Act::StackStore,
            88..94 => Act::DescriptorLoad,
            _ => Act::DescriptorTouch,
        };
        let leaf = match rng.u32(0..10) {
            0..2 if largest > 2 => 3,
            0..4 if largest > 1 => 2,
            _ => 1,
        };
        let outside_leaf = !act.is_implicit() && rng.u32(0..20) == 0;
        let generous = *rng.choice(&[60, 90, 97]).unwrap();
        let supervisor_page = rng.u32(0..3) == 0;
        let entries = std::array::from_fn(|below| {
            let mut chance = |percent: u32| rng.u32(0..100) < percent;
            let state = if chance(5) {
                State::Absent
            } else if chance(5) {
                State::Reserved
            } else if if below + 1 == leaf as usize { outside_leaf } else { chance(1) } {
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
            leaf,
            entries,
            non_canonical: shape.is_long() && !act.is_implicit() && rng.u32(0..40) == 0,
            noise: rng.u32(0..4) == 0,
        }
    }

    /// The entry of `level`, referring to `frame`.
    pub(crate) fn entry(&self, rng: &mut Rng, shape: Shape, level: u32, frame: u64, vcpu: &Vcpu) -> u64 {
        let Entry { state, write, user, no_execute, accessed, dirty } = self.entries[level as usize - 1];
        let large = level > 1 && level == self.leaf;
        let mut entry = frame | when(large, PAGE_SIZE);
        for (set, bit) in [
            (state != State::Absent, PRESENT),
            (write, WRITE),
            (user, USER),
            (no_execute && shape.mode != PagingMode::TwoLevel, NO_EXECUTE),
            (accessed, ACCESSED),
            (dirty, DIRTY),
        ] {
            entry |= when(set, bit);
        }
        if self.noise {
            entry |= rng.u64(..) & ignored(shape, level, large, vcpu.maker);
        }
        if state == State::Outside {
            entry = if shape.mode == PagingMode::TwoLevel {
                outside_of_two_levels(rng, entry, large)
            } else {
                let size = if large { shape.shift(level) } else { 12 };
                let first = (RAM_BYTES >> size).max(1);
                let number =
                    if rng.bool() { first } else { rng.u64(first..1 << (u32::from(vcpu.maxphyaddr) - size)) };
                entry & !0x000f_ffff_ffff_f000 | number << size
            };
        }
        if state == State::Reserved || state == State::Absent && self.noise {
            entry |= reserved(rng, shape, level, large, vcpu);
        }
        entry
    }
}

/// Bits of an entry that no walk looks at: PWT, PCD, 11:9; in long mode 58:52 and the protection key; PAT and G of a leaf,
/// where G is ignored above it.
fn ignored(shape: Shape, level: u32, large: bool, maker: Maker) -> u64 {
    let high = when(shape.is_long(), 0x7ff << 52);
    let more = match (level, large) {
        (1, _) => 1 << 7 | 1 << 8,
        (_, true) => 1 << 8 | 1 << 12,
        (4 | 5, _) if maker == Maker::Amd => 0,
        _ => 1 << 8,
    };
    0b11 << 3 | 0b111 << 9 | high | more
}

/// A table, or a 4 MiB frame of 36-bit addresses, that is not in memory.
fn outside_of_two_levels(rng: &mut Rng, entry: u64, large: bool) -> u64 {
    if large {
        let number = if rng.bool() { RAM_BYTES >> 22 } else { rng.u64(RAM_BYTES >> 22..1 << 14) };
        entry & 0x1fff | number >> 10 << 13 | (number & 0x3ff) << 22
    } else {
        let number = if rng.bool() { RAM_BYTES >> 12 } else { rng.u64(RAM_BYTES >> 12..1 << 20) };
        entry & 0xfff | number << 12
    }
}

/// One bit that the manuals reserve in a present entry of `level`, whatever EFER.NXE says; none where there is none.
fn reserved(rng: &mut Rng, shape: Shape, level: u32, large: bool, vcpu: &Vcpu) -> u64 {
    if shape.mode == PagingMode::TwoLevel {
        return when(large, 1 << rng.u32(u32::from(vcpu.maxphyaddr) - 19..22));
    }
    let address = 1 << rng.u32(u32::from(vcpu.maxphyaddr)..if shape.is_long() { 52 } else { 63 });
    let below_frame = 1 << rng.u32(13..if level == 3 { 30 } else { 21 });
    let choices = match level {
        4 | 5 if vcpu.maker == Maker::Amd => vec![address, PAGE_SIZE, 1 << 8],
        4 | 5 => vec![address, PAGE_SIZE],
        _ if large => vec![address, below_frame],
        // Where a PDPTE may map 1 GiB, the address of a table is below any frame of one.
        3 => vec![address, PAGE_SIZE],
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
        let leaf = if large { 2 } else { 1 };
        let entries = std::array::from_fn(|below| {
            if below + 1 < leaf as usize {
                return Entry::UNUSED;
            }
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
                accessed: if below + 1 == leaf as usize { accessed } else { upper_accessed } != 0,
                dirty: below + 1 == leaf as usize && dirty != 0,
            }
        });
        Some(Case {
            act: [Act::Load, Act::Store, Act::Fetch][act as usize],
            cpl: if cpl == 0 { 0 } else { 3 },
            ac: ac != 0,
            leaf,
            entries,
            non_canonical: false,
            noise: false,
        })
    }
}
