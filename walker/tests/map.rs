//! A map says of every address what a single walk says of it.
//!
//! Random tables in every paging mode, alone and over NPT in every host format and EPT, many of them referring to one
//! another in circles: extents are held against single walks inside them, at their ends and in between. The memory stands
//! still. How a map is cut into calls, and where a budget ends it, must not show.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::map::{Budget, Extent, Filter, Limit, Map, PageSizes, Progress, RangeError, Report};
use pagewalk::mode::{
    CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA,
    EFER_LME, EFER_NXE,
};
use pagewalk::{
    Access, AccessKind, Backing, ControlRegisters, CpuProfile, EptCapabilities, EptControls, ExchangeError,
    Fault, Gpa, Gva, Memory, NestedGpa, NgpaWalk, NptControls, PageSize, PageWalk, PagingMode, Privilege,
    Rights, Translation, Vendor, Walker, Window,
};

const PAGES: u64 = 24;
const CASES: u64 = 2_000;
const EXEMPT: Access = Access::new(AccessKind::Read, Privilege::Exempt);

/// Memory that ends in the middle of a page, with a ROM in it; optionally without what makes a map fast.
struct Ram {
    words: Vec<AtomicU64>,
    plain: bool,
}

const ROM: std::ops::Range<u64> = 0x5000..0x7000;

impl Ram {
    fn put(&self, gpa: u64, entry: u64) {
        if let Some(word) = self.words.get(gpa as usize / 8) {
            word.store(entry, Ordering::Relaxed);
        }
    }
}

impl Memory for Ram {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        assert_eq!(gpa.0 % 8, 0, "an entry is loaded at its own address");
        Window::new(&self.words).load_u64(gpa)
    }

    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        let first = table.0 as usize / 4096 * 512;
        if self.plain { None } else { self.words.get(first..)?.first_chunk() }
    }

    fn load_table(&self, table: Gpa, entries: &mut [u64; 512]) -> bool {
        if !self.plain {
            return Window::new(&self.words).load_table(table, entries);
        }
        (0..).step_by(8).zip(entries).all(|(offset, entry)| {
            let loaded = self.load_in_table(table, offset);
            *entry = loaded.unwrap_or(0xdead_beef);
            loaded.is_some()
        })
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        panic!("a map changes nothing")
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        match Window::new(&self.words).backing(gpa) {
            Backing::Ram if ROM.contains(&gpa.0) => Backing::ReadOnly,
            backing => backing,
        }
    }

    fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
        let (backing, bytes) = Window::new(&self.words).backing_run(gpa);
        match (self.backing(gpa), gpa.0) {
            (Backing::ReadOnly, at) => (Backing::ReadOnly, ROM.end - at),
            (_, at) if at < ROM.start => (backing, bytes.min(ROM.start - at)),
            (..) => (backing, bytes),
        }
    }
}

fn flag(rng: &mut fastrand::Rng, bit: u64, one_in: u32) -> u64 {
    if rng.u32(0..one_in) == 0 { bit } else { 0 }
}

fn right(rng: &mut fastrand::Rng, bit: u64) -> u64 {
    if rng.u32(0..6) == 0 { 0 } else { bit }
}

/// A page or table, or none: bits of every format at once.
fn entry(rng: &mut fastrand::Rng) -> u64 {
    let frame = match rng.u32(0..10) {
        0 => rng.u64(PAGES..PAGES + 3),
        1 => rng.u64(0..1 << 24) << rng.u32(0..18),
        2 => rng.u64(0..8) << 18,
        _ => rng.u64(0..PAGES),
    };
    let mut entry = frame << 12 & ((1 << 52) - 1);
    entry |= right(rng, 1) | right(rng, 2) | right(rng, 4);
    entry |= flag(rng, 0x80, 4) | flag(rng, 0x100, 6) | flag(rng, 0x18, 8) | flag(rng, 0x60, 2);
    entry |= flag(rng, 1 << 63, 6) | flag(rng, 1 << 59, 10) | flag(rng, 1 << 52, 6) | flag(rng, 0xe00, 6);
    entry | flag(rng, 1 << 45, 40) | flag(rng, 1 << 40, 40)
}

