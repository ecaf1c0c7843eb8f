//! One vCPU's address space while its guest is paused: what QEMU finds in it, and what the walker does.

use std::ops::ControlFlow;

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk::map::{Map, Progress};
use pagewalk::{
    Access, AccessKind, CpuProfile, FaultKind, Gva, PageSize, PageWalk, PagingMode, Privilege, Reason,
    Translation, Walker,
};

use super::announced::{self, IDENTITY, Mapping};
use super::expected::{Expected, Intent};
use super::guest::{FileRam, Guest};
use super::monitor::{self, Extent, FLAGS, Registers, TlbEntry};
use crate::bed::ACCESSED;
use crate::bed::judge::Judge;

const PAGE: u64 = 4096;
/// In CR3 under page-table isolation: the root for user space.
const USER_ROOT: u64 = 1 << 12;
/// Known words looked at in one mapping.
const WORDS: u64 = 64;
/// As QEMU's monitor looks at an address: nobody's rights count.
const EXEMPT: Access = Access::new(AccessKind::Read, Privilege::Exempt);

/// One guest of the bed, and the names of its judges.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) mode: PagingMode,
    /// Page-table isolation: each process has a second root, for user space.
    pub(crate) isolated: bool,
    /// Sizes of large pages that the guest has.
    pub(crate) large: &'static [PageSize],
    pub(crate) tlb: &'static str,
    pub(crate) map: &'static str,
    pub(crate) mem: Option<&'static str>,
    pub(crate) gva2gpa: &'static str,
    pub(crate) user: &'static str,
}

pub(crate) struct Judges {
    pub(crate) tlb: Judge,
    pub(crate) map: Judge,
    pub(crate) mem: Option<Judge>,
    pub(crate) gva2gpa: Judge,
    pub(crate) user: Judge,
}

pub(crate) struct Space<'a> {
    kind: &'a Kind,
    vcpu: usize,
    registers: &'a Registers,
    walker: Walker,
    leaves: Vec<TlbEntry>,
    extents: Option<Vec<Extent>>,
    /// The emulator had set bits in PDPTEs that were taken out.
    pdptes_mended: bool,
}

