//! Guests whose page tables are walked, and our own walks through them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::bed::{
    CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE, PAGE, Ram,
    USER,
};
use super::ram::huge;
use pagewalk::{
    Access, AccessKind, ControlRegisters, CpuProfile, EptCapabilities, EptControls, Gva, NgpaWalk, PageWalk,
    Privilege, Vendor, Walker, Window,
};

/// Present, writable, accessed, dirty.
pub(crate) const PLAIN: u64 = 0x63;
/// EPT: read, write, execute, write back.
const EPT_PLAIN: u64 = 0x37;
const EPT_TABLE: u64 = 0x7;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const HOT_PAGES: u64 = 512;

/// Page tables in the making; each new table takes the next free page of memory.
struct Tables {
    ram: Ram,
    free: u64,
    plain: u64,
}

impl Tables {
    fn new(ram: Ram) -> Self {
        Self { ram, free: PAGE, plain: PLAIN }
    }

    fn page(&mut self) -> u64 {
        self.free += PAGE;
        self.free - PAGE
    }

    /// The table behind the entry at `gpa`, made if there is none.
    fn below(&mut self, gpa: u64) -> u64 {
        if self.ram.read(gpa) == 0 {
            let entry = self.page() | self.plain;
            self.ram.write(gpa, entry);
        }
        self.ram.read(gpa) & FRAME
    }

    /// Maps `gva` by `entry`, of `level`.
    fn map(&mut self, root: u64, levels: u32, gva: u64, level: u32, entry: u64) {
        let at = |level: u32| (gva >> shift(level) & 511) * 8;
        let table = (level + 1..=levels).rev().fold(root, |table, above| self.below(table + at(above)));
        self.ram.write(table + at(level), entry);
    }
}

pub(crate) const fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

fn registers(root: u64, levels: u32) -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root,
        cr4: CR4_PAE | CR4_SMEP | CR4_SMAP | if levels == 5 { CR4_LA57 } else { 0 },
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    }
}

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };

pub(crate) fn read() -> Access {
    Access::new(AccessKind::Read, Privilege::Supervisor)
}

/// A guest whose pages form one cycle: the translation of each is the address of the next, but for `base`.
pub(crate) struct Guest {
    pub(crate) ram: Ram,
    pub(crate) root: u64,
    pub(crate) walker: Walker,
    pub(crate) base: u64,
    /// Addresses in the order of the cycle, or a sample of them; a power of two. A peer starts in the middle, so that
    /// neither side finds in the cache what the other has just brought.
    pub(crate) gvas: Vec<u64>,
}

impl Guest {
    /// Pages of `level` at `base`, visited in `order`, of tables that lie in memory in the order of the page numbers' use in
    /// `laid`.
    fn new(ram: Ram, levels: u32, level: u32, flags: u64, laid: &[u64], order: &[u64]) -> Self {
        let base = if levels == 5 { 0xff00_0000_0000_0000 } else { 0xffff_8000_0000_0000 };
        let mut tables = Tables::new(ram);
        let root = tables.page();
        for page in laid {
            tables.map(root, levels, base + (page << shift(level)), level, flags);
        }
        for (from, to) in order.iter().zip(order.iter().cycle().skip(1)) {
            tables.map(root, levels, base + (from << shift(level)), level, to << shift(level) | flags);
        }
        let every = (order.len() >> 20).max(1);
        let gvas = order.iter().step_by(every).map(|page| base + (page << shift(level))).collect();
        let walker = Walker::new(PageWalk::new(&registers(root, levels), &CPU).unwrap());
        Self { ram, root, walker, base, gvas }
    }

