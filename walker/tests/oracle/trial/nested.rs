//! The sheets `nested`, `nested over EPT`, `EPT entry` and `EPT rights`: every guest mode over every host format, and over EPT.
//!
//! The second dimension meets each of the guest's addresses: that of each table's entry and the final one. One entry of one of
//! those nested walks turns at a time, through one defect of each kind, against the rights of the guest's leaf, the size of the
//! nested page, the host's and the guest's controls, and the access. What else an entry holds is drawn: no rule looks at two
//! nested entries at once but the accumulation of rights, which the sheet `rights` turns in one dimension.
//!
//! EPT has entries of its own. `EPT entry` turns the bits of one of them. What an entry means depends on what is translated for, not on
//! the guest's mode: a guest without paging has final addresses alone, one of 4-level paging tables, and one of PAE paging PDPTEs;
//! the accessed and dirty bits are drawn. `EPT rights` turns the rights of all entries that lead to one address, for a guest without
//! paging; they accumulate by AND, so that for a guest with paging, whose own rights turn as well, those of the leaf and of one
//! other level have to do. W without R is left out as that ends the walk.

use fastrand::Rng;

use super::ground::{Ground, HIGH, LOW, ROM};
use super::host::{Building, EPT_RIGHTS, EPT_RIGHTS_ALLOWED, Host, defect, states};
use super::odometer::Reading;
use super::path::{BIT_7, PAGE, PRESENT, Path, Shape, USER, WRITE, table};
use super::setup::{Controls, Setup};
use super::sheets::{ACCESS_WHEELS, ANY_CPU, Sheet, request};
use crate::oracle::{Cpu, EptControls, EptOffers, Second};

/// Where the nested tables start; the pages below are the guest's.
const NESTED_ROOT: u64 = 8 * PAGE;

/// The highest width of an nGPA that both sides can hold, by the lowest bit in which the nGPAs of a case differ above the page
/// they stand for.
fn apart(guest: Shape, host: Shape) -> u32 {
    match (guest.0, host.0) {
        (_, 2) => 22,
        (4 | 5, 4 | 5) => 39,
        _ => 21,
    }
}

/// The nGPA number `n` that stands for `page`: their low bits are equal, so that nested leaves of every size lead there.
fn nested_address(apart: u32, n: u64, page: u64) -> u64 {
    n << apart | page & ((1 << apart.min(30)) - 1)
}

/// What turns in the nested walk of one of the addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// One defect of one entry.
    Defect,
    /// The bits of one EPT entry.
    EptEntry,
    /// The rights of all of its EPT entries.
    EptRights,
}

