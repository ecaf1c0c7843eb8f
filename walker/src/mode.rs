//! Which paging mode the control registers select, and which register values no CPU accepts.
//!
//! Intel SDM volume 3, "Paging Modes and Control Bits"; AMD APM volume 2, "Page Translation and Protection". What a
//! register may hold is checked against the architecture, not against the features of one CPU model: a caller may
//! bring the state of another machine.

use core::fmt;

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.WP: supervisor writes honour R/W.
pub const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
/// CR0.CD: caches disabled.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 64-bit entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57: 57-bit linear addresses.
pub const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
/// CR4.SMEP: supervisor-mode execution prevention.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: supervisor-mode access prevention.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.CET: shadow stacks, among other things.
pub const CR4_CET: u64 = 1 << 23;
/// CR4.PKS: protection keys for supervisor pages.
pub const CR4_PKS: u64 = 1 << 24;
/// CR4.LAM_SUP: linear-address masking of supervisor pointers.
pub const CR4_LAM_SUP: u64 = 1 << 28;
/// EFER.LME: long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: no-execute enable.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.UAIE: upper address ignore enable.
pub const EFER_UAIE: u64 = 1 << 20;
/// IA32_PAT as a CPU comes out of reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

const CR0_DEFINED: u64 = 0xe005_003f;
/// VME to SMXE (14:0), FSGSBASE to UINTR (25:16), LASS, LAM_SUP, FRED.
const CR4_DEFINED: u64 = 0x0000_0001_1bff_7fff;
/// SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE.
const EFER_DEFINED: u64 = 0x0000_0000_0036_fd01;

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// CR0.PG is clear: linear addresses are physical.
    None,
    /// 32-bit paging: 4-byte entries.
    TwoLevel,
    /// PAE paging outside long mode.
    Pae,
    /// 4-level paging, 48-bit linear addresses.
    FourLevel,
    /// 5-level paging, 57-bit linear addresses.
    FiveLevel,
}

impl PagingMode {
    /// Whether this is the paging of long mode: 4-level or 5-level.
    #[must_use]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::FourLevel | Self::FiveLevel)
    }
}

impl fmt::Display for PagingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no paging",
            Self::TwoLevel => "2-level",
            Self::Pae => "PAE",
            Self::FourLevel => "4-level",
            Self::FiveLevel => "5-level",
        })
    }
}

/// Who made the CPU, where that changes an entry's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// Intel, and those who follow it.
    Intel,
    /// AMD and Hygon: bit 8 of a PML4E and a PML5E is reserved.
    Amd,
}

/// What the vCPU's CPUID says that the meaning of an entry depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuProfile {
    /// Vendor.
    pub vendor: Vendor,
    /// MAXPHYADDR, the width of a physical address in bits: 32 to 52.
    pub maxphyaddr: u8,
    /// Whether a PDPTE may map a 1 GiB page.
    pub gib_pages: bool,
    /// Position of the bit that marks memory as encrypted, 47 to 51, where there is one: the C-bit of AMD's SME and SEV. Masked
    /// out of every address in CR3, nCR3 and 64-bit entries, and not reserved. Enabling encryption may take further bits
    /// from the physical address (AMD APM volume 2, "Secure Memory Encryption"): `maxphyaddr` is then the reduced width.
    pub encryption_bit: Option<u8>,
}

/// The registers a walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER (MSR 0xc0000080).
    pub efer: u64,
    /// IA32_PAT (MSR 0x277).
    pub pat: u64,
}

impl Default for ControlRegisters {
    /// As after reset, in protected mode without paging.
    fn default() -> Self {
        Self { cr0: CR0_PE, cr3: 0, cr4: 0, efer: 0, pat: PAT_RESET }
    }
}

/// Register values that select no walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateError {
    /// A register has bits set that the architecture reserves.
    ReservedBits {
        /// The register's name.
        register: &'static str,
        /// The reserved bits that are set.
        bits: u64,
    },
    /// A register contradicts another one, or itself.
    Contradiction {
        /// The register whose value has to change.
        register: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// MAXPHYADDR is not between 32 and 52.
    MaxPhyAddr(u8),
    /// The encryption bit is not between 47 and 51.
    EncryptionBit(u8),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservedBits { register, bits } => write!(f, "{register} has reserved bits set: {bits:#x}"),
            Self::Contradiction { register, problem } => write!(f, "{register}: {problem}"),
            Self::MaxPhyAddr(bits) => write!(f, "MAXPHYADDR is {bits}; it must be between 32 and 52"),
            Self::EncryptionBit(bit) => {
                write!(f, "the encryption bit is {bit}; it must be between 47 and 51")
            }
        }
    }
}

