//! The fast lane: an untraced walk of one dimension that meets nothing to report.
//!
//! It only ever accepts, by masks of the same [`PageFormat`] that the general walk asks, and exactly what the general walk
//! answers (a test enumerates the bits). Whatever it does not accept, it leaves without a word to the general walk, which
//! starts over and alone knows faults. So everything stays in registers, and the level is a constant at each step.
//!
//! An entry is not judged when it is met: its bits are collected, and all levels are judged together at the leaf. Until
//! then the lane may follow an entry that is absent or reserved. That reads guest memory in vain and does no harm.

use core::hint::cold_path;

use crate::access::Access;
use crate::addr::Gpa;
use crate::entry::{EntryLayout, LongMode};
use crate::format::PageFormat;
use crate::memory::{Backing, Memory};
use crate::mode::PagingMode;
use crate::permission::{Rights, Shown, WORDS, key_field, key_refusal};
use crate::translation::{Page, PageSize, Translation};
use crate::walk::PageWalk;

/// What the lane knows of a walk, of one dimension and in 4-level or 5-level paging, without an encryption bit, so that an
/// entry's address bits are a constant. Of any other walk it knows that it has no canonical address.
///
/// In this order, and at the start of a walker, because a loop over walks is as fast as its instructions are short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Lane {
    /// How many addresses are canonical, counted from the lowest one; 0 outside 4-level paging.
    four_level: u64,
    /// As many, in 5-level paging.
    five_level: u64,
    root: u64,
    /// What needs a second look in a PDPTE or above: the page-size bit, and what is reserved in a PML4E and not everywhere.
    upper: u64,
    /// Reserved in the entries of every level.
    reserved: u64,
    /// By what the levels of a page show ([`Shown`]): bit [`Access::word_index`] is set where that access is refused, or asks
    /// for a protection key.
    asks: [u64; Shown::COUNT],
    /// Reserved in a PML4E and a PML5E, the page-size bit among them.
    reserved_top: u64,
    /// Reserved in a PDE that maps a page.
    reserved_pde: u64,
    /// Reserved in a PDPTE that maps a page.
    reserved_pdpte: u64,
}

impl Lane {
    /// The lane that knows no walk.
    pub(crate) const CLOSED: Self = Self {
        four_level: 0,
        five_level: 0,
        root: 0,
        upper: 0,
        reserved: 0,
        asks: [0; Shown::COUNT],
        reserved_top: 0,
        reserved_pde: 0,
        reserved_pdpte: 0,
    };

    pub(crate) const fn of(walk: &PageWalk) -> Self {
        let format = walk.format();
        let (four_level, five_level) = match format.mode() {
            _ if format.address_bits() != u64::MAX => return Self::CLOSED,
            PagingMode::FourLevel => (1 << 48, 0),
            PagingMode::FiveLevel => (0, 1 << format.unchanged_width()),
            _ => return Self::CLOSED,
        };
        let reserved = format.reserved_leaf_at(1);
        let reserved_top = format.reserved_leaf_at(4);
        Self {
            four_level,
            five_level,
            root: walk.root(),
            upper: reserved_top & !reserved | LongMode::PAGE_SIZE,
            reserved,
            asks: asks(format),
            reserved_top,
            reserved_pde: format.reserved_leaf_at(2),
            reserved_pdpte: format.reserved_leaf_at(3),
        }
    }

    /// The translation of `gva` for `access`, if it takes no more than the lane knows of `walk`, which it was made of.
    #[inline(always)]
    pub(crate) fn translate<M: Memory>(
        &self,
        walk: &PageWalk,
        memory: &M,
        gva: u64,
        access: &Access,
    ) -> Option<Translation> {
        let format = walk.format();
        let mut run = Run { lane: self, format, memory, address: gva, access, all: u64::MAX, any: 0 };
        if gva.wrapping_add(1 << 47) < self.four_level {
            return run.four_levels(self.root);
        }
        cold_path();
        if gva.wrapping_add(self.five_level >> 1) < self.five_level {
            let entry = run.entry(5, self.root)?;
            if entry & self.reserved_top != 0 {
                return None;
            }
            // It has none of these bits: they are the PML4E's and the PDPTE's to show.
            run.all |= self.upper;
            return run.four_levels(entry);
        }
        None
    }
}

