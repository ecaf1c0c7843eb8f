//! The memory of the demo guest: its page tables, its frames, and the landmarks in them.
//!
//! Two address spaces share the kernel half (PML4E 256) and differ in the user half (PML4E 0). An L2 lies in the last 2 MiB
//! of RAM: its tables hold nGPAs, and the NPT tables turn those into GPAs. Nothing executes in the L2: it is there to be
//! walked.

use pagewalk::{CpuProfile, Gpa};

use super::super::Landmark;
use super::super::boot;
use super::super::memory::{GuestRam, MemoryError, Region};
use super::guest;

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PCD: u64 = 1 << 4;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
/// Bit 13 of a PDE that maps 2 MiB: reserved on every CPU, whatever its MAXPHYADDR.
const RESERVED_IN_2M: u64 = 1 << 13;

const RAM_SIZE: u64 = 8 << 20;
const ROM: u64 = 0x1000_0000;
/// Where no memory is.
const NO_MEMORY: u64 = 0x2000_0000;

/// The memory regions: RAM, and a ROM that the guest cannot write.
pub(super) const REGIONS: [Region; 2] = [
    Region { start: Gpa(0), size: RAM_SIZE, read_only: false },
    Region { start: Gpa(ROM), size: 0x4000, read_only: true },
];

/// Base of the kernel half.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
pub(super) const GDT_GVA: u64 = KERNEL + 0x1000;
pub(super) const KERNEL_TEXT: u64 = KERNEL + 0x1_0000;
/// The guest counts its rounds here: a GVA, in page `kernel-data`.
pub const ROUND_COUNTER: u64 = KERNEL + 0x1_1000;
const KERNEL_STACK: u64 = KERNEL + 0x1_2000;
pub(super) const KERNEL_STACK_END: u64 = KERNEL_STACK + 0x1000;
pub(super) const READ_ONLY: u64 = KERNEL + 0x1_3000;
const NO_EXECUTE: u64 = KERNEL + 0x1_4000;
const NOT_PRESENT: u64 = KERNEL + 0x1_5000;
pub(super) const REMAPPED: u64 = KERNEL + 0x1_7000;
const MMIO: u64 = KERNEL + 0x1_9000;
const ROM_PAGE: u64 = KERNEL + 0x1_a000;
const USER_BIT: u64 = KERNEL + 0x1_b000;
const PAGE_TABLE: u64 = KERNEL + 0x1_f000;
/// The entry that maps `remapped`, through the page table's own mapping.
pub(super) const REMAPPED_PTE: u64 = PAGE_TABLE + (REMAPPED >> 12 & 511) * 8;
pub(super) const HUGE_2M: u64 = KERNEL + 0x20_0000;
const RESERVED_BIT: u64 = KERNEL + 0x40_0000;
const UNBACKED_TABLE: u64 = KERNEL + 0x60_0000;
const HUGE_1G: u64 = KERNEL + 0x4000_0000;

const USER_TEXT: u64 = 0x40_0000;
pub(super) const USER_DATA: u64 = 0x40_1000;
const USER_READ_ONLY: u64 = 0x40_2000;
const SUPERVISOR_PAGE: u64 = 0x40_3000;
const READ_ONLY_TABLE: u64 = 0x60_0000;
const NON_CANONICAL: u64 = 0x8000_0000_0000;

/// The two values between which CR3 switches.
pub const ADDRESS_SPACES: [u64; 2] = [0x2_0000, 0x2_1000];
/// The frames of `user-data` in the two address spaces.
pub const USER_DATA_FRAMES: [u64; 2] = [0x3_1000, 0x4_1000];
/// The frames between which the guest moves `remapped`.
pub const REMAPPED_FRAMES: [u64; 2] = [0x1_7000, 0x1_8000];