impl core::error::Error for StateError {}

impl CpuProfile {
    /// Bits from MAXPHYADDR up to `highest` that have to be 0 in an address.
    #[must_use]
    pub(crate) const fn address_reserved(&self, highest: u32) -> u64 {
        bits(self.maxphyaddr as u32, highest) & !self.encryption_mask()
    }

    /// The encryption bit as a mask; 0 where there is none.
    #[must_use]
    pub(crate) const fn encryption_mask(&self) -> u64 {
        match self.encryption_bit {
            Some(bit) => 1 << (bit & 63),
            None => 0,
        }
    }

    pub(crate) const fn check(&self) -> Result<(), StateError> {
        match (self.maxphyaddr, self.encryption_bit) {
            (32..=52, None | Some(47..=51)) => Ok(()),
            (32..=52, Some(bit)) => Err(StateError::EncryptionBit(bit)),
            (other, _) => Err(StateError::MaxPhyAddr(other)),
        }
    }
}

impl ControlRegisters {
    /// The paging mode these registers select.
    ///
    /// # Errors
    /// Names the register that holds a value no CPU accepts.
    pub const fn mode(&self) -> Result<PagingMode, StateError> {
        if let Err(e) = reserved("CR0", self.cr0, !CR0_DEFINED) {
            return Err(e);
        }
        if let Err(e) = reserved("CR4", self.cr4, !CR4_DEFINED) {
            return Err(e);
        }
        if let Err(e) = reserved("EFER", self.efer, !EFER_DEFINED) {
            return Err(e);
        }
        if let Err(e) = self.check_pat() {
            return Err(e);
        }
        if self.cr0 & CR0_NW != 0 && self.cr0 & CR0_CD == 0 {
            return contradiction("CR0", "NW is set while CD is clear");
        }
        if self.cr4 & CR4_CET != 0 && self.cr0 & CR0_WP == 0 {
            return contradiction("CR4", "CET is set while CR0.WP is clear");
        }
        if self.cr0 & CR0_PG == 0 {
            return match self.efer & EFER_LMA {
                0 => Ok(PagingMode::None),
                _ => contradiction("EFER", "LMA is set while CR0.PG is clear"),
            };
        }
        if self.cr0 & CR0_PE == 0 {
            return contradiction("CR0", "PG is set while PE is clear");
        }
        let pae = self.cr4 & CR4_PAE != 0;
        let long = self.efer & EFER_LME != 0;
        if long != (self.efer & EFER_LMA != 0) {
            return contradiction("EFER", "LMA differs from LME while CR0.PG is set");
        }
        match (long, pae) {
            (true, false) => contradiction("CR4", "PAE is clear while EFER.LME and CR0.PG are set"),
            (true, true) if self.cr4 & CR4_LA57 != 0 => Ok(PagingMode::FiveLevel),
            (true, true) => Ok(PagingMode::FourLevel),
            (false, _) if self.cr4 & CR4_PCIDE != 0 => contradiction("CR4", "PCIDE is set outside long mode"),
            (false, true) => Ok(PagingMode::Pae),
            (false, false) => Ok(PagingMode::TwoLevel),
        }
    }

    /// Whether a CPU of this vendor has the ways to ignore address bits that the registers ask for.
    pub(crate) const fn check_vendor(&self, vendor: Vendor) -> Result<(), StateError> {
        match vendor {
            Vendor::Intel => reserved("EFER", self.efer, EFER_UAIE),
            Vendor::Amd => reserved("CR4", self.cr4, CR4_LAM_SUP),
        }
    }

    const fn check_pat(&self) -> Result<(), StateError> {
        let mut index = 0;
        while index < 8 {
            let field = (self.pat >> (8 * index)) & 0xff;
            if field > 7 || field == 2 || field == 3 {
                return Err(StateError::ReservedBits { register: "PAT", bits: field << (8 * index) });
            }
            index += 1;
        }
        Ok(())
    }
}

/// A mask of bits `low` to `high`, empty if `low` is above `high`.
pub(crate) const fn bits(low: u32, high: u32) -> u64 {
    if low > high || high > 63 { 0 } else { (u64::MAX << low) & (u64::MAX >> (63 - high)) }
}

pub(crate) const fn reserved(register: &'static str, value: u64, mask: u64) -> Result<(), StateError> {
    match value & mask {
        0 => Ok(()),
        bits => Err(StateError::ReservedBits { register, bits }),
    }
}

const fn contradiction(register: &'static str, problem: &'static str) -> Result<PagingMode, StateError> {
    Err(StateError::Contradiction { register, problem })
}
