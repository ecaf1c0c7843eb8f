//! L2's tables as a soup, and tables of NPT or EPT under them that mostly lead to it.
//!
//! A nested walk reads up to five guest entries, each behind a nested walk of its own: in pure soup nearly all of them
//! would end in the first. So each of L2's tables gets an nGPA, and the second dimension a path for it, with a 4 KiB, 2 MiB
//! or 1 GiB leaf; then trouble is put on some of these paths, and soup into what is left of the second dimension's tables.

use fastrand::Rng;

use super::second::Second;
use crate::bed::soup::{INDICES, Recipe, address, reserved_bit, trouble};
use crate::bed::{
    ACCESSED, DIRTY, Maker, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, Ram, USER, Vcpu, WRITE, when,
};

/// All of RAM is below the smallest large page: a large leaf with frame 0 maps it.
pub(crate) const RAM_PAGES: u64 = 64;
const GUEST_TABLES: usize = 10;
const EPT_READ: u64 = 1 << 0;
const EPT_WRITE: u64 = 1 << 1;
const EPT_EXECUTE: u64 = 1 << 2;
/// Kinds of trouble that an entry of EPT can have.
const EPT_TROUBLES: u32 = 9;
const EPT_EXECUTE_ONLY: u32 = 2;
const EPT_READ_ONLY: u32 = 3;
const EPT_OUTSIDE: u32 = 5;
/// Tables of each level of the second dimension.
const NESTED_TABLES: usize = 3;

/// A set of tables for one or two dimensions.
pub(crate) struct Tables {
    /// CR3: a GPA, or an nGPA where there is a second dimension.
    pub(crate) root: u64,
    /// Where the second dimension's highest table lies.
    pub(crate) second_root: Option<u64>,
    /// The PDPTE registers, where L2 uses PAE paging.
    pub(crate) pdptes: Option<[u64; 4]>,
    /// GPA of every entry that may be other than zero.
    pub(crate) entries: Vec<u64>,
    /// Where L2's tables lie, in the space that L2's entries refer to.
    pub(crate) homes: Vec<u64>,
    /// Where the first of them lies in memory.
    pub(crate) first_table: u64,
}

impl Tables {
    /// `levels` are L2's, 0 without paging.
    pub(crate) fn cook(rng: &mut Rng, ram: Ram, vcpu: &Vcpu, levels: u32, second: Option<Second>) -> Tables {
        ram.clear();
        let mut pages: Vec<u64> = (0..RAM_PAGES).map(|page| page * PAGE).collect();
        rng.shuffle(&mut pages);
        let guest_tables: Vec<u64> = pages.drain(..GUEST_TABLES).collect();
        let first_table = guest_tables[0];
        let mut entries = Vec::new();
        let mut homes = guest_tables.clone();
        let mut second_root = None;
        let mut width = vcpu.maxphyaddr;
        if let Some(second) = second {
            // nGPAs above the width of the second dimension are not asked for: KVM ignores these bits.
            width = width.min(12 + 9 * second.levels() as u8);
            // What 32-bit entries and addresses can refer to.
            let reach = if levels < 4 { 32 } else { width };
            let mut below = Below::new(rng, ram, vcpu, second, &mut pages, reach);
            homes = guest_tables.iter().map(|gpa| below.house(rng, *gpa)).collect();
            if second == Second::Ept {
                below.spoil(rng);
            }
            below.fill(rng);
            second_root = below.tables.last().map(|tables| tables[0]);
            entries = below.entries;
        }
        let recipe = Recipe {
            tables: &homes,
            trouble: if second.is_some() { mild_trouble(rng) } else { trouble(rng) },
            ram_pages: RAM_PAGES,
            width,
            maxphyaddr: vcpu.maxphyaddr,
            gib_pages: vcpu.gib_pages && levels > 3,
        };
        // Where no accessed bit is left to be set, tables need not be written under EPT.
        let accessed = when(second == Some(Second::Ept) && rng.bool(), ACCESSED);
        for table in guest_tables {
            for index in INDICES {
                if levels == 2 {
                    for index in [index, index + 512] {
                        let gpa = table + index * 4;
                        ram.write_u32(gpa, recipe.entry_of_two_levels(rng) | accessed as u32);
                        entries.push(gpa & !7);
                    }
                } else {
                    let gpa = table + index * 8;
                    let entry = if levels == 3 { recipe.entry_of_pae(rng) } else { recipe.entry(rng) };
                    ram.write(gpa, entry | accessed);
                    entries.push(gpa);
                }
            }
        }
        let pdptes = (levels == 3).then(|| std::array::from_fn(|_| recipe.pdpte(rng)));
        let root = if rng.u32(0..30) == 0 { RAM_PAGES * PAGE } else { homes[0] };
        Tables { root, second_root, pdptes, entries, homes, first_table }
    }
}

/// Two dimensions have many more entries to go wrong on one path.
fn mild_trouble(rng: &mut Rng) -> u32 {
    if rng.bool() { 0 } else { trouble(rng) }
}

/// The tables of the second dimension.
struct Below<'a> {
    ram: Ram,
    vcpu: &'a Vcpu,
    second: Second,
    levels: u32,
    width: u8,
    trouble: u32,
    /// By level, the lowest first.
    tables: Vec<Vec<u64>>,
    entries: Vec<u64>,
    /// Level and GPA of the entries on the paths to L2's tables, those to its root first.
    paths: Vec<(u32, u64)>,
}

