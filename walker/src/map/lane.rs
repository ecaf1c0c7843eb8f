//! The lane: along a page table of one dimension whose pages nothing has to be asked about.
//!
//! What an entry means is decided by `entry::step` here as well. What the lane spares is all that is the same for most pages of a
//! table: the second dimension and accesses, which it does not know, what lies behind a page where it lies behind the one
//! before, and pages of which only a part is of interest. It stops in front of anything else, and goes on behind it.

use core::ops::ControlFlow;

use crate::addr::Gpa;
use crate::entry::{EntryLayout, Meaning, step};
use crate::memory::Memory;
use crate::permission::{Rights, Shown};
use crate::translation::{Page, PageSize, Translation};

use super::Report;
use super::cursor::Cursor;
use super::entries::{GROUP, Sought};
use super::extent::Extent;
use super::scan::{Halt, Scan, index, within_table};
use super::table::Table;

/// What the lane looks for.
pub(super) struct Lane {
    /// Rights, by their bits, of the 4 KiB pages that are of interest.
    pub(super) takes: u16,
    /// Where pages of interest lie, if not anywhere.
    pub(super) sought: Option<Sought>,
}

impl Lane {
    /// The lane for a map of one dimension that is no access's.
    pub(super) fn new(cursor: &Cursor) -> Option<Self> {
        if cursor.report == Report::Everything {
            return None;
        }
        let filter = &cursor.filter;
        let takes = |bits: u8| filter.has(Rights(bits), PageSize::Size4K);
        let takes = (0..16).filter(|bits| takes(*bits)).fold(0, |all, bits| all | 1 << bits);
        let (first, last) = filter.gpas;
        let sought = (first.0 > 0xfff || last.0 < 1 << 52).then_some(Sought { first, last });
        Some(Self { takes, sought })
    }
}

