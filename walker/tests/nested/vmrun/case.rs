//! One access of an L2: its registers, its tables, and NPT under them.

use fastrand::Rng;
use pagewalk::{ControlRegisters, CpuProfile, NgpaWalk, PageWalk, PagingMode, StateError, Walker};

use super::memory::{Memory, VMMCALL, stage_index};
use crate::bed::shape::Shape;
use crate::bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, DIRTY,
    EFER_LMA, EFER_LME, EFER_NXE, EFER_SVME, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, USER, WRITE, when,
};

/// What L1 shares among the cases of one batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    /// Its control registers when it executes VMRUN.
    pub(super) registers: ControlRegisters,
    pub(super) pkru: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Load,
    Store,
    Fetch,
}

#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) act: Act,
    pub(super) user: bool,
    pub(super) ac: bool,
    pub(super) registers: ControlRegisters,
    pub(super) ncr3: u64,
    pub(super) gva: u64,
    /// GPA of the page that it is about.
    pub(super) page: u64,
    /// Where L2's entries for it lie, the lowest first.
    pub(super) entries: Vec<u64>,
    /// The pages of its own NPT tables, and the words in them that hold entries.
    pub(super) npt_pages: Vec<u64>,
    pub(super) npt_words: Vec<u64>,
}

/// What a store stores.
pub(super) const STORED: u8 = 0x5a;

/// What a load loads: AL is the low byte of the address before.
pub(super) fn loaded(gva: u64) -> u8 {
    !(gva as u8)
}

/// Widths of the emulated CPU's physical addresses, and of 32-bit ones.
const WIDE: u32 = 40;
const NARROW: u32 = 32;

impl Case {
    /// Draws a case and writes it to memory.
    pub(super) fn make(rng: &mut Rng, memory: &mut Memory, host: &Host, cpu: &CpuProfile) -> Case {
        let (l2, npt) = (memory.l2, memory.npt);
        let first = memory.written.len();
        let act = *rng.choice(&[Act::Load, Act::Store, Act::Fetch]).unwrap();
        let registers = l2_registers(rng, l2);
        let leaf = leaf_level(rng, l2, &registers, cpu);
        let lowest = leaf.max(1) as usize;

        // L2's pages: the one that is accessed, then its tables, the lowest first.
        let mut pages = vec![memory.page()];
        for level in 1..l2.levels {
            pages.push(if level < leaf { 0 } else { memory.page() });
        }
        if l2.levels > 0 {
            pages.push(memory.l2_root());
        }
        let (ncr3, mut npt_pages) = memory.npt_root();
        let mut homes = pages.clone();
        let mut spoilt = false;
        if rng.u32(0..5) != 0 {
            let page = if rng.u32(0..5) < 2 { 0 } else { *rng.choice(&used(l2, lowest)).unwrap() };
            let width = width(l2, npt, page, leaf);
            let home = home(rng, npt, host, cpu, width, pages[page]);
            homes[page] = home.0;
            let path = memory.map(rng, ncr3, &mut npt_pages, home, pages[page]);
            spoilt = rng.u32(0..5) < 3;
            if spoilt {
                spoil(rng, memory, &path, home.1, page == 0 && act == Act::Fetch, cpu);
            }
            if npt.mode == PagingMode::TwoLevel && host.registers.cr4 & CR4_PSE == 0 && rng.bool() {
                let directory = path[path.len() - 1];
                memory.put(npt, directory, npt.read(memory.ram, directory) | PAGE_SIZE);
            }
        }

        let mut gva = address(rng, l2, act);
        if l2.levels == 0 {
            gva = homes[0] + gva % PAGE;
        } else if leaf > 1 {
            // The page lies where its frame's offset says.
            let within = (1 << l2.shift(leaf)) - 1;
            gva = (gva & !within | homes[0] & within) + gva % PAGE;
        }
        // What goes wrong in L2 mostly hides what goes wrong in NPT.
        let trouble = rng.u32(0..4) < if spoilt { 1 } else { 3 };
        let mut entries = Vec::new();
        for level in leaf.max(1)..=l2.levels {
            let at = pages[level as usize] + l2.offset(level, gva);
            let to = if level == leaf { homes[0] } else { homes[level as usize - 1] };
            memory.put(
                l2,
                at,
                entry(rng, l2, (level, level == leaf), to, trouble.then_some(act), &registers),
            );
            entries.push(at);
        }
        if l2.is_long() && act != Act::Fetch && rng.u32(0..40) == 0 {
            gva ^= 1 << rng.u32(l2.linear_width()..64);
        }
        let at = pages[0] + gva % PAGE;
        let there = match act {
            Act::Load => [loaded(gva), 0, 0],
            Act::Store => [!STORED, 0, 0],
            Act::Fetch => VMMCALL,
        };
        memory.put_bytes(at, &there[..if act == Act::Fetch { 3 } else { 1 }]);

        let cr3 = homes.last().copied().unwrap_or_default();
        let registers = ControlRegisters { cr3: when(l2.levels > 0, cr3 | rng.u64(0..4) << 3), ..registers };
        let (user, ac) = (rng.bool(), rng.bool());
        let in_npt = |gpa: &&u64| npt_pages.contains(&(**gpa & !(PAGE - 1)));
        let npt_words = memory.written[first..].iter().filter(in_npt).copied().collect();
        Case { act, user, ac, registers, ncr3, gva, page: pages[0], entries, npt_pages, npt_words }
    }

