//! Which bits of a present entry are reserved.
//!
//! Intel SDM volume 3, "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging", and AMD APM volume 2,
//! "Page-Translation-Table Entry Fields". In long mode, bits 51:MAXPHYADDR are reserved at every level; bit 63 where EFER.NXE is clear; the address bits below a large
//! page; bit 7 where a level has no leaf; and, on AMD, bit 8 of a PML4E and a PML5E. Bits 62:52 are ignored; PAE
//! paging reserves them. 32-bit paging reserves address bits of 4 MiB pages alone.
//!
//! KVM takes every CPU's PSE-36 to be 36 bits wide; here it is as wide as MAXPHYADDR allows, up to the manual's 40 bits.

use crate::entry::{EntryLayout, LongMode};
use crate::mode::{CpuProfile, Vendor, bits};

/// Reserved bits by level; index 0 is level 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReservedBits {
    /// Of an entry that maps a page. Where a level has no leaf, the page-size bit itself is reserved.
    pub(crate) leaf: [u64; 8],
    /// Of an entry that refers to a table.
    pub(crate) table: [u64; 8],
}

impl ReservedBits {
    pub(crate) const NONE: Self = Self { leaf: [0; 8], table: [0; 8] };

    pub(crate) const fn two_level(cpu: &CpuProfile, pse: bool) -> Self {
        // Bits 20:13 of a 4 MiB PDE are address bits 39:32, as far as the CPU has them.
        let width = if cpu.maxphyaddr < 40 { cpu.maxphyaddr as u32 } else { 40 };
        let large = if pse { bits(width - 19, 21) } else { 0 };
        Self { leaf: [0, large, 0, 0, 0, 0, 0, 0], table: [0; 8] }
    }

    pub(crate) const fn pae(cpu: &CpuProfile, nxe: bool) -> Self {
        let everywhere = cpu.address_reserved(62) | no_execute(nxe);
        let large = everywhere | bits(13, 20);
        let pdpte = Self::pdpte(cpu);
        Self {
            leaf: [everywhere, large, pdpte, 0, 0, 0, 0, 0],
            table: [everywhere, everywhere, pdpte, 0, 0, 0, 0, 0],
        }
    }

    /// Of a PDPTE of PAE paging, in memory or in a register: it grants no rights, and maps no page.
    pub(crate) const fn pdpte(cpu: &CpuProfile) -> u64 {
        bits(1, 2) | bits(5, 8) | cpu.address_reserved(63)
    }

    /// Of EPT entries. Intel SDM volume 3, "EPT Translation Mechanism".
    pub(crate) const fn ept(cpu: &CpuProfile, pages_2m: bool, pages_1g: bool) -> Self {
        let everywhere = cpu.address_reserved(51);
        let table = everywhere | bits(3, 6);
        let no_leaf = everywhere | bits(3, 7);
        let pde = if pages_2m { everywhere | bits(12, 20) } else { no_leaf };
        let pdpte = if pages_1g { everywhere | bits(12, 29) } else { no_leaf };
        Self {
            leaf: [everywhere, pde, pdpte, no_leaf, no_leaf, 0, 0, 0],
            table: [everywhere, table, table, no_leaf, no_leaf, 0, 0, 0],
        }
    }

    pub(crate) fn long_mode(cpu: &CpuProfile, nxe: bool) -> Self {
        let everywhere = cpu.address_reserved(51) | no_execute(nxe);
        let top = everywhere
            | match cpu.vendor {
                Vendor::Amd => LongMode::GLOBAL,
                Vendor::Intel => 0,
            };
        let no_leaf = top | LongMode::PAGE_SIZE;
        let gib_leaf = if cpu.gib_pages { bits(13, 29) } else { LongMode::PAGE_SIZE };
        Self {
            leaf: [everywhere, everywhere | bits(13, 20), everywhere | gib_leaf, no_leaf, no_leaf, 0, 0, 0],
            table: [everywhere, everywhere, everywhere, top, top, 0, 0, 0],
        }
    }
}

/// Bit 63 where it does not mean no-execute.
const fn no_execute(nxe: bool) -> u64 {
    if nxe { 0 } else { 1 << 63 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: CpuProfile =
        CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };

    #[test]
    fn address_bits_above_maxphyaddr() {
        let masks = ReservedBits::long_mode(&CPU, true);
        for level in 0..5 {
            assert_eq!(masks.table[level] & bits(40, 63), bits(40, 51), "table, level {}", level + 1);
            assert_eq!(masks.leaf[level] & bits(40, 63), bits(40, 51), "leaf, level {}", level + 1);
        }
        let full = ReservedBits::long_mode(&CpuProfile { maxphyaddr: 52, ..CPU }, true);
        assert_eq!(full.table, [0; 8]);
    }

    #[test]
    fn no_execute_is_reserved_only_without_nxe() {
        assert_eq!(ReservedBits::long_mode(&CPU, true).leaf[0] >> 63, 0);
        assert_eq!(ReservedBits::long_mode(&CPU, false).leaf[0] >> 63, 1);
        assert_eq!(ReservedBits::long_mode(&CPU, false).table[4] >> 63, 1);
    }

    #[test]
    fn large_frames_and_the_page_size_bit() {
        let masks = ReservedBits::long_mode(&CPU, true);
        assert_eq!(masks.leaf[1] & bits(0, 39), bits(13, 20));
        assert_eq!(masks.leaf[2] & bits(0, 39), bits(13, 29));
        assert_eq!(masks.leaf[3] & bits(0, 39), 1 << 7);
        assert_eq!(masks.leaf[4] & bits(0, 39), 1 << 7);
        let small = ReservedBits::long_mode(&CpuProfile { gib_pages: false, ..CPU }, true);
        assert_eq!(small.leaf[2] & bits(0, 39), 1 << 7);
    }

    #[test]
    fn two_level_reserves_what_pse_36_lacks() {
        let masks = |maxphyaddr, pse| ReservedBits::two_level(&CpuProfile { maxphyaddr, ..CPU }, pse);
        assert_eq!(masks(32, true).leaf[1], bits(13, 21));
        assert_eq!(masks(36, true).leaf[1], bits(17, 21));
        assert_eq!(masks(40, true).leaf[1], 1 << 21);
        assert_eq!(masks(52, true).leaf[1], 1 << 21);
        assert_eq!(masks(36, false), ReservedBits::NONE);
    }

    #[test]
    fn pae_reserves_the_high_bits_and_most_of_a_pdpte() {
        let masks = ReservedBits::pae(&CPU, true);
        assert_eq!(masks.table[0], bits(40, 62));
        assert_eq!(masks.leaf[1], bits(40, 62) | bits(13, 20));
        assert_eq!(masks.table[2], 0x6 | 0x1e0 | bits(40, 63));
        assert_eq!(masks.leaf[2], masks.table[2]);
        assert_eq!(ReservedBits::pae(&CPU, false).table[1], bits(40, 63));
    }

    #[test]
    fn amd_reserves_bit_8_of_the_top_levels() {
        let masks = ReservedBits::long_mode(&CpuProfile { vendor: Vendor::Amd, ..CPU }, true);
        let bit_8: [u64; 5] = core::array::from_fn(|level| masks.table[level] & (1 << 8));
        assert_eq!(bit_8, [0, 0, 0, 1 << 8, 1 << 8]);
    }
}