const fn asks(format: &PageFormat) -> [u64; Shown::COUNT] {
    let mut asks = [0; Shown::COUNT];
    let mut shown = 0;
    while shown < Shown::COUNT {
        let rights = Shown::of_bits(shown as u32).rights();
        let mut index = 0;
        while index < WORDS {
            let refused = !rights.read() || format.words()[index] >> rights.bits() & 1 != 0;
            if refused || key_field(format.protection_key_mask(), index, rights) != 0 {
                asks[shown] |= 1 << index;
            }
            index += 1;
        }
        shown += 1;
    }
    asks
}

struct Run<'a, M> {
    lane: &'a Lane,
    format: &'a PageFormat,
    memory: &'a M,
    address: u64,
    access: &'a Access,
    /// The bits that all entries have.
    all: u64,
    /// The bits that some entry has.
    any: u64,
}

impl<M: Memory> Run<'_, M> {
    /// The entry of `level` in the table that `above` refers to.
    #[inline(always)]
    fn entry(&mut self, level: u32, above: u64) -> Option<u64> {
        let offset = (self.address >> shift(level) & 511) << 3;
        let entry = self.memory.load_in_table(Gpa(above & LongMode::FRAME), offset)?;
        self.all &= entry;
        self.any |= entry;
        Some(entry)
    }

    #[inline(always)]
    fn four_levels(&mut self, above: u64) -> Option<Translation> {
        let entry = self.entry(4, above)?;
        let entry = self.entry(3, entry)?;
        if self.any & self.lane.upper != 0 {
            cold_path();
            // What the levels above this one show: where it has a bit, they show what all have, elsewhere what some has.
            let above = self.all & entry | self.any & !entry;
            if above & self.lane.reserved_top != 0 {
                return None;
            }
            if entry & LongMode::PAGE_SIZE != 0 {
                return self.large_page(3, entry, self.lane.reserved_pdpte);
            }
        }
        let entry = self.entry(2, entry)?;
        if entry & LongMode::PAGE_SIZE != 0 {
            return self.large_page(2, entry, self.lane.reserved_pde);
        }
        let entry = self.entry(1, entry)?;
        self.page(1, entry)
    }

    #[inline(always)]
    fn large_page(&self, level: u32, entry: u64, reserved: u64) -> Option<Translation> {
        cold_path();
        if entry & reserved == 0 { self.page(level, entry) } else { None }
    }

    /// The page that `entry` maps, if the bits of all levels allow the access.
    #[inline(always)]
    fn page(&self, level: u32, entry: u64) -> Option<Translation> {
        if self.any & self.lane.reserved != 0 {
            return None;
        }
        let shown = Shown::of_entries(self.all, self.any);
        if self.lane.asks[shown.bits() as usize] >> self.access.word_index() & 1 != 0 {
            cold_path();
            if refused(self.format, self.access, shown.rights(), entry) {
                return None;
            }
        }
        let within = (1 << shift(level)) - 1;
        let gpa = Gpa((entry & LongMode::FRAME & !within) | (self.address & within));
        let mut page = Page::new(PageSize::of_bits(shift(level)), shown);
        let backing = self.memory.backing(gpa);
        if backing != Backing::Ram {
            cold_path();
            page = page.with_backing(backing);
        }
        Some(Translation { gpa, entry, nested: None, page })
    }
}

