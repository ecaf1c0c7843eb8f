//! What one access of an L2 goes through, and the tables that say so.

use fastrand::Rng;
use kvm_bindings::kvm_sregs;
use pagewalk::{AccessKind, PagingMode};

use crate::bed::shape::Shape;
use crate::bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, DIRTY, EFER_LMA,
    EFER_LME, EFER_NXE, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, Ram, USER, Vcpu, WRITE, code_segment,
    data_segment, when,
};
use crate::nested::vmcs12::CR4_VMXE;

pub(crate) const RAM_BYTES: u64 = 4 << 20;

// What all L2s share; here nGPA and GPA are the same.
const L2_CODE: u64 = 0x6000;
const STAGE_TABLES: [u64; 3] = [0x7000, 0x8000, 0x9000];
const STAGE_EPT: [u64; 2] = [0xa000, 0xb000];
/// The cases begin here. L2 sees what is theirs a gigabyte higher.
const CASES: u64 = 0x10_0000;
const HOME: u64 = 1 << 30;
/// A case's pages: its EPT tables, then L2's tables, both from the highest down, then the page that is accessed.
const EPT_TABLES: u64 = 4;
const PAGES_PER_CASE: u64 = EPT_TABLES + 5;
/// How many cases memory holds.
pub(crate) const CASES_PER_SLOT: u64 = (RAM_BYTES - CASES) / PAGE / PAGES_PER_CASE;

const EPT_READ: u64 = 1 << 0;
const EPT_WRITE: u64 = 1 << 1;
const EPT_EXECUTE: u64 = 1 << 2;
const EPT_ALL: u64 = EPT_READ | EPT_WRITE | EPT_EXECUTE;
const EPT_ACCESSED_DIRTY: u64 = 0b11 << 8;
const MEMORY_TYPE: u64 = 0b111 << 3;
const WRITE_BACK: u64 = 6 << 3;

/// `vmcall`
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
/// `mov al, [rdi]` or, outside 64-bit mode, `[edi]`; then `vmcall`.
const LOAD: [u8; 5] = [0x8a, 0x07, 0x0f, 0x01, 0xc1];
/// `mov [rdi], al`, then `vmcall`.
const STORE: [u8; 5] = [0x88, 0x07, 0x0f, 0x01, 0xc1];
const STORE_AT: u64 = 16;
/// What a load loads.
pub(crate) const LOADED: u8 = VMCALL[0];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) mode: PagingMode,
    pub(crate) kind: AccessKind,
    pub(crate) cpl: u8,
    pub(crate) ac: bool,
    cr0: u64,
    cr4: u64,
    efer: u64,
    /// The address that is accessed, but for what a large page decides.
    address: u64,
    /// Level of L2's leaf; 0 without paging.
    leaf: u32,
    /// What L2's entry of each level has beside its address, level 1 first.
    entries: [u64; 4],
    pub(crate) ept_accessed_dirty: bool,
    /// Level of the EPT leaf that maps the case's pages.
    ept_leaf: u32,
    /// The EPT entry that is in trouble: its level, and at level 1 which of L2's pages it maps.
    troubled: (u32, u64),
    trouble: Trouble,
    /// What EPT's entry of each level has in its accessed, dirty and ignored bits, level 1 first.
    noise: [u64; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// The entry allows only this.
    Rights(u64),
    /// The entry has these bits set, too.
    Bits(u64),
    /// The leaf has a memory type that does not exist, or another entry bits in that place.
    MemoryType(u64),
}

/// Where a case has its pages.
#[derive(Clone, Copy)]
pub(crate) struct Plot {
    base: u64,
    shape: Shape,
}

