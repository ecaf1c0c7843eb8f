//! What a map costs, next to plainly reading the same tables once.
//!
//! Both sides go through the tables that hold leaves, of both dimensions where there are two, in the order of the addresses. The
//! peer adds up their words, by loads that the compiler may join into vectors; a map loads each entry atomically, judges it, and
//! hands each extent to a sink that keeps it. Sides take turns, and the table holds medians of these rounds. Tables lie in memory
//! in the order of the addresses, or scattered; both sides take them as they lie.
//!
//! An extent that is one page alone costs what it takes to write it down, eleven words for one. So a second peer reads the tables and
//! writes down as many extents as there are, and in a further round of maps the sink only adds extents up.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

mod support;

use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pagewalk::map::{Extent, Filter, Map, Progress};
use pagewalk::{ControlRegisters, CpuProfile, Gpa, Instructions, NgpaWalk, PageWalk, Vendor, Walker, Window};
use support::kept::{is_test, keep, surroundings};

const PLAIN: u64 = 0x67;
const TABLE: usize = 512;
const ROUNDS: usize = 31;

/// What the leaves of a guest look like.
#[derive(Clone, Copy, PartialEq)]
enum Leaves {
    /// Each frame follows the one before.
    InOrder,
    /// The same, and accessed and dirty bits at random.
    Used,
    /// Runs of so many frames.
    Runs(u64),
    /// One entry in 64 is a page.
    Sparse,
}

struct Guest {
    words: Vec<AtomicU64>,
    /// The tables that hold leaves, in the order of the addresses, by their first word.
    tables: Vec<usize>,
    root: u64,
    leaves: u64,
}

impl Guest {
    fn new(leaves: u64, kind: Leaves, scattered: bool) -> Self {
        let count = (leaves as usize).div_ceil(TABLE);
        let upper = count.div_ceil(TABLE) + 2;
        let total = count + upper;
        let words: Vec<AtomicU64> = (0..total * TABLE).map(|_| AtomicU64::new(0)).collect();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut places: Vec<usize> = (upper..total).collect();
        if scattered {
            rng.shuffle(&mut places);
        }
        let put = |word: usize, entry: u64| words[word].store(entry, Ordering::Relaxed);
        put(0, 0x1000 | PLAIN);
        for (number, place) in places.iter().enumerate() {
            let directory = 2 + number / TABLE;
            put(TABLE + number / TABLE, (directory as u64) << 12 | PLAIN);
            put(directory * TABLE + number % TABLE, (*place as u64) << 12 | PLAIN);
            for entry in 0..TABLE {
                let page = (number * TABLE + entry) as u64;
                let frame = match kind {
                    Leaves::Runs(length) => {
                        (page / length).wrapping_mul(0x9e37_79b1) % (1 << 24) * length + page % length
                    }
                    _ => page,
                };
                let used = if kind == Leaves::Used { rng.u64(..) & 0x60 } else { 0x60 };
                if kind != Leaves::Sparse || entry % 64 == 0 {
                    put(place * TABLE + entry, frame << 12 | 7 | used);
                }
            }
        }
        let tables = places.iter().map(|place| place * TABLE).collect();
        Self { words, tables, root: 0, leaves }
    }

    fn registers(&self) -> ControlRegisters {
        ControlRegisters {
            cr0: 0x8001_0001,
            cr3: self.root,
            cr4: 0x20,
            efer: 0xd00,
            ..ControlRegisters::default()
        }
    }

    fn map(&self) -> Map {
        Map::new(Walker::new(PageWalk::new(&self.registers(), &CPU).unwrap()))
    }