/// Leaves that continue each other, most of them.
fn run(rng: &mut fastrand::Rng, words: &mut [u64]) {
    let size = [12, 12, 12, 21, 30][rng.usize(0..5)];
    let near_a_carry = [1_u64 << 36, 1 << 40, 1 << 46, 1 << 47, 1 << 52, 1 << 32][rng.usize(0..6)];
    let base = match rng.u32(0..3) {
        0 => near_a_carry.max(64 << size) - (rng.u64(0..60) << size),
        1 => rng.u64(0..PAGES) << 12,
        _ => rng.u64(0..1 << 10) << size,
    };
    let flags = entry(rng) & (0xf800_0000_0000_0fff) | 1 | if size > 12 { 0x80 } else { 0 };
    let from = rng.usize(0..words.len()) & if rng.u32(0..4) == 0 { !63 } else { usize::MAX };
    let to = from + rng.usize(0..=words.len() - from);
    for (number, word) in words[from..to].iter_mut().enumerate() {
        let other = if rng.u32(0..60) == 0 { 1 << rng.u32(0..64) } else { 0 };
        let used = rng.u64(..) & 0x60 & if rng.bool() { u64::MAX } else { 0 };
        *word = (base.wrapping_add((number as u64) << size) & ((1 << 52) - 1) | flags | used) ^ other;
    }
}

fn ram(rng: &mut fastrand::Rng) -> Ram {
    let mut words = vec![0; PAGES as usize * 512 - rng.usize(0..512) * usize::from(rng.bool())];
    for table in words.chunks_mut(512) {
        for _ in 0..rng.usize(0..4) {
            run(rng, table);
        }
        for _ in 0..rng.usize(0..24) {
            let at = rng.usize(0..table.len());
            table[at] = entry(rng);
        }
    }
    Ram { words: words.into_iter().map(AtomicU64::new).collect(), plain: rng.bool() }
}

fn root(rng: &mut fastrand::Rng) -> u64 {
    rng.u64(0..PAGES - 1) << 12
}

fn guest(rng: &mut fastrand::Rng) -> ControlRegisters {
    let free = rng.u64(..);
    let common = free & (CR4_PKE | CR4_SMEP | CR4_SMAP | CR4_CET);
    let long = EFER_LME | EFER_LMA | free & EFER_NXE;
    let (cr4, efer) = match rng.u32(0..12) {
        0 => (0, 0),
        1 | 2 => (free & (CR4_PSE | CR4_SMEP | CR4_SMAP), 0),
        3 | 4 => (CR4_PAE | common, free & EFER_NXE),
        5..=7 => (CR4_PAE | CR4_LA57 | common, long),
        _ => (CR4_PAE | common, long),
    };
    let paging = if efer == 0 && cr4 == 0 && rng.bool() { 0 } else { CR0_PG };
    let root = root(rng) | if efer & EFER_LME == 0 && cr4 & CR4_PAE != 0 { free & 0xfe0 } else { 0 };
    ControlRegisters { cr0: CR0_PE | paging | CR0_WP, cr3: root, cr4, efer, pat: 0x0007_0406_0105_0406 }
}

fn cpu(rng: &mut fastrand::Rng) -> CpuProfile {
    CpuProfile {
        vendor: if rng.bool() { Vendor::Intel } else { Vendor::Amd },
        maxphyaddr: [36, 40, 46, 48, 52][rng.usize(0..5)],
        gib_pages: rng.bool(),
        encryption_bit: if rng.u32(0..4) == 0 { Some(47) } else { None },
    }
}

