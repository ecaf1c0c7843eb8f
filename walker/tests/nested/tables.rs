//! L2's tables as a soup, and NPT tables under them that mostly lead to it.
//!
//! A nested walk reads up to five guest entries, each behind a nested walk of its own: in pure soup nearly all of them
//! would end in the first. So each of L2's tables gets an nGPA, and NPT a path for it, with a 4 KiB, 2 MiB or 1 GiB leaf;
//! then trouble is put on some of these paths, and soup into what is left of NPT's tables.

use fastrand::Rng;

use crate::bed::soup::{INDICES, Recipe, address, reserved_bit, trouble};
use crate::bed::{
    ACCESSED, DIRTY, Maker, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, Ram, USER, Vcpu, WRITE, when,
};

/// All of RAM is below the smallest large page: a large leaf with frame 0 maps it.
pub(crate) const RAM_PAGES: u64 = 96;
const GUEST_TABLES: usize = 10;
/// NPT tables of each level.
const NESTED_TABLES: usize = 3;

/// A set of tables for one or two dimensions.
pub(crate) struct Tables {
    /// CR3: a GPA, or an nGPA where there is NPT.
    pub(crate) root: u64,
    pub(crate) ncr3: Option<u64>,
    /// The PDPTE registers, where L2 uses PAE paging.
    pub(crate) pdptes: Option<[u64; 4]>,
    /// GPA of every entry that may be other than zero.
    pub(crate) entries: Vec<u64>,
    /// Where L2's tables lie, in the space that L2's entries refer to.
    pub(crate) homes: Vec<u64>,
}

impl Tables {
    /// `levels` are L2's, 0 without paging; `npt_levels` are NPT's.
    pub(crate) fn cook(rng: &mut Rng, ram: Ram, vcpu: &Vcpu, levels: u32, npt_levels: Option<u32>) -> Tables {
        ram.clear();
        let mut pages: Vec<u64> = (0..RAM_PAGES).map(|page| page * PAGE).collect();
        rng.shuffle(&mut pages);
        let guest_tables: Vec<u64> = pages.drain(..GUEST_TABLES).collect();
        let mut entries = Vec::new();
        let mut homes = guest_tables.clone();
        let mut ncr3 = None;
        let mut width = vcpu.maxphyaddr;
        if let Some(npt_levels) = npt_levels {
            // nGPAs above the width of NPT are not asked for: KVM ignores these bits.
            width = width.min(12 + 9 * npt_levels as u8);
            // What 32-bit entries and addresses can refer to.
            let reach = if levels < 4 { 32 } else { width };
            let mut npt = Npt::new(rng, ram, vcpu, npt_levels, &mut pages, reach);
            homes = guest_tables.iter().map(|gpa| npt.house(rng, *gpa)).collect();
            npt.fill(rng);
            entries = npt.entries;
            ncr3 = Some(npt.tables[npt_levels as usize - 1][0]);
        }
        let recipe = Recipe {
            tables: &homes,
            trouble: if npt_levels.is_some() { mild_trouble(rng) } else { trouble(rng) },
            ram_pages: RAM_PAGES,
            width,
            maxphyaddr: vcpu.maxphyaddr,
            gib_pages: vcpu.gib_pages && levels > 3,
        };
        for table in guest_tables {
            for index in INDICES {
                if levels == 2 {
                    for index in [index, index + 512] {
                        let gpa = table + index * 4;
                        ram.write_u32(gpa, recipe.entry_of_two_levels(rng));
                        entries.push(gpa & !7);
                    }
                } else {
                    let gpa = table + index * 8;
                    let entry = if levels == 3 { recipe.entry_of_pae(rng) } else { recipe.entry(rng) };
                    ram.write(gpa, entry);
                    entries.push(gpa);
                }
            }
        }
        let pdptes = (levels == 3).then(|| std::array::from_fn(|_| recipe.pdpte(rng)));
        let root = if rng.u32(0..30) == 0 { RAM_PAGES * PAGE } else { homes[0] };
        Tables { root, ncr3, pdptes, entries, homes }
    }
}

/// Two dimensions have many more entries to go wrong on one path.
fn mild_trouble(rng: &mut Rng) -> u32 {
    if rng.bool() { 0 } else { trouble(rng) }
}

