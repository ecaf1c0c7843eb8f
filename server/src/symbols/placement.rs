//! Where a guest's Linux kernel lies, by what its memory holds there.
//!
//! A kernel with KASLR lies higher than its file says, by a multiple of 2 MiB: the slide. There are at most some hundred places
//! where it can be. At each the kernel's own constants are looked for, through its page tables, in pages of the supervisor:
//! `linux_banner`, the whole of it where the file has it (`vmlinux`), and `linux_proc_banner` where the file has that symbol.
//! Exactly one place has to hold them, or none is taken. The guest may reboot, and its program may lie: before each use the
//! constants are read again.

use std::ops::Range;
use std::sync::Arc;

use pagewalk::{
    Access, AccessKind, ControlRegisters, CpuProfile, Gpa, Gva, PageWalk, PagingMode, Privilege, Walker,
};

use super::table::SymbolTable;
use crate::machine::{GuestRam, Machine, PAGE};
use crate::vcpu::{NestedMode, Snapshot};

/// What `linux_banner` begins with.
pub(super) const BANNER: &[u8] = b"Linux version ";
/// What `linux_proc_banner` begins with.
const PROC_BANNER: &[u8] = b"%s version %s ";
/// CONFIG_PHYSICAL_ALIGN is no smaller by default.
const STEP: u64 = 2 << 20;
/// Where the kernel's image can be: Documentation/arch/x86/x86_64/mm.rst.
const IMAGE_64: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
/// The same of 32-bit kernels, whichever way they split memory.
const IMAGE_32: Range<u64> = 0x4000_0000..0xfe00_0000;
/// With page-table isolation, a user's CR3 is the kernel's with this bit set.
const USER_ROOT: u64 = 1 << 12;
/// vCPUs whose address spaces are looked at.
const STATES: usize = 16;

/// Where the kernel is.
#[derive(Debug)]
pub(crate) struct Placed {
    /// What has to be added to the file's addresses, modulo 2^64.
    slide: u64,
    /// What it was found by; `None` where the file says of no Linux kernel, and is believed as it stands.
    kernel: Option<Kernel>,
}

#[derive(Debug)]
struct Kernel {
    walker: Walker,
    /// The image, by the file's addresses.
    image: Range<u64>,
    /// What the kernel gives away after it has booted, likewise.
    given_away: Range<u64>,
    /// Where the image begins in the guest's physical memory.
    gpa: Option<u64>,
    whole_banner: bool,
    proc_banner: bool,
}

/// Control registers of address spaces that a kernel may be found in.
pub(super) fn states(machine: &Machine) -> Vec<(ControlRegisters, CpuProfile)> {
    let snapshots = machine.source().vcpus().iter().take(STATES).map(|vcpu| vcpu.latest());
    // An L2 has a kernel of its own.
    let own = |snapshot: &Arc<Snapshot>| !matches!(snapshot.nested, NestedMode::Guest(_));
    snapshots.filter(own).map(|snapshot| (snapshot.registers.control(), snapshot.cpu)).collect()
}

/// Looks for the kernel that the symbols are of.
pub(super) fn find(
    table: &SymbolTable,
    states: &[(ControlRegisters, CpuProfile)],
    memory: &GuestRam,
) -> Result<Placed, String> {
    let Some(banner) = table.only("linux_banner") else {
        return Ok(Placed { slide: 0, kernel: None });
    };
    let mut roots = Vec::new();
    for (registers, cpu) in states {
        for cr3 in [registers.cr3, registers.cr3 & !USER_ROOT] {
            if !roots.contains(&cr3) {
                roots.push(cr3);
                let registers = ControlRegisters { cr3, ..*registers };
                if let Some(placed) = find_in(table, banner, &registers, cpu, memory)? {
                    return Ok(placed);
                }
            }
        }
    }
    Err("its `linux_banner` is at no place in the guest's memory where it could be: either the guest's kernel is another one, or \
         it has not booted yet"
        .to_owned())
}

