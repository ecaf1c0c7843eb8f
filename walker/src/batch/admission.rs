//! What the lanes of a batch accept: entries that the general walk accepts for this access.
//!
//! Lanes never refuse. What they do not accept is walked alone, by the one who knows faults. All masks come from the
//! [`PageFormat`], once a batch; a test enumerates that what they accept is what the general walk answers.

use crate::access::{Access, AccessKind};
use crate::batch::word::{NO_EXECUTE, PageWord, SIZE, USER, WRITE, size_code};
use crate::entry::{EntryLayout, LongMode, TwoLevel};
use crate::format::PageFormat;
use crate::mode::PagingMode;
use crate::permission::{Rights, key_field};
use crate::translation::PageSize;

const GRANTING: u64 = LongMode::GRANTING;
/// The bits by which an entry withholds a right, those that grant by being set turned.
const WITHHOLDING: u64 = GRANTING | NO_EXECUTE;
/// PWT, PCD, accessed, dirty, PAT, global, protection key: where a word has them, too.
const OF_LEAF: u64 = 0x1f8 | LongMode::KEY;

/// The masks of one batch.
#[derive(Clone, Debug)]
pub(super) struct Admission {
    /// The address bits of an entry.
    frame: u64,
    /// By level: what has to be 0 in an entry that refers to a table, its P bit turned.
    table: [u64; 8],
    /// By level: what has to be 0 in an entry that maps a page, its granting bits turned and those of `unwanted` once more,
    /// together with what the levels above withhold.
    leaf: [u64; 8],
    /// The rights that must not be there, as under SMAP and SMEP.
    unwanted: u64,
    /// Entries are those of 32-bit paging.
    short: bool,
}

/// A lane's way so far: where its next entry lies, and in the bits that the address of an entry has free, what the entries
/// above withhold.
pub(super) type State = u64;

/// The address in a state.
pub(super) const ADDRESS: u64 = LongMode::FRAME | 0xff8;

impl Admission {
    /// What `format` lets lanes accept for `access`; `None` where there are none or they are EPT's, or lanes would
    /// accept nothing.
    pub(super) fn new(format: &PageFormat, access: &Access) -> Option<Self> {
        if format.levels() == 0 || format.is_ept() {
            return None;
        }
        let Needs { decided, unwanted } = Needs::of(format, access)?;
        Some(Self::of(format, decided, unwanted))
    }

    /// What EPT lets lanes accept for an access of this kind, in the form of long mode ([`super::nested`]): readable pages, that
    /// are writable or executable where the access asks for it.
    pub(super) fn of_ept(format: &PageFormat, kind: AccessKind) -> Self {
        let (decided, unwanted) = match kind {
            AccessKind::Read => (0, 0),
            AccessKind::Fetch => (NO_EXECUTE, 0),
            _ => (WRITE, 0),
        };
        Self::of(format, decided, unwanted)
    }

    fn of(format: &PageFormat, decided: u64, unwanted: u64) -> Self {
        let frame = LongMode::FRAME & format.address_bits();
        let short = format.mode() == PagingMode::TwoLevel;
        let mut admission = Self { frame, table: [u64::MAX; 8], leaf: [u64::MAX; 8], unwanted, short };
        let masks = admission.table.iter_mut().zip(&mut admission.leaf);
        for ((table, leaf), level) in masks.zip(1..=format.levels()) {
            *table = LongMode::PRESENT | format.page_size_bit() | format.reserved_table_at(level);
            *leaf = LongMode::PRESENT | decided | format.reserved_leaf_at(level);
        }
        admission
    }

    /// What decides over the entries of a level above 1.
    #[inline(always)]
    pub(super) fn tables(&self, level: u32) -> Tables {
        Tables { refused: at(&self.table, level), frame: self.frame }
    }

    /// What decides over PTEs.
    #[inline(always)]
    pub(super) fn pages(&self) -> Pages {
        Pages { refused: at(&self.leaf, 1), unwanted: self.unwanted, kept: self.frame | OF_LEAF }
    }

