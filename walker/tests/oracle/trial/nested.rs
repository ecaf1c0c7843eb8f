//! The sheet `nested`: every guest mode over every host format.
//!
//! The second dimension meets each of the guest's addresses: that of each table's entry and the final one. One entry of one of
//! those nested walks turns at a time, through one defect of each kind, against the rights of the guest's leaf, the size of the
//! nested page, the host's and the guest's controls, and the access. What else an entry holds is drawn: no rule looks at two
//! nested entries at once but the accumulation of rights, which the sheet `rights` turns in one dimension.

use fastrand::Rng;

use super::ground::{Ground, HIGH, LOW, ROM};
use super::odometer::Reading;
use super::path::{ACCESSED, BIT_7, BIT_8, DIRTY, NX, PAGE, PRESENT, Path, SOUND, Shape, USER, WRITE, table};
use super::setup::{Controls, Setup};
use super::sheets::{ACCESS_WHEELS, ANY_CPU, Sheet, request};
use crate::oracle::{Cpu, Second};

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

/// Nested tables under construction.
struct Building<'a> {
    ground: &'a mut Ground,
    host: Shape,
    root: u64,
    /// The next page to take for a table.
    free: u64,
}

impl Building<'_> {
    /// Maps `address` to `page` and says where the entries for it lie, by level. Entries that another address already has are
    /// shared.
    fn map(&mut self, address: u64, page: u64, leaf: u32, rng: &mut Rng) -> [u64; 6] {
        let host = self.host;
        let mut at = [0; 6];
        let mut table = self.root;
        for level in (1..=host.0).rev() {
            let entry_address = table + host.entry_bytes() * host.index(address, level);
            at[level as usize] = entry_address;
            let present = self.ground.entry(entry_address, host.entry_bytes());
            if present & PRESENT != 0 {
                if level > 1 && present & BIT_7 != 0 {
                    return at;
                }
                table = present & 0x000f_ffff_ffff_f000 & host.entry_mask();
                continue;
            }
            let drawn = host.sound(level) | rng.u64(..) & host.free(level);
            if level == leaf {
                let size = if level > 1 { BIT_7 } else { 0 };
                let entry = drawn | size | host.held(level, page);
                self.ground.place(entry_address, host.entry_bytes(), entry);
                return at;
            }
            table = self.free;
            self.free += PAGE;
            self.ground.place(entry_address, host.entry_bytes(), drawn | table);
        }
        at
    }
}

pub(crate) fn nested(guest: Shape, host: Shape, rng: &mut Rng) -> Sheet {
    let apart = apart(guest, host);
    let guest_root = nested_address(apart, 1, table(LOW, guest.0)) + if guest.0 == 3 { 0x20 } else { 0 };
    let host_root = NESTED_ROOT + if host.0 == 3 { 0xfe0 } else { 0 };
    let mut setups = Vec::new();
    for (nxe, amd, feature, guest_nxe) in (0..16).map(|n| (n & 1 == 1, n & 2 == 2, n & 4 == 4, n & 8 == 8)) {
        // WP, SMEP, SMAP and PKE of the host must change nothing.
        let host = Controls { nxe, pse: feature, ..Controls::numbered(host, rng.u64(..64)) };
        let guest = Controls { nxe: guest_nxe, ..Controls::numbered(guest, rng.u64(..64)) };
        let cpu = Cpu { amd, maxphyaddr: 48, page1gb: feature, encryption_bit: None };
        let second =
            Second::Npt { ncr3: host_root | rng.u64(..4) << 3, host: host.registers(0), cpu, gmet: false };
        setups.push(Setup::new(guest.registers(guest_root), ANY_CPU, Some(second)));
    }
    let targets = u64::from(guest.0) + 1;
    let guest_leaves = u64::from(if guest.0 == 0 { 1 } else { guest.largest_leaf() });
    let nested_leaves = u64::from(host.largest_leaf());
    let mut wheels =
        vec![setups.len() as u64, targets, u64::from(host.0), 14, nested_leaves, guest_leaves, 8];
    wheels.extend(ACCESS_WHEELS);
    let lay = move |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        let large = match setups[number].system.second {
            Some(Second::Npt { cpu, .. }) if !cpu.page1gb => host.largest_leaf() - 1,
            _ => host.largest_leaf(),
        };
        let target = reading.take() as usize;
        let turned_level = reading.take() as usize + 1;
        let state = reading.take();
        let turned_leaf = reading.take() as u32 + 1;
        let leaf = reading.take() as u32 + if guest.0 == 0 { 0 } else { 1 };
        let guest_rights = reading.take();

        // Each address the second dimension meets: its nGPA, and the page it stands for. First the guest's tables.
        let linear = if guest.0 == 0 { rng.u64(..LOW.pages * PAGE) } else { guest.linear(rng) };
        let mut path = Path::new(linear, guest, leaf, LOW);
        let mut met = Vec::with_capacity(6);
        for level in (leaf.max(1)..=guest.0).rev() {
            let home = match rng.u32(..8) {
                0 if level < guest.0 => ROM,
                1 if level < guest.0 => HIGH,
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
        for (n, level) in (leaf.max(1)..=guest.0).rev().enumerate() {
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
        if state == 13 && target > 0 {
            // More than four levels can translate; or, of a 2-level guest, than its host has mapped.
            path.entries[guest.0 as usize + 1 - target] |= 1 << rng.u32(32..52);
        }
        for level in leaf.max(1)..=guest.0 {
            path.entries[level as usize] &= guest.entry_mask();
        }
        if guest.0 > 0 {
            path.lay(ground);
        }

        let mut building = Building { ground, host, root: host_root, free: NESTED_ROOT + PAGE };
        let mut turned_at = [0; 6];
        for (n, &(address, page)) in met.iter().enumerate() {
            let leaf = if n == target { turned_leaf } else { rng.u32(1..=large) };
            let at = building.map(address, page, leaf, rng);
            if n == target {
                turned_at = at;
            }
        }
        let at = turned_at[turned_level];
        if at != 0 {
            let entry = building.ground.entry(at, host.entry_bytes());
            let defective = defect(entry, state, rng) & host.entry_mask();
            building.ground.place(at, host.entry_bytes(), defective);
        }
        (number, request(reading, linear, rng.u32(..)))
    };
    Sheet { name: "nested", wheels, setups, share: 6, lay: Box::new(lay) }
}

/// A sound nested entry with one thing changed; nothing, for the states that change something else.
fn defect(entry: u64, state: u64, rng: &mut Rng) -> u64 {
    match state {
        1 => 0,
        2 => rng.u64(..) & !PRESENT,
        3 => entry & !WRITE,
        4 => entry & !USER,
        5 => entry | NX,
        6 => entry | 1 << rng.u32(48..52) | 1 << 21,
        7 => entry ^ BIT_7,
        8 => entry | BIT_8,
        9 => entry | 1 << 46 | 1 << 30,
        10 => entry | 1 << 13,
        11 => entry & !(ACCESSED | DIRTY),
        12 if entry & SOUND == SOUND => entry | 0xf << 59,
        _ => entry,
    }
}