fn find_in(
    table: &SymbolTable,
    banner: u64,
    registers: &ControlRegisters,
    cpu: &CpuProfile,
    memory: &GuestRam,
) -> Result<Option<Placed>, String> {
    let Ok(walk) = PageWalk::new(registers, cpu) else { return Ok(None) };
    let wide = banner > u64::from(u32::MAX);
    let range = match (walk.format().mode(), wide) {
        (PagingMode::FourLevel | PagingMode::FiveLevel, true) => IMAGE_64,
        (PagingMode::TwoLevel | PagingMode::Pae, false) => IMAGE_32,
        _ => return Ok(None),
    };
    let walker = Walker::new(walk);
    let first = range.start + banner % STEP;
    let places = (first..range.end).step_by(STEP as usize);
    let mut slides =
        places.map(|place| place.wrapping_sub(banner)).filter(|slide| is_at(table, *slide, &walker, memory));
    let Some(slide) = slides.next() else { return Ok(None) };
    if let Some(other) = slides.next() {
        return Err(format!(
            "the guest's memory holds what it should at {:#x} and at {:#x}, and which is the kernel is not known",
            banner.wrapping_add(slide),
            banner.wrapping_add(other)
        ));
    }
    let bounds = |start: &str, end: &str, within: &Range<u64>| {
        let (start, end) = table.only(start).zip(table.only(end))?;
        // What is at the end has a name, too.
        (within.contains(&start) && within.contains(&end) && start <= end).then_some(start..end + 1)
    };
    let image = bounds("_text", "_end", &range).or_else(|| bounds("_stext", "_end", &range)).unwrap_or(range);
    let given_away = bounds("__init_begin", "__init_end", &image).unwrap_or(0..0);
    let at = |walker: &Walker, address: u64| page(walker, memory, address.wrapping_add(slide));
    // The kernel's own root stays when the process that runs now is gone.
    let root = ["init_top_pgt", "swapper_pg_dir"].iter().find_map(|name| at(&walker, table.only(name)?));
    let own = root
        .and_then(|cr3| PageWalk::new(&ControlRegisters { cr3, ..*registers }, cpu).ok())
        .map(Walker::new)
        .filter(|walker| is_at(table, slide, walker, memory));
    let walker = own.unwrap_or(walker);
    let gpa = at(&walker, image.start);
    let kernel = Kernel {
        walker,
        image,
        given_away,
        gpa,
        whole_banner: table.banner.is_some(),
        proc_banner: table.only("linux_proc_banner").is_some(),
    };
    Ok(Some(Placed { slide, kernel: Some(kernel) }))
}

/// Whether the kernel's constants are where they have to be with this slide.
fn is_at(table: &SymbolTable, slide: u64, walker: &Walker, memory: &GuestRam) -> bool {
    let holds = |name: &str, expected: &[u8]| {
        table.only(name).map(|address| reads(walker, memory, address.wrapping_add(slide), expected))
    };
    holds("linux_banner", table.banner.as_deref().unwrap_or(BANNER)) == Some(true)
        && holds("linux_proc_banner", PROC_BANNER) != Some(false)
}

/// Where a supervisor's page is.
fn page(walker: &Walker, memory: &GuestRam, gva: u64) -> Option<u64> {
    let access = Access::new(AccessKind::Read, Privilege::Exempt);
    let page = walker.translate(memory, Gva(gva), &access).ok()?;
    (!page.rights().user()).then_some(page.gpa.0)
}

/// Reads a supervisor's pages; says whether all of them are there.
fn read(walker: &Walker, memory: &GuestRam, gva: u64, bytes: &mut [u8]) -> bool {
    let (mut gva, mut bytes) = (gva, bytes);
    while !bytes.is_empty() {
        let size = bytes.len().min((PAGE - gva % PAGE) as usize);
        let (now, rest) = bytes.split_at_mut(size);
        if page(walker, memory, gva).and_then(|gpa| memory.read(Gpa(gpa), now).ok()) != Some(size) {
            return false;
        }
        (gva, bytes) = (gva.wrapping_add(size as u64), rest);
    }
    true
}