    pub(super) fn walker(&self, host: &Host, cpu: &CpuProfile) -> Result<Walker, StateError> {
        // The emulated CPU does not reserve bit 8 of its highest levels; no case sets it.
        let gva_walk = PageWalk::new(&self.registers, cpu)?;
        Ok(Walker::nested(gva_walk, NgpaWalk::npt(self.ncr3, &host.registers, cpu)?))
    }
}

/// The pages that a walk with its leaf at `lowest` uses.
fn used(l2: Shape, lowest: usize) -> Vec<usize> {
    match l2.levels {
        0 => vec![0],
        levels => std::iter::once(0).chain(lowest..=levels as usize).collect(),
    }
}

fn l2_registers(rng: &mut Rng, l2: Shape) -> ControlRegisters {
    let paged = l2.levels > 0;
    ControlRegisters {
        cr0: CR0_PE | CR0_NE | when(paged, CR0_PG) | when(rng.bool(), CR0_WP),
        cr3: 0,
        cr4: when(l2.levels > 2, CR4_PAE)
            | when(l2.levels == 5, CR4_LA57)
            | when(rng.u32(0..3) != 0, CR4_PSE)
            | when(rng.u32(0..3) == 0, CR4_SMEP)
            | when(rng.u32(0..3) == 0, CR4_SMAP)
            | when(rng.u32(0..3) == 0, CR4_PKE),
        efer: EFER_SVME | when(l2.is_long(), EFER_LME | EFER_LMA) | when(rng.u32(0..4) != 0, EFER_NXE),
        ..ControlRegisters::default()
    }
}

fn leaf_level(rng: &mut Rng, l2: Shape, registers: &ControlRegisters, cpu: &CpuProfile) -> u32 {
    let large = match l2.mode {
        PagingMode::None => return 0,
        PagingMode::TwoLevel => registers.cr4 & CR4_PSE != 0,
        _ => true,
    };
    match rng.u32(0..10) {
        0 | 1 if l2.is_long() && cpu.gib_pages => 3,
        0..4 if large => 2,
        _ => 1,
    }
}

/// How wide the nGPA of L2's page number `page` may be: as wide as what refers to it, and no wider than NPT, above which
/// KVM ignores address bits.
fn width(l2: Shape, npt: Shape, page: usize, leaf: u32) -> u32 {
    let referrer = match l2.mode {
        PagingMode::FourLevel | PagingMode::FiveLevel => WIDE,
        PagingMode::Pae if page < 3 => WIDE,
        // PSE-36.
        PagingMode::TwoLevel if page == 0 && leaf == 2 => WIDE,
        _ => NARROW,
    };
    if npt.is_long() { referrer } else { NARROW }
}

/// An nGPA for the page at `gpa` outside of what all cases share, and the level of its leaf in NPT.
fn home(rng: &mut Rng, npt: Shape, host: &Host, cpu: &CpuProfile, width: u32, gpa: u64) -> (u64, u32) {
    let large = npt.mode != PagingMode::TwoLevel || host.registers.cr4 & CR4_PSE != 0;
    let leaf = match rng.u32(0..10) {
        0 | 1 if npt.is_long() && cpu.gib_pages => 3,
        0..4 if large => 2,
        _ => 1,
    };
    let shared = if npt.mode == PagingMode::TwoLevel { 1 << 22 } else { 1 << 30 };
    // Mostly far up, so that a path parts from the shared one early.
    let ngpa = rng.u64(shared..1 << width) & !(PAGE - 1);
    let within = (1 << npt.shift(leaf)) - 1;
    (ngpa & !within | if leaf > 1 { gpa & within } else { 0 }, leaf)
}

