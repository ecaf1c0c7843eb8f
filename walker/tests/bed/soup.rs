//! Entries and addresses for a soup of tables: every table page may be used at every level, so that tables refer to
//! themselves, to each other and to nowhere, and one entry is a PML4E on one path and a PTE on the next.

use fastrand::Rng;

use super::{ACCESSED, DIRTY, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, USER, WRITE, when};

/// Indices that entries are put at and addresses are made of, so that paths meet.
pub(crate) const INDICES: [u64; 8] = [0, 1, 2, 255, 256, 300, 510, 511];

/// What the entries of one soup are made of.
pub(crate) struct Recipe<'a> {
    /// Where the tables lie, in the space that the entries refer to.
    pub(crate) tables: &'a [u64],
    /// How often each kind of trouble is met, in percent, by itself.
    pub(crate) trouble: u32,
    pub(crate) ram_pages: u64,
    /// Width of the addresses in the entries.
    pub(crate) width: u8,
    pub(crate) maxphyaddr: u8,
    pub(crate) gib_pages: bool,
}

/// A hostile soup has trouble at every level; a mild one lets most walks through.
pub(crate) fn trouble(rng: &mut Rng) -> u32 {
    *rng.choice(&[0, 1, 1, 2, 4]).unwrap()
}

impl Recipe<'_> {
    /// One entry: usually plain, sometimes one of everything that can be wrong with it.
    pub(crate) fn entry(&self, rng: &mut Rng) -> u64 {
        let &Recipe { trouble, ram_pages, width, maxphyaddr, .. } = self;
        let mut chance = |percent: u32| rng.u32(0..100) < percent;
        let (present, reserved, large, outside) =
            (!chance(2 + 3 * trouble), chance(trouble), chance(6 + trouble), chance(1 + trouble));
        let (user, no_execute, noise) = (chance(90), chance(trouble), chance(20));
        let frame = if large && rng.u32(0..10) < 8 {
            let size = if self.gib_pages && rng.bool() { 30 } else { 21 };
            if rng.bool() { 0 } else { rng.u64(0..1 << (width - size)) << size }
        } else if outside {
            match rng.u32(0..3) {
                0 => ram_pages * PAGE,
                1 => rng.u64(ram_pages..1 << (width - 12)) * PAGE,
                _ => (1 << width) - PAGE,
            }
        } else if rng.u32(0..20) == 0 {
            rng.u64(0..ram_pages) * PAGE
        } else {
            *rng.choice(self.tables).unwrap()
        };
        let mut entry = frame | when(rng.bool(), WRITE);
        for (set, bit) in [(present, PRESENT), (user, USER), (large, PAGE_SIZE), (no_execute, NO_EXECUTE)] {
            entry |= when(set, bit);
        }
        if reserved {
            entry |= reserved_bit(rng, maxphyaddr);
        }
        if noise {
            // PWT, PCD, A, D, G, ignored bits 11:9 and 62:52; never what decides a path.
            entry |= rng.u64(..) & (0b11 << 3 | ACCESSED | DIRTY | 0xf << 8 | 0x7ff << 52);
        }
        entry
    }

    /// An entry of PAE paging below the PDPTEs. Bits 62:52, noise in long mode, are reserved there.
    pub(crate) fn entry_of_pae(&self, rng: &mut Rng) -> u64 {
        let entry = self.entry(rng);
        if rng.u32(0..100) < self.trouble { entry } else { entry & !(0x7ff << 52) }
    }

    /// What a PDPTE register may hold.
    pub(crate) fn pdpte(&self, rng: &mut Rng) -> u64 {
        let within = ((1 << self.maxphyaddr) - 1) & !(PAGE - 1);
        let noise = rng.u64(..) & (0b11 << 3 | 0b111 << 9);
        match rng.u32(0..12) {
            0 => rng.u64(..) & !PRESENT,
            1 => self.entry(rng) & within | noise | PRESENT,
            _ => *rng.choice(self.tables).unwrap() | noise | PRESENT,
        }
    }

    /// An entry of 32-bit paging, with 4 MiB pages of 36-bit addresses.
    pub(crate) fn entry_of_two_levels(&self, rng: &mut Rng) -> u32 {
        let entry = self.entry(rng);
        let mut low = entry as u32 & 0xfff;
        let mut chance = |percent: u32| rng.u32(0..100) < percent;
        let (large, reserved, outside) = (
            chance(20),
            chance(self.trouble),
            entry >> 12 << 12 >= self.ram_pages * PAGE && entry >> 32 != 0,
        );
        if large {
            low |= PAGE_SIZE as u32;
            // PAT and, rarely, address bits 35:32 and a reserved one.
            low |= rng.u32(..) & 1 << 12;
            low |= when(rng.u32(0..4) == 0, rng.u64(..) & 0xf << 13) as u32;
            low |= when(rng.bool(), rng.u64(..) & 0xffc0_0000) as u32;
            low | when(reserved, 1 << rng.u32(17..22)) as u32
        } else if outside {
            low | rng.u32(..) & 0xffff_f000
        } else {
            low | entry as u32 & 0xffff_f000
        }
    }
}

/// An address bit that this CPU does not have; where it has all 52, an ignored bit instead.
pub(crate) fn reserved_bit(rng: &mut Rng, maxphyaddr: u8) -> u64 {
    1 << rng.u32(u32::from(maxphyaddr)..52.max(u32::from(maxphyaddr) + 1))
}

/// An address whose indices at `levels` levels are mostly those that soups use. Not sign-extended.
pub(crate) fn address(rng: &mut Rng, levels: u32) -> u64 {
    let mut address = rng.u64(0..PAGE);
    for level in 0..levels {
        let index = if rng.u32(0..50) == 0 { rng.u64(0..512) } else { *rng.choice(&INDICES).unwrap() };
        address |= index << (12 + 9 * level);
    }
    address
}

/// The same in 64 bits: mostly canonical for `levels` levels.
pub(crate) fn linear_address(rng: &mut Rng, levels: u32) -> u64 {
    let address = address(rng, levels);
    let canonical = twin(address, levels);
    match rng.u32(0..20) {
        0 => address | rng.u64(..) << (12 + 9 * levels),
        1 => canonical ^ 1 << rng.u32(12 + 9 * levels..64),
        _ => canonical,
    }
}

/// The canonical address that a walk of `levels` levels takes `address` for if it does not look at the bits above.
pub(crate) fn twin(address: u64, levels: u32) -> u64 {
    let unused = 64 - (12 + 9 * levels);
    ((address << unused) as i64 >> unused) as u64
}
