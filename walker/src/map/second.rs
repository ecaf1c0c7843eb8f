//! What lies behind a page of the guest: the second dimension's pages, and memory, each asked once for all that it covers.
//!
//! A walk of the second dimension, which [`NgpaWalk`] makes, is good for more than the one address: every other address of its
//! table's range is walked through the same entries but for the last. Where that one agrees with the one that was judged in
//! every bit but those that say where its page lies, and accessed and dirty bits, its page is known. All else is walked.

use core::sync::atomic::AtomicU64;

use crate::access::Access;
use crate::addr::{Gpa, NestedGpa};
use crate::batch::dispatch::{self, Instructions, Work};
use crate::batch::gather::Gather;
use crate::entry::LongMode;
use crate::fault::Fault;
use crate::format::PageFormat;
use crate::memory::{Backing, Memory};
use crate::nested::{NestedLeaf, NgpaWalk};
use crate::permission::Rights;
use crate::trace::{Recorder, Step, Trace};
use crate::translation::{PageSize, Translation};

use super::entries::LINE;

/// Lines that are loaded before they are compared.
const LINES: usize = 8;

/// The answers that came last.
pub(super) struct Behind {
    /// For pages, and the guest's rights that it was asked for.
    pages: Option<Stretch>,
    guest: Rights,
    /// For the guest's tables.
    tables: Option<Stretch>,
    backing: (u64, u64, Backing),
    /// What it is asked for: an access whose rights do not count.
    access: Access,
    instructions: Instructions,
}

/// nGPAs whose pages continue each other.
#[derive(Clone, Copy)]
struct Stretch {
    /// The lowest one.
    start: u64,
    bytes: u64,
    /// What it means.
    leaf: NestedLeaf,
    /// The table with their leaves.
    table: Option<Leaves>,
}

/// A table of the second dimension, one of whose leaves has been judged.
#[derive(Clone, Copy)]
struct Leaves {
    /// Lowest nGPA that the table translates.
    first: u64,
    /// Number of address bits within its pages.
    shift: u32,
    gpa: Gpa,
    /// The leaf that was judged, without the following bits.
    judged: u64,
    /// The bits that say where its page lies.
    frame: u64,
    accessed_dirty: u64,
}

impl Leaves {
    /// The table of the last step of a walk that ended well.
    fn of(format: &PageFormat, step: &Step) -> Option<Self> {
        if format.index_bits() != 9 {
            return None;
        }
        let shift = (12 + 9 * step.level.wrapping_sub(1)) & 63;
        let frame = LongMode::FRAME & format.address_bits() & !format.reserved_leaf_at(step.level);
        let frame = frame >> shift << shift;
        Some(Self {
            first: step.input & !((0x200 << shift) - 1),
            shift,
            gpa: step.table_gpa,
            judged: step.entry & !(frame | step.accessed_dirty),
            frame,
            accessed_dirty: step.accessed_dirty,
        })
    }

    /// Where the page of `ngpa` lies, if its leaf says what the judged one says.
    #[inline(always)]
    fn page<M: Memory>(&self, memory: &M, ngpa: u64) -> Option<u64> {
        let number = ngpa.wrapping_sub(self.first) >> self.shift;
        if number >= 0x200 {
            return None;
        }
        let entry = memory.load_u64(Gpa(self.gpa.0.wrapping_add(number << 3)))?;
        (entry & !(self.frame | self.accessed_dirty) == self.judged).then_some(entry & self.frame)
    }

    /// How many pages, of `most`, continue the one of `ngpa`, which lies at `gpa`; itself counted.
    #[inline(always)]
    fn length<M: Memory>(
        &self,
        memory: &M,
        instructions: Instructions,
        ngpa: u64,
        gpa: u64,
        most: u64,
    ) -> u64 {
        let number = ngpa.wrapping_sub(self.first) >> self.shift & 0x1ff;
        // No frame carries into a bit that is no address bit.
        let counter = self.frame & !self.frame.wrapping_add(1 << self.shift);
        let room = (counter.wrapping_sub(gpa & counter) >> self.shift).wrapping_add(1);
        let most = most.min(0x200 - number).min(room);
        let expected = |length: u64| self.judged | gpa.wrapping_add(length << self.shift);
        let follows = |length: u64| {
            let at = Gpa(self.gpa.0.wrapping_add((number + length) << 3));
            memory.load_u64(at).map(|entry| entry & !self.accessed_dirty) == Some(expected(length))
        };
        let mut length = 1;
        if most > 1 && !follows(1) {
            return length;
        }
        if let Some(words) = memory.table(self.gpa) {
            let words = words.get(number as usize..(number + most) as usize).unwrap_or_default();
            let (lines, _) = words.as_chunks::<LINE>();
            let mut alike = 0;
            let expected = expected(0);
            let (step, ignored) = (1 << self.shift, self.accessed_dirty);
            dispatch::run(instructions, Alike { lines, expected, step, ignored, alike: &mut alike });
            length = (alike * LINE as u64).max(1);
        }
        while length < most && follows(length) {
            length += 1;
        }
        length
    }
}

