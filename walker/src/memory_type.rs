//! Memory types: what a page's PAT bits select, and what EPT makes of it.
//!
//! Intel SDM volume 3, "Memory Types Available", "Effective Memory Types" (the table for MTRRs and PAT) and "Memory Type
//! Used for Translated Guest-Physical Addresses". The MTRRs are not known here: without EPT only the PAT's choice is.

/// A memory type (Intel SDM volume 3, "Memory Types Available").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// Strong uncacheable.
    Uncacheable,
    /// Write combining.
    WriteCombining,
    /// Write through.
    WriteThrough,
    /// Write protected.
    WriteProtected,
    /// Write back.
    WriteBack,
    /// Uncacheable, unless an MTRR says write combining.
    UncacheableMinus,
}

impl MemoryType {
    pub(crate) const fn from_pat(field: u64) -> Self {
        match field & 7 {
            1 => Self::WriteCombining,
            4 => Self::WriteThrough,
            5 => Self::WriteProtected,
            6 => Self::WriteBack,
            7 => Self::UncacheableMinus,
            _ => Self::Uncacheable,
        }
    }
    /// From the memory-type field of an EPT entry; `None` where the encoding is reserved.
    const fn from_ept(field: u64) -> Option<Self> {
        match field & 7 {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }
}

/// What an EPT leaf says of a page's memory type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EptMemoryType {
    /// Bits 5:3 of the leaf.
    pub memory_type: MemoryType,
    /// Bit 6 of the leaf: the guest's PAT has no say.
    pub ignore_pat: bool,
}

impl EptMemoryType {
    pub(crate) const fn of_leaf(entry: u64) -> Option<Self> {
        match MemoryType::from_ept(entry >> 3) {
            Some(memory_type) => Some(Self { memory_type, ignore_pat: entry >> 6 & 1 != 0 }),
            None => None,
        }
    }

    /// The memory type of accesses to the page, where the guest's PAT selects `pat` and CR0.CD is clear. EPT's type acts as
    /// an MTRR's would; the MTRRs themselves have no say.
    #[must_use]
    pub const fn effective(self, pat: MemoryType) -> MemoryType {
        use MemoryType::{
            Uncacheable, UncacheableMinus, WriteBack, WriteCombining, WriteProtected, WriteThrough,
        };
        if self.ignore_pat {
            return self.memory_type;
        }
        match (self.memory_type, pat) {
            (_, Uncacheable) => Uncacheable,
            (_, WriteCombining) => WriteCombining,
            (WriteCombining | WriteProtected, UncacheableMinus) => WriteCombining,
            (_, UncacheableMinus) => Uncacheable,
            (memory_type, WriteBack) => memory_type,
            (Uncacheable | UncacheableMinus | WriteCombining, WriteThrough | WriteProtected) => Uncacheable,
            (_, WriteThrough) => WriteThrough,
            (_, WriteProtected) => WriteProtected,
        }
    }
}
