//! What the odometer turns: one sheet for each family of rules, each with all the wheels its rules depend on.
//!
//! The full product over every bit of every entry is out of reach, so each sheet holds the rest still or draws it anew for
//! each tuple. Reasons, sheet by sheet:
//! - `rights`: rights accumulate over all levels, so all of W, U and NX turn at once on every level. What a present and
//!   well-formed entry holds besides (accessed, dirty, keys, memory type, frame, available bits) decides nothing there that
//!   depends on the rights of other levels: it is drawn.
//! - `protection keys`: decided by the page's key, by U/S and R/W of all levels, for which the leaf's stand here (`rights` has the
//!   others), by the control bits and the access.
//! - `entry`: an entry is read by itself, so the bits of one turn at a time, under every MAXPHYADDR, vendor and feature; the
//!   others are sound. A reserved address bit is tried at both ends of the reserved range and in the middle, not 20 times.
//! - `order`: which of several defects is met first depends on their levels and not on their bits: one of each kind.
//! - `shadow stack` and `masking`, in their own file.
//! - `canonicality`: decided before any entry is read: no entry turns.
//! - `accessed and dirty`: depend on the bits themselves, on where the table lies and on the kind of access; the access is
//!   refused or allowed by one right of the leaf.
//! - `nested`, in its own file.

use fastrand::Rng;

use super::checks::{masking, shadow_stack};
use super::ground::{Ground, HIGH, LOW, ROM, Stretch, TOP};
use super::host::Host;
use super::nested::{Turn, nested};
use super::odometer::Reading;
use super::path::{
    ACCESSED, BIT_7, BIT_8, DIRTY, NX, PRESENT, Path, SOUND, Shape, USER, WRITE, canonical, table,
};
use super::setup::{Controls, Setup};
use crate::oracle::{By, Cpu, Kind, Request};

/// One family of tuples.
pub(crate) struct Sheet {
    pub(crate) name: &'static str,
    pub(crate) wheels: Vec<u64>,
    pub(crate) setups: Vec<Setup>,
    /// Its share of a run that does not do everything, in parts of the sum of all shares.
    pub(crate) share: u64,
    pub(crate) lay: Box<Lay>,
}

/// Puts a tuple's entries into memory and says what to ask, of which setup.
type Lay = dyn Fn(&mut Reading, &[Setup], &mut Ground, &mut Rng) -> (usize, Request);

/// The wheels of an access: kind, and privilege with RFLAGS.AC.
pub(crate) const ACCESS_WHEELS: [u64; 2] = [5, 7];

pub(crate) fn request(reading: &mut Reading, linear: u64, pkru: u32) -> Request {
    let kind = [Kind::Read, Kind::Write, Kind::Fetch, Kind::ShadowStackRead, Kind::ShadowStackWrite]
        [reading.take() as usize];
    let (by, ac) = [
        (By::User, false),
        (By::User, true),
        (By::Supervisor, false),
        (By::Supervisor, true),
        (By::ImplicitSupervisor, false),
        (By::ImplicitSupervisor, true),
        (By::Exempt, true),
    ][reading.take() as usize];
    Request { linear, kind, by, ac, pkru, pkrs: 0, stack: false }
}

pub(crate) const ANY_CPU: Cpu = Cpu { amd: false, maxphyaddr: 52, page1gb: true, encryption_bit: None };

/// Every sheet.
pub(crate) fn all(rng: &mut Rng) -> Vec<Sheet> {
    let mut sheets = Vec::new();
    for shape in [2, 3, 4, 5].map(Shape) {
        for leaf in 1..=shape.largest_leaf() {
            sheets.push(rights(shape, leaf));
            sheets.push(protection_keys(shape, leaf));
            sheets.push(accessed_and_dirty(shape, leaf));
            sheets.push(shadow_stack(shape, leaf));
            for level in leaf..=shape.0 {
                sheets.push(entry(shape, leaf, level, rng));
            }
        }
        sheets.push(order(shape));
    }
    sheets.push(canonicality());
    sheets.extend([4, 5].map(|levels| masking(Shape(levels), rng)));
    for guest in [0, 2, 3, 4, 5].map(Shape) {
        for host in [2, 3, 4, 5].map(|levels| Host::Npt(Shape(levels))) {
            sheets.push(nested(guest, host, Turn::Defect, rng));
        }
        for host in [4, 5].map(Host::Ept) {
            sheets.push(nested(guest, host, Turn::Defect, rng));
            if [0, 3, 4].contains(&guest.0) {
                sheets.push(nested(guest, host, Turn::EptEntry, rng));
                sheets.push(nested(guest, host, Turn::EptRights, rng));
            }
        }
    }
    sheets
}

