//! Where everything lies, and the tables of L1, of the stage that all L2s share, and of NPT.
//!
//! nGPAs below 1 GiB (below 4 MiB, where NPT is in 2-level format) are GPAs, through tables that all cases share. What a case
//! needs beside has an nGPA above that, through tables of its own. No table is written again once a CPU may have walked it.

use fastrand::Rng;
use pagewalk::PagingMode;

use crate::bed::shape::Shape;
use crate::bed::{ACCESSED, DIRTY, PAGE, PAGE_SIZE, PRESENT, Ram, USER, WRITE};

pub(super) const RAM_BYTES: u64 = 4 << 20;
pub(super) const CASES: u64 = 60;

pub(super) const L1_TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
pub(super) const L1_CODE: u64 = 0x5000;
pub(super) const HOST_SAVE: u64 = 0x6000;
pub(super) const IOPM: u64 = 0x7000;
pub(super) const MSRPM: u64 = 0xa000;
const L2_CODE: u64 = 0xc000;
/// The lowest first.
const STAGE_TABLES: [u64; 4] = [0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000];
const NPT_DIRECTORY: u64 = 0x1_8000;
const NPT_TABLES: [u64; 2] = [0x1_9000, 0x1_a000];
pub(super) const VMCBS: u64 = 0x4_0000;
const POOL: u64 = 0x10_0000;

const OPEN: u64 = PRESENT | WRITE | USER;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// `vmrun; add eax, 4096; cmp eax, ebx; jb vmrun; out 0x40, al`: every VMCB from EAX up to EBX.
const L1: [u8; 14] = [0x0f, 0x01, 0xd8, 0x05, 0x00, 0x10, 0x00, 0x00, 0x39, 0xd8, 0x72, 0xf4, 0xe6, 0x40];
/// The same behind `and byte [0x1000], 0xdf`, with the jump to that: the emulated CPU sets the accessed bit of L1's PDPTE,
/// where that bit is reserved, and KVM would not take the PDPTE back when L2 exits.
#[rustfmt::skip]
const PAE_L1: [u8; 21] = [
    0x80, 0x25, 0x00, 0x10, 0x00, 0x00, 0xdf,
    0x0f, 0x01, 0xd8, 0x05, 0x00, 0x10, 0x00, 0x00, 0x39, 0xd8, 0x72, 0xed, 0xe6, 0x40,
];
/// `mov al, [rax]; vmmcall`
const LOAD: [u8; 5] = [0x8a, 0x00, 0x0f, 0x01, 0xd9];
/// `mov [rax], cl; vmmcall`
const STORE: [u8; 5] = [0x88, 0x08, 0x0f, 0x01, 0xd9];
pub(super) const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
const STORE_AT: u64 = 16;

pub(super) struct Memory {
    pub(super) ram: Ram,
    /// What the walker walks: the tables of L2 and of NPT.
    pub(super) copy: Ram,
    pub(super) l2: Shape,
    pub(super) npt: Shape,
    /// The words of the pool that are not zero.
    pub(super) written: Vec<u64>,
    /// The first page of the pool that nothing lies in.
    next: u64,
}

impl Memory {
    pub(super) fn new(ram: Ram, l2: PagingMode, npt: PagingMode) -> Memory {
        let (l2, npt, copy) = (Shape::in_memory(l2), Shape::in_memory(npt), Ram::new(RAM_BYTES));
        let memory = Memory { ram, copy, l2, npt, written: Vec::new(), next: POOL };
        memory.set_l1();
        memory.set_l2();
        memory
    }

    /// L1's linear addresses are its physical ones; its paging mode selects NPT's format.
    fn set_l1(&self) {
        let npt = self.npt;
        self.ram.write_bytes(L1_CODE, if npt.mode == PagingMode::Pae { &PAE_L1 } else { &L1 });
        if npt.mode == PagingMode::TwoLevel {
            // CR4.PSE is free to be clear.
            self.ram.write_u32(L1_TABLES[0], (L1_TABLES[1] | PRESENT | WRITE) as u32);
            for page in 0..1024 {
                self.ram.write_u32(L1_TABLES[1] + page * 4, ((page * PAGE) | PRESENT | WRITE) as u32);
            }
            return;
        }
        let large = if npt.mode == PagingMode::Pae { 2 } else { 3 };
        for (level, table) in (large..=npt.levels).rev().zip(L1_TABLES) {
            let grants = if (npt.mode, level) == (PagingMode::Pae, 3) { PRESENT } else { PRESENT | WRITE };
            self.ram.write(table, if level == large { PAGE_SIZE | grants } else { (table + PAGE) | grants });
        }
        if large == 2 {
            self.ram.write(L1_TABLES[1] + 8, 1 << 21 | PAGE_SIZE | PRESENT | WRITE);
        }
    }

    /// L2's code, once for the supervisor and once for the user.
    fn set_l2(&self) {
        self.ram.write_bytes(L2_CODE, &LOAD);
        self.ram.write_bytes(L2_CODE + STORE_AT, &STORE);
        let l2 = self.l2;
        for (at, grants) in [PRESENT | WRITE, OPEN].into_iter().enumerate() {
            let at = at as u64 * l2.entry_bytes();
            if l2.levels > 1 {
                self.set(l2, STAGE_TABLES[0] + at, L2_CODE | grants);
            }
        }
        for level in 2..l2.levels as usize {
            self.set(l2, STAGE_TABLES[level - 1], STAGE_TABLES[level - 2] | OPEN);
        }
    }

