//! Guests whose tables are walked.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{
    Access, AccessKind, ControlRegisters, CpuProfile, NgpaWalk, PageWalk, Privilege, Vendor, Walker,
};

const PAGE: u64 = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// Present, writable, accessed, dirty.
const PLAIN: u64 = 0x63;
const LARGE: u64 = 1 << 7;
const USER: u64 = 1 << 2;
pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;
const BASE: u64 = 0xffff_8000_0000_0000;
const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };
/// Addresses that contestants walk, at least.
const ADDRESSES: usize = 1 << 20;

pub(crate) fn read() -> Access {
    Access::new(AccessKind::Read, Privilege::Supervisor)
}

fn registers(root: u64) -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root,
        cr4: CR4_PAE | CR4_SMEP | CR4_SMAP,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    }
}

/// Memory in huge pages, where the host has transparent ones.
struct Memory {
    words: &'static [AtomicU64],
    layout: Layout,
}

impl Memory {
    fn new(bytes: u64) -> Self {
        let bytes = (bytes as usize).next_multiple_of(HUGE_PAGE);
        let layout = Layout::from_size_align(bytes, HUGE_PAGE).unwrap();
        // SAFETY: the layout has a size.
        #[allow(unsafe_code, reason = "memory aligned to huge pages")]
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: the range is this allocation; the advice changes nothing of what it holds.
        #[allow(unsafe_code, reason = "there is no safe advice")]
        let _ = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
        // SAFETY: the allocation is zeroed and aligned, and lives as long as the guest that has it.
        #[allow(unsafe_code, reason = "memory aligned to huge pages")]
        let words = unsafe { slice::from_raw_parts(start.cast::<AtomicU64>(), bytes / 8) };
        Self { words, layout }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody else keeps the words.
        #[allow(unsafe_code, reason = "what was allocated is freed")]
        unsafe {
            std::alloc::dealloc(self.words.as_ptr().cast::<u8>().cast_mut(), self.layout);
        }
    }
}

/// Page tables in the making; each new table takes the next free page of memory.
struct Tables {
    memory: Memory,
    free: u64,
    plain: u64,
}

impl Tables {
    fn read(&self, gpa: u64) -> u64 {
        self.memory.words[gpa as usize / 8].load(Ordering::Relaxed)
    }

    fn write(&self, gpa: u64, entry: u64) {
        self.memory.words[gpa as usize / 8].store(entry, Ordering::Relaxed);
    }

    fn page(&mut self) -> u64 {
        self.free += PAGE;
        self.free - PAGE
    }

    fn map(&mut self, root: u64, gva: u64, level: u32, entry: u64) {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let at = table + offset(gva, above);
            if self.read(at) == 0 {
                let entry = self.page() | self.plain;
                self.write(at, entry);
            }
            table = self.read(at) & FRAME;
        }
        self.write(table + offset(gva, level), entry);
    }
}

pub(crate) const fn offset(gva: u64, level: u32) -> u64 {
    (gva >> (12 + 9 * (level - 1)) & 511) * 8
}

pub(crate) struct Guest {
    pub(crate) words: &'static [AtomicU64],
    pub(crate) root: u64,
    pub(crate) walker: Walker,
    /// Addresses in random order, a power of two of them.
    pub(crate) gvas: Vec<u64>,
    _memory: Memory,
}

impl Guest {
    fn finish(tables: Tables, root: u64, gvas: Vec<u64>) -> Self {
        let walker = Walker::new(PageWalk::new(&registers(root), &CPU).unwrap());
        Self { words: tables.memory.words, root, walker, gvas, _memory: tables.memory }
    }

    fn tables(pages_of_tables: u64) -> (Tables, u64) {
        let memory = Memory::new((pages_of_tables + 16) * PAGE);
        let mut tables = Tables { memory, free: PAGE, plain: PLAIN };
        let root = tables.page();
        (tables, root)
    }

    fn addresses(rng: &mut fastrand::Rng, pages: u64) -> Vec<u64> {
        (0..ADDRESSES).map(|_| BASE + (rng.u64(..pages) << 12) + rng.u64(..PAGE)).collect()
    }

