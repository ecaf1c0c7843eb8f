//! The fast lane: an untraced walk of one dimension that meets nothing to report.
//!
//! It only ever accepts, by masks of the same [`PageFormat`] that the general walk asks, and exactly what the general walk
//! answers (a test enumerates the bits). Whatever it does not accept, it leaves without a word to the general walk, which
//! starts over and alone knows faults. So everything stays in registers, and the level is a constant at each step.

use crate::access::Access;
use crate::addr::{Gpa, is_canonical};
use crate::entry::{EntryLayout, Grants, LongMode};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::mode::PagingMode;
use crate::permission::key_refusal;
use crate::translation::{PageSize, Translation};
use crate::walk::PageWalk;

/// The translation of `gva` for `access`, if it takes no more than the lane knows.
#[inline(always)]
pub(crate) fn translate<M: Memory>(
    walk: &PageWalk,
    memory: &M,
    gva: u64,
    access: &Access,
) -> Option<Translation> {
    let mut lane = Lane { format: walk.format(), memory, address: gva, access, grants: Grants::ALL };
    // That the root is aligned is nothing new, but it saves a shift between the address and the first load.
    let mut table = walk.root() & LongMode::FRAME;
    match lane.format.mode() {
        PagingMode::FourLevel if is_canonical(gva, 48) => {}
        PagingMode::FiveLevel if is_canonical(gva, lane.format.unchanged_width()) => {
            table = lane.table(5, table)?;
        }
        _ => return None,
    }
    table = lane.table(4, table)?;
    let entry = lane.entry(3, table)?;
    if !lane.is_plain(3, entry) {
        return lane.large_page(3, entry);
    }
    let entry = lane.entry(2, entry & lane.frame())?;
    if !lane.is_plain(2, entry) {
        return lane.large_page(2, entry);
    }
    let entry = lane.entry(1, entry & lane.frame())?;
    if lane.is_plain(1, entry) { lane.page(1, entry) } else { None }
}

struct Lane<'a, M> {
    format: &'a PageFormat,
    memory: &'a M,
    address: u64,
    access: &'a Access,
    grants: Grants,
}

impl<M: Memory> Lane<'_, M> {
    #[inline(always)]
    fn entry(&mut self, level: u32, table: u64) -> Option<u64> {
        let entry = self.memory.load_u64(Gpa(table | (self.address >> shift(level) & 511) << 3))?;
        self.grants = LongMode::through(self.grants, level, entry);
        Some(entry)
    }

    /// The table that the entry of `level` refers to.
    #[inline(always)]
    fn table(&mut self, level: u32, table: u64) -> Option<u64> {
        let entry = self.entry(level, table)?;
        if self.is_plain(level, entry) { Some(entry & self.frame()) } else { None }
    }

    #[inline(always)]
    fn frame(&self) -> u64 {
        LongMode::FRAME & self.format.address_bits()
    }

    /// The mask of plain entries holds no rights: what `GRANTING` turns is the present bit, as it does for the grants.
    #[inline(always)]
    fn is_plain(&self, level: u32, entry: u64) -> bool {
        (entry ^ LongMode::GRANTING) & self.format.plain_at(level) == 0
    }

    /// The page of an entry at level 2 or 3 that is no plain table.
    #[inline(always)]
    fn large_page(&self, level: u32, entry: u64) -> Option<Translation> {
        const LARGE: u64 = LongMode::PRESENT | LongMode::PAGE_SIZE;
        let accept = entry & LARGE == LARGE && entry & self.format.reserved_leaf_at(level) == 0;
        if accept { self.page(level, entry) } else { None }
    }

    /// The page that `entry` maps, if the rights of all levels allow the access.
    #[inline(always)]
    fn page(&self, level: u32, entry: u64) -> Option<Translation> {
        let rights = LongMode::rights(self.grants);
        if self.format.refuses(self.access, rights) {
            return None;
        }
        let mask = self.format.protection_key_mask();
        if mask != 0 && key_refusal(mask, self.access, rights, LongMode::protection_key(entry)) != 0 {
            return None;
        }
        let within = (1 << shift(level)) - 1;
        let gpa = Gpa((entry & self.frame() & !within) | (self.address & within));
        Some(Translation {
            gpa,
            entry,
            nested_gpa: None,
            nested_page_size: None,
            page_size: PageSize::of_bits(shift(level)),
            rights,
            backing: self.memory.backing(gpa),
            ad_skipped: false,
        })
    }
}