    /// Forgets all cases. What is shared is as it was, but for accessed and dirty bits in NPT.
    pub(super) fn clear(&mut self, rng: &mut Rng) {
        for gpa in self.written.drain(..) {
            self.ram.write(gpa, 0);
            self.copy.write(gpa, 0);
        }
        for gpa in (VMCBS..VMCBS + CASES * PAGE).step_by(8) {
            self.ram.write(gpa, 0);
        }
        self.next = POOL;
        for page in 0..RAM_BYTES / PAGE {
            let entry = (page * PAGE) | OPEN | rng.u64(..) & (ACCESSED | DIRTY);
            self.set(self.npt, NPT_TABLES[0] + page * self.npt.entry_bytes(), entry);
        }
        for (at, table) in NPT_TABLES.into_iter().enumerate() {
            self.set(self.npt, NPT_DIRECTORY + at as u64 * 8, table | OPEN);
        }
        if self.npt.mode == PagingMode::Pae {
            self.ram.write(L1_TABLES[0], L1_TABLES[1] | PRESENT);
        }
    }

    fn set(&self, shape: Shape, gpa: u64, entry: u64) {
        shape.write(self.ram, gpa, entry);
        shape.write(self.copy, gpa, entry);
    }

    /// An entry of a case, in a page of the pool.
    pub(super) fn put(&mut self, shape: Shape, gpa: u64, entry: u64) {
        self.set(shape, gpa, entry);
        self.written.push(gpa & !7);
    }

    /// What an access meets.
    pub(super) fn put_bytes(&mut self, gpa: u64, bytes: &[u8]) {
        self.ram.write_bytes(gpa, bytes);
        self.written.extend([gpa & !7, (gpa + bytes.len() as u64 - 1) & !7]);
    }

    pub(super) fn page(&mut self) -> u64 {
        let page = self.next;
        self.next += PAGE;
        assert!(self.next <= RAM_BYTES, "a batch has room for {CASES} cases");
        page
    }

    /// The pages in which L1's NPT lies for every case.
    pub(super) fn shared_npt(&self) -> &'static [u64] {
        const ALL: [u64; 3] = [NPT_TABLES[0], NPT_TABLES[1], NPT_DIRECTORY];
        if self.npt.mode == PagingMode::TwoLevel { &ALL[..1] } else { &ALL }
    }

    /// A root of L2, in which nothing but the stage is mapped.
    pub(super) fn l2_root(&mut self) -> u64 {
        let l2 = self.l2;
        let root = self.page();
        // PDPTEs grant nothing.
        let grants = if l2.mode == PagingMode::Pae { PRESENT } else { OPEN };
        let at = stage_index(l2) * l2.entry_bytes();
        self.put(l2, root + at, STAGE_TABLES[l2.levels as usize - 2] | grants);
        root
    }

    /// Where L2's code begins.
    pub(super) fn code(&self, user: bool, store: bool) -> u64 {
        let page = match self.l2.levels {
            0 => L2_CODE,
            levels => (stage_index(self.l2) << self.l2.shift(levels)) + u64::from(user) * PAGE,
        };
        page + if store { STORE_AT } else { 0 }
    }

    /// A root of NPT, in which nothing but what is shared is mapped, and the pages of this case's own tables.
    pub(super) fn npt_root(&mut self) -> (u64, Vec<u64>) {
        let npt = self.npt;
        let root = self.page();
        let mut own = vec![root];
        let mut table = root;
        for _ in 3..npt.levels {
            let below = self.page();
            self.put(npt, table, below | OPEN);
            own.push(below);
            table = below;
        }
        match npt.mode {
            PagingMode::TwoLevel => self.put(npt, table, NPT_TABLES[0] | OPEN),
            PagingMode::Pae => self.put(npt, table, NPT_DIRECTORY | PRESENT),
            _ => self.put(npt, table, NPT_DIRECTORY | OPEN),
        }
        (root, own)
    }

    /// Maps the page at `gpa` to `ngpa` with a leaf of `leaf`; answers where the path's entries lie, the lowest first.
    pub(super) fn map(
        &mut self,
        rng: &mut Rng,
        root: u64,
        own: &mut Vec<u64>,
        (ngpa, leaf): (u64, u32),
        gpa: u64,
    ) -> Vec<u64> {
        let npt = self.npt;
        let mut path = Vec::new();
        let mut table = root;
        for level in (leaf..=npt.levels).rev() {
            let at = table + npt.offset(level, ngpa);
            path.insert(0, at);
            let found = npt.read(self.ram, at) & FRAME;
            if found != 0 && level > leaf {
                table = found;
                continue;
            }
            let to = match level {
                1 => gpa,
                _ if level == leaf => gpa >> npt.shift(level) << npt.shift(level) | PAGE_SIZE,
                _ => {
                    table = self.page();
                    own.push(table);
                    table
                }
            };
            let noise = rng.u64(..) & (ACCESSED | DIRTY);
            let grants = if (npt.mode, level) == (PagingMode::Pae, 3) { PRESENT } else { OPEN | noise };
            self.put(npt, at, to | grants);
        }
        path
    }
}

/// The root's entry that maps the stage.
pub(super) fn stage_index(l2: Shape) -> u64 {
    match l2.mode {
        PagingMode::TwoLevel => 1023,
        PagingMode::Pae => 3,
        _ => 1,
    }
}