/// The second dimension's tables are like all others; now and then a few of them map memory onto itself.
fn second(rng: &mut fastrand::Rng, ram: &Ram, cpu: &CpuProfile) -> NgpaWalk {
    let sound = rng.u32(0..3) > 0;
    let top = PAGES - 5;
    if rng.bool() {
        let five_level = rng.bool();
        if sound {
            onto_itself(rng, ram, top, if five_level { 5 } else { 4 }, 8, 0x37, 0xb7);
        }
        let root = if sound { top << 12 } else { root(rng) };
        let eptp = root | if five_level { 0x26 } else { 0x1e } | flag(rng, 0x40, 2);
        let controls = EptControls { mode_based_execute: rng.bool(), tables_written: false };
        let capabilities = EptCapabilities { execute_only: rng.bool(), ..EptCapabilities::all() };
        NgpaWalk::ept(eptp, &controls, &capabilities, cpu).unwrap()
    } else {
        let host = loop {
            let host = guest(rng);
            if host.cr0 & CR0_PG != 0 {
                break host;
            }
        };
        let long = host.efer & EFER_LME != 0;
        let levels = if host.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        if sound && long {
            onto_itself(rng, ram, top, levels, 8, 7, 0x87);
        }
        let root = if sound && long { top << 12 } else { root(rng) };
        let controls = NptControls { guest_mode_execute_trap: rng.bool() };
        NgpaWalk::npt_with(root, &host, &controls, cpu).unwrap()
    }
}

/// Tables from page `top` on, root first, that map the first 2 MiB by 4 KiB leaves and more by 2 MiB leaves.
fn onto_itself(rng: &mut fastrand::Rng, ram: &Ram, top: u64, levels: u64, bytes: u64, table: u64, leaf: u64) {
    let table = if leaf == 0xb7 { 7 } else { table };
    for level in 0..levels - 1 {
        ram.put((top + level) << 12, (top + level + 1) << 12 | table);
    }
    for number in 1..512 {
        ram.put(((top + levels - 2) << 12) + number * bytes, number << 21 | leaf);
    }
    for number in 0..512 {
        if rng.u32(0..30) > 0 {
            let other = if rng.u32(0..20) == 0 { 2 } else { 0 };
            ram.put(((top + levels - 1) << 12) + number * bytes, number << 12 | (leaf & 0x7f) ^ other);
        }
    }
}

fn walker(rng: &mut fastrand::Rng, ram: &Ram) -> Walker {
    let cpu = cpu(rng);
    let registers = guest(rng);
    let pae = registers.cr0 & CR0_PG != 0 && registers.cr4 & CR4_PAE != 0 && registers.efer & EFER_LME == 0;
    let gva_walk = if pae && rng.bool() {
        let pdptes = std::array::from_fn(|_| rng.u64(0..PAGES + 1) << 12 | rng.u64(0..2));
        PageWalk::with_pdptes(&registers, pdptes, &cpu).unwrap()
    } else {
        PageWalk::new(&registers, &cpu).unwrap()
    };
    if rng.bool() { Walker::nested(gva_walk, second(rng, ram, &cpu)) } else { Walker::new(gva_walk) }
}

fn access(rng: &mut fastrand::Rng) -> Access {
    let kind = rng
        .choice([
            AccessKind::Read,
            AccessKind::Write,
            AccessKind::Fetch,
            AccessKind::ShadowStackRead,
            AccessKind::ShadowStackWrite,
        ])
        .unwrap();
    let privilege = rng
        .choice([Privilege::User, Privilege::Supervisor, Privilege::ImplicitSupervisor, Privilege::Exempt])
        .unwrap();
    Access::new(kind, privilege).with_ac(rng.bool()).with_pkru(rng.u32(..))
}

fn whole(map: &mut Map, ram: &Ram) -> (Vec<Extent>, Progress) {
    let mut extents = Vec::new();
    let progress = map.advance(ram, u64::MAX, |extent| {
        extents.push(extent);
        ControlFlow::Continue(())
    });
    (extents, progress)
}