pub(crate) fn nested(guest: Shape, host: Host, turn: Turn, rng: &mut Rng) -> Sheet {
    let apart = apart(guest, host.shape());
    let setups: Vec<Setup> = (0..32).map(|number| setup(guest, host, apart, number, rng)).collect();
    let targets = u64::from(guest.0) + 1;
    let nested_leaves = u64::from(host.shape().largest_leaf());
    let rights = EPT_RIGHTS_ALLOWED.len() as u64;
    let paged = guest.0 > 0;
    // One level that turns; of the guest, the size of the page and its rights. What a sheet does not turn is drawn.
    let one_level = if turn == Turn::EptRights && !paged { 1 } else { u64::from(host.levels()) };
    let (guest_leaves, guest_rights) = match turn {
        _ if !paged => (1, 1),
        Turn::EptEntry => (1, 1),
        _ => (u64::from(guest.largest_leaf()), 8),
    };
    let mut wheels = vec![setups.len() as u64, targets, one_level, nested_leaves, guest_leaves, guest_rights];
    match turn {
        Turn::Defect => wheels.push(states(host)),
        // Rights; memory type; bits 6, 7 and 60; one reserved bit.
        Turn::EptEntry => wheels.extend([16, 8, 2, 2, 2, 6]),
        Turn::EptRights if paged => wheels.extend([rights, rights]),
        Turn::EptRights => wheels.extend(vec![rights; host.levels() as usize]),
    }
    wheels.extend(ACCESS_WHEELS);
    let lay = move |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        let setup = &setups[number];
        let target = reading.take() as usize;
        let turned_level = reading.take() as usize + 1;
        let turned_leaf = reading.take() as u32 + 1;
        let (leaf, guest_rights) = (reading.take() as u32, reading.take());
        let (leaf, guest_rights) = match turn {
            _ if !paged => (0, guest_rights),
            Turn::EptEntry => (rng.u32(1..=guest.largest_leaf()), rng.u64(..8)),
            _ => (leaf + 1, guest_rights),
        };

        // Each address the second dimension meets: its nGPA, and the page it stands for. First the guest's tables, but for one
        // that registers stand for.
        let top = if setup.system.pdpte_registers.is_some() { 2 } else { guest.0 };
        let linear = if guest.0 == 0 { rng.u64(..LOW.pages * PAGE) } else { guest.linear(rng) };
        let mut path = Path::new(linear, guest, leaf, LOW);
        let mut met = Vec::with_capacity(6);
        for level in (leaf.max(1)..=top).rev() {
            let home = match rng.u32(..8) {
                0 if level < top => ROM,
                1 if level < top => HIGH,
                _ => LOW,
            };
            let page = table(home, level);
            path.tables[level as usize] = page + if (guest.0, level) == (3, 3) { 0x20 } else { 0 };
            met.push((nested_address(apart, met.len() as u64 + 1, page), page));
        }
        // Then the page. In a larger guest page, bits of the linear address choose it.
        let page = match leaf {
            0 => linear & !0xfff,
            1 => [LOW.start + 60 * PAGE, ROM.start, HIGH.start, 0x40_0000][rng.usize(..4)],
            leaf => linear & ((1 << guest.shift(leaf)) - 1) & !0xfff,
        };
        let last = met.len();
        met.push(match leaf {
            0 => (page, page),
            leaf => {
                let address = nested_address(apart, last as u64 + 1, page);
                let within = (1 << guest.shift(leaf)) - 1;
                (address & !within | linear & within & !0xfff, page)
            }
        });
        for (n, level) in (leaf.max(1)..=top).rev().enumerate() {
            let to = met[n + 1].0;
            let entry = &mut path.entries[level as usize];
            *entry = guest.sound(level) | rng.u64(..) & guest.free(level);
            if level > leaf {
                *entry |= to & !0xfff | if (guest.0, level) == (3, 3) { 0 } else { rng.u64(..2) << 9 };
                continue;
            }
            *entry &= !(WRITE | USER);
            *entry |= (guest_rights & 1) << 1 | (guest_rights >> 1 & 1) << 2 | (guest_rights >> 2) << 63;
            *entry |= guest.held(level, to) | if level > 1 { BIT_7 } else { 0 };
        }
        let target = target.min(last);
        let mut state = 0;
        if turn == Turn::Defect {
            state = reading.take();
            if state == states(host) - 1 && target > 0 {
                // More than four levels can translate; or, of a 2-level guest, than its host has mapped.
                path.entries[top as usize + 1 - target] |= 1 << rng.u32(32..52);
            }
        }
        for level in leaf.max(1)..=top {
            path.entries[level as usize] &= guest.entry_mask();
        }
        if guest.0 > 0 {
            path.lay(ground);
        }

        let mut digits = [0; 6];
        let mut turned_rights = [EPT_RIGHTS; 6];
        match turn {
            Turn::Defect => {}
            Turn::EptEntry => digits = std::array::from_fn(|_| reading.take()),
            Turn::EptRights if paged => {
                turned_rights[turned_level] = EPT_RIGHTS_ALLOWED[reading.take() as usize];
                turned_rights[turned_leaf as usize] &= EPT_RIGHTS_ALLOWED[reading.take() as usize];
            }
            Turn::EptRights => {
                for rights in turned_rights.iter_mut().skip(1).take(host.levels() as usize) {
                    *rights = EPT_RIGHTS_ALLOWED[reading.take() as usize];
                }
            }
        }
        let root = host_root(host);
        let mut building = Building { ground, host, root, free: NESTED_ROOT + PAGE };
        let mut turned_at = [0; 6];
        for (n, &(address, page)) in met.iter().enumerate() {
            let leaf = if n == target { turned_leaf } else { rng.u32(1..=largest_leaf(setup, host)) };
            let at = building.map(address, page, leaf, rng);
            if n == target {
                turned_at = at;
            }
        }
        // Few combinations make a supervisor shadow stack: now and then it is one, or nearly.
        let marked = rng.u32(..4) == 0;
        for (level, at) in turned_at.into_iter().enumerate().skip(1).take(host.levels() as usize) {
            let rights = (turn == Turn::EptRights).then_some(turned_rights[level]);
            if at == 0 || (rights.is_none() && level != turned_level) {
                continue;
            }
            let entry = building.ground.entry(at, host.entry_bytes());
            let turned = match (rights, turn) {
                (Some(_), _) if marked => supervisor_shadow_stack(entry, level == turned_leaf as usize, rng),
                (Some(rights), _) => entry & !EPT_RIGHTS | rights,
                (None, Turn::EptEntry) => ept_entry(entry, digits, rng),
                (None, _) => defect(host, entry, state, rng),
            };
            building.ground.place(at, host.entry_bytes(), turned);
        }
        (number, request(reading, linear, rng.u32(..)))
    };
    let name = match (turn, host) {
        (Turn::Defect, Host::Npt(_)) => "nested",
        (Turn::Defect, Host::Ept(_)) => "nested over EPT",
        (Turn::EptEntry, _) => "EPT entry",
        (Turn::EptRights, _) => "EPT rights",
    };
    Sheet { name, wheels, setups, share: 6, lay: Box::new(lay) }
}