/// Whether these bytes are there.
fn reads(walker: &Walker, memory: &GuestRam, gva: u64, expected: &[u8]) -> bool {
    let mut found = vec![0; expected.len()];
    read(walker, memory, gva, &mut found) && found == expected
}

/// A kernel's memory, by its own tables.
pub(crate) struct KernelMemory<'a> {
    walker: &'a Walker,
    memory: &'a GuestRam,
}

impl KernelMemory<'_> {
    /// Size of a pointer in bytes.
    pub(crate) fn pointer(&self) -> u64 {
        if self.walker.gva_walk().format().mode().is_long() { 8 } else { 4 }
    }

    /// Where the top table at this address lies, if CR3 can lead there.
    pub(crate) fn root(&self, gva: u64) -> Option<u64> {
        // PAE paging has a smaller one.
        let (unit, end) = if self.pointer() == 8 { (PAGE, u64::MAX) } else { (32, 1 << 32) };
        page(self.walker, self.memory, gva).filter(|root| root.is_multiple_of(unit) && *root < end)
    }

    /// Fills `bytes`; says whether all that is the kernel's, and there.
    pub(crate) fn read(&self, gva: u64, bytes: &mut [u8]) -> bool {
        read(self.walker, self.memory, gva, bytes)
    }
}

impl Placed {
    /// Whether the kernel is still there.
    pub(super) fn holds(&self, table: &SymbolTable, memory: &GuestRam) -> bool {
        self.kernel.as_ref().is_none_or(|kernel| is_at(table, self.slide, &kernel.walker, memory))
    }

    /// The memory of the kernel that was looked for.
    pub(crate) fn kernel<'a>(&'a self, memory: &'a GuestRam) -> Option<KernelMemory<'a>> {
        self.kernel.as_ref().map(|kernel| KernelMemory { walker: &kernel.walker, memory })
    }

    /// The slide, where the kernel was looked for.
    pub(crate) fn slide(&self) -> Option<u64> {
        self.kernel.as_ref().map(|_| self.slide)
    }

    /// How it is known, for a person.
    pub(crate) fn reason(&self) -> String {
        let Some(kernel) = &self.kernel else {
            return "the file has no `linux_banner` to find a kernel by: its addresses are taken as they stand".to_owned();
        };
        let banner = if kernel.whole_banner {
            "the file's `linux_banner`, to the last byte"
        } else {
            "a Linux banner"
        };
        let proc = if kernel.proc_banner { " and `linux_proc_banner`" } else { "" };
        format!("the guest's memory holds {banner}{proc}, there and at no other place where a kernel can be")
    }