    /// `pages` one after the other, that map pages of memory at random.
    pub(crate) fn dense(pages: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(2);
        let (mut tables, root) = Self::tables(pages / 512 + pages / 512 / 512 + 4);
        let frames = tables.memory.words.len() as u64 / 512;
        for page in 0..pages {
            tables.map(root, BASE + (page << 12), 1, rng.u64(..frames) << 12 | PLAIN);
        }
        let gvas = Self::addresses(&mut rng, pages);
        Self::finish(tables, root, gvas)
    }

    /// As [`Self::dense`], but of each nine GiB two are 1 GiB pages, of each three tables in the others one is a 2 MiB page, and
    /// one PTE in twenty is absent.
    pub(crate) fn mixed(pages: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(3);
        let (mut tables, root) = Self::tables(pages / 512 + pages / 512 / 512 + 4);
        let frames = tables.memory.words.len() as u64 / 512;
        let mut page = 0;
        while page < pages {
            let gva = BASE + (page << 12);
            if page & 0x3ffff == 0 && page >> 18 & 7 == 7 {
                tables.map(root, gva, 3, PLAIN | LARGE);
                page += 1 << 18;
            } else if page & 511 == 0 && page >> 9 & 3 == 3 {
                tables.map(root, gva, 2, PLAIN | LARGE);
                page += 512;
            } else {
                let present = rng.u32(..20) != 0;
                tables.map(root, gva, 1, if present { rng.u64(..frames) << 12 | PLAIN } else { 0 });
                page += 1;
            }
        }
        let gvas = Self::addresses(&mut rng, pages);
        Self::finish(tables, root, gvas)
    }

    /// Four pages in each of `count` page tables, eight of which share a page directory, all strewn over memory.
    pub(crate) fn sparse(count: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(4);
        let mut strewn: Vec<u64> =
            (0..count).map(|table| (table / 8 * 512 + table % 8 * 64 + rng.u64(..64)) << 21).collect();
        rng.shuffle(&mut strewn);
        let (mut tables, root) = Self::tables(count + count / 8 + count / 4096 + 4);
        let frames = tables.memory.words.len() as u64 / 512;
        let mut gvas = Vec::new();
        for table in strewn {
            for _ in 0..4 {
                let gva = BASE + table + (rng.u64(..512) << 12);
                tables.map(root, gva, 1, rng.u64(..frames) << 12 | PLAIN);
                gvas.push(gva);
            }
        }
        rng.shuffle(&mut gvas);
        gvas.truncate(ADDRESSES.max(1 << gvas.len().ilog2() as usize >> 1));
        let missing = ADDRESSES.saturating_sub(gvas.len());
        gvas.extend_from_within(..missing.min(gvas.len()));
        while gvas.len() < ADDRESSES {
            gvas.extend_from_within(..);
        }
        Self::finish(tables, root, gvas)
    }

    /// A dense guest behind NPT that maps its memory to other pages, in random order, by 4 KiB leaves.
    pub(crate) fn nested(pages: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(5);
        let guest_pages = pages / 512 + pages / 512 / 512 + 16;
        let (mut tables, root) = Self::tables(3 * guest_pages);
        // The guest's tables are built where they are to lie from the guest's point of view, and then moved.
        let frames = guest_pages;
        for page in 0..pages {
            tables.map(root, BASE + (page << 12), 1, rng.u64(..frames) << 12 | PLAIN);
        }
        let used = tables.free / PAGE;
        let mut places: Vec<u64> = (used.max(frames)..used.max(frames) + frames).collect();
        rng.shuffle(&mut places);
        tables.free = (used.max(frames) + frames) * PAGE;
        tables.plain = PLAIN | USER;
        let ncr3 = tables.page();
        for (page, place) in (0..frames).zip(&places) {
            for word in 0..512 {
                tables.write(place * PAGE + word * 8, tables.read(page * PAGE + word * 8));
            }
            tables.map(ncr3, page << 12, 1, place << 12 | PLAIN | USER);
        }
        let gvas = Self::addresses(&mut rng, pages);
        let guest = Self::finish(tables, root, gvas);
        let npt = NgpaWalk::npt(ncr3, &registers(0), &CPU).unwrap();
        Self { walker: Walker::nested(guest.walker.gva_walk().clone(), npt), ..guest }
    }
}