struct Npt<'a> {
    ram: Ram,
    vcpu: &'a Vcpu,
    levels: u32,
    width: u8,
    trouble: u32,
    /// By level, the lowest first.
    tables: Vec<Vec<u64>>,
    entries: Vec<u64>,
}

impl<'a> Npt<'a> {
    fn new(rng: &mut Rng, ram: Ram, vcpu: &'a Vcpu, levels: u32, pages: &mut Vec<u64>, width: u8) -> Npt<'a> {
        let tables = (0..levels).map(|_| pages.drain(..NESTED_TABLES).collect()).collect();
        Npt { ram, vcpu, levels, width, trouble: mild_trouble(rng), tables, entries: Vec::new() }
    }

    /// Picks an nGPA for the page at `gpa` and maps it there, trouble aside.
    fn house(&mut self, rng: &mut Rng, gpa: u64) -> u64 {
        let leaf_level = match rng.u32(0..10) {
            0 | 1 => 2,
            2 | 3 if self.vcpu.gib_pages => 3,
            _ => 1,
        };
        let within = (PAGE << (9 * (leaf_level - 1))) - 1;
        let mut ngpa = address(rng, self.levels) & !within | rng.u64(..) & within & !(PAGE - 1);
        if leaf_level > 1 {
            ngpa = ngpa & !within | gpa;
        }
        ngpa &= ((1 << self.width) - 1) & !(PAGE - 1);

        let mut table = self.tables[self.levels as usize - 1][0];
        for level in (1..=self.levels).rev() {
            let at = table + (ngpa >> (12 + 9 * (level - 1)) & 511) * 8;
            if self.ram.read(at) == 0 {
                let frame = if level == 1 {
                    gpa
                } else if level == leaf_level {
                    PAGE_SIZE
                } else {
                    *rng.choice(&self.tables[level as usize - 2]).unwrap()
                };
                self.ram.write(at, self.entry(rng, level, frame));
                self.entries.push(at);
            }
            table = self.ram.read(at) & 0x000f_ffff_ffff_f000;
            if level == leaf_level || table >= RAM_PAGES * PAGE {
                break;
            }
        }
        ngpa
    }

    fn entry(&self, rng: &mut Rng, level: u32, frame: u64) -> u64 {
        let mut trouble = || rng.u32(0..400) < self.trouble * 3;
        let mut entry = frame | PRESENT | WRITE | USER;
        for bit in [PRESENT, WRITE, USER] {
            entry ^= when(trouble(), bit);
        }
        entry |= when(trouble(), NO_EXECUTE);
        entry ^= when(trouble(), PAGE_SIZE);
        let (reserved, outside) = (trouble(), trouble());
        if reserved {
            let top = level > 3 && self.vcpu.maker == Maker::Amd && rng.bool();
            entry |= if top { 1 << 8 } else { reserved_bit(rng, self.vcpu.maxphyaddr) };
        }
        if outside {
            entry |= RAM_PAGES.next_power_of_two() * PAGE;
        }
        entry | rng.u64(..) & (ACCESSED | DIRTY) | when(rng.bool(), rng.u64(..) & (0b11 << 3 | 0x7ff << 52))
    }

    /// Soup for the places that no path of a table uses.
    fn fill(&mut self, rng: &mut Rng) {
        for level in 1..=self.levels as usize {
            let below: Vec<u64> = match level {
                1 => (0..RAM_PAGES).map(|page| page * PAGE).collect(),
                _ => self.tables[level - 2].clone(),
            };
            let recipe = Recipe {
                tables: &below,
                trouble: self.trouble,
                ram_pages: RAM_PAGES,
                // L2 may take these for entries of its own, and what they hold for nGPAs.
                width: self.vcpu.maxphyaddr.min(12 + 9 * self.levels as u8),
                maxphyaddr: self.vcpu.maxphyaddr,
                gib_pages: self.vcpu.gib_pages,
            };
            for table in self.tables[level - 1].clone() {
                for index in INDICES {
                    let gpa = table + index * 8;
                    if self.ram.read(gpa) == 0 {
                        self.ram.write(gpa, recipe.entry(rng));
                        self.entries.push(gpa);
                    }
                }
            }
        }
    }
}