const KERNEL_PDPT: u64 = 0x2_2000;
const KERNEL_PD: u64 = 0x2_3000;
const KERNEL_PT: u64 = 0x2_4000;
/// PDPT, PD, PT and a second PT of each user half.
const USER_TABLES: [[u64; 4]; 2] =
    [[0x2_5000, 0x2_6000, 0x2_7000, 0x2_8000], [0x2_9000, 0x2_a000, 0x2_b000, 0x2_c000]];
/// Frames of the user half: text, data (second), read-only, supervisor, under a read-only table.
const USER_FRAMES: [u64; 2] = [0x3_0000, 0x4_0000];
const HUGE_2M_FRAME: u64 = 0x40_0000;

/// nCR3 of the NPT tables, a GPA.
pub const NCR3: u64 = 0x5_0000;
const NPT_PDPT: u64 = 0x5_1000;
const NPT_PD: u64 = 0x5_2000;
const NPT_PT: u64 = 0x5_3000;
/// L2's CR3, an nGPA.
pub const L2_CR3: u64 = 0x1000;
const L2_PDPT: u64 = 0x2000;
const L2_PD: u64 = 0x3000;
const L2_PT: u64 = 0x4000;
/// nGPA 0 is this GPA; the 2 MiB from there are L2's memory.
const L2_MEMORY: u64 = 0x60_0000;
/// Base of L2's kernel, a GVA of L2.
pub const L2_KERNEL: u64 = 0xffff_ffff_8100_0000;
const L2_NPT_HOLE: u64 = 0x1_2000;
const L2_NPT_READ_ONLY: u64 = 0x1_3000;
const L2_NO_TABLE: u64 = 0x2_0000;
const L2_HUGE_2M: u64 = 0x20_0000;

/// Writes everything into `memory`.
pub(super) fn write(memory: &GuestRam, cpu: &CpuProfile) -> Result<(), MemoryError> {
    let set = |table: u64, index: u64, entry: u64| memory.write_u64(Gpa(table + (index & 511) * 8), entry);
    write_kernel_half(&set, cpu)?;
    for space in 0..2 {
        write_user_half(&set, space)?;
    }
    write_npt(&set)?;
    write_l2(&|table, index, entry| set(L2_MEMORY + table, index, entry))?;

    for (at, descriptor) in (0x1000..).step_by(8).zip(boot::GDT) {
        memory.write_u64(Gpa(at), descriptor)?;
    }
    memory.write(Gpa(0x1_0000), &guest::code())?;
    memory.write(Gpa(0x1_3000), b"a page the kernel may read and not write")?;
    memory.write(Gpa(0x1_4000), b"data that nobody may execute")?;
    memory.write(Gpa(REMAPPED_FRAMES[0]), b"the first frame of the remapped page")?;
    memory.write(Gpa(REMAPPED_FRAMES[1]), b"the second frame of the remapped page")?;
    memory.write(Gpa(ROM), b"read-only memory")?;
    memory.write(Gpa(USER_FRAMES[0]), b"\xf4 user text of address space A")?;
    memory.write(Gpa(USER_FRAMES[1]), b"\xf4 user text of address space B")?;
    memory.write(Gpa(HUGE_2M_FRAME), b"the start of a 2 MiB page")?;
    memory.write(Gpa(L2_MEMORY + 0x1_0000), b"\xf4 code of L2")
}

type Set<'a> = &'a dyn Fn(u64, u64, u64) -> Result<(), MemoryError>;