impl<M: Memory, S: FnMut(Extent) -> ControlFlow<()>> Scan<'_, M, S> {
    /// Takes pages of a page table from the current position on, as far as the lane knows them.
    #[inline(always)]
    pub(super) fn lane<E: EntryLayout>(&mut self, takes: u16, table: &Table, end: u64) -> Result<(), Halt> {
        let Some(entries) = table.entries::<E>() else { return Ok(()) };
        let format = self.format();
        let (first, last) = self.cursor.filter.gpas;
        let base = self.cursor.next & !within_table::<E>(1);
        // Pages that lie wholly in the range.
        let behind = (end.wrapping_add(1).wrapping_sub(base) >> 12) as usize;
        if self.cursor.next & 0xfff != 0 {
            return Ok(());
        }
        let mut number = index::<E>(1, self.cursor.next);
        while number < behind {
            let mut heads = entries.heads(number);
            let group = number - number % GROUP;
            number = group + GROUP;
            while heads != 0 {
                let head = group + heads.trailing_zeros() as usize;
                heads &= heads.wrapping_sub(1);
                if head >= behind {
                    return Ok(());
                }
                let position = base | (head as u64) << 12;
                self.cursor.next = position;
                let entry = entries.word(head);
                if step::<E>(format, 1, entry) != Meaning::Leaf {
                    return Ok(());
                }
                // A branch, so that the next head does not wait for this one's length.
                let length = if entries.is_alone(head) { 1 } else { entries.length(head, behind - 1) };
                let bytes = (length as u64) << 12;
                let gpa = Gpa(E::page(1, entry) & format.address_bits());
                let last_gpa = Gpa(gpa.0.wrapping_add(bytes.wrapping_sub(1)));
                let Some(backing) = self.behind.known(gpa, bytes) else { return Ok(()) };
                let rights = E::rights(E::through(table.grants, 1, entry));
                if takes >> (rights.bits() & 15) & 1 != 0 && first <= last_gpa && gpa <= last {
                    if gpa < first || last < last_gpa {
                        return Ok(());
                    }
                    let entry = entry | table.any::<E>(entry, head, length);
                    let page = Page::new(PageSize::Size4K, Shown::of(rights)).with_backing(backing);
                    let page = Translation { gpa, entry, nested: None, page };
                    self.put_page(self.gva(position), bytes, &page)?;
                }
                self.arrived(position.wrapping_add(bytes))?;
                if head + length > number {
                    number = head + length;
                    break;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicU64;
    use std::vec::Vec;

    use crate::addr::Gva;
    use crate::map::{Filter, Map, PageSizes, Progress};
    use crate::memory::{Backing, ExchangeError};
    use crate::mode::{
        CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::walk::PageWalk;
    use crate::walker::Walker;
    use crate::window::Window;

    use super::*;

    /// P, W, U, PAT, G, an absent frame, one above MAXPHYADDR, a key bit, NX.
    const BITS: [u64; 9] = [1, 2, 4, 0x80, 0x100, 1 << 35, 1 << 45, 1 << 60, 1 << 63];
    const PAGES: u64 = 16;

    /// Memory whose tables are never had whole, so that each entry is looked at by itself, and a map has no lane.
    struct Piecewise<'a>(Window<'a>);

    impl Memory for Piecewise<'_> {
        fn load_u64(&self, gpa: Gpa) -> Option<u64> {
            self.0.load_u64(gpa)
        }

        fn load_table(&self, _: Gpa, _: &mut [u64; 512]) -> bool {
            false
        }

        fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
            Err(ExchangeError::ReadOnly)
        }

        fn backing(&self, gpa: Gpa) -> Backing {
            self.0.backing(gpa)
        }

        fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
            self.0.backing_run(gpa)
        }
    }

    fn walker(rng: &mut fastrand::Rng) -> Walker {
        let mut when = |value: u64| if rng.bool() { value } else { 0 };
        let long = when(EFER_LME | EFER_LMA);
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_PG,
            cr4: CR4_PAE | if long != 0 { when(CR4_LA57) } else { 0 },
            efer: long | when(EFER_NXE),
            ..ControlRegisters::default()
        };
        let cpu = CpuProfile {
            vendor: if rng.bool() { Vendor::Amd } else { Vendor::Intel },
            maxphyaddr: [36, 40, 52][rng.usize(..3)],
            gib_pages: true,
            encryption_bit: rng.bool().then_some(47),
        };
        Walker::new(PageWalk::new(&registers, &cpu).expect("these registers are valid"))
    }

    /// Five tables, each the first entry of the one before, and in the page tables every combination of the bits, in any
    /// order, by themselves and continuing each other.
    fn memory(rng: &mut fastrand::Rng, levels: u64) -> Vec<AtomicU64> {
        let mut words = std::vec![0; (PAGES * 512) as usize];
        let upper = |rng: &mut fastrand::Rng| 1 | rng.u64(..) & 6 | 0x20;
        for level in 0..levels - 2 {
            words[level as usize * 512] = (level + 1) << 12 | if levels == 3 { 1 } else { upper(rng) };
        }
        for table in levels - 1..PAGES {
            words[((levels - 2) * 512 + (table + 1 - levels)) as usize] = table << 12 | upper(rng);
            let mut combinations: Vec<u64> = (0..1 << BITS.len()).collect();
            rng.shuffle(&mut combinations);
            let mut number = 0;
            while number < 512 {
                let combination = combinations[number];
                let bits = BITS.iter().enumerate().filter(|(at, _)| combination >> at & 1 != 0);
                let flags = bits.fold(0, |all, (_, bit)| all | bit);
                let length = if rng.bool() { 1 } else { rng.usize(1..150) };
                let frame = rng.u64(..PAGES + 2);
                for at in 0..length.min(512 - number) {
                    let used = rng.u64(..) & 0xe60;
                    words[table as usize * 512 + number + at] =
                        ((frame + at as u64) << 12 | flags | used) & !(1 << 62);
                }
                number += length;
            }
        }
        words.into_iter().map(AtomicU64::new).collect()
    }

    fn filter(rng: &mut fastrand::Rng) -> Filter {
        let mut some = |rights: Rights| if rng.u8(..4) == 0 { rights } else { Rights::NONE };
        let (required, forbidden) = (some(Rights::WRITE), some(Rights::EXECUTE).or(some(Rights::USER)));
        let sizes = PageSizes::NONE.with(PageSize::Size2M);
        let page_sizes = if rng.u8(..8) == 0 { sizes } else { PageSizes::ALL };
        let first = rng.u64(..PAGES << 12);
        let gpas = match rng.u8(..4) {
            0 => (Gpa(first), Gpa(first + (rng.u64(..) >> rng.u32(28..64)))),
            1 => (Gpa(first & !0xfff), Gpa(first | 0xfff)),
            _ => Filter::ALL.gpas,
        };
        Filter { required, forbidden, page_sizes, gpas }
    }

    /// What is taken by the table is what is taken entry by entry.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn accepting_implies_agreement() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut joined, mut alone, mut sought, mut problems) = (0, 0, 0, 0);
        for _ in 0..1_500 {
            let walker = walker(&mut rng);
            let words = memory(&mut rng, u64::from(walker.gva_walk().format().levels()));
            let memory = Window::new(&words[..words.len() - rng.usize(..2)]);
            let filter = filter(&mut rng);
            let report = [Report::Pages, Report::Problems, Report::Everything][rng.usize(..3)];
            let (first, last) = match rng.u8(..3) {
                0 => (rng.u64(..PAGES << 21), rng.u64((PAGES << 21)..1 << 30)),
                _ => (0, 1 << 30),
            };
            let map = Map::new(walker).filtered(filter).reporting(report).over(Gva(first), Gva(last));
            let map = map.expect("these are addresses");
            let mut extents = [Vec::new(), Vec::new()];
            let [whole, single] = &mut extents;
            let (mut by_table, mut by_entry) = (map.clone(), map);
            let done = by_table.advance(&memory, u64::MAX, |extent| {
                whole.push(extent);
                ControlFlow::Continue(())
            });
            assert_eq!(done, Progress::Done);
            let done = by_entry.advance(&Piecewise(memory), u64::MAX, |extent| {
                single.push(extent);
                ControlFlow::Continue(())
            });
            assert_eq!(done, Progress::Done);
            for (whole, single) in whole.iter().zip(single.iter()) {
                assert_eq!(whole, single, "{filter:x?} {report:?} {first:#x} {last:#x}");
            }
            assert_eq!(whole.len(), single.len());
            assert_eq!(by_table.tally().reserved, by_entry.tally().reserved);
            assert_eq!(by_table.tally().mapped, by_entry.tally().mapped);
            joined += whole.iter().filter(|extent| extent.outcome.is_ok() && extent.bytes > 0x1000).count();
            alone += whole.iter().filter(|extent| extent.outcome.is_ok() && extent.bytes == 0x1000).count();
            problems += whole.iter().filter(|extent| extent.outcome.is_err()).count();
            sought += if filter.gpas == Filter::ALL.gpas { 0 } else { whole.len() };
        }
        assert!(joined > 5_000 && alone > 5_000, "{joined} {alone}");
        assert!(sought > 1_000 && problems > 10_000, "{sought} {problems}");
    }
}