impl<'a> Below<'a> {
    fn new(
        rng: &mut Rng,
        ram: Ram,
        vcpu: &'a Vcpu,
        second: Second,
        pages: &mut Vec<u64>,
        width: u8,
    ) -> Below<'a> {
        let levels = second.levels();
        let tables = (0..levels).map(|_| pages.drain(..NESTED_TABLES).collect()).collect();
        let (entries, paths) = (Vec::new(), Vec::new());
        Below { ram, vcpu, second, levels, width, trouble: mild_trouble(rng), tables, entries, paths }
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
                self.paths.push((level, at));
            }
            table = self.ram.read(at) & 0x000f_ffff_ffff_f000;
            if level == leaf_level || table >= RAM_PAGES * PAGE {
                break;
            }
        }
        ngpa
    }

    /// Puts trouble into one entry of a path, at every level alike: few entries are high ones. Often it is the root's path,
    /// which every address needs.
    fn spoil(&self, rng: &mut Rng) {
        if rng.bool() {
            return;
        }
        let (wanted, of_root) = (rng.u32(1..=self.levels), rng.bool());
        let mut there: Vec<u64> =
            self.paths.iter().filter(|(level, _)| *level == wanted).map(|(_, at)| *at).collect();
        if of_root {
            there.truncate(1);
        }
        if let Some(&at) = rng.choice(&there) {
            let entry = self.ram.read(at);
            let frame = entry & 0x000f_ffff_ffff_f000 | when(wanted > 1, entry & PAGE_SIZE);
            // A table of L2 outside memory takes a leaf of its own path.
            let trouble = match rng.u32(0..4) {
                0 if wanted == 1 => EPT_OUTSIDE,
                1 => EPT_READ_ONLY,
                _ => rng.u32(1..=EPT_TROUBLES),
            };
            self.ram.write(at, self.ept_entry_with(rng, wanted, frame, trouble));
        }
    }

    fn entry(&self, rng: &mut Rng, level: u32, frame: u64) -> u64 {
        match self.second {
            Second::Npt(_) => self.npt_entry(rng, level, frame),
            Second::Ept => self.ept_entry(rng, level, frame),
        }
    }

    fn npt_entry(&self, rng: &mut Rng, level: u32, frame: u64) -> u64 {
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

    fn ept_entry(&self, rng: &mut Rng, level: u32, frame: u64) -> u64 {
        let trouble = if rng.u32(0..100) < self.trouble * 3 { rng.u32(1..=EPT_TROUBLES) } else { 0 };
        self.ept_entry_with(rng, level, frame, trouble)
    }

    /// `trouble` is one of [`EPT_TROUBLES`], or 0.
    fn ept_entry_with(&self, rng: &mut Rng, level: u32, frame: u64, trouble: u32) -> u64 {
        let mut entry = frame;
        entry |= match trouble {
            1 => 0,
            EPT_EXECUTE_ONLY => EPT_EXECUTE,
            EPT_READ_ONLY => EPT_READ | EPT_EXECUTE & rng.u64(..),
            // A misconfiguration.
            4 => EPT_WRITE | EPT_EXECUTE & rng.u64(..),
            _ => EPT_READ | EPT_WRITE | EPT_EXECUTE & rng.u64(..),
        };
        entry |= when(trouble == EPT_OUTSIDE, RAM_PAGES.next_power_of_two() * PAGE);
        entry |= when(trouble == 6, reserved_bit(rng, self.vcpu.maxphyaddr));
        entry ^= when(trouble == 7, PAGE_SIZE);
        let leaf = level == 1 || entry & PAGE_SIZE != 0;
        entry |= match (leaf, trouble) {
            // Memory types that do not exist.
            (true, 8) => *rng.choice(&[2, 3, 7]).unwrap() << 3,
            (true, _) => *rng.choice(&[0, 1, 4, 5, 6]).unwrap() << 3,
            (false, 8) => rng.u64(1..8) << 3,
            (false, _) => 0,
        };
        // Below the frame of a large page, or a bit that an entry of a table has to keep clear.
        entry |= when(trouble == 9 && level > 1, if leaf { PAGE << rng.u32(0..9) } else { 1 << 6 });
        // A, D, and ignored bits: the PAT's part of the memory type in a leaf, 11:10, and 63:52.
        let ignored = 0xf << 8 | 0xfff << 52 | when(leaf, 1 << 6);
        entry | when(rng.bool(), rng.u64(..) & ignored)
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
                    if self.ram.read(gpa) != 0 {
                        continue;
                    }
                    let entry = match self.second {
                        // Half of it as it comes, which under EPT is mostly misconfigured.
                        Second::Ept if rng.bool() => {
                            let large = matches!(level, 2 | 3) && rng.u32(0..10) == 0;
                            let frame = if large { PAGE_SIZE } else { *rng.choice(&below).unwrap() };
                            // A page that can be fetched from alone: only the final access, a read, meets these.
                            match rng.u32(0..8) {
                                0 => self.ept_entry_with(rng, level as u32, frame, EPT_EXECUTE_ONLY),
                                _ => self.ept_entry(rng, level as u32, frame),
                            }
                        }
                        _ => recipe.entry(rng),
                    };
                    self.ram.write(gpa, entry);
                    self.entries.push(gpa);
                }
            }
        }
    }
}