fn write_kernel_half(set: Set<'_>, cpu: &CpuProfile) -> Result<(), MemoryError> {
    for root in ADDRESS_SPACES {
        set(root, 256, KERNEL_PDPT | P | W)?;
    }
    set(KERNEL_PDPT, 0, KERNEL_PD | P | W)?;
    if cpu.gib_pages {
        set(KERNEL_PDPT, HUGE_1G >> 30, P | W | PS | G | NX)?;
    }
    set(KERNEL_PD, 0, KERNEL_PT | P | W)?;
    set(KERNEL_PD, HUGE_2M >> 21, HUGE_2M_FRAME | P | W | PS | G | NX)?;
    set(KERNEL_PD, RESERVED_BIT >> 21, HUGE_2M_FRAME | P | W | PS | RESERVED_IN_2M)?;
    set(KERNEL_PD, UNBACKED_TABLE >> 21, NO_MEMORY | P | W)?;
    for (gva, entry) in [
        (GDT_GVA, 0x1000 | P | W | G | NX),
        (KERNEL_TEXT, 0x1_0000 | P | G),
        (ROUND_COUNTER, 0x1_1000 | P | W | G | NX),
        (KERNEL_STACK, 0x1_2000 | P | W | G | NX),
        (READ_ONLY, 0x1_3000 | P | G | NX),
        (NO_EXECUTE, 0x1_4000 | P | W | G | NX),
        // What a kernel keeps in an entry that is not present, such as a swap slot, means nothing to the CPU.
        (NOT_PRESENT, 0xdead_beef_0000),
        (REMAPPED, REMAPPED_FRAMES[0] | P | W | NX),
        (MMIO, NO_MEMORY | P | W | PCD | G | NX),
        (ROM_PAGE, ROM | P | W | G | NX),
        (USER_BIT, 0x1_b000 | P | W | U | G | NX),
        (PAGE_TABLE, KERNEL_PT | P | W | G | NX),
    ] {
        set(KERNEL_PT, gva >> 12, entry)?;
    }
    Ok(())
}

fn write_user_half(set: Set<'_>, space: usize) -> Result<(), MemoryError> {
    let [pdpt, pd, pt, read_only_pt] = USER_TABLES[space];
    let frames = USER_FRAMES[space];
    set(ADDRESS_SPACES[space], 0, pdpt | P | W | U)?;
    set(pdpt, 0, pd | P | W | U)?;
    set(pd, USER_TEXT >> 21, pt | P | W | U)?;
    set(pd, READ_ONLY_TABLE >> 21, read_only_pt | P | U)?;
    set(pt, USER_TEXT >> 12, frames | P | U)?;
    set(pt, USER_DATA >> 12, USER_DATA_FRAMES[space] | P | W | U | NX)?;
    set(pt, USER_READ_ONLY >> 12, (frames + 0x2000) | P | U | NX)?;
    set(pt, SUPERVISOR_PAGE >> 12, (frames + 0x3000) | P | W | NX)?;
    set(read_only_pt, READ_ONLY_TABLE >> 12, (frames + 0x4000) | P | W | U | NX)
}

fn write_npt(set: Set<'_>) -> Result<(), MemoryError> {
    // Under NPT every access counts as a user access.
    set(NCR3, 0, NPT_PDPT | P | W | U)?;
    set(NPT_PDPT, 0, NPT_PD | P | W | U)?;
    set(NPT_PD, 0, NPT_PT | P | W | U)?;
    set(NPT_PD, L2_HUGE_2M >> 21, HUGE_2M_FRAME | P | W | U | PS)?;
    for ngpa in (0..L2_NO_TABLE).step_by(4096) {
        let rights = match ngpa {
            L2_NPT_HOLE => continue,
            L2_NPT_READ_ONLY => P | U,
            _ => P | W | U,
        };
        set(NPT_PT, ngpa >> 12, (L2_MEMORY + ngpa) | rights)?;
    }
    Ok(())
}

fn write_l2(set: Set<'_>) -> Result<(), MemoryError> {
    set(L2_CR3, L2_KERNEL >> 39, L2_PDPT | P | W)?;
    set(L2_PDPT, L2_KERNEL >> 30, L2_PD | P | W)?;
    set(L2_PD, L2_KERNEL >> 21, L2_PT | P | W)?;
    set(L2_PD, (L2_KERNEL >> 21) + 1, L2_HUGE_2M | P | W | PS | NX)?;
    set(L2_PD, (L2_KERNEL >> 21) + 2, L2_NO_TABLE | P | W)?;
    set(L2_PT, 0, 0x1_0000 | P)?;
    set(L2_PT, 1, 0x1_1000 | P | W | NX)?;
    set(L2_PT, 2, L2_NPT_HOLE | P | W | NX)?;
    set(L2_PT, 3, L2_NPT_READ_ONLY | P | W | NX)?;
    set(L2_PT, 4, 0)
}