/// The root table of a path, which outside long mode lies below 4 GiB, and in PAE paging on 32 bytes.
pub(crate) fn root(shape: Shape, home: Stretch) -> u64 {
    match shape {
        Shape(3) => table(if home.start >> 32 == 0 { home } else { LOW }, 3) + 0x60,
        shape => table(home, shape.0),
    }
}

/// The encryption bit, or not.
fn encrypted(cpu: &Cpu, rng: &mut Rng) -> u64 {
    cpu.encryption_bit.map_or(0, |bit| rng.u64(..2) << bit)
}

/// Setups of `controls` over that root: in PAE paging every other one has PDPTE registers, one of the four absent.
pub(crate) fn rooted(controls: Controls, home: Stretch, cpu: Cpu, number: u64) -> Setup {
    let root = root(controls.shape, home);
    // PWT and PCD are no part of the address.
    let registers = controls.registers(root | ((number % 4) << 3));
    let pdptes = (controls.shape.0 == 3 && number % 2 == 1).then(|| {
        let sound = table(home, 2) | PRESENT;
        [sound, sound, sound, 0xffff_ffff_ffff_fffe]
    });
    Setup::with_pdptes(registers, cpu, pdptes, None)
}

fn rights(shape: Shape, leaf: u32) -> Sheet {
    // A PDPTE of PAE paging has no rights.
    let top = if shape.0 == 3 { 2 } else { shape.0 };
    let mut wheels = vec![64];
    wheels.extend(vec![8; (top - leaf + 1) as usize]);
    wheels.extend(ACCESS_WHEELS);
    wheels.push(4);
    let home = [LOW, LOW, LOW, HIGH, HIGH, TOP][shape.0 as usize];
    let setups =
        (0..64).map(|number| rooted(Controls::numbered(shape, number), home, ANY_CPU, number / 2)).collect();
    let lay = move |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        // Without EFER.NXE bit 63 is reserved, which would end nearly every walk: `entry` and `order` have that.
        let turned = if setups[number].system.registers.efer >> 11 & 1 == 0 { 3 } else { 7 };
        let mut path = Path::new(shape.linear(rng), shape, leaf, home);
        path.tables[shape.0 as usize] = root(shape, home);
        for level in leaf..=shape.0 {
            let entry = &mut path.entries[level as usize];
            *entry |= rng.u64(..) & shape.free(level);
            if level <= top {
                let rights = reading.take() & turned;
                *entry = *entry & !(WRITE | USER)
                    | (rights & 1) << 1
                    | (rights >> 1 & 1) << 2
                    | ((rights >> 2) << 63) & shape.entry_mask()
                    | rng.u64(..) & BIT_8;
            }
        }
        let leaf_entry = &mut path.entries[leaf as usize];
        *leaf_entry |= shape.frame(leaf, rng);
        // PAT.
        *leaf_entry |= rng.u64(..2) << if leaf == 1 { 7 } else { 12 };
        let key = *leaf_entry >> 59 & 15;
        let mut request = request(reading, path.linear, 0);
        let disabled = reading.take() as u32;
        request.pkru = with_key(rng, key, disabled);
        let for_the_supervisor = rng.u32(..4);
        request.pkrs = with_key(rng, key, for_the_supervisor);
        path.lay(ground);
        (number, request)
    };
    Sheet { name: "rights", wheels, setups, share: 8, lay: Box::new(lay) }
}

fn protection_keys(shape: Shape, leaf: u32) -> Sheet {
    // CR4.PKE or CR4.PKS is set in all of them: `rights` has both clear.
    let mut wheels = vec![48, 4, 16, 4, 4];
    wheels.extend(ACCESS_WHEELS);
    let setups = (0..48)
        .map(|number| {
            let [pke, pks] = [[true, false], [false, true], [true, true]][number as usize / 16];
            let controls = Controls { pke, pks, ..Controls::numbered(shape, 32 | (number % 16)) };
            rooted(controls, LOW, ANY_CPU, number)
        })
        .collect();
    let lay = move |reading: &mut Reading, _: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        let mut path = Path::new(shape.linear(rng), shape, leaf, LOW);
        path.tables[shape.0 as usize] = root(shape, LOW);
        let (rights, key) = (reading.take(), reading.take());
        let disabled = [reading.take() as u32, reading.take() as u32];
        let leaf_entry = &mut path.entries[leaf as usize];
        *leaf_entry |= shape.frame(leaf, rng) | if shape.0 < 4 { 0 } else { key << 59 };
        *leaf_entry &= !((!rights & 3) << 1);
        // A shadow stack now and then.
        *leaf_entry |= rng.u64(..2) << 6;
        path.lay(ground);
        let request = request(reading, path.linear, with_key(rng, key, disabled[0]));
        (number, Request { pkrs: with_key(rng, key, disabled[1]), ..request })
    };
    Sheet {
        name: "protection keys",
        wheels,
        setups,
        share: if shape.0 < 4 { 2 } else { 8 },
        lay: Box::new(lay),
    }
}

