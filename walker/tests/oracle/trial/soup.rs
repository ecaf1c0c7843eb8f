//! Random tables: entries that refer to any page, their own included, walked from everywhere in both dimensions.

use fastrand::Rng;

use super::ground::{Ground, HIGH, LOW, ROM, TOP};
use super::path::{PAGE, Shape, canonical};
use super::setup::{Controls, Setup};
use crate::oracle::{By, Cpu, EptControls, EptOffers, Kind, Request, Second};

/// Pages of [`LOW`] that hold tables.
const TABLES: u64 = 16;
/// From here on they are EPT's.
const EPT_TABLES: u64 = 12;

pub(crate) fn setup(rng: &mut Rng) -> Setup {
    let cpu = |rng: &mut Rng| Cpu {
        amd: rng.bool(),
        maxphyaddr: [32, 36, 40, 48, 52, 52][rng.usize(..6)],
        page1gb: rng.bool(),
        encryption_bit: (rng.u32(..4) == 0).then(|| rng.u32(47..52)),
    };
    let shape = Shape([0, 2, 3, 4, 4, 5, 5][rng.usize(..7)]);
    let controls = |shape: Shape, rng: &mut Rng| Controls {
        pse: rng.bool(),
        ..Controls::numbered(shape, rng.u64(..64))
    };
    let root = |rng: &mut Rng| (rng.u64(..TABLES) * PAGE) | (rng.u64(..) & 0xfff);
    let second = match rng.u32(..4) {
        0 => Some(Second::Npt {
            ncr3: root(rng),
            host: controls(Shape(rng.u32(2..=5)), rng).registers(0),
            cpu: cpu(rng),
            gmet: rng.u32(..4) == 0,
        }),
        1 => Some(ept(rng)),
        _ => None,
    };
    let pdptes = (shape.0 == 3 && second.is_none() && rng.bool())
        .then(|| [0; 4].map(|_| (rng.u64(..TABLES) * PAGE) | u64::from(rng.u32(..8) != 0)));
    // Outside long mode the upper half of CR3 is ignored.
    let ignored = if matches!(shape.0, 2 | 3) && rng.bool() { rng.u64(..) << 32 } else { 0 };
    Setup::with_pdptes(controls(shape, rng).registers(root(rng) | ignored), cpu(rng), pdptes, second)
}

fn ept(rng: &mut Rng) -> Second {
    let root = rng.u64(EPT_TABLES..TABLES) * PAGE;
    let controls = EptControls { mode_based_execute: rng.bool(), tables_written: rng.u32(..8) == 0 };
    let offers = EptOffers {
        execute_only: rng.u32(..4) != 0,
        pages_2_mib: rng.u32(..4) != 0,
        pages_1_gib: rng.u32(..4) != 0,
        advanced_information: rng.bool(),
    };
    let levels = rng.u64(4..6);
    let eptp = root | (levels - 1) << 3 | [0, 6][rng.usize(..2)] | rng.u64(..4) << 6;
    let maxphyaddr = [32, 36, 40, 48, 52, 52][rng.usize(..6)];
    let cpu = Cpu { amd: false, maxphyaddr, page1gb: true, encryption_bit: None };
    Second::Ept { eptp, controls, offers, cpu }
}

/// Fills one page of tables.
pub(crate) fn stir(ground: &Ground, rng: &mut Rng) {
    let page = rng.u64(..TABLES) * PAGE;
    if page >= EPT_TABLES * PAGE {
        let sound = rng.bool();
        for index in 0..512 {
            ground.keep(page + 8 * index, ept_entry(rng, sound));
        }
        return;
    }
    // Some pages hold sound entries only: otherwise few walks of two dimensions come to an end.
    let sound = rng.bool();
    let narrow = rng.u32(..4) == 0;
    for index in 0..512 {
        let word = match narrow {
            true => entry(rng, sound) & 0xffff_ffff | entry(rng, sound) << 32,
            false => entry(rng, sound),
        };
        ground.keep(page + 8 * index, word);
    }
}

fn ept_entry(rng: &mut Rng, sound: bool) -> u64 {
    let mut entry = 0x407 | rng.u64(..) & 0xfff0_0000_0000_0b00;
    let leaf = rng.u32(..4) == 0;
    if leaf {
        entry |= [0, 1, 4, 5, 6][rng.usize(..5)] << 3 | rng.u64(..2) << 6;
        entry |= if rng.bool() { 1 << 7 } else { rng.u64(..TABLES) * PAGE };
    } else {
        entry |= rng.u64(EPT_TABLES..TABLES) * PAGE;
    }
    match rng.u32(..if sound { 48 } else { 12 }) {
        0 => entry & !0x407,
        1 => entry & !2,
        2 => entry & !3,
        3 => entry & !4,
        4 => entry & !0x400,
        5 => entry & !(rng.u64(..) & 0x407),
        6 => entry ^ 1 << rng.u32(3..8),
        7 => entry ^ 1 << rng.u32(12..52),
        8 => entry & !2 | 1 << 60,
        9 => rng.u64(..),
        _ => entry,
    }
}

fn entry(rng: &mut Rng, sound: bool) -> u64 {
    let mut entry = (rng.u64(..TABLES) * PAGE) | 7 | (rng.u64(..) & 0x0e78);
    match rng.u32(..4) {
        // What only long mode allows.
        0 => entry |= rng.u64(..) & 0x7ff0_0000_0000_0000,
        // What a PDPTE of PAE paging allows.
        1 => entry &= !0x1e6,
        _ => {}
    }
    if rng.u32(..8) == 0 {
        entry |= 1 << 7;
        if rng.u32(..4) != 0 {
            entry &= !0x1f_e000;
        }
    }
    if sound {
        return entry;
    }
    match rng.u32(..16) {
        0 => entry & !1,
        1 | 2 => entry & !2,
        3 | 4 => entry & !4,
        5 | 6 => entry | 1 << 63,
        7 => entry | 1 << rng.u32(12..52),
        8 => entry | 1 << 8,
        9 => entry | [ROM, HIGH, TOP][rng.usize(..3)].start,
        10 => rng.u64(..),
        _ => entry,
    }
}

pub(crate) fn request(rng: &mut Rng, setup: &Setup) -> Request {
    let mut linear = canonical(rng, if setup.shape == Shape(5) { 57 } else { 48 });
    // Where a large page starts at address 0, half of the offsets should meet memory.
    if rng.bool() {
        linear &= !0x3ffc_0000 | (LOW.pages * PAGE - 1);
    }
    if rng.u32(..64) == 0 {
        linear = rng.u64(..);
    }
    Request {
        linear,
        kind: [Kind::Read, Kind::Write, Kind::Fetch, Kind::ShadowStackRead, Kind::ShadowStackWrite]
            [[0, 0, 1, 1, 2, 2, 3, 4][rng.usize(..8)]],
        by: [By::User, By::User, By::Supervisor, By::ImplicitSupervisor, By::Exempt][rng.usize(..5)],
        ac: rng.bool(),
        pkru: rng.u32(..) & rng.u32(..),
        pkrs: rng.u32(..) & rng.u32(..),
        stack: rng.bool(),
    }
}
