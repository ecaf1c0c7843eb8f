//! The page format: everything that the meaning of an entry depends on, computed once for a set of registers.

use crate::access::{Access, AccessKind};
use crate::entry::{EntryLayout, LongMode, TwoLevel};
use crate::ept::{EPTP_ACCESSED_DIRTY, EPTP_SUPERVISOR_SHADOW_STACK, EptCapabilities, EptControls};
use crate::masking::Masking;
use crate::memory_type::MemoryType;
use crate::mode::{
    CR0_CD, CR0_WP, CR4_CET, CR4_PGE, CR4_PKE, CR4_PKS, CR4_PSE, CR4_SMAP, CR4_SMEP, ControlRegisters,
    CpuProfile, EFER_LMA, EFER_NXE, PagingMode, StateError,
};
use crate::npt::NptControls;
use crate::permission::{Protections, Rights, WORDS, ept_words};
use crate::reserved::ReservedBits;
use crate::translation::Translation;

/// How entries are read and judged: levels, reserved bits, permission words, protection-key mask.
///
/// Built once per change of the registers it depends on. Walking only reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageFormat {
    mode: PagingMode,
    levels: u32,
    linear_width: u32,
    maxphyaddr: u8,
    /// The bit that makes an entry above level 1 a leaf; 0 where CR4.PSE is clear in 32-bit paging.
    page_size_bit: u64,
    fetch_reported: bool,
    global_pages: bool,
    is_ept: bool,
    /// Whether a walk sets accessed and dirty bits: not under EPT without bit 6 of EPTP.
    records_use: bool,
    cache_disabled: bool,
    /// Mode-based execute control of EPT.
    mode_based_execute: bool,
    bad_memory_type_xwr: u64,
    reserved: ReservedBits,
    permissions: [u16; WORDS],
    protection_key_mask: u32,
    shadow_stacks: bool,
    /// The bits of a table's or page's address that an entry gives: all but the encryption bit.
    address_bits: u64,
    masking: Masking,
    memory_types: [MemoryType; 8],
}

impl PageFormat {
    /// The format of `gva_walk` under these registers.
    ///
    /// # Errors
    /// If no CPU accepts the registers.
    pub fn guest(registers: &ControlRegisters, cpu: &CpuProfile) -> Result<Self, StateError> {
        let long = registers.efer & EFER_LMA != 0;
        let protections = Protections {
            write_protect: registers.cr0 & CR0_WP != 0,
            smep: registers.cr4 & CR4_SMEP != 0,
            smap: registers.cr4 & CR4_SMAP != 0,
            user_keys: registers.cr4 & CR4_PKE != 0 && long,
            supervisor_keys: registers.cr4 & CR4_PKS != 0 && long,
            shadow_stacks: registers.cr4 & CR4_CET != 0,
            supervisor_pages_open: false,
        };
        let format = Self::build(registers, cpu, protections, registers.cr4 & CR4_SMEP != 0)?;
        Ok(Self { masking: Masking::new(registers, format.mode), ..format })
    }

    /// The format of `ngpa_walk` under NPT: the host format that L1's CR4 and EFER select at VMRUN.
    ///
    /// # Errors
    /// If no CPU accepts the registers, or L1 does not page.
    pub fn npt(
        host: &ControlRegisters,
        controls: &NptControls,
        cpu: &CpuProfile,
    ) -> Result<Self, StateError> {
        let gmet = controls.guest_mode_execute_trap;
        let protections = if gmet { Protections::NPT_GMET } else { Protections::NPT };
        let format = Self::build(host, cpu, protections, gmet)?;
        match format.mode {
            PagingMode::None => Err(StateError::Contradiction {
                register: "CR0",
                problem: "nested paging needs CR0.PG set in the state that L1 runs VMRUN with",
            }),
            _ => Ok(format),
        }
    }