impl<'a> Space<'a> {
    /// Asks QEMU what `vcpu` has mapped.
    pub(crate) fn look(
        kind: &'a Kind,
        cpu: &CpuProfile,
        guest: &mut Guest,
        vcpu: usize,
        registers: &'a Registers,
    ) -> Result<Space<'a>, Failed> {
        let mut pdptes_mended = false;
        let walk = match kind.mode {
            PagingMode::Pae => {
                let found = pdptes(&guest.ram()?, registers.control.cr3)?;
                let loaded = found.map(|pdpte| pdpte & !ACCESSED);
                pdptes_mended = found != loaded;
                PageWalk::with_pdptes(&registers.control, loaded, cpu)?
            }
            _ => PageWalk::new(&registers.control, cpu)?,
        };
        if walk.format().mode() != kind.mode {
            return Err(format!("the guest is in {} paging", walk.format().mode()).into());
        }
        let leaves = monitor::tlb(&guest.ask(vcpu, "info tlb")?)?;
        let extents = match kind.mem {
            Some(_) => Some(monitor::extents(&guest.ask(vcpu, "info mem")?)?),
            None => None,
        };
        Ok(Space { kind, vcpu, registers, walker: Walker::new(walk), leaves, extents, pdptes_mended })
    }

    /// Every leaf and every gap between two of them.
    pub(crate) fn judge_leaves(&self, rng: &mut Rng, ram: &FileRam<'_>, judges: &mut Judges) {
        let mut extents: Vec<Extent> = Vec::new();
        let mut next_gva = Some(0);
        for leaf in &self.leaves {
            judges.tlb.case();
            if self.pdptes_mended {
                judges.tlb.exempt("A set in a PDPTE by the emulator, and taken out");
            }
            match next_gva {
                Some(next) if next < leaf.gva => self.judge_gap(rng, ram, next, leaf.gva, &mut judges.tlb),
                Some(next) if next == leaf.gva => {}
                _ => judges.tlb.disagree(|| self.describe(leaf.gva, "the leaf before reaches into this one")),
            }
            let page = match self.walker.translate(ram, Gva(leaf.gva), &EXEMPT) {
                Ok(page) => page,
                Err(fault) => {
                    judges.tlb.disagree(|| self.describe(leaf.gva, &format!("{leaf:x?}, walker {fault:x?}")));
                    next_gva = leaf.gva.checked_add(PAGE);
                    continue;
                }
            };
            let bytes = page.page_size().bytes().unwrap_or(PAGE);
            next_gva = leaf.gva.checked_add(bytes);
            self.judge_leaf(rng, ram, leaf, &page, &mut judges.tlb);
            self.judge_accesses(ram, leaf, &mut judges.tlb);

            let (user, write) = (page.rights().user(), page.rights().write());
            let end = leaf.gva.saturating_add(bytes);
            match extents.last_mut() {
                Some(last) if (last.end, last.user, last.write) == (leaf.gva, user, write) => last.end = end,
                _ => extents.push(Extent { start: leaf.gva, end, user, write }),
            }
        }
        let end = if self.kind.mode.is_long() { u64::MAX } else { 1 << 32 };
        if let Some(next) = next_gva.filter(|next| *next < end) {
            self.judge_gap(rng, ram, next, end & !(PAGE - 1), &mut judges.tlb);
        }
        if let (Some(judge), Some(qemu)) = (&mut judges.mem, &self.extents) {
            self.judge_extents(&extents, qemu, judge);
        }
    }

    /// Address, size and flags.
    fn judge_leaf(
        &self,
        rng: &mut Rng,
        ram: &FileRam<'_>,
        leaf: &TlbEntry,
        page: &Translation,
        judge: &mut Judge,
    ) {
        judge.count(size_name(page.page_size()), 0);
        if page.gpa.0 != leaf.gpa {
            judge.disagree(|| self.describe(leaf.gva, &format!("{leaf:x?}, walker {page:x?}")));
        }
        // Bit 7 of a PTE is no size, but the page's PAT.
        let large = page.page_size() != PageSize::Size4K;
        if large && !leaf.has('P') {
            judge.disagree(|| self.describe(leaf.gva, &format!("{leaf:x?}, walker {page:x?}")));
        }
        for ((letter, bit), set) in FLAGS.into_iter().zip(leaf.flags) {
            let ours = match letter {
                'A' => page.accessed(),
                'D' => page.dirty(),
                'G' => page.global(),
                _ => page.entry & bit != 0,
            };
            if ours != set {
                judge.disagree(|| {
                    self.describe(leaf.gva, &format!("flag {letter}: {leaf:x?}, walker {page:x?}"))
                });
            }
        }
        let offset = rng.u64(0..page.page_size().bytes().unwrap_or(PAGE));
        let inside = self.walker.translate(ram, Gva(leaf.gva + offset), &EXEMPT);
        if inside.map(|it| it.gpa.0) != Ok(leaf.gpa + offset) {
            judge.disagree(|| self.describe(leaf.gva + offset, &format!("{leaf:x?}, walker {inside:x?}")));
        }
    }

    /// Every kind of access to the page's first byte.
    fn judge_accesses(&self, ram: &FileRam<'_>, leaf: &TlbEntry, judge: &mut Judge) {
        let Some(expected) = self.expected(leaf) else {
            judge.disagree(|| self.describe(leaf.gva, "info tlb has a leaf where info mem has nothing"));
            return;
        };
        judge.count(if expected.user { "page of the user" } else { "page of the supervisor" }, 0);
        judge.count_if("writable", expected.write);
        judge.count_if("executable", expected.execute);
        judge.count_if("NX in a table, not in the leaf", !leaf.has('X') && !expected.execute);
        for intent in Intent::ALL {
            let ours = self.walker.translate(ram, Gva(leaf.gva), &intent.access());
            let ours = ours.map(|page| page.gpa.0).map_err(|fault| fault.kind);
            let wanted = match expected.error_code(&self.registers.control, intent) {
                None => Ok(leaf.gpa),
                Some(error_code) => Err(FaultKind::PageFault { error_code }),
            };
            judge.count(if wanted.is_ok() { "access allowed" } else { "access refused" }, 0);
            if ours != wanted {
                judge.disagree(|| {
                    self.describe(
                        leaf.gva,
                        &format!("{leaf:x?} {intent:?}: walker {ours:x?}, expected {wanted:x?}"),
                    )
                });
            }
        }
    }

    /// Effective rights, without the walker.
    fn expected(&self, leaf: &TlbEntry) -> Option<Expected> {
        let (user, write) = match &self.extents {
            // Linux's upper entries grant everything to the half of the address space that they are for.
            None => (leaf.has('U'), leaf.has('W')),
            Some(extents) => {
                let after = extents.partition_point(|extent| extent.end <= leaf.gva);
                let extent = extents.get(after).filter(|extent| extent.start <= leaf.gva)?;
                (extent.user, extent.write)
            }
        };
        Some(Expected { user, write, execute: !leaf.has('X') && !self.poisoned(leaf.gva) })
    }

    /// Page-table isolation makes user space no-execute in the kernel's half of each pair of roots, by NX in the PML4E.
    fn poisoned(&self, gva: u64) -> bool {
        self.kind.isolated
            && self.kind.mode.is_long()
            && self.registers.control.cr3 & USER_ROOT == 0
            && gva >> 63 == 0
    }

    /// QEMU has no leaf from `start` to right before `end`.
    fn judge_gap(&self, rng: &mut Rng, ram: &FileRam<'_>, start: u64, end: u64, judge: &mut Judge) {
        let pages = (end - start) / PAGE;
        for gva in [start, start + rng.u64(0..pages.max(1)) * PAGE, end - PAGE] {
            judge.count("address between leaves", 0);
            let ours = self.walker.translate(ram, Gva(gva), &EXEMPT);
            if !ours.is_err_and(|fault| matches!(fault.reason, Reason::NotPresent | Reason::NonCanonical)) {
                judge.disagree(|| self.describe(gva, &format!("no leaf, walker {ours:x?}")));
            }
        }
    }

    fn judge_extents(&self, ours: &[Extent], qemu: &[Extent], judge: &mut Judge) {
        for number in 0..ours.len().max(qemu.len()) {
            judge.case();
            let (ours, qemu) = (ours.get(number), qemu.get(number));
            if let Some(extent) = qemu {
                judge.count(if extent.user { "extent of the user" } else { "extent of the supervisor" }, 0);
                judge.count(if extent.write { "extent, writable" } else { "extent, read-only" }, 0);
            }
            if ours != qemu {
                judge.disagree(|| {
                    format!("CR3 {:#x}: walker {ours:x?}, QEMU {qemu:x?}", self.registers.control.cr3)
                });
                return;
            }
        }
    }

    /// The whole map, page by page, is the whole of `info tlb`: nothing is missing, and nothing more is there.
    pub(crate) fn judge_map(&self, ram: &FileRam<'_>, judge: &mut Judge) {
        let mut map = Map::new(self.walker.clone());
        let mut extents = Vec::new();
        let progress = map.advance(ram, u64::MAX, |extent| {
            extents.push(extent);
            ControlFlow::Continue(())
        });
        if progress != Progress::Done {
            judge.disagree(|| self.describe(map.position().0, &format!("the map ends here, {progress:?}")));
        }
        let mut leaves = self.leaves.iter();
        for extent in extents {
            let Ok(page) = extent.outcome else {
                judge.disagree(|| self.describe(extent.start.0, &format!("{extent:x?} is not a page")));
                continue;
            };
            let bytes = page.page_size().bytes().unwrap_or(PAGE);
            judge.count(
                if extent.bytes > bytes { "extent of several pages" } else { "extent of one page" },
                0,
            );
            let (mut accessed, mut dirty) = (false, false);
            for offset in (0..extent.bytes).step_by(bytes as usize) {
                judge.case();
                judge.count(size_name(page.page_size()), 0);
                let leaf = leaves.next();
                if !leaf
                    .is_some_and(|leaf| self.holds(&page, extent.start.0.wrapping_add(offset), offset, leaf))
                {
                    judge.disagree(|| {
                        self.describe(extent.start.0, &format!("{extent:x?} at {offset:#x}, {leaf:x?}"))
                    });
                    // From here on, each page would be held against another one's leaf.
                    return;
                }
                accessed |= leaf.is_some_and(|leaf| leaf.has('A'));
                dirty |= leaf.is_some_and(|leaf| leaf.has('D'));
            }
            if (accessed, dirty) != (page.accessed(), page.dirty()) {
                judge.disagree(|| {
                    self.describe(extent.start.0, &format!("{extent:x?}, A {accessed} D {dirty}"))
                });
            }
        }
        for leaf in leaves {
            judge.case();
            judge.disagree(|| self.describe(leaf.gva, &format!("{leaf:x?} is in no extent")));
        }
    }

    /// Whether the page at `gva` that `page`, `offset` bytes before, says something of is this leaf.
    fn holds(&self, page: &Translation, gva: u64, offset: u64, leaf: &TlbEntry) -> bool {
        let Some(expected) = self.expected(leaf) else { return false };
        let rights = page.rights();
        let large = page.page_size() != PageSize::Size4K;
        let shown = FLAGS.into_iter().zip(leaf.flags).all(|((letter, bit), set)| match letter {
            'G' => page.global() == set,
            // Used by some pages of an extent: its other pages are not asked for that.
            'A' | 'D' => true,
            // Those of the leaf alone: what all levels grant is expected.
            'X' | 'U' | 'W' => true,
            _ => (page.entry & bit != 0) == set,
        });
        (leaf.gva, leaf.gpa) == (gva, page.gpa.0 + offset)
            && (!large || leaf.has('P'))
            && shown
            && (rights.user(), rights.write(), rights.execute())
                == (expected.user, expected.write, expected.execute)
    }

    /// `number` random addresses.
    pub(crate) fn judge_addresses(
        &self,
        rng: &mut Rng,
        guest: &mut Guest,
        number: u64,
        judge: &mut Judge,
    ) -> Result<(), Failed> {
        let addresses: Vec<u64> = (0..number).map(|_| self.address(rng)).collect();
        let answers = guest.ask_all(self.vcpu, addresses.iter().map(|gva| format!("gva2gpa {gva:#x}")))?;
        let ram = guest.ram()?;
        for (gva, answer) in addresses.into_iter().zip(answers) {
            judge.case();
            let qemu = monitor::gpa(&answer)?;
            let ours = self.walker.translate(&ram, Gva(gva), &EXEMPT);
            match ours {
                Ok(page) => judge.count(size_name(page.page_size()), 0),
                Err(fault) if fault.reason == Reason::NonCanonical => judge.count("not canonical", 0),
                Err(fault) if fault.reason == Reason::NotPresent => {
                    judge.count("not present, level", u64::from(fault.level));
                }
                Err(_) => judge.count("refused otherwise", 0),
            }
            if ours.map(|page| page.gpa.0).ok() != qemu {
                judge.disagree(|| self.describe(gva, &format!("walker {ours:x?}, QEMU {qemu:x?}")));
            }
        }
        Ok(())
    }

    /// Near what is mapped, mostly.
    fn address(&self, rng: &mut Rng) -> u64 {
        let leaf = rng.choice(&self.leaves).map_or(0, |leaf| leaf.gva);
        let near = leaf.wrapping_add(rng.u64(0..PAGE));
        let width = match self.kind.mode {
            PagingMode::FourLevel => 48,
            PagingMode::FiveLevel => 57,
            _ => 32,
        };
        let gva = match rng.u32(0..100) {
            0..30 => near,
            30..45 => leaf.wrapping_add(rng.u64(0..1 << 30)),
            45..65 => near.wrapping_add(PAGE * rng.u64(1..16)).wrapping_sub(PAGE * 16 * rng.u64(0..2)),
            65..85 => near ^ 1 << rng.u32(12..width),
            85..93 if width > 32 => near ^ 1 << rng.u32(width - 1..64),
            _ => rng.u64(..) >> rng.u32(0..40),
        };
        match width {
            32 => gva & 0xffff_ffff,
            // The kernel's half as often as the user's.
            _ if rng.u32(0..10) == 0 => ((gva << (64 - width)) as i64 >> (64 - width)) as u64,
            _ => gva,
        }
    }

    /// The worker that the vCPU was running, if it was: everything that it announced.
    pub(crate) fn judge_worker(
        &self,
        rng: &mut Rng,
        ram: &FileRam<'_>,
        mappings: &[Mapping],
        judge: &mut Judge,
    ) {
        let identity = self.walker.translate(ram, Gva(IDENTITY), &EXEMPT);
        let word = identity.ok().and_then(|page| ram.word(page.gpa.0));
        let Some(worker) = word.and_then(announced::worker) else {
            judge.count("a root of no worker", 0);
            return;
        };
        judge.count("root of worker", worker);
        for mapping in mappings.iter().filter(|mapping| mapping.worker == worker) {
            let steps = mapping.bytes / mapping.step;
            for number in 0..WORDS.min(steps) {
                judge.case();
                let step = match number {
                    0 => 0,
                    1 => steps - 1,
                    _ => rng.u64(0..steps),
                };
                self.judge_word(ram, mapping, mapping.start + step * mapping.step, judge);
            }
        }
    }

    /// One word of a mapping, as the worker would read it.
    fn judge_word(&self, ram: &FileRam<'_>, mapping: &Mapping, gva: u64, judge: &mut Judge) {
        let read = Access::new(AccessKind::Read, Privilege::User);
        let ours = self.walker.translate(ram, Gva(gva), &read);
        let agreed = match (mapping.rights, ours) {
            (None, Err(fault)) => {
                judge.count("absent", 0);
                fault.kind == FaultKind::PageFault { error_code: 4 } && fault.reason == Reason::NotPresent
            }
            (Some(rights), Ok(page)) => {
                judge.count(size_name(page.page_size()), 0);
                judge.count_if("with a protection key", mapping.key != 0);
                judge.count(if rights.write { "writable" } else { "read-only" }, 0);
                let execute = match self.kind.mode {
                    PagingMode::TwoLevel => true,
                    PagingMode::Pae => page.rights().execute(),
                    _ => rights.execute && !self.poisoned(gva),
                };
                judge.count(if execute { "executable" } else { "no-execute" }, 0);
                ram.word(page.gpa.0) == Some(mapping.word(gva))
                    && page.page_size().bytes() == Some(mapping.page_bytes)
                    && u64::from(page.key()) == mapping.key
                    && page.rights().user()
                    && page.rights().write() == rights.write
                    && page.rights().execute() == execute
            }
            _ => false,
        };
        if !agreed {
            let found = ours.ok().and_then(|page| ram.word(page.gpa.0));
            judge
                .disagree(|| self.describe(gva, &format!("{mapping:x?}: walker {ours:x?}, word {found:x?}")));
        }
    }

    fn describe(&self, gva: u64, what: &str) -> String {
        let control = &self.registers.control;
        format!(
            "GVA {gva:#x} on vCPU {} (CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x}): {what}",
            self.vcpu, control.cr0, control.cr3, control.cr4, control.efer
        )
    }
}

/// The PDPTEs in memory. A CPU holds them in registers, which the last load of CR3 filled; Linux loads CR3 anew when it
/// changes one. TCG has no such registers, reads PDPTEs at every walk, and sets bit 5 in them as if they were PDEs. That
/// bit is reserved: a CPU leaves it alone, and refuses to load it.
fn pdptes(ram: &FileRam<'_>, cr3: u64) -> Result<[u64; 4], Failed> {
    let mut pdptes = [0; 4];
    for (pdpte, gpa) in pdptes.iter_mut().zip((cr3 & !0x1f..).step_by(8)) {
        *pdpte = ram.word(gpa).ok_or("CR3 lies outside of the memory")?;
    }
    Ok(pdptes)
}

pub(crate) fn size_name(size: PageSize) -> &'static str {
    match size {
        PageSize::Size4K => "page of 4 KiB",
        PageSize::Size2M => "page of 2 MiB",
        PageSize::Size4M => "page of 4 MiB",
        PageSize::Size1G => "page of 1 GiB",
        PageSize::Unpaged => "no page",
    }
}