    /// The word of the page in RAM that `entry` of level 2 or 3 maps at `gva`; `None` where it maps none that the access may
    /// use.
    pub(super) fn large_page(&self, level: u32, state: State, entry: u64, gva: u64) -> Option<u64> {
        let wrong = (withheld(state, entry) ^ self.unwanted | entry & !WITHHOLDING) & at(&self.leaf, level);
        if entry & LongMode::PAGE_SIZE == 0 || wrong != 0 {
            return None;
        }
        let (within, size) = match level {
            2 if self.short => (0x3f_ffff, PageSize::Size4M),
            2 => (0x1f_ffff, PageSize::Size2M),
            _ => (0x3fff_ffff, PageSize::Size1G),
        };
        let page = if self.short { TwoLevel::page(level, entry) } else { entry };
        let frame = page & self.frame & !within | gva & within & PageWord::FRAME;
        // Of a large page, PAT is bit 12, and bit 7 is the page size.
        let flags = entry & OF_LEAF & !LongMode::PAGE_SIZE | entry >> 5 & LongMode::PAGE_SIZE;
        Some(frame | flags | withheld(state, entry) ^ GRANTING | size_code(size) << SIZE)
    }
}

/// The bits of [`WITHHOLDING`] that `entry` or those above it withhold rights by.
#[inline(always)]
const fn withheld(state: State, entry: u64) -> u64 {
    (entry ^ GRANTING | state) & WITHHOLDING
}

/// What decides over the entries of one level above 1.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    refused: u64,
    frame: u64,
}

impl Tables {
    /// The bits that keep `entry` from referring to a table.
    #[inline(always)]
    pub(super) const fn wrong(self, entry: u64) -> u64 {
        (entry ^ LongMode::PRESENT) & self.refused
    }

    /// The state once a walk has passed through `entry`, which refers to a table, and is to go on with that table's entry at
    /// `offset`.
    #[inline(always)]
    pub(super) const fn through(self, state: State, entry: u64, offset: u64) -> State {
        entry & self.frame | withheld(state, entry) | offset
    }
}

/// What decides over PTEs.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    refused: u64,
    unwanted: u64,
    kept: u64,
}

impl Pages {
    /// The bits that keep `entry` from mapping a page that the access may use.
    #[inline(always)]
    pub(super) const fn wrong(self, state: State, entry: u64) -> u64 {
        (withheld(state, entry) ^ self.unwanted | entry & !WITHHOLDING) & self.refused
    }

    /// The word of the page in RAM that `entry` maps.
    #[inline(always)]
    pub(super) const fn word(self, state: State, entry: u64) -> u64 {
        const SIZE_4K: u64 = size_code(PageSize::Size4K) << SIZE;
        entry & self.kept | withheld(state, entry) ^ (GRANTING | SIZE_4K)
    }

    /// The same for the PTEs of one table, which all are met in one state.
    #[inline(always)]
    pub(super) const fn under(self, state: State) -> TablePages {
        let open = !state & WITHHOLDING;
        let withheld = state & WITHHOLDING;
        TablePages {
            expected: (GRANTING ^ self.unwanted) & open,
            refused: self.refused & !withheld,
            never: (withheld ^ self.unwanted & withheld) & self.refused != 0,
            kept: self.kept | open,
            set: self.word(state, 0) & !open,
        }
    }
}

/// What decides over the PTEs of one table.
#[derive(Clone, Copy)]
pub(super) struct TablePages {
    /// What the bits of `refused` have to be.
    expected: u64,
    refused: u64,
    /// What the levels above withhold decides already.
    never: bool,
    kept: u64,
    set: u64,
}

impl TablePages {
    /// The bits in which `entry` is not as it has to be. Those of many entries count together.
    #[inline(always)]
    pub(super) const fn differing(self, entry: u64) -> u64 {
        entry ^ self.expected
    }

    /// Whether entries that differ in these bits, no more, map pages that the access may use.
    #[inline(always)]
    pub(super) const fn accepts(self, differing: u64) -> bool {
        !self.never && differing & self.refused == 0
    }