fn position(walker: &Walker, gva: Gva) -> u64 {
    gva.0 & ((1 << walker.gva_walk().format().linear_width()) - 1)
}

fn gva(walker: &Walker, position: u64) -> Gva {
    let format = walker.gva_walk().format();
    let unused = if format.mode().is_long() { 64 - format.linear_width() } else { 0 };
    Gva(((position << unused) as i64 >> unused) as u64)
}

/// All that an extent says of a page, but where it leads and whether it was used.
fn shown(page: &Translation) -> impl PartialEq + std::fmt::Debug {
    (
        page.page_size(),
        page.rights(),
        page.backing(),
        page.key(),
        page.global(),
        page.pat_index(),
        page.nested.map(|nested| (nested.page_size, nested.ept_memory_type)),
    )
}

/// Whether the extent says of its byte `offset` what the walk says.
fn agrees(extent: &Extent, offset: u64, walked: &Result<Translation, Fault>) -> bool {
    match (&extent.outcome, walked) {
        (Ok(page), Ok(walked)) => {
            let nested = |page: &Translation| page.nested.map(|nested| nested.ngpa.0);
            page.gpa.0 + offset == walked.gpa.0
                && shown(page) == shown(walked)
                && nested(page).map(|ngpa| NestedGpa(ngpa + offset)) == nested(walked).map(NestedGpa)
                && (page.accessed() || !walked.accessed())
                && (page.dirty() || !walked.dirty())
        }
        (Err(fault), Err(walked)) if offset == 0 => fault == walked,
        (Err(fault), Err(walked)) => {
            (fault.kind, fault.reason, fault.dimension) == (walked.kind, walked.reason, walked.dimension)
        }
        _ => false,
    }
}

#[derive(Default)]
struct Seen(BTreeMap<String, u64>);

impl Seen {
    fn note(&mut self, class: impl Into<String>) {
        *self.0.entry(class.into()).or_default() += 1;
    }
}

