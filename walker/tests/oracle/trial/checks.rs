//! The sheets `shadow stack` and `masking`.
//!
//! `shadow stack`: what makes a page one is R/W of every entry and D of the leaf, and whose it is, U/S of every entry. Here one of
//! these has the wrong value at one level, against the control bits, the access and the key; `rights` has all values of all levels,
//! of which few make a shadow stack.
//!
//! `masking`: decided before any entry is read, by the address's upper bits, the registers, the kind of access and its segment. The
//! address is a canonical one with drawn metadata, and one or two further bits are turned over.

use fastrand::Rng;

use super::ground::{Ground, LOW};
use super::odometer::Reading;
use super::path::{DIRTY, Path, Shape, USER, WRITE, canonical};
use super::setup::{Controls, Setup};
use super::sheets::{ACCESS_WHEELS, ANY_CPU, Sheet, request, root, rooted};
use crate::oracle::{Cpu, Request};

pub(crate) fn shadow_stack(shape: Shape, leaf: u32) -> Sheet {
    // A PDPTE of PAE paging has neither R/W nor U/S.
    let top = if shape.0 == 3 { 2 } else { shape.0 };
    let levels = u64::from(top - leaf + 1);
    // What is wrong of R/W and D: nothing, the leaf's R/W, its D, R/W of one level, or of any. Where U/S is clear: nowhere, or on
    // one level.
    let mut wheels = vec![32, levels + 4, levels + 1, 4];
    wheels.extend(ACCESS_WHEELS);
    let setups = (0..32)
        .map(|number| {
            // CET is set in all of them, and WP with it.
            let controls = Controls { cet: true, ..Controls::numbered(shape, number << 1 | 1) };
            rooted(controls, LOW, ANY_CPU, number)
        })
        .collect();
    let lay = move |reading: &mut Reading, _: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        let mut path = Path::new(shape.linear(rng), shape, leaf, LOW);
        path.tables[shape.0 as usize] = root(shape, LOW);
        for level in leaf..=shape.0 {
            path.entries[level as usize] |= rng.u64(..) & shape.free(level);
        }
        let leaf_entry = &mut path.entries[leaf as usize];
        *leaf_entry = *leaf_entry & !WRITE | DIRTY | shape.frame(leaf, rng);
        match reading.take() {
            0 => {}
            1 => *leaf_entry |= WRITE,
            2 => *leaf_entry &= !DIRTY,
            3 => {
                for level in leaf..=top {
                    path.entries[level as usize] ^= rng.u64(..) & (WRITE | DIRTY);
                }
            }
            n => path.entries[leaf as usize + n as usize - 4] &= !WRITE,
        }
        match reading.take() {
            0 => {}
            n => path.entries[leaf as usize + n as usize - 1] &= !USER,
        }
        let key = path.entries[leaf as usize] >> 59 & 15;
        let disabled = reading.take() as u32;
        let mask = 3 << (2 * key);
        path.lay(ground);
        let request = request(reading, path.linear, disabled << (2 * key) | rng.u32(..) & !mask);
        (number, Request { pkrs: rng.u32(..), ..request })
    };
    Sheet { name: "shadow stack", wheels, setups, share: 4, lay: Box::new(lay) }
}

pub(crate) fn masking(shape: Shape, rng: &mut Rng) -> Sheet {
    // CR3.LAM_U48, CR3.LAM_U57 and CR4.LAM_SUP, or EFER.UAIE.
    let mut setups = Vec::new();
    for number in 0..12 {
        let amd = number >= 8;
        let mut registers = Controls::numbered(shape, rng.u64(..64)).registers(root(shape, LOW));
        if amd {
            registers.efer |= (number & 1) << 20;
        } else {
            registers.cr3 |= (number & 1) << 62 | (number >> 1 & 1) << 61;
            registers.cr4 |= (number >> 2 & 1) << 28;
        }
        setups.push(Setup::new(registers, Cpu { amd, ..ANY_CPU }, None));
    }
    // The width that the address is canonical for, and the sign; the lowest bit of the metadata; two bits that are turned over.
    let mut wheels = vec![setups.len() as u64, 6, 4, 20, 20, 2];
    wheels.extend(ACCESS_WHEELS);
    let lay = move |reading: &mut Reading, _: &[Setup], ground: &mut Ground, rng: &mut Rng| {
        let number = reading.take() as usize;
        let width = [47, 48, 57][reading.take() as usize / 2];
        let base = canonical(rng, width);
        let metadata = [64, 63, 57, 48][reading.take() as usize];
        let mut linear = base;
        if metadata < 63 {
            // Bit 63 stays, as it tells whose pointer it is.
            let mask = (u64::MAX << metadata) & !(1 << 63);
            linear = base & !mask | rng.u64(..) & mask;
        } else if metadata == 63 {
            linear ^= 1 << 63;
        }
        // The last few of them are nothing.
        for _ in 0..2 {
            let bit = reading.take() + 46;
            linear ^= if bit < 64 { 1 << bit } else { 0 };
        }
        let stack = reading.flag();
        let request = Request { stack, ..request(reading, linear, 0) };
        // Where the address leads to if it is taken for what it was without metadata, and often otherwise.
        let mut path = Path::new(if rng.bool() { base } else { linear }, shape, 1, LOW);
        path.tables[shape.0 as usize] = root(shape, LOW);
        path.entries[1] |= shape.frame(1, rng);
        path.lay(ground);
        (number, request)
    };
    Sheet { name: "masking", wheels, setups, share: 16, lay: Box::new(lay) }
}