    /// Under NPT that maps everything onto itself, by leaves of `level`.
    fn nested(leaves: u64, level: u32) -> (Self, Map) {
        let mut guest = Self::new(leaves, Leaves::InOrder, false);
        let own = guest.words.len() as u64 * 8;
        // The guest's frames reach further than its tables.
        let span = (leaves << 12).max(own).next_multiple_of(1 << 30);
        let mut more = vec![0_u64; 2 * TABLE];
        let first = own >> 12;
        let page = |more: &mut Vec<u64>| {
            more.resize(more.len() + TABLE, 0);
            first + (more.len() / TABLE) as u64 - 1
        };
        more[0] = (first + 1) << 12 | 7;
        for gib in 0..span >> 30 {
            let directory = page(&mut more);
            more[TABLE + gib as usize] = directory << 12 | 7;
            for mega in 0..512 {
                let base = gib << 30 | mega << 21;
                let entry = if level == 2 {
                    base | 0x87
                } else {
                    let table = page(&mut more);
                    guest.tables.push((table * 512) as usize);
                    for small in 0..512 {
                        more[((table - first) * 512 + small) as usize] = base | small << 12 | 7;
                    }
                    table << 12 | 7
                };
                more[((directory - first) * 512 + mega) as usize] = entry;
            }
        }
        guest.words.extend(more.into_iter().map(AtomicU64::new));
        let npt = NgpaWalk::npt(first << 12, &guest.registers(), &CPU).unwrap();
        let walk = PageWalk::new(&guest.registers(), &CPU).unwrap();
        (guest, Map::new(Walker::nested(walk, npt)))
    }

    /// Nanoseconds of a map that hands its extents to `sink`.
    fn mapped(&self, map: &Map, mut sink: impl FnMut(Extent)) -> u64 {
        let mut map = map.clone();
        let memory = Window::new(&self.words);
        let start = Instant::now();
        let progress = map.advance(&memory, u64::MAX, |extent| {
            sink(extent);
            ControlFlow::Continue(())
        });
        let elapsed = start.elapsed();
        assert_eq!(progress, Progress::Done);
        elapsed.as_nanos() as u64
    }

    fn kept(&self, map: &Map, kept: &mut Vec<Extent>) -> u64 {
        kept.clear();
        let elapsed = self.mapped(map, |extent| kept.push(extent));
        black_box(&kept);
        elapsed
    }

    fn added_up(&self, map: &Map) -> u64 {
        let mut sum = 0_u64;
        let elapsed = self.mapped(map, |extent| {
            let gpa = extent.outcome.map_or(0, |page| page.gpa.0);
            sum = sum.wrapping_add(extent.start.0 ^ extent.bytes ^ gpa);
        });
        black_box(sum);
        elapsed
    }

    fn read(&mut self) -> u64 {
        let start = Instant::now();
        let mut sum = 0_u64;
        for table in &self.tables {
            for word in &mut self.words[*table..table + TABLE] {
                sum = sum.wrapping_add(*word.get_mut());
            }
        }
        black_box(sum);
        start.elapsed().as_nanos() as u64
    }
}

/// Nanoseconds of writing down as many extents as there are.
fn write(kept: &mut Vec<Extent>) -> u64 {
    let Some(mut extent) = kept.first().copied() else { return 0 };
    let count = kept.len() as u64;
    kept.clear();
    let start = Instant::now();
    for number in 0..count {
        extent.start.0 = number;
        kept.push(extent);
    }
    let elapsed = start.elapsed();
    black_box(kept);
    elapsed.as_nanos() as u64
}

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Amd, maxphyaddr: 52, gib_pages: true, encryption_bit: None };

struct Row {
    case: String,
    bytes: u64,
    extents: usize,
    kept: u64,
    added_up: u64,
    read: u64,
    written: u64,
}

fn measure(case: &str, mut guest: Guest, map: &Map, rounds: usize) -> Row {
    let mut kept = Vec::new();
    // Pages of memory are there before the clock runs.
    guest.kept(map, &mut kept);
    let mut sides: [Vec<u64>; 4] = Default::default();
    for _ in 0..rounds {
        sides[0].push(guest.kept(map, &mut kept));
        sides[1].push(guest.read());
        sides[2].push(write(&mut kept));
        sides[3].push(guest.added_up(map));
    }
    let [ours, read, written, added_up] = sides.map(|mut side| {
        side.sort_unstable();
        side[rounds / 2]
    });
    let bytes = guest.tables.len() as u64 * 4096;
    assert!(guest.leaves > 0);
    let row = Row { case: case.to_owned(), bytes, extents: kept.len(), kept: ours, added_up, read, written };
    println!(
        "{case}: {:.2} GB/s, plain {:.2} GB/s, {} extents",
        row.bytes as f64 / row.kept as f64,
        row.bytes as f64 / row.read as f64,
        row.extents
    );
    row
}

