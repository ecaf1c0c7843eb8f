//! What a whole range of guest virtual addresses means: its mappings, as extents.
//!
//! A [`Map`] goes through the guest's tables in the order of the addresses, reads each table whole, and joins pages that
//! continue each other. Nothing below an absent entry is looked at, so that an empty range costs what its upper tables do.
//! Where there is a second dimension, it is walked once for each of its tables that hold leaves, not once for each page.
//!
//! What an entry means is decided where a single walk decides it, by `entry::step`, and rights accumulate
//! as there: for every address of an extent, [`Walker::translate`](crate::Walker::translate) for the same access gives the extent's
//! outcome. A run of leaves is only accepted without being judged one by one where they agree with a judged one in every
//! bit that has a meaning, but for accessed and dirty bits and a frame that counts upwards. The same goes for the leaves of the
//! second dimension, whose frames may be any. All entries of a table are compared at once, by vector instructions.
//!
//! Tables are hostile. One that refers to itself maps 512^4 pages: work is counted in entries and bounded by a [`Budget`],
//! and when that is used up the map says where to go on. The descent is a loop over at most five tables.
//!
//! A map is a plain value and may be put aside between two calls of [`Map::advance`], which keeps no table from one call
//! to the next: each begins with a descent from the root. So a map of a running guest is as recent as its last call; guests
//! that change their tables meanwhile may be seen before the change in one extent and after it in the next.
//!
//! Addresses are linear: what linear-address masking and upper address ignore take from a pointer is gone already.

mod cursor;
mod entries;
mod extent;
mod filter;
mod lane;
mod scan;
mod second;
mod table;

use core::fmt;
use core::ops::ControlFlow;

use crate::access::{Access, AccessKind, Privilege};
use crate::addr::{Gva, is_canonical};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::walker::Walker;

pub use cursor::Tally;
pub use extent::Extent;
pub use filter::{Filter, PageSizes};

use cursor::Cursor;
use scan::{Halt, Scan};

/// What becomes an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Report {
    /// Pages.
    #[default]
    Pages,
    /// Pages; and as faults what is present and leads nowhere: entries with reserved bits or misconfigured, tables outside
    /// memory, and what the second dimension refuses.
    Problems,
    /// Every address of the range: what is absent, too, as faults.
    Everything,
}

/// How much a map may cost.
///
/// Both are bounds for the whole map, over all calls of [`Map::advance`]. Each map gets somewhere, however small its
/// budget: entries may be overdrawn by one descent from the root and one table, of each dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Entries read, of both dimensions.
    pub entries: u64,
    /// Extents.
    pub extents: u64,
}

impl Budget {
    /// 2 GiB of tables, which map 1 TiB by 4 KiB pages, and 16 Mi extents.
    pub const DEFAULT: Self = Self { entries: 1 << 28, extents: 1 << 24 };
}

impl Default for Budget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Which bound of a [`Budget`] was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// [`Budget::entries`].
    Entries,
    /// [`Budget::extents`].
    Extents,
}

/// How far a map has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Progress {
    /// There is more to do: call [`Map::advance`] again.
    Going,
    /// The range is done.
    Done,
    /// The budget is used up. A map of the range from `at` goes on without a gap or an overlap, except that an extent
    /// that reaches over `at` comes as two.
    Truncated {
        /// The first address that was not looked at.
        at: Gva,
        /// What was used up.
        limit: Limit,
    },
}

/// Why a range cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeError {
    /// The last address lies before the first.
    Inverted,
    /// This address is not canonical, or outside long mode does not fit 32 bits.
    NotAnAddress(Gva),
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inverted => f.write_str("the range ends before it starts"),
            Self::NotAnAddress(gva) => write!(f, "{gva} is no linear address of this paging mode"),
        }
    }
}

impl core::error::Error for RangeError {}