/// The addresses worth asking about.
pub(super) fn landmarks(cpu: &CpuProfile) -> Vec<Landmark> {
    let gib: &[(&str, u64, &str)] = if cpu.gib_pages {
        &[("huge-1g", HUGE_1G + 0x1_0000, "Kernel text once more, as data, inside a 1 GiB page.")]
    } else {
        &[]
    };
    [
        ("kernel-text", KERNEL_TEXT, "The guest's own code: supervisor, executable, not writable."),
        ("kernel-data", ROUND_COUNTER, "The guest's round counter: supervisor, writable, no-execute."),
        ("kernel-stack", KERNEL_STACK, "The guest's stack: supervisor, writable, no-execute."),
        ("read-only", READ_ONLY, "A supervisor page that may not be written: CR0.WP is set."),
        ("no-execute", NO_EXECUTE, "A page from which a fetch faults."),
        ("not-present", NOT_PRESENT, "A PTE whose P is clear and whose other bits mean nothing to the CPU."),
        ("reserved-bit", RESERVED_BIT, "A PDE that maps 2 MiB and has reserved bit 13 set."),
        ("remapped", REMAPPED, "A page that the guest moves between two frames, once a round."),
        ("page-table", PAGE_TABLE, "The page table that maps the kernel's 4 KiB pages, mapped by itself."),
        ("huge-2m", HUGE_2M, "A 2 MiB page."),
        ("mmio", MMIO, "A mapped page with no memory behind it, which is what a device looks like."),
        ("rom", ROM_PAGE, "A page that the tables call writable, in memory that the guest cannot write."),
        ("user-bit-lost", USER_BIT, "U/S set in the PTE and clear above it: no user page."),
        ("unbacked-table", UNBACKED_TABLE, "A PDE that points to a page table outside memory."),
        ("user-text", USER_TEXT, "User code, another frame in each of the two address spaces."),
        ("user-data", USER_DATA, "User data, another frame in each of the two address spaces."),
        ("user-read-only", USER_READ_ONLY, "A user page that may not be written."),
        ("supervisor-page", SUPERVISOR_PAGE, "A supervisor page in the user half: a user access faults."),
        ("read-only-table", READ_ONLY_TABLE, "R/W set in the PTE and clear in the PDE: not writable."),
        ("non-canonical", NON_CANONICAL, "An address that is not canonical with 4-level paging."),
    ]
    .iter()
    .chain(gib)
    .chain(&[
        ("l2-cr3", L2_CR3, "CR3 for the L2 of nested mode, an nGPA."),
        ("l2-ncr3", NCR3, "nCR3 for nested mode: root of the NPT tables."),
        ("l2-code", L2_KERNEL, "In nested mode: code of L2."),
        ("l2-data", L2_KERNEL + 0x1000, "In nested mode: data of L2."),
        ("l2-npt-hole", L2_KERNEL + 0x2000, "In nested mode: mapped by L2, and its nGPA not mapped by NPT."),
        ("l2-npt-read-only", L2_KERNEL + 0x3000, "In nested mode: writable for L2, and read-only in NPT."),
        ("l2-not-present", L2_KERNEL + 0x4000, "In nested mode: not present in L2's own page table."),
        ("l2-huge-2m", L2_KERNEL + 0x20_0000, "In nested mode: 2 MiB pages in both dimensions."),
        ("l2-table-hole", L2_KERNEL + 0x40_0000, "In nested mode: L2's page table lies at an unmapped nGPA."),
    ])
    .map(|(name, address, description)| Landmark {
        name: (*name).to_owned(),
        address: *address,
        description: (*description).to_owned(),
    })
    .collect()
}