fn main() {
    let short = is_test();
    let (rounds, leaves, more) = if short { (1, 1 << 12, 1 << 13) } else { (ROUNDS, 4 << 20, 32 << 20) };
    let mut rows = Vec::new();
    let mut one = |case: &str, guest: Guest, filter: Filter| {
        let map = guest.map().filtered(filter);
        rows.push(measure(case, guest, &map, rounds));
    };
    one("dense, 4 M leaves", Guest::new(leaves, Leaves::InOrder, false), Filter::ALL);
    one("dense, 4 M leaves, A and D at random", Guest::new(leaves, Leaves::Used, false), Filter::ALL);
    one("dense, 4 M leaves, scattered tables", Guest::new(leaves, Leaves::InOrder, true), Filter::ALL);
    one("dense, 32 M leaves", Guest::new(more, Leaves::InOrder, false), Filter::ALL);
    one("dense, 32 M leaves, scattered tables", Guest::new(more, Leaves::InOrder, true), Filter::ALL);
    one("sparse, one leaf in 64", Guest::new(more, Leaves::Sparse, false), Filter::ALL);
    one("frames in runs of 64", Guest::new(leaves, Leaves::Runs(64), false), Filter::ALL);
    one("frames in runs of 8", Guest::new(leaves, Leaves::Runs(8), false), Filter::ALL);
    one("scattered frames", Guest::new(leaves, Leaves::Runs(1), false), Filter::ALL);
    let gpas = (Gpa(0x1234_5000), Gpa(0x1234_5fff));
    one(
        "scattered frames, looking for one",
        Guest::new(leaves, Leaves::Runs(1), false),
        Filter { gpas, ..Filter::ALL },
    );
    for (case, level) in
        [("nested, 4 M leaves over 2 MiB pages", 2), ("nested, 4 M leaves over 4 KiB pages", 1)]
    {
        let (guest, map) = Guest::nested(leaves, level);
        rows.push(measure(case, guest, &map, rounds));
    }

    let mut table = String::from(
        "| case | tables | extents | map, GB/s | plain reading, GB/s | share of it | share of reading and writing down | map, ns an entry | extents added up |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let mut lines = String::new();
    for row in &rows {
        let entries = row.bytes as f64 / 8.0;
        let an_entry = |side: u64| side as f64 / entries;
        let [ours, added_up, peer] = [row.kept, row.added_up, row.read].map(an_entry);
        writeln!(
            table,
            "| {} | {} MiB | {} | {:.2} | {:.2} | {:.2} | {:.2} | {ours:.3} | {added_up:.3} |",
            row.case,
            row.bytes >> 20,
            row.extents,
            8.0 / ours,
            8.0 / peer,
            peer / ours,
            an_entry(row.read + row.written) / ours,
        )
        .unwrap();
        writeln!(
            lines,
            "{{\"bench\":\"map\",\"case\":\"{}\",\"ours_ns\":{ours:.4},\"peer\":\"plain reading of the page tables\",\"peer_ns\":{peer:.4},\"ratio\":{:.4}}}",
            row.case,
            ours / peer
        )
        .unwrap();
    }
    println!("\n{table}");
    if !short {
        keep("map", "MAP.md", &format!("{}\n{table}", heading()), &lines);
    }
}

fn heading() -> String {
    format!(
        "# Maps\n\nWritten by `cargo bench -p pagewalk --bench map`; `benches/map.rs` says what is compared. Medians of {ROUNDS} interleaved\n\
         rounds, on one thread. What is counted are the tables that hold leaves, of both dimensions.\n\n\
         - the map uses {:?}\n- load average meanwhile: {} (a bench wants the machine alone)\n{}",
        Instructions::best(),
        fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or("?"),
        surroundings(&[]),
    )
}
