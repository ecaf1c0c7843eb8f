//! The way through the tables: down to a leaf, along its table, and up again.

use core::ops::ControlFlow;

use crate::access::Access;
use crate::addr::{Gpa, Gva, NestedGpa};
use crate::batch::Instructions;
use crate::entry::{EntryLayout, Grants, LongMode, Meaning, Pae, TwoLevel, step};
use crate::fault::{Fault, Reason, Refusal};
use crate::format::PageFormat;
use crate::memory::Memory;
use crate::mode::PagingMode;
use crate::nested::NgpaWalk;
use crate::permission::{Rights, Shown};
use crate::trace::NoTrace;
use crate::translation::{Page, PageSize, Translation};
use crate::walk::linear;
use crate::walker::Walker;

use super::cursor::Cursor;
use super::entries::{Look, WORDS};
use super::extent::Extent;
use super::lane::Lane;
use super::second::Behind;
use super::table::Table;
use super::{EXEMPT, Limit, Report};

/// Why a scan stopped before the end of its range.
pub(super) enum Halt {
    /// To be called again.
    Pause,
    /// Something of the budget is used up.
    Budget(Limit),
}

/// Where a scan of one table ended.
enum Next {
    /// In an entry that refers to a table, which is open now.
    Down,
    /// At the end of the table.
    Up,
}

const LEVELS: usize = 5;

/// One call of [`super::Map::advance`].
pub(super) struct Scan<'a, M, S> {
    walker: &'a Walker,
    memory: &'a M,
    pub(super) cursor: &'a mut Cursor,
    sink: S,
    /// The sink wants no more.
    full: bool,
    /// Entries that may be read, of those that were read before this call, too.
    pause_at: u64,
    begun_at: u64,
    exempt: bool,
    /// Pages of one extent may differ in what the access finds.
    page_by_page: bool,
    pub(super) behind: Behind,
    instructions: Instructions,
    lane: Option<Lane>,
}

impl<'a, M: Memory, S: FnMut(Extent) -> ControlFlow<()>> Scan<'a, M, S> {
    pub(super) fn new(
        walker: &'a Walker,
        memory: &'a M,
        cursor: &'a mut Cursor,
        entries: u64,
        sink: S,
    ) -> Self {
        let exempt = cursor.access.is_exempt();
        let instructions = Instructions::best();
        Self {
            walker,
            memory,
            sink,
            full: false,
            pause_at: cursor.tally.entries.saturating_add(entries),
            begun_at: cursor.next,
            exempt,
            // The second dimension may refuse the access a table, or the update of an entry, and the dirty bit of a leaf
            // makes a shadow stack: an extent's pages have none of it in common.
            page_by_page: !exempt && (walker.ngpa_walk().is_some() || cursor.access.is_shadow_stack()),
            behind: Behind::new(if exempt { cursor.access } else { EXEMPT }, instructions),
            instructions,
            lane: if exempt && walker.ngpa_walk().is_none() { Lane::new(cursor) } else { None },
            cursor,
        }
    }

    pub(super) fn run(mut self) -> Result<(), Halt> {
        let scanned = if self.is_done() {
            Ok(())
        } else {
            match self.format().mode() {
                PagingMode::None => self.unpaged(),
                PagingMode::TwoLevel => self.tables::<TwoLevel>(),
                PagingMode::Pae => self.tables::<Pae>(),
                PagingMode::FourLevel | PagingMode::FiveLevel => self.tables::<LongMode>(),
            }
        };
        if !matches!(scanned, Err(Halt::Pause))
            && let Some(extent) = self.cursor.pending.take()
        {
            // There is nothing left to break off.
            let _ = (self.sink)(extent);
        }
        scanned
    }