    /// All pages in one table.
    pub(crate) fn hot(ram: Ram, levels: u32, level: u32, flags: u64) -> Self {
        let mut order: Vec<u64> = (0..HOT_PAGES).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut order);
        Self::new(ram, levels, level, flags, &[], &order)
    }

    /// As many pages as `bytes` of PTEs map: the PTE misses the caches, and the tables above stay in them.
    pub(crate) fn dense(bytes: u64) -> Self {
        Self::dense_in(huge(dense_bytes(bytes)), bytes)
    }

    /// [`Self::dense`] in this memory, of at least [`dense_bytes`].
    pub(crate) fn dense_in(ram: Ram, bytes: u64) -> Self {
        let mut order: Vec<u64> = (0..bytes / 8).collect();
        fastrand::Rng::with_seed(2).shuffle(&mut order);
        Self::new(ram, 4, 1, PLAIN, &[], &order)
    }

    /// Four pages in each of `tables` page tables, eight of which share a page directory, all strewn over memory: PDE and PTE
    /// miss the caches.
    pub(crate) fn sparse(tables: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut laid: Vec<u64> =
            (0..tables).map(|table| (table / 8 * 512 + table % 8 * 64 + rng.u64(0..64)) * 512).collect();
        let mut order: Vec<u64> =
            laid.iter().flat_map(|&table| (0..4).map(move |page| table + page * 128)).collect();
        for page in &mut order {
            *page += rng.u64(0..128);
        }
        rng.shuffle(&mut laid);
        rng.shuffle(&mut order);
        let directories = tables / 8 + tables / 4096 + 2;
        Self::new(huge((tables + directories + 16) * PAGE), 4, 1, PLAIN, &laid, &order)
    }

    /// The hot guest with addresses behind an absent PDE.
    pub(crate) fn absent(ram: Ram) -> Self {
        let hot = Self::hot(ram, 4, 1, PLAIN);
        let gvas = hot.gvas.iter().map(|gva| gva + (1 << shift(2))).collect();
        Self { gvas, ..hot }
    }

    /// The hot guest behind NPT that maps its memory one to one, by 4 KiB leaves.
    pub(crate) fn behind_npt(ram: Ram) -> Self {
        let (hot, root) = Self::identity(ram, PLAIN | USER, PLAIN | USER);
        let npt = NgpaWalk::npt(root, &registers(0, 4), &CPU).unwrap();
        Self { walker: Walker::nested(hot.walker.gva_walk().clone(), npt), ..hot }
    }

    /// The hot guest behind EPT that maps its memory one to one, by 4 KiB leaves.
    pub(crate) fn behind_ept(ram: Ram) -> Self {
        const WRITE_BACK: u64 = 6;
        const FOUR_LEVELS: u64 = 3 << 3;
        let (hot, root) = Self::identity(ram, EPT_TABLE, EPT_PLAIN);
        let eptp = root | FOUR_LEVELS | WRITE_BACK;
        let ept = NgpaWalk::ept(eptp, &EptControls::default(), &EptCapabilities::all(), &CPU).unwrap();
        Self { walker: Walker::nested(hot.walker.gva_walk().clone(), ept), ..hot }
    }

    fn identity(ram: Ram, table: u64, leaf: u64) -> (Self, u64) {
        let hot = Self::hot(ram, 4, 1, PLAIN);
        let mut tables = Tables { ram: hot.ram, free: 32 * PAGE, plain: table };
        let root = tables.page();
        for gpa in (0..HOT_PAGES).map(|page| page * PAGE) {
            tables.map(root, 4, gpa, 1, gpa | leaf);
        }
        (hot, root)
    }

    pub(crate) fn answer(&self, gva: u64) -> Option<u64> {
        let answer = self.walker.translate(&Window::new(self.ram.words()), Gva(gva), &read());
        answer.ok().map(|page| page.gpa.0)
    }

    /// Each address out of the answer before.
    pub(crate) fn chained(&self) -> impl FnMut(u64) -> Duration {
        assert!(self.gvas.iter().all(|gva| self.answer(*gva).is_some()), "a page is not mapped");
        let access = black_box(read());
        let mut gva = self.gvas[0];
        move |times| {
            let memory = Window::new(self.ram.words());
            let start = Instant::now();
            for _ in 0..times {
                let answer = self.walker.translate(&memory, Gva(gva), &access);
                gva = self.base + answer.as_ref().map_or(0, |page| page.gpa.0);
                black_box(&answer);
            }
            start.elapsed()
        }
    }

    /// Independent walks.
    pub(crate) fn in_a_loop(&self) -> impl FnMut(u64) -> Duration {
        let access = black_box(read());
        let mut at = 0;
        move |times| {
            let memory = Window::new(self.ram.words());
            let start = Instant::now();
            for _ in 0..times {
                let answer =
                    self.walker.translate(&memory, Gva(self.gvas[at & (self.gvas.len() - 1)]), &access);
                black_box(&answer);
                at += 1;
            }
            start.elapsed()
        }
    }
}

/// Memory of a dense guest with this many bytes of PTEs.
pub(crate) const fn dense_bytes(bytes: u64) -> u64 {
    bytes + bytes / 256 + 16 * PAGE
}