#[test]
fn a_map_says_what_single_walks_say() {
    let mut seen = Seen::default();
    for seed in 0..CASES {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ram = ram(&mut rng);
        let walker = walker(&mut rng, &ram);
        let access = if rng.bool() { EXEMPT } else { access(&mut rng) };
        let budget = Budget { entries: 30_000, extents: 3_000 };
        let space = (1 << walker.gva_walk().format().linear_width()) - 1;
        let start = match rng.u32(0..3) {
            0 => 0,
            _ => rng.u64(..) >> rng.u32(0..64) & space,
        };
        let map = Map::new(walker.clone()).for_access(&access).reporting(Report::Everything).within(budget);
        let mut map = map.over(gva(&walker, start), gva(&walker, space)).unwrap();
        let (extents, progress) = whole(&mut map, &ram);
        let end = match progress {
            Progress::Done => space + 1,
            Progress::Truncated { at, .. } => position(&walker, at),
            Progress::Going => panic!("{seed}: no bound was given"),
        };
        seen.note(if progress == Progress::Done { "done" } else { "truncated" });
        assert!(end > start, "{seed}: a map gets somewhere");
        // Every address is in one extent.
        let mut next = start;
        for extent in &extents {
            assert_eq!(position(&walker, extent.start), next, "{seed}: {extent:x?}");
            assert!(extent.bytes > 0, "{seed}");
            next += extent.bytes;
            let last = Gva(extent.start.0.wrapping_add(extent.bytes - 1));
            assert_eq!(gva(&walker, next - 1), last, "{seed}: an extent is of addresses: {extent:x?}");
        }
        assert_eq!(next, end, "{seed}: {progress:?}");
        assert_eq!(map.tally().extents, extents.len() as u64, "{seed}");
        let mapped: u64 = extents.iter().filter(|it| it.outcome.is_ok()).map(|it| it.bytes).sum();
        assert_eq!(map.tally().mapped, mapped, "{seed}");

        let linear = walker.clone();
        let mode = walker.gva_walk().format().mode();
        for _ in 0..400.min(extents.len() * 6) {
            let extent = rng.choice(&extents).unwrap();
            let offset = match rng.u32(0..5) {
                0 => 0,
                1 => extent.bytes - 1,
                2 => (rng.u64(..) >> rng.u32(0..64)) % extent.bytes,
                _ => rng.u64(0..extent.bytes),
            };
            let at = gva(&walker, position(&walker, extent.start) + offset);
            let walked = linear.translate(&ram, at, &access);
            assert!(
                agrees(extent, offset, &walked),
                "{seed}: {at:?} {access:?}\n{extent:x?} at {offset:#x}\n{walked:x?}\n{walker:x?}"
            );
            match &walked {
                Ok(page) => {
                    let nested = page.nested.map(|nested| nested.page_size);
                    seen.note(format!("{mode:?} {:?} over {nested:?}", page.page_size()));
                    seen.note(format!("{:?}", page.backing()));
                    if extent.bytes > page.page_size().bytes().unwrap_or(0) {
                        seen.note("pages that continue each other");
                    }
                }
                Err(fault) => seen.note(format!("{mode:?} {:?} {:?}", fault.dimension, fault.reason)),
            }
        }
        // Neighbours that could be one are one.
        for pair in extents.windows(2) {
            let (one, other) = (&pair[0], &pair[1]);
            if one.start.0.wrapping_add(one.bytes) != other.start.0 {
                continue;
            }
            let joined = Extent { bytes: one.bytes + other.bytes, ..*one };
            assert!(!agrees(&joined, one.bytes, &other.outcome), "{seed}: {one:x?} {other:x?}");
        }
    }
    for class in [
        "done",
        "truncated",
        "Ram",
        "ReadOnly",
        "None",
        "pages that continue each other",
        "None Unpaged over None",
        "None Unpaged over Some(Size4K)",
        "TwoLevel Size4K over None",
        "TwoLevel Size4M over None",
        "TwoLevel Size4K over Some(Size4K)",
        "Pae Size4K over None",
        "Pae Size2M over None",
        "Pae Size4K over Some(Size2M)",
        "FourLevel Size4K over None",
        "FourLevel Size2M over None",
        "FourLevel Size1G over None",
        "FourLevel Size4K over Some(Size4K)",
        "FourLevel Size2M over Some(Size4K)",
        "FiveLevel Size4K over Some(Size2M)",
        "FiveLevel Size1G over None",
        "FourLevel Guest NotPresent",
        "FourLevel Guest ReservedBits",
        "FourLevel Guest TableUnbacked",
        "FourLevel Nested NotPresent",
        "FourLevel Nested ReservedBits",
        "FourLevel Guest SupervisorPage",
        "FourLevel Guest ReadOnly",
        "Pae Guest NotPresent",
        "TwoLevel Guest NotPresent",
    ] {
        assert!(seen.0.get(class).copied().unwrap_or(0) >= 20, "{class}: {:#?}", seen.0);
    }
}