/// A PKRU or IA32_PKRS that has these bits for `key`.
fn with_key(rng: &mut Rng, key: u64, disabled: u32) -> u32 {
    rng.u32(..) & !(3 << (2 * key)) | disabled << (2 * key)
}

fn entry(shape: Shape, leaf: u32, level: u32, rng: &mut Rng) -> Sheet {
    let mut setups = Vec::new();
    for maxphyaddr in [32, 36, 40, 46, 48, 51, 52] {
        for (amd, feature, nxe) in (0..8).map(|n| (n & 1 == 1, n & 2 == 2, n & 4 == 4)) {
            for encrypts in [false, true] {
                // What lets a leaf be large: 1-GByte pages of the CPU, and CR4.PSE in 2-level paging.
                let controls = Controls { nxe, pse: feature, ..Controls::numbered(shape, rng.u64(..64)) };
                let encryption_bit = encrypts.then(|| rng.u32(47..52));
                let cpu = Cpu { amd, maxphyaddr, page1gb: feature, encryption_bit };
                // Only in long mode has CR3 the bits.
                let of_the_root = if shape.0 < 4 { 0 } else { encrypted(&cpu, rng) };
                setups.push(Setup::new(controls.registers(root(shape, LOW) | of_the_root), cpu, None));
            }
        }
    }
    let mut wheels = vec![2; 8];
    wheels.extend([2, 7, 4]);
    wheels.extend(ACCESS_WHEELS);
    wheels.push(setups.len() as u64);
    let lay = move |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let mut path = Path::new(shape.linear(rng), shape, leaf, LOW);
        path.tables[shape.0 as usize] = root(shape, LOW);
        let mut turned = path.entries[level as usize] & !0xff;
        for bit in [PRESENT, WRITE, USER, NX, BIT_7, ACCESSED, DIRTY, BIT_8] {
            turned |= if reading.flag() { bit } else { 0 };
        }
        if (shape.0, level) == (3, 3) && rng.bool() {
            // Half of these bits are reserved in a PDPTE: without them now and then, nothing else would be seen.
            turned &= !(WRITE | USER | NX | BIT_7 | ACCESSED | DIRTY | BIT_8);
        }
        let key = reading.flag();
        turned |= if key && shape.0 != 3 { rng.u64(1..16) << 59 } else { 0 };
        turned |= [0, 1 << 12, 1 << 13, 1 << 20, 1 << 21, 1 << 29, 1 << 30][reading.take() as usize];
        let high = reading.take();
        turned |= rng.u64(..) & 0x0e00;
        turned |= if shape.0 == 3 && rng.u32(..8) > 0 { 0 } else { rng.u64(..) & 0x07f0_0000_0000_0000 };
        let request = request(reading, path.linear, rng.u32(..));
        let number = reading.take() as usize;
        let cpu = setups[number].system.cpu;
        let maxphyaddr = cpu.maxphyaddr;
        if shape.0 > 2 {
            for level in leaf..=shape.0 {
                path.entries[level as usize] |= encrypted(&cpu, rng);
            }
            turned |= encrypted(&cpu, rng);
        }
        turned |= match (high, shape.0) {
            (0, _) => 0,
            (1, 2) => 1 << rng.u32(13..22),
            (_, 2) => 1 << (13 + maxphyaddr.min(40) - 32 - (high as u32 - 2)),
            (1, _) => 1 << (maxphyaddr - 1),
            (2, _) => (1 << maxphyaddr) & 0x000f_ffff_ffff_ffff,
            _ => 1 << rng.u32(maxphyaddr.min(51)..52),
        };
        path.entries[level as usize] = turned & shape.entry_mask();
        path.lay(ground);
        (number, request)
    };
    Sheet { name: "entry", wheels, setups, share: 3, lay: Box::new(lay) }
}

