//! What a walk did, step by step, in both dimensions.
//!
//! The recorder is a type parameter of the walk: with [`NoTrace`] nothing of this is compiled in.

use crate::addr::Gpa;
use crate::fault::Dimension;
use crate::memory::Memory;
use crate::permission::Rights;

/// The most entries one attempt can read: five guest levels, each behind a nested walk of up to five, and the nested
/// walk of the final address.
pub const MAX_STEPS: usize = 5 * (5 + 1) + 5;

/// What a walk made of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It refers to the next table.
    Table,
    /// It maps a page. Whether the access is allowed is decided by the rights of all levels.
    Leaf,
    /// It is not present.
    NotPresent,
    /// It has reserved bits set.
    Reserved,
    /// EPT: it is misconfigured, and not by reserved bits.
    Misconfigured,
    /// It could not be read: its table is outside memory.
    Unbacked,
}

/// One entry read during a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// The dimension whose table holds the entry.
    pub dimension: Dimension,
    /// Level of the entry: 1 (PTE) to 5 (PML5E).
    pub level: u32,
    /// The address being translated: a GVA in the guest dimension, an nGPA in the nested one.
    pub input: u64,
    /// Where the table starts, in the machine's memory; 0 for a PDPTE register.
    pub table_gpa: Gpa,
    /// Index of the entry in its table.
    pub index: u32,
    /// Where the entry lies, in the machine's memory; 0 for a PDPTE register.
    pub entry_gpa: Gpa,
    /// The entry as it was loaded; 0 if it could not be.
    pub entry: u64,
    /// What the levels down to this one grant, this dimension alone.
    pub rights_so_far: Rights,
    /// What the entry is.
    pub verdict: Verdict,
    /// What held the entry.
    pub(crate) held: Held,
    /// The accessed and dirty bits that the access sets in it.
    pub(crate) sets: u64,
    /// Where the format keeps accessed and dirty bits.
    pub(crate) accessed_dirty: u64,
}

/// What holds an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Held {
    /// A PDPTE register: it lies nowhere, and its step's addresses are 0.
    Register,
    /// Four bytes of memory.
    Word32,
    /// Eight bytes of memory.
    Word64,
}

impl Step {
    /// Whether the entry still means what it meant when the walk loaded it: all but its accessed and dirty bits are the
    /// same.
    pub fn is_current<M: Memory>(&self, memory: &M) -> bool {
        let found = match self.held {
            Held::Register => return true,
            Held::Word32 => memory.load_u32(self.entry_gpa).map(u64::from),
            Held::Word64 => memory.load_u64(self.entry_gpa),
        };
        match (found, self.verdict) {
            (found, Verdict::Unbacked) => found.is_none(),
            (None, _) => false,
            (Some(found), _) => self.differs_in_accessed_dirty_only(found),
        }
    }

    pub(crate) fn differs_in_accessed_dirty_only(&self, found: u64) -> bool {
        (found ^ self.entry) & !self.accessed_dirty == 0
    }
}

/// Takes note of the steps of a walk.
pub trait Recorder {
    /// Whether steps are wanted at all.
    const ENABLED: bool;

    /// Takes one step.
    fn record(&mut self, step: Step);

    /// Forgets all steps: the walk starts over.
    fn clear(&mut self);

    /// The steps taken so far, in order.
    fn steps(&self) -> &[Step];
}

/// Records nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTrace;

impl Recorder for NoTrace {
    const ENABLED: bool = false;

    #[inline(always)]
    fn record(&mut self, _: Step) {}

    #[inline(always)]
    fn clear(&mut self) {}

    fn steps(&self) -> &[Step] {
        &[]
    }
}

/// Records every step of one attempt.
#[derive(Clone, Debug)]
pub struct Trace {
    steps: [Step; MAX_STEPS],
    len: usize,
}

impl Trace {
    pub(crate) const EMPTY_STEP: Step = Step {
        dimension: Dimension::Guest,
        level: 0,
        input: 0,
        table_gpa: Gpa(0),
        index: 0,
        entry_gpa: Gpa(0),
        entry: 0,
        rights_so_far: Rights::NONE,
        verdict: Verdict::Table,
        held: Held::Word64,
        sets: 0,
        accessed_dirty: 0,
    };

    /// An empty trace.
    #[must_use]
    pub const fn new() -> Self {
        Self { steps: [Self::EMPTY_STEP; MAX_STEPS], len: 0 }
    }

    /// The steps in the order in which the entries were read.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        self.steps.get(..self.len).unwrap_or_default()
    }
}

impl Default for Trace {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder for Trace {
    const ENABLED: bool = true;

    fn record(&mut self, step: Step) {
        if let Some(slot) = self.steps.get_mut(self.len) {
            *slot = step;
            self.len += 1;
        }
    }

    fn clear(&mut self) {
        self.len = 0;
    }

    fn steps(&self) -> &[Step] {
        Self::steps(self)
    }
}