impl Case {
    pub(crate) fn sample(rng: &mut Rng, mode: PagingMode, maxphyaddr: u8) -> Case {
        let levels = Shape::new(mode).levels;
        let leaf = match (mode, rng.u32(0..8)) {
            (PagingMode::None, _) => 0,
            (PagingMode::FourLevel, 0) => 3,
            (_, 1) => 2,
            _ => 1,
        };
        let kind = *rng.choice(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]).unwrap();
        let nxe = rng.u32(0..4) != 0;
        let entries = Case::guest_entries(rng, mode, leaf, maxphyaddr);
        let reach = if levels == 4 { 1 << 39 } else { 1 << 30 };
        let mut address = rng.u64(0..reach) & !(PAGE - 1) | rng.u64(0..PAGE - 8);
        // L2 cannot be entered at an address that is not canonical.
        if mode.is_long() && kind != AccessKind::Fetch && rng.u32(0..30) == 0 {
            address |= 1 << 63;
        }
        let ept_leaf = *rng.choice(&[1, 1, 1, 1, 1, 2, 3]).unwrap();
        let level = if ept_leaf > 1 || rng.u32(0..4) == 0 { rng.u32(ept_leaf..=4) } else { 1 };
        // Mostly the page that is accessed: trouble on the way to it is met by the first access.
        let page = if rng.u32(0..4) != 0 { levels.into() } else { rng.u64(0..=levels.into()) };
        let frame_bits = if level == ept_leaf { PAGE << rng.u32(0..9) } else { 1 << rng.u32(3..7) };
        let trouble = match rng.u32(0..23) {
            0..3 => Trouble::Rights(0),
            3..6 => Trouble::Rights(EPT_EXECUTE),
            6..8 => Trouble::Rights(EPT_READ),
            8..10 => Trouble::Rights(EPT_READ | EPT_EXECUTE),
            10..12 => Trouble::Rights(EPT_READ | EPT_WRITE),
            12 => Trouble::Rights(EPT_WRITE),
            13 => Trouble::Rights(EPT_WRITE | EPT_EXECUTE),
            14 => Trouble::Bits(1 << rng.u32(maxphyaddr.into()..52)),
            15 if level > 1 => Trouble::Bits(frame_bits),
            15 | 16 => Trouble::MemoryType(*rng.choice(&[2, 3, 7]).unwrap()),
            _ => Trouble::None,
        };
        let paging = match mode {
            PagingMode::None => when(rng.bool(), CR4_PAE),
            PagingMode::TwoLevel => when(leaf == 2 || rng.bool(), CR4_PSE),
            _ => CR4_PAE,
        };
        let mut rarely = |bits| when(rng.u32(0..3) == 0, bits);
        Case {
            mode,
            kind,
            cr4: CR4_VMXE | paging | rarely(CR4_SMEP) | rarely(CR4_SMAP),
            cr0: CR0_PE | CR0_NE | when(levels > 0, CR0_PG) | when(rng.bool(), CR0_WP),
            efer: when(mode.is_long(), EFER_LME | EFER_LMA) | when(nxe, EFER_NXE),
            cpl: if rng.bool() { 3 } else { 0 },
            ac: rng.bool(),
            address,
            leaf,
            entries,
            ept_accessed_dirty: rng.bool(),
            ept_leaf,
            troubled: (level, page),
            trouble,
            noise: std::array::from_fn(|_| rng.u64(..) & (0xf << 8 | 0xfff << 52)),
        }
    }

    fn guest_entries(rng: &mut Rng, mode: PagingMode, leaf: u32, maxphyaddr: u8) -> [u64; 4] {
        let troubled = rng.bool();
        // Bits above 31.
        let wide = mode != PagingMode::TwoLevel;
        std::array::from_fn(|index| {
            let level = index as u32 + 1;
            let mut chance = |percent: u32| troubled && rng.u32(0..100) < percent;
            let mut entry = when(!chance(8), PRESENT) | when(!chance(12), WRITE) | when(!chance(15), USER);
            // Reserved without EFER.NXE.
            entry |= when(wide && chance(10), NO_EXECUTE);
            let (reserved, top_leaf) = (wide && chance(5), level == 4 && chance(5));
            entry |= when(reserved, 1 << rng.u32(maxphyaddr.into()..52));
            entry |= when(top_leaf || level == leaf && level > 1, PAGE_SIZE);
            entry | rng.u64(..) & (ACCESSED | DIRTY)
        })
    }

    /// The same with accessed and dirty bits set in all of L2's entries, so that no walk has to set them.
    pub(crate) fn settled(&self) -> Case {
        Case { entries: self.entries.map(|entry| entry | ACCESSED | DIRTY), ..*self }
    }

    /// The address that is accessed.
    pub(crate) fn gva(&self, plot: Plot) -> u64 {
        if self.mode == PagingMode::None {
            return HOME + plot.accessed_page() + self.address % PAGE;
        }
        let within = (1 << plot.shape.shift(self.leaf)) - 1;
        self.address & !(within & !(PAGE - 1)) | plot.accessed_page() & within
    }

    /// Where L2 starts: at the code that makes the access, unless the access is the fetch.
    pub(crate) fn rip(&self, plot: Plot) -> u64 {
        let stage = match (self.kind, self.mode) {
            (AccessKind::Fetch, _) => return self.gva(plot),
            (_, PagingMode::None) => L2_CODE,
            // The second page of the stage is the user's.
            _ => stage(self.mode) + when(self.cpl == 3, PAGE),
        };
        stage + when(self.kind == AccessKind::Write, STORE_AT)
    }

    pub(crate) fn sregs(&self, vcpu: &Vcpu, plot: Plot) -> kvm_sregs {
        let mut sregs = vcpu.reset;
        let long = self.mode.is_long();
        sregs.cs = code_segment(0x08, self.cpl);
        (sregs.cs.l, sregs.cs.db) = (long.into(), (!long).into());
        let data = data_segment(0x10, self.cpl);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.cr0, sregs.cr4, sregs.efer) = (self.cr0, self.cr4, self.efer);
        // PDPTEs are registers.
        sregs.cr3 = if self.mode == PagingMode::Pae { 0 } else { HOME + plot.guest_page(0) };
        sregs
    }

    pub(crate) fn pdptes(&self, plot: Plot) -> Option<[u64; 4]> {
        let pdptes = [(HOME + plot.guest_page(0)) | PRESENT, STAGE_TABLES[1] | PRESENT, 0, 0];
        (self.mode == PagingMode::Pae).then_some(pdptes)
    }

    /// Writes the case's tables and page, and says where the entries are that its access goes through.
    pub(crate) fn write(&self, ram: Ram, plot: Plot) -> Vec<u64> {
        let Plot { shape, .. } = plot;
        let mut used = Vec::new();
        for page in 0..PAGES_PER_CASE {
            for word in (0..PAGE).step_by(8) {
                ram.write(plot.base + page * PAGE + word, 0);
            }
        }
        let gva = self.gva(plot);
        for level in (self.leaf.max(1)..=shape.levels).rev() {
            let number = u64::from(shape.levels - level);
            let frame = if level > self.leaf {
                HOME + plot.guest_page(number + 1)
            } else {
                (HOME + plot.accessed_page()) & !((1 << shape.shift(level)) - 1)
            };
            let at = plot.guest_page(number) + shape.offset(level, gva);
            shape.write(ram, at, frame | self.entries[level as usize - 1]);
            used.push(at);
        }
        match self.mode {
            PagingMode::None | PagingMode::Pae => {}
            // The stage is reached from the same root.
            PagingMode::TwoLevel => {
                let at = plot.guest_page(0) + shape.offset(2, stage(self.mode));
                ram.write_u32(at, (STAGE_TABLES[2] | OPEN) as u32);
            }
            _ => ram.write(plot.guest_page(0) + shape.offset(4, stage(self.mode)), STAGE_TABLES[0] | OPEN),
        }
        ram.write_bytes(plot.accessed_page() + gva % PAGE, &VMCALL);
        self.write_ept(ram, plot, &mut used);
        used
    }

    fn write_ept(&self, ram: Ram, plot: Plot, used: &mut Vec<u64>) {
        let [pml4, pdpt, directory, table] = std::array::from_fn(|number| plot.base + number as u64 * PAGE);
        let mut write = |at: u64, entry: u64| {
            ram.write(at, entry);
            if !used.contains(&at) {
                used.push(at);
            }
        };
        write(pml4, self.ept_entry(4, 0, pdpt));
        write(pdpt, STAGE_EPT[0] | EPT_ALL | EPT_ACCESSED_DIRTY);
        write(pdpt + 8, self.ept_entry(3, 0, if self.ept_leaf == 3 { 0 } else { directory }));
        for number in 0..=u64::from(plot.shape.levels) {
            let gpa = plot.guest_page(number);
            let large = gpa >> 21 << 21;
            write(
                directory + (gpa >> 21) * 8,
                self.ept_entry(2, 0, if self.ept_leaf == 2 { large } else { table }),
            );
            write(table + (gpa >> 12 & 511) * 8, self.ept_entry(1, number, gpa));
        }
    }

    fn ept_entry(&self, level: u32, number: u64, frame: u64) -> u64 {
        let leaf = level == self.ept_leaf;
        let mut entry = frame | EPT_ALL | when(leaf, WRITE_BACK) | when(leaf && level > 1, PAGE_SIZE);
        if self.troubled == (level, number) || level > 1 && self.troubled.0 == level {
            match self.trouble {
                Trouble::None => {}
                Trouble::Rights(rights) => entry = entry & !EPT_ALL | rights,
                Trouble::Bits(bits) => entry |= bits,
                Trouble::MemoryType(memory_type) => entry = entry & !MEMORY_TYPE | memory_type << 3,
            }
        }
        entry | self.noise[level as usize - 1]
    }
}