    /// The format of `ngpa_walk` under EPT, with an `eptp` that has been checked.
    pub(crate) fn ept(
        eptp: u64,
        controls: &EptControls,
        capabilities: &EptCapabilities,
        cpu: &CpuProfile,
    ) -> Self {
        let five_level = eptp >> 3 & 7 == 4;
        let records_use = eptp & EPTP_ACCESSED_DIRTY != 0;
        let supervisor_shadow_stacks = eptp & EPTP_SUPERVISOR_SHADOW_STACK != 0;
        let reserved = ReservedBits::ept(cpu, capabilities.pages_2m, capabilities.pages_1g);
        let permissions = ept_words(supervisor_shadow_stacks);
        let address_bits = !cpu.encryption_mask();
        Self {
            mode: if five_level { PagingMode::FiveLevel } else { PagingMode::FourLevel },
            is_ept: true,
            levels: if five_level { 5 } else { 4 },
            linear_width: if five_level { 57 } else { 48 },
            maxphyaddr: cpu.maxphyaddr,
            page_size_bit: LongMode::PAGE_SIZE,
            fetch_reported: false,
            global_pages: false,
            records_use,
            cache_disabled: false,
            mode_based_execute: controls.mode_based_execute,
            bad_memory_type_xwr: bad_memory_type_xwr(capabilities.execute_only, controls.mode_based_execute),
            reserved,
            permissions,
            protection_key_mask: 0,
            shadow_stacks: false,
            address_bits,
            masking: Masking::NONE,
            memory_types: [MemoryType::WriteBack; 8],
        }
    }

    fn build(
        registers: &ControlRegisters,
        cpu: &CpuProfile,
        protections: Protections,
        smep: bool,
    ) -> Result<Self, StateError> {
        cpu.check()?;
        let mode = registers.mode()?;
        registers.check_vendor(cpu.vendor)?;
        let nxe = registers.efer & EFER_NXE != 0;
        let pse = mode != PagingMode::TwoLevel || registers.cr4 & CR4_PSE != 0;
        let (levels, linear_width, reserved) = match mode {
            PagingMode::None => (0, 32, ReservedBits::NONE),
            PagingMode::TwoLevel => (2, 32, ReservedBits::two_level(cpu, pse)),
            PagingMode::Pae => (3, 32, ReservedBits::pae(cpu, nxe)),
            PagingMode::FourLevel => (4, 48, ReservedBits::long_mode(cpu, nxe)),
            PagingMode::FiveLevel => (5, 57, ReservedBits::long_mode(cpu, nxe)),
        };
        let permissions = protections.words();
        let protection_key_mask = protections.key_mask();
        let address_bits = !cpu.encryption_mask();
        Ok(Self {
            mode,
            levels,
            linear_width,
            maxphyaddr: cpu.maxphyaddr,
            page_size_bit: if pse { LongMode::PAGE_SIZE } else { 0 },
            fetch_reported: (nxe && mode != PagingMode::TwoLevel) || smep,
            global_pages: registers.cr4 & CR4_PGE != 0,
            is_ept: false,
            records_use: true,
            cache_disabled: registers.cr0 & CR0_CD != 0,
            mode_based_execute: false,
            bad_memory_type_xwr: 0,
            reserved,
            permissions,
            protection_key_mask,
            shadow_stacks: protections.shadow_stacks,
            address_bits,
            masking: Masking::NONE,
            memory_types: core::array::from_fn(|i| MemoryType::from_pat(registers.pat >> (8 * i))),
        })
    }

    /// The paging mode; under EPT the one with as many levels.
    #[must_use]
    pub const fn mode(&self) -> PagingMode {
        self.mode
    }

    /// Whether entries are those of EPT.
    #[must_use]
    pub fn is_ept(&self) -> bool {
        self.is_ept
    }

    /// Number of levels: 0 without paging, else 2 to 5.
    #[must_use]
    pub fn levels(&self) -> u32 {
        self.levels
    }