/// Counts the lines, from the first on, in which each entry but for the `ignored` bits is what the one before is and a `step`.
struct Alike<'a> {
    lines: &'a [[AtomicU64; LINE]],
    /// The first entry.
    expected: u64,
    step: u64,
    ignored: u64,
    alike: &'a mut u64,
}

impl Work for Alike<'_> {
    #[inline(always)]
    fn run(self, gather: impl Gather) {
        let Self { lines, mut expected, step, ignored, alike } = self;
        let further: [u64; LINE] = core::array::from_fn(|number| number as u64 * step);
        let mut loaded = [[0; LINE]; LINES];
        for lines in lines.chunks(LINES) {
            // One after the other: a vector cannot be loaded while the stores of its parts are still on their way.
            loaded.iter_mut().zip(lines).for_each(|(own, line)| gather.line(line, own));
            for line in loaded.iter().take(lines.len()) {
                let mut differs = 0;
                for (entry, further) in line.iter().zip(further) {
                    differs |= entry & !ignored ^ expected.wrapping_add(further);
                }
                if differs != 0 {
                    return;
                }
                *alike += 1;
                expected = expected.wrapping_add(step * LINE as u64);
            }
        }
    }
}

impl Stretch {
    #[inline(always)]
    fn holds(&self, ngpa: u64) -> bool {
        ngpa.wrapping_sub(self.start) < self.bytes
    }

    /// What `ngpa` of this stretch means, and for how many bytes.
    #[inline(always)]
    fn at(&self, ngpa: u64) -> (NestedLeaf, u64) {
        let within = ngpa.wrapping_sub(self.start);
        let leaf = NestedLeaf { gpa: Gpa(self.leaf.gpa.0.wrapping_add(within)), ..self.leaf };
        (leaf, self.bytes.wrapping_sub(within))
    }

    /// The stretch that begins with the page of `ngpa`, of which `wanted` bytes from there on count, if the table of `self` tells;
    /// and how many entries of that were read.
    #[inline(always)]
    fn beside<M: Memory>(
        &self,
        memory: &M,
        instructions: Instructions,
        ngpa: u64,
        wanted: u64,
    ) -> Option<(Self, u64)> {
        let table = self.table?;
        let gpa = table.page(memory, ngpa)?;
        let size = 1 << table.shift;
        let start = ngpa & !(size - 1);
        let pages = (wanted.saturating_add(ngpa - start).saturating_add(size - 1)) >> table.shift;
        let length = table.length(memory, instructions, ngpa, gpa, pages);
        let leaf = NestedLeaf { gpa: Gpa(gpa), ..self.leaf };
        Some((Self { start, bytes: length << table.shift, leaf, table: self.table }, length.wrapping_add(1)))
    }
}

/// Keeps the last step of a walk.
struct Last(Step);

impl Recorder for Last {
    const ENABLED: bool = true;

    #[inline(always)]
    fn record(&mut self, step: Step) {
        self.0 = step;
    }

    fn clear(&mut self) {}

    fn steps(&self) -> &[Step] {
        core::slice::from_ref(&self.0)
    }
}

impl Behind {
    /// Nothing has been asked yet.
    pub(super) const fn new(access: Access, instructions: Instructions) -> Self {
        let backing = (0, 0, Backing::None);
        Self { pages: None, guest: Rights::NONE, tables: None, backing, access, instructions }
    }

    /// Whether something of the second dimension has to be read for `page`.
    #[inline(always)]
    pub(super) fn is_new(&self, page: &Translation) -> bool {
        !(self.pages.is_some_and(|pages| pages.holds(page.gpa.0)) && self.guest == page.rights())
    }