    /// The guest's address of one of the file's.
    pub(super) fn address(&self, in_file: u64) -> Result<u64, &'static str> {
        match &self.kernel {
            None => Ok(in_file),
            Some(kernel) if kernel.image.contains(&in_file) => Ok(in_file.wrapping_add(self.slide)),
            Some(kernel) if in_file < kernel.image.start => {
                Err("is no address: it is an offset into per-CPU data, or another number")
            }
            Some(_) if self.slide == 0 => Ok(in_file),
            Some(_) => Err(
                "is in a module, and the file is of another boot of this kernel: modules lie elsewhere each time",
            ),
        }
    }

    /// The file's address of one of the guest's.
    pub(super) fn in_file(&self, gva: u64) -> Option<u64> {
        let in_file = gva.wrapping_sub(self.slide);
        match &self.kernel {
            None => Some(gva),
            Some(kernel) if kernel.image.contains(&in_file) => Some(in_file),
            Some(kernel) => (self.slide == 0 && gva >= kernel.image.end).then_some(gva),
        }
    }

    /// The file's address of a physical one of the guest's, in the part of the image that stays the image.
    pub(super) fn in_file_physical(&self, gpa: u64) -> Option<u64> {
        let kernel = self.kernel.as_ref()?;
        let in_file = kernel.image.start.checked_add(gpa.checked_sub(kernel.gpa?)?)?;
        (kernel.image.contains(&in_file) && !kernel.given_away.contains(&in_file)).then_some(in_file)
    }

    /// Whether a symbol at one of the file's addresses says something of another one: both are in the image, or neither is.
    pub(super) fn joins(&self, symbol: u64, at: u64) -> bool {
        self.kernel.as_ref().is_none_or(|kernel| {
            let image = &kernel.image;
            image.contains(&symbol) == image.contains(&at) && symbol >= image.start
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use pagewalk::Vendor;
    use proptest::prelude::*;

    use super::*;
    use crate::machine::Region;

    const CPU: CpuProfile =
        CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
    const LINKED: u64 = 0xffff_ffff_8100_0000;
    const ROOT: u64 = 0x2000;
    /// Where the image begins in the guest's physical memory.
    const IMAGE: u64 = 0x40_0000;
    const SLIDE: u64 = 0x1ea0_0000;

    fn table(banner: Option<&[u8]>) -> SymbolTable {
        let mut table = SymbolTable::default();
        for (address, name) in [
            (0x1000, "cpu_data"),
            (LINKED, "_text"),
            (LINKED + 0x1000, "linux_banner"),
            (LINKED + 0x1100, "linux_proc_banner"),
            (LINKED + 0x3000, "init_top_pgt"),
            (LINKED + 0x5000, "__init_begin"),
            (LINKED + 0x6000, "__init_end"),
            (LINKED + 0x7000, "_end"),
            (0xffff_ffff_c000_0000, "module"),
        ] {
            table.push(address, name, true).unwrap();
        }
        let mut table = table.complete().unwrap();
        table.banner = banner.map(<[u8]>::to_vec);
        table
    }

    /// A guest with page-table isolation: at `ROOT` the kernel's tables, behind them the user's, which have no image.
    fn guest(slide: u64, leaf: u64) -> GuestRam {
        let ram = GuestRam::allocate(&[Region { start: Gpa(0), size: 8 << 20, read_only: false }]).unwrap();
        let put = |gpa, value| ram.write_u64(Gpa(gpa), value).unwrap();
        let place = LINKED + slide;
        let index = |level: u32| place >> (12 + 9 * (level - 1)) & 0x1ff;
        put(ROOT + 8 * index(4), 0x4007);
        put(0x4000 + 8 * index(3), 0x5007);
        put(0x5000 + 8 * index(2), IMAGE | leaf);
        ram.write(Gpa(IMAGE + 0x1000), b"Linux version 9.9 (me)\n\0").unwrap();
        ram.write(Gpa(IMAGE + 0x1100), b"%s version %s (you)\n\0").unwrap();
        // The kernel's own root.
        put(IMAGE + 0x3000 + 8 * index(4), 0x4007);
        ram
    }

    fn state(cr3: u64) -> (ControlRegisters, CpuProfile) {
        (
            ControlRegisters { cr0: 0x8005_0033, cr3, cr4: 0x20, efer: 0xd01, ..ControlRegisters::default() },
            CPU,
        )
    }

    const SUPERVISOR: u64 = 0xe3;

    fn found(table: &SymbolTable, ram: &GuestRam, cr3: u64) -> Result<Placed, String> {
        find(table, &[state(cr3)], ram)
    }

    #[test]
    fn the_slide_is_found_and_checked_again() {
        let table = table(Some(b"Linux version 9.9 (me)\n"));
        let ram = guest(SLIDE, SUPERVISOR);
        let placed = found(&table, &ram, ROOT).unwrap();
        assert_eq!(placed.slide(), Some(SLIDE));
        assert!(placed.reason().contains("last byte"), "{}", placed.reason());
        // Whatever becomes of the process that ran.
        ram.write(Gpa(ROOT), &[0; 4096]).unwrap();
        assert!(placed.holds(&table, &ram));
        ram.write(Gpa(IMAGE + 0x1000), b"?").unwrap();
        assert!(!placed.holds(&table, &ram));
        assert!(found(&table, &ram, ROOT).unwrap_err().contains("another one"));
    }

    #[test]
    fn with_a_users_root_the_kernels_is_looked_at() {
        let placed = found(&table(None), &guest(0, SUPERVISOR), ROOT | USER_ROOT).unwrap();
        assert_eq!(placed.slide(), Some(0));
    }

    #[test]
    fn another_kernel_is_none() {
        for (banner, leaf) in
            [(&b"Linux version 9.9 (you)\n"[..], SUPERVISOR), (b"Linux version 9.9 (me)\n", SUPERVISOR | 4)]
        {
            assert!(found(&table(Some(banner)), &guest(SLIDE, leaf), ROOT).is_err());
        }
        let ram = guest(SLIDE, SUPERVISOR);
        ram.write(Gpa(IMAGE + 0x1100), b"%d").unwrap();
        assert!(found(&table(None), &ram, ROOT).is_err());
    }

    #[test]
    fn two_places_are_none() {
        let ram = guest(SLIDE, SUPERVISOR);
        let index = (LINKED + SLIDE) >> 21 & 0x1ff;
        ram.write_u64(Gpa(0x5000 + 8 * (index + 1)), IMAGE | SUPERVISOR).unwrap();
        let why = found(&table(None), &ram, ROOT).unwrap_err();
        assert!(why.contains("0xffffffff9fa01000") && why.contains("0xffffffff9fc01000"), "{why}");
    }

    #[test]
    fn addresses_there_and_back() {
        let table = table(None);
        let placed = found(&table, &guest(SLIDE, SUPERVISOR), ROOT).unwrap();
        assert_eq!(placed.address(LINKED + 0x7000), Ok(LINKED + SLIDE + 0x7000));
        assert_eq!(placed.in_file(LINKED + SLIDE), Some(LINKED));
        assert_eq!(placed.in_file(LINKED), None);
        assert!(placed.address(0x1000).unwrap_err().contains("per-CPU"));
        assert!(placed.address(0xffff_ffff_c000_0000).unwrap_err().contains("module"));
        assert_eq!(placed.in_file_physical(IMAGE + 0x3008), Some(LINKED + 0x3008));
        assert_eq!(placed.in_file_physical(IMAGE + 0x5000), None);
        assert_eq!(placed.in_file_physical(IMAGE - 1), None);
        let placed = found(&table, &guest(0, SUPERVISOR), ROOT).unwrap();
        assert_eq!(placed.address(0xffff_ffff_c000_0000), Ok(0xffff_ffff_c000_0000));
        assert_eq!(placed.in_file(0xffff_ffff_c000_0010), Some(0xffff_ffff_c000_0010));
        assert!(placed.joins(0xffff_ffff_c000_0000, 0xffff_ffff_c000_0010));
        assert!(!placed.joins(LINKED + 0x7000, LINKED + 0x7001));
    }

    #[test]
    fn a_32_bit_kernel() {
        let mut table = SymbolTable::default();
        for (address, name) in [(0xc100_0000, "_text"), (0xc100_1000, "linux_banner"), (0xc100_7000, "_end")]
        {
            table.push(address, name, true).unwrap();
        }
        let table = table.complete().unwrap();
        let ram = guest(0, SUPERVISOR);
        let slide = 0x0240_0000;
        let pde = ROOT + 4 * ((0xc100_0000 + slide) >> 22);
        ram.write(Gpa(pde), &(0x40_0000u32 | SUPERVISOR as u32).to_le_bytes()).unwrap();
        let registers =
            ControlRegisters { cr0: 0x8005_0033, cr3: ROOT, cr4: 0x10, ..ControlRegisters::default() };
        let placed = find(&table, &[(registers, CPU)], &ram).unwrap();
        assert_eq!((placed.slide(), placed.address(0xc100_7000)), (Some(slide), Ok(0xc340_7000)));
        // Another kind of kernel's symbols.
        assert!(find(&self::table(None), &[(registers, CPU)], &ram).is_err());
    }

    proptest! {
        #[test]
        fn any_memory_is_searched_to_the_end(words in proptest::collection::vec(any::<u64>(), 512), cr3 in 0u64..8) {
            let ram = guest(SLIDE, SUPERVISOR);
            for (place, word) in (0..).zip(&words) {
                ram.write_u64(Gpa(0x5000 + 8 * place), word & 0x7f_ffff).unwrap();
            }
            let _ = found(&table(None), &ram, cr3 << 12);
        }
    }
}