    /// Width of an input address in bits: 32, 48 or 57.
    #[must_use]
    pub fn linear_width(&self) -> u32 {
        self.linear_width
    }

    /// MAXPHYADDR in bits.
    #[must_use]
    pub fn maxphyaddr(&self) -> u8 {
        self.maxphyaddr
    }

    /// Whether a fault on a fetch sets the error code's I/D bit: EFER.NXE (with PAE) or CR4.SMEP is set.
    #[must_use]
    pub fn fetch_reported(&self) -> bool {
        self.fetch_reported
    }

    /// Whether a leaf's global bit has a meaning: CR4.PGE is set.
    #[must_use]
    pub fn global_pages(&self) -> bool {
        self.global_pages
    }

    /// Reserved bits of an entry that maps a page; index 0 is level 1. A level without a leaf reserves bit 7 itself.
    #[must_use]
    pub fn reserved_leaf(&self) -> &[u64] {
        self.reserved.leaf.get(..self.levels as usize).unwrap_or_default()
    }

    /// Reserved bits of an entry that refers to a table; index 0 is level 1, which never does.
    #[must_use]
    pub fn reserved_table(&self) -> &[u64] {
        self.reserved.table.get(..self.levels as usize).unwrap_or_default()
    }

    /// The permission words. Word index: [`Access::permission_index`](crate::Access::permission_index); bit number:
    /// [`Rights::bits`](crate::Rights::bits); a set bit refuses the access. Under EPT the access's privilege is that of the
    /// linear address, which its page decides, and [`Rights::USER`] is its right to be fetched from.
    #[must_use]
    pub fn permissions(&self) -> &[u16] {
        self.permissions.get(..16).unwrap_or_default()
    }

    /// The protection-key mask: sixteen 2-bit fields, indexed by error-code bits 4:1 with RSVD's place taken by the page's
    /// U/S. A field holds the bits (access-disable 1, write-disable 2) that refuse such an access: of PKRU for a user page, of
    /// PKRS for a supervisor page. 0 without CR4.PKE and CR4.PKS.
    #[must_use]
    pub const fn protection_key_mask(&self) -> u32 {
        self.protection_key_mask
    }

    /// Whether there are shadow-stack accesses: CR4.CET is set. Where there are none, such an access is decided and
    /// reported as a data access. Never in the second dimension.
    #[must_use]
    pub fn shadow_stacks(&self) -> bool {
        self.shadow_stacks
    }

    /// The bits that an entry's address is masked with: all but [`CpuProfile::encryption_bit`].
    #[must_use]
    #[inline]
    pub const fn address_bits(&self) -> u64 {
        self.address_bits
    }

    /// EPT: which of the 64 combinations of memory type (bits 5:3) and rights (execute, write, read: bits 2:0) are
    /// misconfigured in an entry that is present; bit number is bits 5:0 of the entry, whose memory type counts in a leaf
    /// only. 0 for all other formats.
    #[must_use]
    pub fn bad_memory_type_xwr(&self) -> u64 {
        self.bad_memory_type_xwr
    }

    /// EPT: whether bit 10 of an entry lets user-mode linear addresses be fetched from, and bit 2 supervisor-mode ones alone.
    #[must_use]
    pub fn mode_based_execute(&self) -> bool {
        self.mode_based_execute
    }

    /// Whether entries have accessed and dirty bits: always, except under EPT without bit 6 of EPTP.
    #[must_use]
    pub fn has_accessed_dirty(&self) -> bool {
        self.records_use
    }

    /// Bytes of an entry: 4 or 8; 0 without paging.
    #[must_use]
    pub fn entry_bytes(&self) -> u32 {
        match self.mode {
            PagingMode::None => 0,
            PagingMode::TwoLevel => 4,
            _ => 8,
        }
    }