#[test]
fn calls_and_budgets_do_not_show() {
    for seed in 0..CASES / 3 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ram = ram(&mut rng);
        let walker = walker(&mut rng, &ram);
        let report = rng.choice([Report::Pages, Report::Problems, Report::Everything]).unwrap();
        let made = |budget| Map::new(walker.clone()).reporting(report).within(budget);
        let (extents, progress) = whole(&mut made(Budget { entries: 40_000, extents: 2_000 }), &ram);
        let end = match progress {
            Progress::Truncated { at, .. } => Some(position(&walker, at)),
            _ => None,
        };

        // In many calls, each of which a sink may break off.
        let mut map = made(Budget::DEFAULT);
        let mut sliced: Vec<Extent> = Vec::new();
        loop {
            let mut room = rng.usize(1..40);
            let before = map.position();
            let progress = map.advance(&ram, rng.u64(0..3_000), |extent| {
                sliced.push(extent);
                room = room.saturating_sub(1);
                if room == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            if progress == Progress::Done || end.is_some_and(|end| position(&walker, map.position()) > end) {
                break;
            }
            assert_eq!(progress, Progress::Going, "{seed}");
            assert_ne!(map.position(), before, "{seed}: a call gets somewhere");
        }
        // The last one was cut where the budget ended.
        let whole_ones = if end.is_some() { extents.len().saturating_sub(1) } else { extents.len() };
        assert!(sliced.len() >= whole_ones, "{seed}: {} {whole_ones}", sliced.len());
        for (sliced, extent) in sliced.iter().zip(&extents[..whole_ones]) {
            assert_eq!(sliced, extent, "{seed}");
        }

        // In many maps, each of which begins where the budget of the one before ended.
        let mut at = 0;
        let mut resumed: Vec<Extent> = Vec::new();
        let last = gva(&walker, (1 << walker.gva_walk().format().linear_width()) - 1);
        for _ in 0..200 {
            let budget = Budget { entries: rng.u64(1..5_000), extents: rng.u64(1..40) };
            let (more, progress) = whole(&mut made(budget).over(gva(&walker, at), last).unwrap(), &ram);
            assert!(more.len() as u64 <= budget.extents, "{seed}");
            resumed.extend(more);
            match progress {
                Progress::Truncated { at: next, limit } => {
                    let next = position(&walker, next);
                    assert!(next > at, "{seed}: {limit:?}");
                    at = next;
                }
                _ => break,
            }
        }
        let covered = |extents: &[Extent], below: u64| -> u64 {
            let below = |extent: &Extent| {
                let start = position(&walker, extent.start);
                below.saturating_sub(start).min(extent.bytes)
            };
            extents.iter().map(below).sum()
        };
        let both = at.min(end.unwrap_or(u64::MAX));
        assert_eq!(covered(&resumed, both), covered(&extents, both), "{seed}");
    }
}

#[test]
fn a_filter_leaves_what_it_says() {
    for seed in 0..CASES / 3 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ram = ram(&mut rng);
        let walker = walker(&mut rng, &ram);
        let budget = Budget { entries: 60_000, extents: 4_000 };
        let mut all = Map::new(walker.clone()).within(budget);
        let (extents, progress) = whole(&mut all, &ram);
        let last = match progress {
            Progress::Truncated { at, .. } => position(&walker, at) - 1,
            _ => (1 << walker.gva_walk().format().linear_width()) - 1,
        };
        let rights = |rng: &mut fastrand::Rng| {
            rng.choice([Rights::NONE, Rights::NONE, Rights::WRITE, Rights::USER, Rights::EXECUTE]).unwrap()
        };
        let page_sizes = match rng.u32(0..3) {
            0 => PageSizes::NONE.with(PageSize::Size2M).with(PageSize::Size4M).with(PageSize::Size1G),
            1 => PageSizes::NONE.with(PageSize::Size4K),
            _ => PageSizes::ALL,
        };
        let gpas = match rng.u32(0..3) {
            0 => {
                let first = rng.u64(0..PAGES << 12);
                (Gpa(first), Gpa(first + (rng.u64(..) >> rng.u32(40..64))))
            }
            _ => Filter::ALL.gpas,
        };
        let filter = Filter { required: rights(&mut rng), forbidden: rights(&mut rng), page_sizes, gpas };
        let map = Map::new(walker.clone()).filtered(filter).over(gva(&walker, 0), gva(&walker, last));
        let (filtered, progress) = whole(&mut map.unwrap(), &ram);
        assert_eq!(progress, Progress::Done, "{seed}");

        let has = |rights: Rights, wanted: Rights| rights.bits() & wanted.bits();
        let mut expected = Vec::new();
        for extent in extents {
            let page = extent.outcome.unwrap();
            let wanted = has(page.rights(), filter.required) == filter.required.bits()
                && has(page.rights(), filter.forbidden) == 0
                && page_sizes.contains(page.page_size());
            let first = page.gpa.0.max(gpas.0.0);
            let end = (u128::from(page.gpa.0) + u128::from(extent.bytes)).min(u128::from(gpas.1.0) + 1);
            if wanted && u128::from(first) < end {
                let bytes = (end - u128::from(first)) as u64;
                expected.push((
                    extent.start.0 + (first - page.gpa.0),
                    bytes,
                    first,
                    format!("{:?}", shown(&page)),
                ));
            }
        }
        let found: Vec<_> = filtered
            .iter()
            .map(|extent| {
                let page = extent.outcome.unwrap();
                (extent.start.0, extent.bytes, page.gpa.0, format!("{:?}", shown(&page)))
            })
            .collect();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "{seed}: {filter:x?}");
        }
        assert_eq!(found.len(), expected.len(), "{seed}: {filter:x?}");
    }
}