fn host_root(host: Host) -> u64 {
    NESTED_ROOT + if host == Host::Npt(Shape(3)) { 0xfe0 } else { 0 }
}

fn setup(guest: Shape, host: Host, apart: u32, number: u64, rng: &mut Rng) -> Setup {
    let on = |bit: u64| number >> bit & 1 == 1;
    let maxphyaddr = 48;
    let second = match host {
        Host::Npt(shape) => {
            // WP, SMEP, SMAP, PKE, PKS and CET of the host must change nothing.
            let host = Controls { nxe: on(0), pse: on(2), ..Controls::numbered(shape, rng.u64(..64)) };
            let encryption_bit = (shape.0 > 2 && rng.u32(..4) == 0).then(|| rng.u32(48..52));
            let cpu = Cpu { amd: on(1), maxphyaddr, page1gb: on(2), encryption_bit };
            let ncr3 = host_root(Host::Npt(shape)) | rng.u64(..4) << 3;
            Second::Npt { ncr3, host: host.registers(0), cpu, gmet: on(4) }
        }
        Host::Ept(levels) => {
            let controls = EptControls {
                mode_based_execute: on(0),
                // As KVM has it, now and then.
                tables_written: rng.u32(..8) == 0,
            };
            let offers = EptOffers {
                execute_only: rng.u32(..4) != 0,
                pages_2_mib: on(2) || rng.bool(),
                pages_1_gib: on(2),
                advanced_information: rng.bool(),
            };
            let flags = u64::from(on(1)) << 6 | u64::from(on(4)) << 7;
            let eptp = host_root(host) | u64::from(levels - 1) << 3 | [0, 6][rng.usize(..2)] | flags;
            Second::Ept { eptp, controls, offers, cpu: Cpu { maxphyaddr, ..ANY_CPU } }
        }
    };
    let controls = Controls { nxe: on(3), ..Controls::numbered(guest, rng.u64(..64)) };
    let address = |level| nested_address(apart, 1, table(LOW, level));
    // Of PAE guests, every other one has PDPTE registers.
    if guest.0 == 3 && rng.bool() {
        let pdptes = [address(2) | PRESENT, address(2) | PRESENT, address(2) | PRESENT, !PRESENT];
        return Setup::with_pdptes(controls.registers(0x20), ANY_CPU, Some(pdptes), Some(second));
    }
    let root = address(guest.0) + if guest.0 == 3 { 0x20 } else { 0 };
    Setup::new(controls.registers(root), ANY_CPU, Some(second))
}

/// The highest level at which the second dimension may map a page.
fn largest_leaf(setup: &Setup, host: Host) -> u32 {
    match setup.system.second {
        Some(Second::Npt { cpu, .. }) if !cpu.page1gb => host.shape().largest_leaf() - 1,
        Some(Second::Ept { offers, .. }) => match (offers.pages_2_mib, offers.pages_1_gib) {
            (_, true) => 3,
            (true, false) => 2,
            (false, false) => 1,
        },
        _ => host.shape().largest_leaf(),
    }
}

/// Of a supervisor shadow stack: W above the leaf, which itself has bit 60 and need not have W; or now and then one of these wrong.
fn supervisor_shadow_stack(entry: u64, leaf: bool, rng: &mut Rng) -> u64 {
    const MARK: u64 = 1 << 60;
    let sound = match leaf {
        true => entry & !EPT_RIGHTS | MARK | [0x405, 0x407, 0x001][rng.usize(..3)],
        false => entry | EPT_RIGHTS,
    };
    match (leaf, rng.u32(..16)) {
        (true, 0) => sound & !MARK,
        (_, 1) => sound & !0b11,
        (false, 2) => sound & !0b10,
        _ => sound,
    }
}

/// An EPT entry that refers to the same address, with bits turned.
fn ept_entry(entry: u64, digits: [u64; 6], rng: &mut Rng) -> u64 {
    let [rights, memory_type, flags @ .., reserved] = digits;
    let mut turned = entry & !(EPT_RIGHTS | 0xf8 | 1 << 60) | rights & 7 | (rights >> 3) << 10;
    turned |= memory_type << 3;
    for (bit, flag) in [6, 7, 60].into_iter().zip(flags) {
        turned |= flag << bit;
    }
    turned | [0, 0, 1 << 12, 1 << 20, 1 << 29, 1 << rng.u32(48..52)][reserved as usize]
}