    /// Address bits that index one table: 9 or 10; 0 without paging. The four PDPTEs of PAE paging take 2.
    #[must_use]
    pub fn index_bits(&self) -> u32 {
        match self.mode {
            PagingMode::None => 0,
            PagingMode::TwoLevel => TwoLevel::INDEX_BITS,
            _ => LongMode::INDEX_BITS,
        }
    }

    /// EPT: supervisor shadow-stack control, bit 7 of EPTP.
    #[must_use]
    pub fn supervisor_shadow_stack_control(&self) -> bool {
        self.is_ept && self.permissions[AccessKind::ShadowStackRead as usize] == u16::MAX
    }

    /// What is ignored of a pointer before its address is checked: by linear-address masking or upper address ignore.
    #[must_use]
    #[inline(always)]
    pub fn masking(&self) -> Masking {
        self.masking
    }

    /// The width by which an address is canonical whose access sees no bit of it ignored.
    #[inline(always)]
    pub(crate) const fn unchanged_width(&self) -> u32 {
        self.masking.unchanged_width(self.linear_width)
    }

    #[inline(always)]
    pub(crate) fn page_size_bit(&self) -> u64 {
        self.page_size_bit
    }

    /// Whether the permission words refuse `access` to a page with `rights`.
    #[inline(always)]
    pub(crate) fn refuses(&self, access: &Access, rights: Rights) -> bool {
        (self.permissions[access.word_index()] >> (rights.bits() & 15)) & 1 != 0
    }

    /// Whether no rights at all would allow `access`: something else of the leaf decides.
    pub(crate) fn decided_by_leaf(&self, access: &Access) -> bool {
        self.refuses(access, Rights::ALL)
    }

    #[inline(always)]
    pub(crate) const fn reserved_leaf_at(&self, level: u32) -> u64 {
        self.reserved.leaf[index(level)]
    }

    #[inline(always)]
    pub(crate) fn reserved_table_at(&self, level: u32) -> u64 {
        self.reserved.table[index(level)]
    }

    /// The permission words of all accesses, by [`Access::word_index`].
    pub(crate) const fn words(&self) -> &[u16; WORDS] {
        &self.permissions
    }

    /// The memory type that a page's PAT, PCD and PWT bits select in IA32_PAT; write back where paging is off. MTRRs and
    /// the second dimension are not applied.
    #[must_use]
    pub fn pat_type(&self, page: &Translation) -> MemoryType {
        page.pat_index().map_or(MemoryType::WriteBack, |index| self.memory_types[index & 7])
    }

    /// The memory type of accesses to a page, where it is known: under EPT, whose own type stands in the place of the
    /// MTRRs'. `self` is the guest's format.
    #[must_use]
    pub fn effective_type(&self, page: &Translation) -> Option<MemoryType> {
        let ept = page.nested?.ept_memory_type?;
        Some(if self.cache_disabled { MemoryType::Uncacheable } else { ept.effective(self.pat_type(page)) })
    }
}

/// Memory types 2, 3 and 7 do not exist; writing needs reading; and so does executing, where a CPU has no execute-only
/// pages. With mode-based execute control an entry without any of bits 2:0 is present by its bit 10, and executable.
const fn bad_memory_type_xwr(execute_only: bool, mode_based_execute: bool) -> u64 {
    const EVERY_TYPE: u64 = 0x0101_0101_0101_0101;
    let types = 0xff << (2 * 8) | 0xff << (3 * 8) | 0xff << (7 * 8);
    let unreadable = EVERY_TYPE << 0b010 | EVERY_TYPE << 0b110;
    let only_executable = match (execute_only, mode_based_execute) {
        (true, _) => 0,
        (false, false) => EVERY_TYPE << 0b100,
        (false, true) => EVERY_TYPE << 0b100 | EVERY_TYPE,
    };
    types | unreadable | only_executable
}

/// Array index of a level. Masked, so that indexing an array of eight cannot panic.
#[inline(always)]
pub(crate) const fn index(level: u32) -> usize {
    (level.wrapping_sub(1) & 7) as usize
}