fn four_level(root: u64) -> Walker {
    let registers = ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    };
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
    Walker::new(PageWalk::new(&registers, &cpu).unwrap())
}

/// Pages that continue each other, one of which has another bit than its neighbours.
#[test]
fn a_page_that_differs_ends_an_extent() {
    const RUN: u64 = 200;
    for (bit, odd, plain) in [1, 2, 3, 4, 7, 8, 59, 63]
        .into_iter()
        .flat_map(|bit| [1, 63, 64, 100, 199].map(move |odd| (bit, odd)))
        .flat_map(|(bit, odd)| [(bit, odd, false), (bit, odd, true)])
    {
        let ram = Ram { words: (0..4 * 512).map(|_| AtomicU64::new(0)).collect(), plain };
        (0..3).for_each(|table| ram.put(table << 12, (table + 1) << 12 | 7));
        for page in 0..RUN {
            let differs = u64::from(page == odd) << bit;
            ram.put(3 << 12 | page << 3, (16 + page) << 12 | 7 ^ differs);
        }
        let walker = four_level(0);
        let (extents, progress) = whole(&mut Map::new(walker.clone()), &ram);
        assert_eq!(progress, Progress::Done);
        for gva in (0..RUN).map(|page| page << 12) {
            let extent = extents.iter().rfind(|extent| extent.start.0 <= gva).unwrap();
            let walked = walker.translate(&ram, Gva(gva), &EXEMPT);
            assert!(
                agrees(extent, gva - extent.start.0, &walked),
                "bit {bit} of page {odd}: {gva:#x}, {extent:?}"
            );
        }
    }
}

/// Every entry of the only table refers to the table itself: 512^4 pages.
#[test]
fn a_table_that_refers_to_itself_ends_by_the_budget() {
    let ram = Ram { words: (0..512).map(|_| AtomicU64::new(3)).collect(), plain: false };
    let (extents, progress) = whole(&mut Map::new(four_level(0)), &ram);
    assert_eq!(extents.len() as u64, Budget::DEFAULT.extents);
    assert!(matches!(progress, Progress::Truncated { limit: Limit::Extents, .. }), "{progress:?}");
    // Each page is an extent of its own: none continues the one before.
    let at = Gva(Budget::DEFAULT.extents << 12);
    assert_eq!(progress, Progress::Truncated { at, limit: Limit::Extents });

    // Nothing to report, and nothing that could be skipped.
    let budget = Budget { entries: 1 << 22, ..Budget::DEFAULT };
    let gpas = (Gpa(1 << 40), Gpa(1 << 41));
    let mut map = Map::new(four_level(0)).filtered(Filter { gpas, ..Filter::ALL }).within(budget);
    let (extents, progress) = whole(&mut map, &ram);
    assert!(extents.is_empty());
    assert!(matches!(progress, Progress::Truncated { limit: Limit::Entries, .. }), "{progress:?}");
    assert!((1 << 22..(1 << 22) + 5 * 512).contains(&map.tally().entries), "{:?}", map.tally());

    // What no page can have is not looked for.
    let filter = Filter { required: Rights::USER, ..Filter::ALL };
    let mut map = Map::new(four_level(0)).filtered(filter);
    assert_eq!(whole(&mut map, &ram), (vec![], Progress::Done));
    assert_eq!(map.tally().tables, 1);
}