    /// `page`, whose address is the guest's, with what the second dimension makes of it; for how many bytes that holds, of
    /// `wanted` or more; and how many entries were read.
    ///
    /// A fault holds as far as the entry that refused reaches.
    #[inline(always)]
    pub(super) fn second<M: Memory>(
        &mut self,
        second: &NgpaWalk,
        memory: &M,
        page: &Translation,
        wanted: u64,
    ) -> (Result<Translation, Fault>, u64, u64) {
        let ngpa = page.gpa.0;
        let kept = self.pages.filter(|_| self.guest == page.rights());
        let mut read = 0;
        let stretch = match kept {
            Some(stretch) if stretch.holds(ngpa) => stretch,
            _ => match kept.and_then(|stretch| stretch.beside(memory, self.instructions, ngpa, wanted)) {
                Some((stretch, entries)) => {
                    read = entries;
                    stretch
                }
                None => {
                    let mut last = Last(Trace::EMPTY_STEP);
                    let format = second.page_walk().format();
                    read = u64::from(format.levels());
                    match second.final_page(memory, NestedGpa(ngpa), &self.access, page.rights(), &mut last) {
                        Ok(leaf) => {
                            let bytes = leaf.size.bytes().unwrap_or(1);
                            let within = ngpa & bytes.wrapping_sub(1);
                            let leaf = NestedLeaf { gpa: Gpa(leaf.gpa.0.wrapping_sub(within)), ..leaf };
                            let table = Leaves::of(format, &last.0);
                            let mut stretch =
                                Stretch { start: ngpa.wrapping_sub(within), bytes, leaf, table };
                            if wanted > bytes - within
                                && let Some((longer, entries)) =
                                    stretch.beside(memory, self.instructions, ngpa, wanted)
                            {
                                stretch = longer;
                                read += entries;
                            }
                            stretch
                        }
                        Err(fault) => {
                            let below = match fault.level {
                                // No entry did: all that lies above is too wide as well.
                                0 => u64::MAX,
                                level => (1 << ((12 + format.index_bits() * level.wrapping_sub(1)) & 63)) - 1,
                            };
                            return (Err(fault), (below & !ngpa).saturating_add(1), read);
                        }
                    }
                }
            },
        };
        self.pages = Some(stretch);
        self.guest = page.rights();
        let (leaf, holds) = stretch.at(ngpa);
        let page = Translation {
            gpa: leaf.gpa,
            nested: Some(leaf.page(NestedGpa(ngpa))),
            page: page.page.with_rights(leaf.rights),
            ..*page
        };
        (Ok(page), holds, read)
    }

    /// Where the guest's table at `ngpa` lies, and how many entries were read for that.
    pub(super) fn table<M: Memory>(
        &mut self,
        second: &NgpaWalk,
        memory: &M,
        ngpa: NestedGpa,
        pdptes: bool,
    ) -> (Result<Gpa, Fault>, u64) {
        let mut read = 0;
        let kept = self.tables.filter(|_| !pdptes);
        let stretch = match kept {
            Some(stretch) if stretch.holds(ngpa.0) => stretch,
            _ => match kept.and_then(|stretch| stretch.beside(memory, self.instructions, ngpa.0, 1)) {
                Some((stretch, entries)) => {
                    read = entries;
                    stretch
                }
                None => {
                    let mut last = Last(Trace::EMPTY_STEP);
                    let format = second.page_walk().format();
                    read = u64::from(format.levels());
                    match second.table_entry(memory, ngpa, pdptes, &self.access, &mut None, &mut last) {
                        Ok(gpa) if !pdptes => {
                            let bits = 12 + format.index_bits() * last.0.level.wrapping_sub(1);
                            let size = PageSize::of_bits(bits);
                            let bytes = 1_u64 << (bits & 63);
                            let within = ngpa.0 & (bytes - 1);
                            let gpa = Gpa(gpa.0.wrapping_sub(within));
                            let leaf = NestedLeaf { gpa, rights: Rights::NONE, size, ept_memory_type: None };
                            let table = Leaves::of(format, &last.0);
                            Stretch { start: ngpa.0.wrapping_sub(within), bytes, leaf, table }
                        }
                        outcome => return (outcome, read),
                    }
                }
            },
        };
        self.tables = Some(stretch);
        (Ok(stretch.at(ngpa.0).0.gpa), read)
    }

    /// Where the guest's table at `ngpa` probably lies.
    pub(super) fn table_ahead<M: Memory>(&self, memory: &M, ngpa: NestedGpa) -> Option<Gpa> {
        let kept = self.tables?;
        if kept.holds(ngpa.0) {
            return Some(kept.at(ngpa.0).0.gpa);
        }
        Some(Gpa(kept.table?.page(memory, ngpa.0)?))
    }