/// Number of address bits below the index of `level`.
#[inline(always)]
const fn shift(level: u32) -> u32 {
    12 + LongMode::INDEX_BITS * (level - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{AccessKind, Privilege};
    use crate::memory::{Backing, ExchangeError};
    use crate::mode::{
        CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_SMAP, CR4_SMEP, ControlRegisters, CpuProfile,
        EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::trace::NoTrace;

    const MAXPHYADDR: u8 = 40;
    /// Below MAXPHYADDR, but outside memory.
    const OUTSIDE: u64 = 1 << 39;
    /// P, W, U, PS, G, a bit that large frames reserve, an absent frame, a bit above MAXPHYADDR, NX.
    const BITS: [u64; 9] = [1, 1 << 1, 1 << 2, 1 << 7, 1 << 8, 1 << 13, OUTSIDE, 1 << 45, 1 << 63];

    /// One entry a level, the table of level `n` at `n` GiB, so that every entry may be a leaf of any size.
    struct Path {
        entries: [u64; 6],
    }

    impl Memory for Path {
        fn load_u64(&self, gpa: Gpa) -> Option<u64> {
            if gpa.0 >= OUTSIDE { None } else { self.entries.get((gpa.0 >> 30) as usize).copied() }
        }

        fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
            Err(ExchangeError::ReadOnly)
        }

        fn backing(&self, gpa: Gpa) -> Backing {
            if gpa.0 >= OUTSIDE { Backing::None } else { Backing::Ram }
        }
    }

    fn walk(format: u32) -> PageWalk {
        let when = |bit: u32, value: u64| if format >> bit & 1 != 0 { value } else { 0 };
        let levels = if format & 1 == 0 { 4 } else { 5 };
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG | when(1, CR0_WP),
            cr3: levels << 30,
            cr4: CR4_PAE | when(0, CR4_LA57) | when(2, CR4_SMEP) | when(3, CR4_SMAP) | when(4, CR4_PKE),
            efer: EFER_LME | EFER_LMA | when(5, EFER_NXE),
            ..ControlRegisters::default()
        };
        let vendor = if format >> 6 & 1 == 0 { Vendor::Intel } else { Vendor::Amd };
        let cpu = CpuProfile {
            vendor,
            maxphyaddr: MAXPHYADDR,
            gib_pages: format >> 7 & 1 == 0,
            encryption_bit: None,
        };
        PageWalk::new(&registers, &cpu).expect("these registers are valid")
    }

    fn access(rng: &mut fastrand::Rng) -> Access {
        let kind = rng.choice([AccessKind::Read, AccessKind::Write, AccessKind::Fetch]);
        let privilege = rng.choice([
            Privilege::User,
            Privilege::Supervisor,
            Privilege::ImplicitSupervisor,
            Privilege::Exempt,
        ]);
        let (Some(kind), Some(privilege)) = (kind, privilege) else { unreachable!() };
        let pkru = if rng.bool() { 0 } else { rng.u32(..) };
        Access::new(kind, privilege).with_ac(rng.bool()).with_pkru(pkru)
    }

    fn address(rng: &mut fastrand::Rng) -> u64 {
        let address = rng.u64(..);
        let unused = [0, 7, 16, 16][rng.usize(..4)];
        ((address << unused) as i64 >> unused) as u64
    }

    /// For every format, level and combination of the bits that matter: the lane accepts what the general walk answers,
    /// with the same answer, and nothing else.
    #[test]
    fn accepts_exactly_what_the_general_walk_answers() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut accepted, mut left) = ([0; 5], 0);
        for format in 0..1 << 8 {
            let walk = walk(format);
            for varied in 1..=walk.format().levels() as usize {
                for combination in 0..1_u32 << BITS.len() {
                    let mut path = Path { entries: [0; 6] };
                    for (level, entry) in path.entries.iter_mut().enumerate().skip(1) {
                        let ignored = rng.u64(..) & (0x7f << 52 | 0xf << 59 | 0xf << 9 & 0xe00 | 0x78);
                        let right = |bit: u64, rng: &mut fastrand::Rng| if rng.u8(..4) > 0 { bit } else { 0 };
                        *entry = ((level as u64 - 1) << 30) | ignored & !(1 << 63) | 1;
                        *entry |= right(2, &mut rng) | right(4, &mut rng);
                        if level == varied {
                            *entry &= !7;
                            for (number, bit) in BITS.iter().enumerate() {
                                *entry |= if combination >> number & 1 != 0 { *bit } else { 0 };
                            }
                        }
                    }
                    let (gva, access) = (address(&mut rng), access(&mut rng));
                    let general = crate::walk::translate(&walk, None, &path, gva, &access, &mut NoTrace).ok();
                    let lane = translate(&walk, &path, gva, &access);
                    assert_eq!(lane, general, "{gva:#x} {access:?} {:x?} {walk:?}", path.entries);
                    match lane {
                        Some(page) => accepted[page.page_size as usize] += 1,
                        None => left += 1,
                    }
                }
            }
        }
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            assert!(accepted[size as usize] > 1_000, "{size:?}: {accepted:?}");
        }
        assert!(left > 100_000, "{left}");
    }

    #[test]
    fn leaves_walks_without_paging() {
        let cpu = CpuProfile {
            vendor: Vendor::Intel,
            maxphyaddr: MAXPHYADDR,
            gib_pages: true,
            encryption_bit: None,
        };
        let walk = PageWalk::new(&ControlRegisters::default(), &cpu).expect("reset state");
        let access = Access::new(AccessKind::Read, Privilege::Supervisor);
        assert_eq!(translate(&walk, &Path { entries: [1; 6] }, 0, &access), None);
    }
}