/// A map in the making.
///
/// ```
/// use core::ops::ControlFlow;
/// use core::sync::atomic::AtomicU64;
/// use pagewalk::*;
/// use pagewalk::map::{Map, Progress};
///
/// // A PML4E, PDPTE and PDE, and two PTEs that continue each other.
/// let mut words: Vec<AtomicU64> = (0..0x8000 / 8).map(|_| AtomicU64::new(0)).collect();
/// for (gpa, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4008, 0x6003), (0x4010, 0x7003)] {
///     words[gpa / 8] = AtomicU64::new(entry);
/// }
///
/// let registers = ControlRegisters { cr0: 0x8000_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
/// let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
/// let mut map = Map::new(Walker::new(PageWalk::new(&registers, &cpu)?));
///
/// let mut extents = Vec::new();
/// let sink = |extent| { extents.push(extent); ControlFlow::Continue(()) };
/// assert_eq!(map.advance(&Window::new(&words), u64::MAX, sink), Progress::Done);
/// assert_eq!((extents.len(), extents[0].start, extents[0].bytes), (1, Gva(0x1000), 0x2000));
/// assert_eq!(extents[0].outcome.map(|page| page.gpa), Ok(Gpa(0x6000)));
/// # Ok::<(), StateError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Map {
    walker: Walker,
    cursor: Cursor,
}

impl Map {
    /// A map of all pages in the walker's address space, without regard to rights.
    #[must_use]
    pub fn new(walker: Walker) -> Self {
        let cursor = Cursor::new(space(walker.gva_walk().format()));
        Self { walker, cursor }
    }

    /// The same map of the addresses from `first` to `last`, both included.
    ///
    /// # Errors
    /// If there is no such range.
    pub fn over(mut self, first: Gva, last: Gva) -> Result<Self, RangeError> {
        let format = self.walker.gva_walk().format();
        for gva in [first, last] {
            let fits = if format.mode().is_long() {
                is_canonical(gva.0, format.linear_width())
            } else {
                gva.0 <= space(format)
            };
            if !fits {
                return Err(RangeError::NotAnAddress(gva));
            }
        }
        if last < first {
            return Err(RangeError::Inverted);
        }
        self.cursor = Cursor { first: first.0 & space(format), last: last.0 & space(format), ..self.cursor };
        self.cursor.next = self.cursor.first;
        Ok(self)
    }

    /// The same map of those pages alone that `filter` lets through. Tables in which there can be none are not read.
    #[must_use]
    pub fn filtered(mut self, filter: Filter) -> Self {
        self.cursor.filter = filter;
        self
    }

    /// The same map for `access`: pages that it is not allowed to become faults.
    #[must_use]
    pub fn for_access(mut self, access: &Access) -> Self {
        let shadow_stacks = self.walker.gva_walk().format().shadow_stacks();
        self.cursor.access = if shadow_stacks { *access } else { access.as_data() };
        self
    }

    /// The same map with more, or less, in it.
    #[must_use]
    pub fn reporting(mut self, report: Report) -> Self {
        self.cursor.report = report;
        self
    }

    /// The same map within `budget`.
    #[must_use]
    pub fn within(mut self, budget: Budget) -> Self {
        self.cursor.budget = budget;
        self
    }

    /// The walker whose address space this is.
    #[must_use]
    pub fn walker(&self) -> &Walker {
        &self.walker
    }

    /// What was met so far.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.cursor.tally
    }

    /// The address that the next call begins with.
    #[must_use]
    pub fn position(&self) -> Gva {
        self.cursor.gva(self.walker.gva_walk().format(), self.cursor.next)
    }

    /// Goes on, until about `entries` entries have been read (it always gets somewhere), or `sink` breaks off. The sink
    /// gets one extent at a time, in the order of the addresses; at the end of a call one may be held back that the next
    /// page might continue. About 24 KiB of stack hold the tables.
    pub fn advance<M: Memory>(
        &mut self,
        memory: &M,
        entries: u64,
        sink: impl FnMut(Extent) -> ControlFlow<()>,
    ) -> Progress {
        let Self { walker, cursor } = self;
        let format = walker.gva_walk().format();
        match Scan::new(walker, memory, cursor, entries, sink).run() {
            Ok(()) => Progress::Done,
            Err(Halt::Pause) => Progress::Going,
            Err(Halt::Budget(limit)) => Progress::Truncated { at: cursor.gva(format, cursor.next), limit },
        }
    }
}

/// The highest position in the address space: positions are addresses without the bits that only extend a sign.
fn space(format: &PageFormat) -> u64 {
    (1 << (format.linear_width() & 63)) - 1
}

/// As a map looks at pages unless it is told otherwise: nobody's rights count.
const EXEMPT: Access = Access::new(AccessKind::Read, Privilege::Exempt);