fn order(shape: Shape) -> Sheet {
    let mut wheels = vec![9; shape.0 as usize];
    wheels.extend(ACCESS_WHEELS);
    wheels.push(8);
    let setups = (0..8)
        .map(|n| {
            let controls = Controls { nxe: n & 1 == 1, ..Controls::numbered(shape, 29) };
            let cpu = Cpu { amd: n & 2 == 2, maxphyaddr: 46, page1gb: n & 4 == 4, encryption_bit: None };
            rooted(controls, LOW, cpu, n >> 1)
        })
        .collect();
    let lay = move |reading: &mut Reading, _: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let mut path = Path::new(shape.linear(rng), shape, 1, LOW);
        path.tables[shape.0 as usize] = root(shape, LOW);
        for level in 1..=shape.0 {
            let entry = &mut path.entries[level as usize];
            match (reading.take(), shape.0) {
                (0, _) => {}
                (1, _) => *entry = 0,
                (2, _) => *entry = rng.u64(..) & !PRESENT,
                (3, 2) => *entry |= BIT_7 | 1 << 21,
                (3, _) => *entry |= 1 << rng.u32(46..52),
                (4, _) => *entry |= BIT_7,
                (5, 2) => *entry |= DIRTY,
                (5, _) => *entry |= NX,
                (6, 2) => *entry |= 1 << 30,
                (6, _) => *entry |= 1 << 40,
                (7, _) => *entry &= !WRITE,
                _ => *entry &= !USER,
            }
            *entry &= shape.entry_mask();
        }
        let request = request(reading, path.linear, 0);
        path.lay(ground);
        (reading.take() as usize, request)
    };
    Sheet { name: "order", wheels, setups, share: 8, lay: Box::new(lay) }
}

fn canonicality() -> Sheet {
    let mut wheels = vec![4, 65, 65, 2];
    wheels.extend(ACCESS_WHEELS);
    wheels.push(5);
    let setups = [0, 2, 3, 4, 5]
        .map(Shape)
        .map(|shape| Setup::new(Controls::numbered(shape, 7).registers(root(shape, LOW)), ANY_CPU, None))
        .into_iter()
        .collect();
    let lay = |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let base = match reading.take() {
            0 => 0,
            1 => u64::MAX,
            2 => canonical(rng, 48),
            _ => canonical(rng, 57),
        };
        let flipped = |bit: u64| if bit == 64 { 0 } else { 1 << bit };
        let linear = base ^ flipped(reading.take()) ^ flipped(reading.take());
        let stack = reading.flag();
        let request = Request { stack, ..request(reading, linear, 0) };
        let number = reading.take() as usize;
        let shape = setups[number].shape;
        if shape.0 > 0 {
            let mut path = Path::new(linear, shape, 1, LOW);
            path.tables[shape.0 as usize] = root(shape, LOW);
            path.entries[1] |= shape.frame(1, rng);
            path.lay(ground);
        }
        (number, request)
    };
    Sheet { name: "canonicality", wheels, setups, share: 8, lay: Box::new(lay) }
}

fn accessed_and_dirty(shape: Shape, leaf: u32) -> Sheet {
    // For each level its accessed bit and whether its table is read-only; the leaf's dirty bit and R/W.
    let mut wheels = vec![4; (shape.0 - leaf + 1) as usize];
    wheels.extend([2, 2]);
    wheels.extend(ACCESS_WHEELS);
    wheels.push(4);
    let setups = [LOW, ROM, LOW, ROM]
        .into_iter()
        .zip(0..)
        .map(|(home, n)| rooted(Controls::numbered(shape, 3), home, ANY_CPU, n / 2))
        .collect();
    let lay = move |reading: &mut Reading, setups: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let mut path = Path::new(shape.linear(rng), shape, leaf, LOW);
        let mut accessed = [false; 6];
        for level in leaf..=shape.0 {
            let digit = reading.take();
            accessed[level as usize] = digit & 1 == 1;
            if digit & 2 == 2 {
                path.tables[level as usize] = table(ROM, level);
            }
        }
        let (dirty, writable) = (reading.flag(), reading.flag());
        let request = request(reading, path.linear, 0);
        let number = reading.take() as usize;
        path.tables[shape.0 as usize] = root(shape, [LOW, ROM][number % 2]);
        if setups[number].system.pdpte_registers.is_some() {
            path.tables[2] = table([LOW, ROM][number % 2], 2);
        }
        path.sound();
        for level in leaf..=shape.0 {
            let entry = &mut path.entries[level as usize];
            *entry |= if accessed[level as usize] && *entry & SOUND == SOUND { ACCESSED } else { 0 };
        }
        let entry = &mut path.entries[leaf as usize];
        *entry |= shape.frame(leaf, rng) | if dirty { DIRTY } else { 0 };
        *entry &= if writable { u64::MAX } else { !WRITE };
        path.lay(ground);
        (number, request)
    };
    Sheet { name: "accessed and dirty", wheels, setups, share: 4, lay: Box::new(lay) }
}