    /// What lies behind the `bytes` from `gpa` on, if that is known.
    #[inline(always)]
    pub(super) fn known(&self, gpa: Gpa, bytes: u64) -> Option<Backing> {
        let (start, all, backing) = self.backing;
        (all.saturating_sub(gpa.0.wrapping_sub(start)) >= bytes).then_some(backing)
    }

    /// What lies behind `gpa`, and for how many bytes.
    #[inline(always)]
    pub(super) fn backing<M: Memory>(&mut self, memory: &M, gpa: Gpa) -> (Backing, u64) {
        let (start, bytes, backing) = self.backing;
        let within = gpa.0.wrapping_sub(start);
        if within < bytes {
            return (backing, bytes.wrapping_sub(within));
        }
        let (backing, bytes) = memory.backing_run(gpa);
        let bytes = bytes.max(1);
        self.backing = (gpa.0, bytes, backing);
        (backing, bytes)
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::Ordering;
    use std::vec::Vec;

    use super::super::EXEMPT;
    use super::*;
    use crate::ept::{EptCapabilities, EptControls};
    use crate::mode::{
        CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, ControlRegisters, CpuProfile, EFER_LMA, EFER_LME, EFER_NXE, Vendor,
    };
    use crate::npt::NptControls;
    use crate::permission::Shown;
    use crate::single_path::SinglePath;
    use crate::translation::{NestedPage, Page};
    use crate::window::Window;

    /// Second dimensions of both kinds, their root at the GPA of `root`.
    fn seconds(maxphyaddr: u8, root: impl Fn(u64) -> u64) -> Vec<NgpaWalk> {
        let mut seconds = Vec::new();
        for choice in 0..32_u64 {
            let when = |bit: u32, value: u64| if choice >> bit & 1 != 0 { value } else { 0 };
            let levels = 4 + when(0, 1);
            let cpu = CpuProfile {
                vendor: Vendor::Amd,
                maxphyaddr,
                gib_pages: choice & 8 == 0,
                encryption_bit: (choice & 16 != 0).then_some(47),
            };
            let host = ControlRegisters {
                cr0: CR0_PE | CR0_PG,
                cr4: CR4_PAE | when(0, CR4_LA57),
                efer: EFER_LME | EFER_LMA | when(1, EFER_NXE),
                ..ControlRegisters::default()
            };
            let controls = NptControls { guest_mode_execute_trap: choice & 4 != 0 };
            seconds.push(NgpaWalk::npt_with(root(levels), &host, &controls, &cpu));
            let eptp = root(levels) | (levels - 1) << 3 | 6 | when(1, 1 << 6);
            let controls = EptControls { mode_based_execute: choice & 4 != 0, tables_written: false };
            let capabilities = EptCapabilities { execute_only: choice & 8 == 0, ..EptCapabilities::all() };
            seconds.push(NgpaWalk::ept(eptp, &controls, &capabilities, &cpu));
        }
        seconds.into_iter().map(|second| second.expect("these registers are valid")).collect()
    }

    fn page(ngpa: u64, rights: Rights) -> Translation {
        let page = Page::new(PageSize::Size4K, Shown::of(rights));
        Translation { gpa: Gpa(ngpa), entry: 0, nested: None, page }
    }

    /// After a walk, another entry in the place of its last one: each that differs in one bit or in two, of every level and
    /// format.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn accepting_implies_agreement() {
        let mut rng = fastrand::Rng::with_seed(5);
        let (mut accepted, mut walked, mut refused) = ([0; 5], 0, 0);
        for second in seconds(40, |levels| levels << 30) {
            for level in 1..=3_u64 {
                for round in 0..300 {
                    let mut path = SinglePath([0; 6]);
                    for (at, entry) in path.0.iter_mut().enumerate().skip(1) {
                        let ignored = rng.u64(..) & (0x7f << 52 | 0xb00);
                        let right = |bit: u64, rng: &mut fastrand::Rng| if rng.u8(..8) > 0 { bit } else { 0 };
                        *entry = (at as u64 - 1) << 30 | ignored | 1;
                        *entry |= right(2, &mut rng) | right(4, &mut rng) | right(0x400, &mut rng);
                    }
                    let leaf = if level == 1 { 0x30 } else { 0xb0 };
                    path.0[level as usize] = path.0[level as usize] & 0x7f00_0000_0000_0f07 | leaf;
                    let guest = Rights(rng.u8(..16) | 1);
                    let ngpa = (rng.u64(..) & 0x3f_ffff_ffff) << 3;
                    let mut behind = Behind::new(EXEMPT, Instructions::best());
                    let (first, ..) = behind.second(&second, &path, &page(ngpa, guest), 1);
                    let (table, _) = behind.table(&second, &path, NestedGpa(ngpa & !7), false);
                    if first.is_err() && table.is_err() {
                        continue;
                    }
                    let flipped = match round {
                        0..64 => 1 << round,
                        _ => 1 << rng.u32(..64) | 1 << rng.u32(..64),
                    };
                    path.0[level as usize] ^= flipped;
                    // Another page of the same table.
                    let shift = 12 + 9 * (level - 1);
                    let other = ngpa ^ 1 << (shift + rng.u64(..9));
                    let page = page(other, guest);
                    let (kept, _, read) = behind.second(&second, &path, &page, 1);
                    let (fresh, ..) =
                        Behind::new(EXEMPT, Instructions::best()).second(&second, &path, &page, 1);
                    assert_eq!(kept, fresh, "{flipped:#x} {level} {:x?} {second:?}", path.0);
                    match kept {
                        Ok(page) if read == 2 => {
                            accepted[page.nested.map_or(4, |nested| nested.page_size as usize)] += 1;
                        }
                        Ok(_) => walked += 1,
                        Err(_) => refused += 1,
                    }
                    let (kept, _) = behind.table(&second, &path, NestedGpa(other & !7), false);
                    let (fresh, _) = Behind::new(EXEMPT, Instructions::best()).table(
                        &second,
                        &path,
                        NestedGpa(other & !7),
                        false,
                    );
                    assert_eq!(kept, fresh, "{flipped:#x} {level} {:x?} {second:?}", path.0);
                }
            }
        }
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            assert!(accepted[size as usize] > 500, "{size:?}: {accepted:?}");
        }
        assert!(walked > 1_000 && refused > 1_000, "{walked} {refused}");
    }

    /// Pages of a table that continue each other, up to where frames carry.
    #[test]
    #[cfg_attr(miri, ignore = "enumerates too much for an interpreter")]
    fn a_stretch_is_what_its_pages_are() {
        let mut rng = fastrand::Rng::with_seed(6);
        let (mut long, mut carried) = (0, 0);
        for round in 0..30 {
            for second in seconds(52, |_| 0) {
                let levels = u64::from(second.page_walk().format().levels());
                let words: Vec<AtomicU64> = (0..levels * 512).map(|_| AtomicU64::new(0)).collect();
                for level in 0..levels - 1 {
                    words[level as usize * 512].store((level + 1) << 12 | 7, Ordering::Relaxed);
                }
                let mut number = 0;
                while number < 512 {
                    let length = rng.u64(1..200).min(512 - number);
                    let near_a_carry = [1_u64 << 47, 1 << 48, 1 << 52, 1 << 40][rng.usize(..4)];
                    let base = (near_a_carry - (rng.u64(..100) << 12)) | rng.u64(..) & 1 << 47;
                    let flags = 0x37 | rng.u64(..) & 0x300;
                    for at in 0..length {
                        let entry = base.wrapping_add(at << 12) & LongMode::FRAME | flags | base & 1 << 47;
                        let place = ((levels - 1) * 512 + number + at) as usize;
                        words[place].store(entry, Ordering::Relaxed);
                    }
                    number += length;
                }
                let memory = Window::new(&words);
                for instructions in Instructions::ALL.repeat(7) {
                    let ngpa = rng.u64(..512 << 12);
                    let asked = |ngpa, wanted| {
                        Behind::new(EXEMPT, instructions).second(
                            &second,
                            &memory,
                            &page(ngpa, Rights::ALL),
                            wanted,
                        )
                    };
                    let (outcome, holds, _) = asked(ngpa, [1, rng.u64(1..1 << 20), 1 << 30][round % 3]);
                    let Ok(first) = outcome else { continue };
                    for offset in (0..holds).step_by(4096).chain([holds - 1]) {
                        let (alone, ..) = asked(ngpa + offset, 1);
                        let gpa = Gpa(first.gpa.0 + offset);
                        let nested = first
                            .nested
                            .map(|nested| NestedPage { ngpa: NestedGpa(ngpa + offset), ..nested });
                        assert_eq!(
                            alone,
                            Ok(Translation { gpa, nested, ..first }),
                            "{ngpa:#x} {offset:#x} {second:?}"
                        );
                    }
                    long += u32::from(holds > 16 << 12);
                    carried += u32::from((first.gpa.0 + holds) & ((1 << 40) - 1) == 0);
                }
            }
        }
        assert!(long > 1_000 && carried > 100, "{long} {carried}");
    }
}