    pub(super) fn format(&self) -> &'a PageFormat {
        self.walker.gva_walk().format()
    }

    fn is_done(&self) -> bool {
        self.cursor.next > self.cursor.last
    }

    pub(super) fn gva(&self, position: u64) -> Gva {
        self.cursor.gva(self.format(), position)
    }

    /// Accounts for `entries` that are about to be read, unless it is time to stop.
    #[inline(always)]
    fn charge(&mut self, entries: u64) -> Result<(), Halt> {
        let read = self.cursor.tally.entries;
        if read >= self.cursor.budget.entries && self.cursor.next > self.cursor.first {
            return Err(Halt::Budget(Limit::Entries));
        }
        if read >= self.pause_at && self.cursor.next > self.begun_at {
            return Err(Halt::Pause);
        }
        self.cursor.tally.entries = read.saturating_add(entries);
        Ok(())
    }

    fn unpaged(&mut self) -> Result<(), Halt> {
        while !self.is_done() {
            let page = Translation {
                gpa: Gpa(self.cursor.next),
                entry: 0,
                nested: None,
                page: Page::new(PageSize::Unpaged, Shown::of(Rights::ALL)),
            };
            let left = self.cursor.last.wrapping_sub(self.cursor.next).wrapping_add(1);
            let (outcome, bytes) = self.behind(&page, left)?;
            let end = self.cursor.next.saturating_add(bytes.wrapping_sub(1)).min(self.cursor.last);
            match outcome {
                Ok(page) => self.found(&page, end)?,
                Err(fault) => {
                    self.cursor.tally.nested += 1;
                    self.refused(end, fault)?;
                }
            }
        }
        Ok(())
    }

    fn tables<E: EntryLayout>(&mut self) -> Result<(), Halt> {
        let walk = self.walker.gva_walk();
        let top = self.format().levels();
        let mut tables = [const { Table::EMPTY }; LEVELS];
        let mut level = top;
        if let Some(pdptes) = walk.pdptes() {
            table(&mut tables, level).registers(pdptes);
        } else {
            // A refusal of the root says which entry it was about; the halves of the address space are extents of their own.
            while let Err(fault) =
                self.open::<E>(table(&mut tables, level), level, walk.root(), Grants::ALL, None)?
            {
                let end = self.cursor.last.min(self.cursor.next | within_half(self.format()));
                self.refused(end, fault)?;
                if self.is_done() {
                    return Ok(());
                }
            }
        }
        loop {
            let ended = match self.along::<E>(table(&mut tables, level), level)? {
                Next::Down => {
                    let above = table(&mut tables, level);
                    let number = index::<E>(level, self.cursor.next);
                    let entry = above.load::<E, M>(self.memory, number).unwrap_or(0);
                    let grants = E::through(above.grants, level, entry);
                    let root = E::table(entry) & self.format().address_bits();
                    let end = self.end::<E>(level, number, 1);
                    let ahead = self.ahead::<E>(above, level, number + 1);
                    match self.open::<E>(table(&mut tables, level - 1), level - 1, root, grants, ahead)? {
                        Ok(()) => {
                            level -= 1;
                            false
                        }
                        // It may have been the last entry of its table.
                        Err(fault) => {
                            self.refused(end, fault)?;
                            true
                        }
                    }
                }
                Next::Up => true,
            };
            while ended && self.cursor.next & within_table::<E>(level) == 0 && level < top {
                level += 1;
            }
            if self.is_done() {
                return Ok(());
            }
        }
    }

    /// Reads the table of `level` at `at`, which the second dimension may refuse.
    fn open<E: EntryLayout>(
        &mut self,
        table: &mut Table,
        level: u32,
        at: u64,
        grants: Grants,
        ahead: Option<Gpa>,
    ) -> Result<Result<(), Fault>, Halt> {
        let pdptes = E::sets(level, false) == 0;
        let entries = if pdptes { 4 } else { WORDS << (3 - E::SIZE_SHIFT) };
        let second = self.walker.ngpa_walk();
        self.charge(entries as u64)?;
        self.cursor.tally.tables += 1;
        let gpa = match second {
            None => Gpa(at),
            Some(second) => {
                let offset = (index::<E>(level, self.cursor.next) as u64) << E::SIZE_SHIFT;
                let ngpa = NestedGpa(at.wrapping_add(offset));
                let (found, read) = self.behind.table(second, self.memory, ngpa, pdptes);
                self.cursor.tally.entries = self.cursor.tally.entries.saturating_add(read);
                match found {
                    Ok(gpa) => Gpa(gpa.0.wrapping_sub(offset)),
                    Err(fault) => {
                        self.cursor.tally.nested += 1;
                        return Ok(Err(fault));
                    }
                }
            }
        };
        let look = Look {
            instructions: self.instructions,
            format: self.format(),
            level,
            sought: self.lane.as_ref().and_then(|lane| lane.sought),
            ahead,
        };
        if !table.read::<E, M>(self.memory, gpa, entries, grants, &look) {
            self.cursor.tally.unbacked += 1;
        }
        Ok(Ok(()))
    }

    /// Where the table that entry `number` of `above` refers to probably lies.
    #[inline(always)]
    fn ahead<E: EntryLayout>(&self, above: &Table, level: u32, number: usize) -> Option<Gpa> {
        if number >= WORDS || level != 2 {
            return None;
        }
        let entry = above.load::<E, M>(self.memory, number)?;
        if entry & (E::PRESENT | LongMode::PAGE_SIZE) != E::PRESENT {
            return None;
        }
        let at = E::table(entry) & self.format().address_bits();
        if self.walker.ngpa_walk().is_some() {
            self.behind.table_ahead(self.memory, NestedGpa(at))
        } else {
            Some(Gpa(at))
        }
    }

    /// Goes along a table from the current position, until an entry refers to another table.
    #[inline(never)]
    fn along<E: EntryLayout>(&mut self, table: &Table, level: u32) -> Result<Next, Halt> {
        let format = self.format();
        // What lies between the halves of the address space is not an address.
        let end = self.cursor.last.min(self.cursor.next | within_table::<E>(level).min(within_half(format)));
        let last = index::<E>(level, end);
        while self.cursor.next <= end {
            if level == 1
                && let Some(Lane { takes, .. }) = self.lane
            {
                self.lane::<E>(takes, table, end)?;
                if self.cursor.next > end {
                    break;
                }
            }
            let number = index::<E>(level, self.cursor.next);
            let present = table.present::<E>(number, last);
            if present != Some(number) {
                let end = present.map_or(end, |present| self.end::<E>(level, number, present - number));
                self.absent::<E>(table, level, number, end)?;
                continue;
            }
            let Some(entry) = table.load::<E, M>(self.memory, number) else {
                let end = self.end::<E>(level, number, 1);
                self.guest_refuses(Reason::TableUnbacked, level, table.entry_gpa::<E>(number), 0, 0, end)?;
                continue;
            };
            let grants = E::through(table.grants, level, entry);
            let rights = E::rights(grants);
            let refusal = match step::<E>(format, level, entry) {
                Meaning::Leaf => {
                    self.leaves::<E>(table, level, number, entry, rights, end)?;
                    continue;
                }
                Meaning::Table if self.is_worthwhile(level, rights) => return Ok(Next::Down),
                Meaning::Table => None,
                Meaning::Absent => {
                    let end = self.end::<E>(level, number, 1);
                    self.absent::<E>(table, level, number, end)?;
                    continue;
                }
                Meaning::Reserved(bits) => Some((Reason::ReservedBits, bits)),
                Meaning::Misconfigured(reason, bits) => Some((reason, bits)),
            };
            let end = self.end::<E>(level, number, 1);
            match refusal {
                None => self.cursor.next = end.wrapping_add(1),
                Some((reason, bits)) => {
                    self.cursor.tally.reserved += 1;
                    self.guest_refuses(reason, level, table.entry_gpa::<E>(number), entry, bits, end)?;
                }
            }
        }
        Ok(Next::Up)
    }

    /// The last position of the range that `entries` entries from `number` on translate.
    #[inline(always)]
    fn end<E: EntryLayout>(&self, level: u32, number: usize, entries: usize) -> u64 {
        let table = self.cursor.next & !within_table::<E>(level);
        let behind = ((number + entries) as u64) << (shift::<E>(level) & 63);
        table.wrapping_add(behind.wrapping_sub(1)).min(self.cursor.last)
    }

    /// Whether there may be something to report below an entry.
    fn is_worthwhile(&self, level: u32, rights: Rights) -> bool {
        let filter = &self.cursor.filter;
        let small_alone = level == 2 && !filter.page_sizes.contains(PageSize::Size4K);
        let pages = filter.may_hold(rights) && !small_alone;
        pages || self.cursor.report != Report::Pages
    }

    /// The page at the current position, which `entry` maps.
    #[inline(always)]
    fn page<E: EntryLayout>(&self, level: u32, entry: u64, rights: Rights) -> Translation {
        let shift = shift::<E>(level) & 63;
        let within = (1 << shift) - 1;
        let frame = E::page(level, entry) & self.format().address_bits() & !within;
        Translation {
            gpa: Gpa(frame | self.cursor.next & within),
            entry,
            nested: None,
            page: Page::new(PageSize::of_bits(shift), Shown::of(rights)),
        }
    }

    /// Takes the leaves from the current position on that continue the one at `number`, which has been judged.
    #[inline(always)]
    fn leaves<E: EntryLayout>(
        &mut self,
        table: &Table,
        level: u32,
        mut number: usize,
        mut entry: u64,
        rights: Rights,
        end: u64,
    ) -> Result<(), Halt> {
        let last = index::<E>(level, end);
        let length = table.leaves::<E>(number, last);
        let end = self.end::<E>(level, number, length).min(end);
        loop {
            let page = self.page::<E>(level, entry, rights);
            // As many leaves as share what lies behind them.
            let left = end.wrapping_sub(self.cursor.next).wrapping_add(1);
            let (outcome, bytes) = self.behind(&page, left)?;
            let end_of_these = self.cursor.next.saturating_add(bytes.wrapping_sub(1)).min(end);
            let next = index::<E>(level, end_of_these);
            match outcome {
                Ok(page) => {
                    let any = table.any::<E>(entry, number, next - number + 1);
                    self.found(&used::<E>(page, any), end_of_these)?;
                }
                Err(fault) => {
                    self.cursor.tally.nested += 1;
                    self.refused(end_of_these, fault)?;
                }
            }
            if end_of_these == end {
                return Ok(());
            }
            // What lies behind a page may change within it; its entry has been judged, and is not read again.
            let next = index::<E>(level, self.cursor.next);
            if next != number {
                number = next;
                entry = table.load::<E, M>(self.memory, number).unwrap_or(0);
            }
        }
    }

    /// What the second dimension and memory make of the guest's page at the current position, and for how many bytes that
    /// holds, of `wanted` for which the guest's pages continue each other.
    #[inline(always)]
    fn behind(&mut self, page: &Translation, wanted: u64) -> Result<(Result<Translation, Fault>, u64), Halt> {
        let own = if self.page_by_page { self.to_page_end(page.page_size()).min(wanted) } else { wanted };
        let (page, holds) = match self.walker.ngpa_walk() {
            None => (*page, own),
            Some(second) => match self.second(second, page, own)? {
                (Ok(page), holds) => (page, holds.min(own)),
                (Err(fault), holds) => return Ok((Err(fault), holds.min(own))),
            },
        };
        let (backing, backed) = self.behind.backing(self.memory, page.gpa);
        let holds = holds.min(backed).min(self.cursor.filter.reach(page.gpa));
        Ok((Ok(Translation { page: page.page.with_backing(backing), ..page }), holds))
    }

    /// What the second dimension makes of the guest's page, and for how many bytes, of `wanted`.
    #[inline(never)]
    fn second(
        &mut self,
        second: &NgpaWalk,
        page: &Translation,
        wanted: u64,
    ) -> Result<(Result<Translation, Fault>, u64), Halt> {
        if self.behind.is_new(page) {
            self.charge(0)?;
        }
        let (outcome, holds, read) = self.behind.second(second, self.memory, page, wanted);
        self.cursor.tally.entries = self.cursor.tally.entries.saturating_add(read);
        Ok((outcome, holds))
    }

    fn to_page_end(&self, size: PageSize) -> u64 {
        match size.bytes() {
            Some(bytes) => bytes.wrapping_sub(self.cursor.next & bytes.wrapping_sub(1)),
            None => u64::MAX,
        }
    }

    /// Takes `page`, which is what the guest's pages from the current position to `end` mean in every dimension.
    #[inline(always)]
    fn found(&mut self, page: &Translation, end: u64) -> Result<(), Halt> {
        if self.cursor.filter.takes(page) {
            let start = self.gva(self.cursor.next);
            let bytes = end.wrapping_sub(self.cursor.next).wrapping_add(1);
            if self.exempt {
                self.put_page(start, bytes, page)?;
            } else {
                let outcome = self.ask(start)?.map(|_| *page);
                self.put(Extent { start, bytes, outcome })?;
            }
        }
        self.arrived(end.wrapping_add(1))
    }

    /// The outcome of the map's access to `gva`.
    #[inline(never)]
    fn ask(&mut self, gva: Gva) -> Result<Result<Translation, Fault>, Halt> {
        let second = self.walker.ngpa_walk();
        let nested = second.map_or(0, |second| second.page_walk().format().levels());
        let guest = self.format().levels();
        self.charge(u64::from(guest * (nested + 1) + nested))?;
        let access: Access = self.cursor.access;
        Ok(linear(self.walker.gva_walk(), second, self.memory, gva.0, &access, &mut NoTrace))
    }

    /// Nothing is present from the current position to `end`.
    #[inline(always)]
    fn absent<E: EntryLayout>(
        &mut self,
        table: &Table,
        level: u32,
        number: usize,
        end: u64,
    ) -> Result<(), Halt> {
        if self.cursor.report != Report::Everything {
            self.cursor.next = end.wrapping_add(1);
            return Ok(());
        }
        let entry = table.load::<E, M>(self.memory, number).unwrap_or(0);
        self.guest_refuses(Reason::NotPresent, level, table.entry_gpa::<E>(number), entry, E::PRESENT, end)
    }

    /// An entry of the guest refuses from the current position to `end`.
    fn guest_refuses(
        &mut self,
        reason: Reason,
        level: u32,
        entry_gpa: Gpa,
        entry: u64,
        bits: u64,
        end: u64,
    ) -> Result<(), Halt> {
        let gva = self.gva(self.cursor.next).0;
        let fault = Refusal::at(reason, level, entry_gpa, entry, bits).in_guest(
            self.format(),
            &self.cursor.access,
            gva,
        );
        self.refused(end, fault)
    }

    /// The walk is refused from the current position to `end`, for an access that no right is asked of.
    fn refused(&mut self, end: u64, fault: Fault) -> Result<(), Halt> {
        if self.cursor.report != Report::Pages {
            let start = self.gva(self.cursor.next);
            let outcome =
                if self.exempt { Err(Fault { address: start.0, ..fault }) } else { self.ask(start)? };
            let bytes = end.wrapping_sub(self.cursor.next).wrapping_add(1);
            self.put(Extent { start, bytes, outcome })?;
        }
        self.arrived(end.wrapping_add(1))
    }

    /// Everything before `position` is done.
    #[inline(always)]
    pub(super) fn arrived(&mut self, position: u64) -> Result<(), Halt> {
        self.cursor.next = position;
        if self.full && !self.is_done() { Err(Halt::Pause) } else { Ok(()) }
    }

    /// Adds pages to the extents.
    #[inline(always)]
    pub(super) fn put_page(&mut self, start: Gva, bytes: u64, page: &Translation) -> Result<(), Halt> {
        if !self.cursor.pending.as_mut().is_some_and(|pending| pending.absorb_page(start, bytes, page)) {
            self.begin(Extent { start, bytes, outcome: Ok(*page) })?;
        }
        self.cursor.tally.mapped = self.cursor.tally.mapped.saturating_add(bytes);
        Ok(())
    }

    /// Adds to the extents.
    #[inline(never)]
    fn put(&mut self, extent: Extent) -> Result<(), Halt> {
        match &extent.outcome {
            Ok(page) => self.put_page(extent.start, extent.bytes, page),
            Err(_) => {
                if self.cursor.pending.as_mut().is_some_and(|pending| pending.absorb_fault(&extent)) {
                    return Ok(());
                }
                self.begin(extent)
            }
        }
    }

    /// Adds an extent, which might be continued.
    #[inline(always)]
    fn begin(&mut self, extent: Extent) -> Result<(), Halt> {
        let cursor = &mut *self.cursor;
        if cursor.tally.extents >= cursor.budget.extents {
            return Err(Halt::Budget(Limit::Extents));
        }
        cursor.tally.extents += 1;
        if let Some(done) = cursor.pending
            && (self.sink)(done).is_break()
        {
            self.full = true;
        }
        cursor.pending = Some(extent);
        Ok(())
    }
}