    /// The word of the page in RAM that `entry` maps.
    #[inline(always)]
    pub(super) const fn word(self, entry: u64) -> u64 {
        entry & self.kept | self.set
    }
}

#[inline(always)]
fn at(masks: &[u64; 8], level: u32) -> u64 {
    masks[(level.wrapping_sub(1) & 7) as usize]
}

/// What of a page's rights an access depends on.
struct Needs {
    /// The bits that decide: of the rights, and of the protection key.
    decided: u64,
    /// Those of them that have to be withheld.
    unwanted: u64,
}

impl Needs {
    /// The pages that the access may use, as those that have some rights and lack some others. All access rules have this
    /// shape. `None` where there are no such pages, or rights and key 0 do not tell them.
    fn of(format: &PageFormat, access: &Access) -> Option<Self> {
        const BITS: [u64; 3] = [WRITE, USER, NO_EXECUTE];
        let rights = |number: u8| {
            let right = |at: u8, right: Rights| if number >> at & 1 != 0 { right } else { Rights::NONE };
            Rights::READ.or(right(0, Rights::WRITE)).or(right(1, Rights::USER)).or(right(2, Rights::EXECUTE))
        };
        let (mut allowed, mut key) = (0_u8, 0);
        for number in 0..8 {
            let rights = rights(number);
            let decides = key_field(format.protection_key_mask(), access.permission_index(), rights);
            let register = if rights.user() { access.pkru() } else { access.pkrs() };
            // Two bits for each key.
            let refused = register & decides.wrapping_mul(0x5555_5555);
            if !format.refuses(access, rights) && refused & 3 == 0 {
                allowed |= 1 << number;
                // Where some keys are refused, lanes know key 0 alone.
                key |= if refused == 0 { 0 } else { LongMode::KEY };
            }
        }
        let mut needs = Self { decided: key, unwanted: 0 };
        let mut free = 0;
        for (with, bit) in [0b1010_1010, 0b1100_1100, 0b1111_0000_u8].into_iter().zip(BITS) {
            match (allowed & with != 0, allowed & !with != 0) {
                (true, true) => free += 1,
                (true, false) => needs.decided |= bit,
                (false, true) => {
                    needs.decided |= bit;
                    needs.unwanted |= bit;
                }
                (false, false) => return None,
            }
        }
        if allowed.count_ones() == 1 << free { Some(needs) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Privilege;
    use crate::batch::word::with_backing;
    use crate::mode::{
        CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PKS, CR4_SMAP, CR4_SMEP,
        ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::single_path::{OUTSIDE, SinglePath};
    use crate::trace::NoTrace;
    use crate::walk::PageWalk;

    const MAXPHYADDR: u8 = 40;
    /// P, W, U, PS, G, a bit that large frames reserve, an absent frame, two bits above MAXPHYADDR, a key bit, NX.
    const BITS: [u64; 11] =
        [1, 1 << 1, 1 << 2, 1 << 7, 1 << 8, 1 << 13, OUTSIDE, 1 << 45, 1 << 47, 1 << 60, 1 << 63];

    fn walk(format: u32) -> PageWalk {
        let when = |bit: u32, value: u64| if format >> bit & 1 != 0 { value } else { 0 };
        let intel = format >> 6 & 1 == 0;
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG | when(1, CR0_WP) | when(9, CR0_WP),
            cr3: if format & 1 == 0 { 4 << 30 } else { 5 << 30 },
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

    /// Every kind of access, by everyone, with AC and keys at random.
    fn accesses(rng: &mut fastrand::Rng) -> impl Iterator<Item = Access> {
        let kinds = [
            AccessKind::Read,
            AccessKind::Write,
            AccessKind::Fetch,
            AccessKind::ShadowStackRead,
            AccessKind::ShadowStackWrite,
        ];
        let privileges =
            [Privilege::User, Privilege::Supervisor, Privilege::ImplicitSupervisor, Privilege::Exempt];
        kinds.into_iter().flat_map(move |kind| privileges.map(|privilege| (kind, privilege))).map(
            |(kind, privilege)| {
                // Linux refuses all keys but 0 to start with.
                let [pkru, pkrs] = [(), ()].map(|()| [0, 0x5555_5554, 3, rng.u32(..)][rng.usize(..4)]);
                Access::new(kind, privilege).with_ac(rng.bool()).with_pkru(pkru).with_pkrs(pkrs)
            },
        )
    }

    /// The word that a lane comes to, if it accepts all that it meets.
    fn lane(admission: &Admission, levels: u32, path: &SinglePath, gva: u64) -> Option<u64> {
        let mut state = 0;
        for level in (2..=levels).rev() {
            let entry = path.0[level as usize];
            if admission.tables(level).wrong(entry) != 0 {
                return admission.large_page(level, state, entry, gva);
            }
            state = admission.tables(level).through(state, entry, 0);
            // The next table has to be in memory, and is the one of the next level.
            if state & ADDRESS != u64::from(level - 1) << 30 {
                return None;
            }
        }
        let pages = admission.pages();
        (pages.wrong(state, path.0[1]) == 0).then(|| pages.word(state, path.0[1]))
    }

    /// For every format, level and combination of the bits that matter: what lanes accept is what the general walk answers, and
    /// what they leave of that are shadow stacks, and keys other than 0 where some key is refused.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn accepting_implies_agreement() {
        let mut rng = fastrand::Rng::with_seed(11);
        let (mut accepted, mut left, mut refused) = ([0; 5], 0, 0);
        for format in 0..1 << 11 {
            let walk = walk(format);
            let levels = walk.format().levels();
            for varied in 1..=levels as usize {
                let accesses: std::vec::Vec<Access> = accesses(&mut rng).collect();
                for combination in 0..1_u32 << BITS.len() {
                    let mut path = SinglePath([0; 6]);
                    for (level, entry) in path.0.iter_mut().enumerate().skip(1) {
                        let ignored = rng.u64(..) & (0x7f << 52 | 0xe00 | 0x78);
                        let right = |bit: u64, rng: &mut fastrand::Rng| if rng.u8(..4) > 0 { bit } else { 0 };
                        *entry = (level as u64 - 1) << 30 | ignored | 1;
                        *entry |= right(2, &mut rng) | right(4, &mut rng);
                        if level == varied {
                            *entry &= !7;
                            for (number, bit) in BITS.iter().enumerate() {
                                *entry |= if combination >> number & 1 != 0 { *bit } else { 0 };
                            }
                        }
                    }
                    let access = accesses[rng.usize(..accesses.len())];
                    let gva = ((rng.u64(..) << 16) as i64 >> 16) as u64;
                    let general = crate::walk::translate(&walk, None, &path, gva, &access, &mut NoTrace).ok();
                    let admission = Admission::new(walk.format(), &access);
                    let word = admission.and_then(|admission| lane(&admission, levels, &path, gva));
                    let word = word.map(|page| with_backing(page, gva, &path));
                    match (word, general) {
                        (Some(word), Some(page)) => {
                            assert_eq!(PageWord::from_bits(word), PageWord::of(&page), "{page:?} {access:?}");
                            accepted[PageWord::from_bits(word).page_size() as usize] += 1;
                        }
                        (Some(word), None) => panic!("{word:#x}, {access:?}, {:x?}, {walk:?}", path.0),
                        (None, Some(page)) => {
                            let keys = walk.format().protection_key_mask() != 0;
                            let tables_beyond = path.0[varied] & (OUTSIDE | 1 << 13) != 0;
                            assert!(
                                access.is_shadow_stack() || keys || tables_beyond,
                                "left: {page:?} {access:?} {walk:?}"
                            );
                            left += 1;
                        }
                        (None, None) => refused += 1,
                    }
                }
            }
        }
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            assert!(accepted[size as usize] > 10_000, "{size:?}: {accepted:?}");
        }
        let all: u32 = accepted.iter().sum();
        assert!(left < all / 3, "{left} left, {all} accepted");
        assert!(refused > 1_000_000, "{refused}");
    }
}