#[test]
fn an_empty_space_costs_one_table() {
    let registers = ControlRegisters {
        cr0: CR0_PE | CR0_PG,
        cr4: CR4_PAE | CR4_LA57,
        efer: EFER_LME | EFER_LMA,
        ..ControlRegisters::default()
    };
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
    let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
    let ram = Ram { words: (0..512).map(|_| AtomicU64::new(0)).collect(), plain: false };
    let mut map = Map::new(walker);
    assert_eq!(whole(&mut map, &ram), (vec![], Progress::Done));
    assert_eq!(map.tally().entries, 512);
    let mut map = Map::new(map.walker().clone()).reporting(Report::Everything);
    let (extents, _) = whole(&mut map, &ram);
    // The two halves have a gap between them.
    assert_eq!(extents.iter().map(|it| it.bytes).collect::<Vec<_>>(), [1 << 56, 1 << 56]);
}

#[test]
fn problems_are_counted_and_reported() {
    let ram = Ram { words: (0..8 * 512).map(|_| AtomicU64::new(0)).collect(), plain: false };
    for (gpa, entry) in [
        (0x1000, 0x2003),
        (0x1008, 0x2003 | 1 << 50), // reserved
        (0x1010, 0x100_0003),       // a table outside memory
        (0x2000, 0x3003),
        (0x3000, 0x4003),
        (0x4000, 0x8003),
    ] {
        ram.put(gpa, entry);
    }
    let mut silent = Map::new(four_level(0x1000));
    let (pages, _) = whole(&mut silent, &ram);
    assert_eq!(pages.len(), 1);
    let tally = silent.tally();
    assert_eq!((tally.reserved, tally.unbacked, tally.nested, tally.mapped), (1, 1, 0, 0x1000));
    let (all, _) = whole(&mut Map::new(four_level(0x1000)).reporting(Report::Problems), &ram);
    let spans: Vec<_> = all.iter().map(|it| (it.start.0, it.bytes, it.outcome.is_ok())).collect();
    assert_eq!(spans, [(0, 0x1000, true), (1 << 39, 1 << 39, false), (2 << 39, 1 << 39, false)]);
}

#[test]
fn ranges_that_are_none() {
    let over = |first, last| Map::new(four_level(0)).over(Gva(first), Gva(last)).err();
    assert_eq!(over(1, 0), Some(RangeError::Inverted));
    assert_eq!(over(0xffff_8000_0000_0000, 0x1000), Some(RangeError::Inverted));
    assert_eq!(over(0, 1 << 47), Some(RangeError::NotAnAddress(Gva(1 << 47))));
    assert_eq!(over(1 << 63, u64::MAX), Some(RangeError::NotAnAddress(Gva(1 << 63))));
    assert_eq!(over(0, u64::MAX), None);
    let unpaged = Walker::new(
        PageWalk::new(
            &ControlRegisters::default(),
            &CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None },
        )
        .unwrap(),
    );
    assert_eq!(unpaged.gva_walk().format().mode(), PagingMode::None);
    assert!(Map::new(unpaged.clone()).over(Gva(0), Gva(u64::from(u32::MAX))).is_ok());
    let wide = Gva(1 << 32);
    assert_eq!(Map::new(unpaged).over(Gva(0), wide).err(), Some(RangeError::NotAnAddress(wide)));
}