/// Takes something away from the path to a page: from one entry, so that what refuses is known.
fn spoil(rng: &mut Rng, memory: &mut Memory, path: &[u64], leaf: u32, fetched: bool, cpu: &CpuProfile) {
    let npt = memory.npt;
    let at = rng.usize(0..path.len());
    let level = leaf + at as u32;
    let entry = npt.read(memory.ram, path[at]);
    let large = level == leaf && level > 1;
    let kind = match rng.u32(0..if fetched { 8 } else { 5 }) {
        // KVM looks at nothing but P of NPT's PDPTEs in PAE format; in 2-level format, there is no NX.
        _ if (npt.mode, level) == (PagingMode::Pae, 3) => 0,
        4.. if npt.mode == PagingMode::TwoLevel => 3,
        other => other,
    };
    let entry = match kind {
        0 => entry & !PRESENT,
        1 => entry & !WRITE,
        2 => entry & !USER,
        3 => entry | reserved_in_npt(rng, npt, level, large, cpu),
        _ => entry | NO_EXECUTE,
    };
    memory.put(npt, path[at], entry);
}

fn reserved_in_npt(rng: &mut Rng, npt: Shape, level: u32, large: bool, cpu: &CpuProfile) -> u64 {
    let address = 1 << rng.u32(u32::from(cpu.maxphyaddr)..52);
    match npt.mode {
        // Below bit 21 are address bits that KVM takes every CPU to lack.
        PagingMode::TwoLevel => when(large, 1 << 21),
        PagingMode::Pae => 1 << rng.u32(u32::from(cpu.maxphyaddr)..63),
        _ if level > 3 => *rng.choice(&[address, PAGE_SIZE, 1 << 8]).unwrap(),
        _ if large && rng.bool() => 1 << rng.u32(13..npt.shift(level)),
        _ => address,
    }
}

fn address(rng: &mut Rng, l2: Shape, act: Act) -> u64 {
    let width = l2.linear_width();
    let mut gva = rng.u64(0..1 << width);
    if l2.levels > 0 {
        let top = l2.shift(l2.levels);
        let entries = 1 << (width - top);
        if gva >> top == stage_index(l2) {
            gva ^= rng.u64(1..entries) << top;
        }
    }
    gva -= when(act == Act::Fetch && gva % PAGE > PAGE - 3, 3);
    if l2.is_long() { ((gva << (64 - width)) as i64 >> (64 - width)) as u64 } else { gva }
}

/// L2's entry of `level` for the table or page at `to`, sometimes with something wrong with it: mostly what matters to an
/// access of this kind.
fn entry(
    rng: &mut Rng,
    l2: Shape,
    (level, leaf): (u32, bool),
    to: u64,
    trouble: Option<Act>,
    registers: &ControlRegisters,
) -> u64 {
    let mut chance = |percent: u32| trouble.is_some() && rng.u32(0..100) < percent;
    let (absent, reserved) = (chance(6), chance(5));
    let mut matters = |act| chance(if trouble == Some(act) { 25 } else { 8 });
    let (read_only, no_execute) = (matters(Act::Store), matters(Act::Fetch));
    let supervisor = chance(12);
    let two_level = l2.mode == PagingMode::TwoLevel;
    let large = leaf && level > 1;
    let size = l2.shift(level);
    let mut entry = if !large {
        to
    } else if two_level {
        // PSE-36.
        to & 0xffc0_0000 | (to >> 32 & 0xff) << 13 | PAGE_SIZE
    } else {
        to >> size << size | PAGE_SIZE
    };
    // PWT, PCD, 11:9.
    entry |= when(!absent, PRESENT) | rng.u64(..) & (0b11 << 3 | 0b111 << 9);
    if (l2.mode, level) == (PagingMode::Pae, 3) {
        // Of a PDPTE, the emulated CPU reserves the high bits alone.
        return entry | when(reserved, 1 << rng.u32(WIDE..64));
    }
    entry |= when(!read_only, WRITE) | when(!supervisor, USER) | rng.u64(..) & (ACCESSED | DIRTY);
    entry |= when(no_execute && !two_level, NO_EXECUTE);
    if l2.is_long() && leaf {
        entry |= rng.u64(..) & 0xf << 59;
    }
    if two_level && registers.cr4 & CR4_PSE == 0 && level == 2 {
        entry |= when(rng.bool(), PAGE_SIZE);
    }
    if reserved {
        let address = 1 << rng.u32(WIDE..if l2.is_long() { 52 } else { 63 });
        entry |= match level {
            _ if two_level => when(large, 1 << 21),
            4 | 5 => *rng.choice(&[address, PAGE_SIZE]).unwrap(),
            _ if large && rng.bool() => 1 << rng.u32(13..size),
            _ => address,
        };
    }
    entry
}