/// Whether an access is refused to a page that has these rights and is mapped by `entry`.
#[inline(always)]
fn refused(format: &PageFormat, access: &Access, rights: Rights, entry: u64) -> bool {
    let key = LongMode::protection_key(entry);
    !rights.read()
        || format.refuses(access, rights)
        || key_refusal(format.protection_key_mask(), access, rights, key) != 0
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
    use crate::addr::is_canonical;
    use crate::masking::CR3_LAM_U48;
    use crate::mode::{
        CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PKS, CR4_SMAP, CR4_SMEP,
        ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::single_path::{OUTSIDE, SinglePath};
    use crate::trace::NoTrace;

    const MAXPHYADDR: u8 = 40;
    /// P, W, U, PS, G, a bit that large frames reserve, an absent frame, two bits above MAXPHYADDR, NX.
    const BITS: [u64; 10] = [1, 1 << 1, 1 << 2, 1 << 7, 1 << 8, 1 << 13, OUTSIDE, 1 << 45, 1 << 47, 1 << 63];

    fn walk(format: u32) -> PageWalk {
        let when = |bit: u32, value: u64| if format >> bit & 1 != 0 { value } else { 0 };
        let levels = if format & 1 == 0 { 4 } else { 5 };
        let intel = format >> 6 & 1 == 0;
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG | when(1, CR0_WP) | when(9, CR0_WP),
            cr3: levels << 30 | if intel { when(10, CR3_LAM_U48) } else { 0 },
            cr4: CR4_PAE
                | when(0, CR4_LA57)
                | when(2, CR4_SMEP)
                | when(3, CR4_SMAP)
                | when(4, CR4_PKE)
                | when(8, CR4_PKS)
                | when(9, CR4_CET),
            efer: EFER_LME | EFER_LMA | when(5, EFER_NXE),
            ..ControlRegisters::default()
        };
        let cpu = CpuProfile {
            vendor: if intel { Vendor::Intel } else { Vendor::Amd },
            maxphyaddr: MAXPHYADDR,
            gib_pages: format >> 7 & 1 == 0,
            encryption_bit: (!intel && format >> 10 & 1 != 0).then_some(47),
        };
        PageWalk::new(&registers, &cpu).expect("these registers are valid")
    }

    fn access(rng: &mut fastrand::Rng) -> Access {
        let kind = rng.choice([
            AccessKind::Read,
            AccessKind::Write,
            AccessKind::Fetch,
            AccessKind::ShadowStackRead,
            AccessKind::ShadowStackWrite,
        ]);
        let privilege = rng.choice([
            Privilege::User,
            Privilege::Supervisor,
            Privilege::ImplicitSupervisor,
            Privilege::Exempt,
        ]);
        let (Some(kind), Some(privilege)) = (kind, privilege) else { unreachable!() };
        let [pkru, pkrs] = [(), ()].map(|()| if rng.bool() { 0 } else { rng.u32(..) });
        Access::new(kind, privilege).with_ac(rng.bool()).with_pkru(pkru).with_pkrs(pkrs)
    }

    fn address(rng: &mut fastrand::Rng) -> u64 {
        let address = rng.u64(..);
        let unused = [0, 7, 16, 16][rng.usize(..4)];
        ((address << unused) as i64 >> unused) as u64
    }

    /// For every format, level and combination of the bits that matter: the lane accepts what the general walk answers,
    /// with the same answer, and nothing else. Shadow stacks, encrypted memory and pointers with metadata it leaves alone.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn accepts_exactly_what_the_general_walk_answers() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut accepted, mut left) = ([0; 5], 0);
        for format in 0..1 << 11 {
            let walk = walk(format);
            for varied in 1..=walk.format().levels() as usize {
                for combination in 0..1_u32 << BITS.len() {
                    let mut path = SinglePath([0; 6]);
                    for (level, entry) in path.0.iter_mut().enumerate().skip(1) {
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
                    let lane = Lane::of(&walk).translate(&walk, &path, gva, &access);
                    let general_alone = access.is_shadow_stack()
                        || walk.format().address_bits() != u64::MAX
                        || !is_canonical(gva, walk.format().unchanged_width());
                    if lane.is_some() || !general_alone {
                        assert_eq!(lane, general, "{gva:#x} {access:?} {:x?} {walk:?}", path.0);
                    }
                    match lane {
                        Some(page) => accepted[page.page_size() as usize] += 1,
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
        assert_eq!(Lane::of(&walk).translate(&walk, &SinglePath([1; 6]), 0, &access), None);
    }
}