impl Plot {
    /// The place of case `number` of those in one slot.
    pub(crate) fn new(number: u64, shape: Shape) -> Plot {
        Plot { base: CASES + number * PAGES_PER_CASE * PAGE, shape }
    }

    pub(crate) fn ept_root(self) -> u64 {
        self.base
    }

    /// L2's tables from the highest down, and behind them the page that is accessed.
    fn guest_page(self, number: u64) -> u64 {
        self.base + (EPT_TABLES + number) * PAGE
    }

    fn accessed_page(self) -> u64 {
        self.guest_page(self.shape.levels.into())
    }
}

/// An entry that allows everything, and that no walk changes.
const OPEN: u64 = PRESENT | WRITE | USER | ACCESSED | DIRTY;

/// First linear address of L2's code.
fn stage(mode: PagingMode) -> u64 {
    match mode {
        PagingMode::None => L2_CODE,
        PagingMode::TwoLevel => 1 << 31,
        PagingMode::Pae => 1 << 30,
        PagingMode::FourLevel | PagingMode::FiveLevel => 1 << 39,
    }
}

/// Writes what all cases share: L2's code, the way to it, and its part of EPT.
pub(crate) fn set_stage(ram: Ram, shape: Shape) {
    ram.write_bytes(L2_CODE, &LOAD);
    ram.write_bytes(L2_CODE + STORE_AT, &STORE);
    let [pdpt, directory, table] = STAGE_TABLES;
    ram.write(pdpt, directory | OPEN);
    ram.write(directory, table | OPEN);
    // For the supervisor, and for the user.
    shape.write(ram, table, L2_CODE | OPEN & !USER);
    shape.write(ram, table + shape.entry_bytes(), L2_CODE | OPEN);
    let [directory, table] = STAGE_EPT;
    ram.write(directory, table | EPT_ALL | EPT_ACCESSED_DIRTY);
    for gpa in (0..CASES).step_by(PAGE as usize) {
        ram.write(table + gpa / PAGE * 8, gpa | EPT_ALL | WRITE_BACK | EPT_ACCESSED_DIRTY);
    }
}