/// `page`, with the accessed and dirty bits that `any` of its entries has.
#[inline(always)]
fn used<E: EntryLayout>(page: Translation, any: u64) -> Translation {
    Translation { entry: page.entry | any & (E::ACCESSED | E::DIRTY), ..page }
}

/// The table of `level`, 1 to 5.
#[inline(always)]
fn table(tables: &mut [Table; LEVELS], level: u32) -> &mut Table {
    &mut tables[(level.wrapping_sub(1) as usize).min(LEVELS - 1)]
}

/// Number of address bits below the index of `level`.
#[inline(always)]
fn shift<E: EntryLayout>(level: u32) -> u32 {
    12 + E::INDEX_BITS * level.wrapping_sub(1)
}

/// The address bits that a table of `level` translates.
#[inline(always)]
pub(super) fn within_table<E: EntryLayout>(level: u32) -> u64 {
    (1 << ((shift::<E>(level) + E::INDEX_BITS) & 63)) - 1
}

/// The address bits below the one whose sign is extended.
#[inline(always)]
fn within_half(format: &PageFormat) -> u64 {
    let width = if format.mode().is_long() { format.linear_width() - 1 } else { 63 };
    (1 << (width & 63)) - 1
}

#[inline(always)]
pub(super) fn index<E: EntryLayout>(level: u32, position: u64) -> usize {
    (position >> (shift::<E>(level) & 63) & ((1 << E::INDEX_BITS) - 1)) as usize
}
