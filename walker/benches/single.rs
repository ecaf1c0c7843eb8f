//! What one walk costs, next to `x86_64`'s `OffsetPageTable::translate` and to the ioctl `KVM_TRANSLATE`.
//!
//! Both sides walk the same tables and make their complete answer, which is consumed by reference. *Chained*: each address
//! comes out of the answer before, so that the time is a latency. *Loop*: addresses come from a list. Criterion drives the
//! measurement; within it the two sides take turns of a fraction of a millisecond, and the table holds the medians of
//! these rounds: what disturbs the machine disturbs both, or falls out.
//!
//! The peer checks less: presence and page size only, where the walker checks canonicality, reserved bits, rights,
//! protection keys and what backs the page. It has no 5-level and no nested walk; those rows are compared with the walker's
//! own hot walk.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[path = "../tests/bed/mod.rs"]
mod bed;

use std::env::{args, consts};
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use bed::{
    CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE, Machine,
    Maker, PAGE, PAGE_SIZE, Ram, USER, long_mode,
};
use criterion::{Criterion, SamplingMode};
use pagewalk::{
    Access, AccessKind, ControlRegisters, CpuProfile, Gva, NgpaWalk, PageWalk, Privilege, Vendor, Walker,
    Window,
};
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::TranslateResult;
use x86_64::structures::paging::{OffsetPageTable, PageTable, Translate};

const PEER: &str = "x86_64 OffsetPageTable";
const OWN: &str = "pagewalk hot walk";
const IOCTL: &str = "KVM_TRANSLATE";
/// Present, writable, accessed, dirty.
const PLAIN: u64 = 0x63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const HOT_PAGES: u64 = 512;
/// Walks a round: long enough for the clock, and short enough that the scheduler rarely falls into it.
const ROUND: u64 = 10_000;
const ROUND_OF_MISSES: u64 = 1_000;
const ROUND_OF_IOCTLS: u64 = 50;
const MINIMUM_ROUNDS: usize = 31;

/// Page tables in the making; each new table takes the next free page of memory.
struct Tables {
    ram: Ram,
    free: u64,
    plain: u64,
}

impl Tables {
    fn new(ram: Ram) -> Self {
        Self { ram, free: PAGE, plain: PLAIN }
    }

    fn page(&mut self) -> u64 {
        self.free += PAGE;
        self.free - PAGE
    }

    /// The table behind the entry at `gpa`, made if there is none.
    fn below(&mut self, gpa: u64) -> u64 {
        if self.ram.read(gpa) == 0 {
            let entry = self.page() | self.plain;
            self.ram.write(gpa, entry);
        }
        self.ram.read(gpa) & FRAME
    }

    /// Maps `gva` by `entry`, of `level`.
    fn map(&mut self, root: u64, levels: u32, gva: u64, level: u32, entry: u64) {
        let at = |level: u32| (gva >> shift(level) & 511) * 8;
        let table = (level + 1..=levels).rev().fold(root, |table, above| self.below(table + at(above)));
        self.ram.write(table + at(level), entry);
    }
}

const fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

fn registers(root: u64, levels: u32) -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root,
        cr4: CR4_PAE | CR4_SMEP | CR4_SMAP | if levels == 5 { CR4_LA57 } else { 0 },
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    }
}

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };

/// A guest whose pages form one cycle: the translation of each is the address of the next, but for `base`.
struct Guest {
    ram: Ram,
    root: u64,
    walker: Walker,
    base: u64,
    /// Addresses in the order of the cycle, or a sample of them; a power of two. The peer starts in the middle, so that
    /// neither side finds in the cache what the other has just brought.
    gvas: Vec<u64>,
}

impl Guest {
    /// Pages of `level` at `base`, visited in `order`.
    fn new(ram: Ram, levels: u32, level: u32, flags: u64, order: &[u64]) -> Self {
        let base = if levels == 5 { 0xff00_0000_0000_0000 } else { 0xffff_8000_0000_0000 };
        let mut tables = Tables::new(ram);
        let root = tables.page();
        for (from, to) in order.iter().zip(order.iter().cycle().skip(1)) {
            tables.map(root, levels, base + (from << shift(level)), level, to << shift(level) | flags);
        }
        let every = (order.len() >> 20).max(1);
        let gvas = order.iter().step_by(every).map(|page| base + (page << shift(level))).collect();
        let walker = Walker::new(PageWalk::new(&registers(root, levels), &CPU).unwrap());
        Self { ram, root, walker, base, gvas }
    }

    /// All pages in one table.
    fn hot(ram: Ram, levels: u32, level: u32, flags: u64) -> Self {
        let mut order: Vec<u64> = (0..HOT_PAGES).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut order);
        Self::new(ram, levels, level, flags, &order)
    }

    /// As many pages as `bytes` of PTEs map.
    fn dense(bytes: u64) -> Self {
        let mut order: Vec<u64> = (0..bytes / 8).collect();
        fastrand::Rng::with_seed(2).shuffle(&mut order);
        Self::new(Ram::new(bytes + bytes / 256 + 16 * PAGE), 4, 1, PLAIN, &order)
    }

    /// The hot guest behind NPT that maps its memory one to one, by 4 KiB leaves.
    fn nested() -> Self {
        let hot = Self::hot(Ram::new(64 * PAGE), 4, 1, PLAIN);
        let mut tables = Tables { ram: hot.ram, free: 32 * PAGE, plain: PLAIN | USER };
        let root = tables.page();
        for gpa in (0..HOT_PAGES).map(|page| page * PAGE) {
            tables.map(root, 4, gpa, 1, gpa | PLAIN | USER);
        }
        let npt = NgpaWalk::npt(root, &registers(0, 4), &CPU).unwrap();
        Self { walker: Walker::nested(hot.walker.gva_walk().clone(), npt), ..hot }
    }

    fn answer(&self, gva: u64) -> Option<u64> {
        let answer = self.walker.translate(&Window::new(self.ram.words()), Gva(gva), &read());
        answer.ok().map(|page| page.gpa.0)
    }

    /// Each address out of the answer before.
    fn chained(&self) -> impl FnMut(u64) -> Duration {
        assert!(self.gvas.iter().all(|gva| self.answer(*gva).is_some()), "a page is not mapped");
        let access = black_box(read());
        let mut gva = self.gvas[0];
        move |times| {
            let memory = Window::new(self.ram.words());
            let start = Instant::now();
            for _ in 0..times {
                let answer = self.walker.translate(&memory, Gva(gva), &access);
                gva = self.base + answer.as_ref().map_or(0, |page| page.gpa.0);
                black_box(&answer);
            }
            start.elapsed()
        }
    }

    /// Independent walks.
    fn in_a_loop(&self) -> impl FnMut(u64) -> Duration {
        let access = black_box(read());
        let mut at = 0;
        move |times| {
            let memory = Window::new(self.ram.words());
            let start = Instant::now();
            for _ in 0..times {
                let answer =
                    self.walker.translate(&memory, Gva(self.gvas[at & (self.gvas.len() - 1)]), &access);
                black_box(&answer);
                at += 1;
            }
            start.elapsed()
        }
    }

    fn peer(&self) -> OffsetPageTable<'_> {
        let memory = self.ram.words().as_ptr();
        let root = memory.wrapping_add((self.root / 8) as usize).cast::<PageTable>().cast_mut();
        // SAFETY: the root is one page of the guest's memory, page-aligned, and never freed. Nobody writes while a bench
        // runs, and the peer is used to read only.
        #[allow(unsafe_code, reason = "the peer takes its tables by address")]
        let root = unsafe { &mut *root };
        // SAFETY: all tables lie in the guest's memory, which starts at this address.
        #[allow(unsafe_code, reason = "the peer takes its tables by address")]
        unsafe {
            OffsetPageTable::new(root, VirtAddr::from_ptr(memory))
        }
    }

    fn peer_chained(&self) -> impl FnMut(u64) -> Duration {
        let peer = self.peer();
        let mut gva = self.gvas[self.gvas.len() / 2];
        move |times| {
            let start = Instant::now();
            for _ in 0..times {
                let answer = peer.translate(VirtAddr::new_truncate(gva));
                gva = self.base
                    + match &answer {
                        TranslateResult::Mapped { frame, offset, .. } => {
                            frame.start_address().as_u64() + offset
                        }
                        _ => 0,
                    };
                black_box(&answer);
            }
            start.elapsed()
        }
    }

    fn peer_in_a_loop(&self) -> impl FnMut(u64) -> Duration {
        let peer = self.peer();
        for gva in &self.gvas {
            let theirs = peer.translate_addr(VirtAddr::new_truncate(*gva)).map(x86_64::PhysAddr::as_u64);
            assert_eq!(self.answer(*gva), theirs, "{gva:#x}");
        }
        let mut at = self.gvas.len() / 2;
        move |times| {
            let start = Instant::now();
            for _ in 0..times {
                let answer = peer.translate(VirtAddr::new_truncate(self.gvas[at & (self.gvas.len() - 1)]));
                black_box(&answer);
                at += 1;
            }
            start.elapsed()
        }
    }
}

fn read() -> Access {
    Access::new(AccessKind::Read, Privilege::Supervisor)
}

/// Two sides of one comparison, nanoseconds a walk, round by round.
struct Row {
    case: &'static str,
    peer: &'static str,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

struct Bench {
    criterion: Criterion,
    rows: Vec<Row>,
    asked: usize,
}

impl Bench {
    fn compare(
        &mut self,
        case: &'static str,
        peer: &'static str,
        round: u64,
        mut ours: impl FnMut(u64) -> Duration,
        mut theirs: impl FnMut(u64) -> Duration,
    ) {
        self.asked += 1;
        let mut row = Row { case, peer, ours: Vec::new(), theirs: Vec::new() };
        let mut group = self.criterion.benchmark_group("walk");
        group.sampling_mode(SamplingMode::Flat).sample_size(40).nresamples(2_000);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        group.bench_function(case, |bencher| {
            bencher.iter_custom(|times| {
                let mut total = Duration::ZERO;
                let mut left = times;
                while left > 0 {
                    let now = left.min(round);
                    let (our_time, their_time) = (ours(now), theirs(now));
                    if now == round {
                        row.ours.push(our_time.as_nanos() as f64 / round as f64);
                        row.theirs.push(their_time.as_nanos() as f64 / round as f64);
                    }
                    total += our_time;
                    left -= now;
                }
                total
            });
        });
        group.finish();
        if row.ours.len() >= MINIMUM_ROUNDS {
            self.rows.push(row);
        }
    }

    /// The table and the JSON lines.
    fn report(&self) -> (String, String) {
        let mut table =
            "| case | pagewalk, ns | next to | ns | ratio | rounds |\n|---|---:|---|---:|---:|---:|\n"
                .to_owned();
        let mut lines = String::new();
        for row in &self.rows {
            let (ours, theirs) = (median(&row.ours), median(&row.theirs));
            let (case, peer, ratio, rounds) = (row.case, row.peer, ours / theirs, row.ours.len());
            table += &format!("| {case} | {ours:.2} | {peer} | {theirs:.2} | {ratio:.3} | {rounds} |\n");
            lines += &format!(
                "{{\"bench\":\"walk\",\"case\":\"{case}\",\"ours_ns\":{ours:.3},\"peer\":\"{peer}\",\"peer_ns\":{theirs:.3},\"ratio\":{ratio:.4}}}\n"
            );
        }
        (table, lines)
    }
}

fn main() {
    // Cargo passes `--bench`; without it this is a test that each case runs.
    let short = !args().any(|argument| argument == "--bench") || args().any(|argument| argument == "--test");
    let mut bench = Bench {
        criterion: Criterion::default().configure_from_args().without_plots(),
        rows: Vec::new(),
        asked: 0,
    };
    let ram = || Ram::new(64 * PAGE);

    let hot = Guest::hot(ram(), 4, 1, PLAIN);
    bench.compare("hot-chained", PEER, ROUND, hot.chained(), hot.peer_chained());
    bench.compare("hot-loop", PEER, ROUND, hot.in_a_loop(), hot.peer_in_a_loop());
    let dense = Guest::dense(if short { 1 << 15 } else { 128 << 20 });
    bench.compare("dense-chained", PEER, ROUND_OF_MISSES, dense.chained(), dense.peer_chained());
    bench.compare("dense-loop", PEER, ROUND_OF_MISSES, dense.in_a_loop(), dense.peer_in_a_loop());
    let large = Guest::hot(ram(), 4, 2, PLAIN | PAGE_SIZE);
    bench.compare("2-MiB-leaf-chained", PEER, ROUND, large.chained(), large.peer_chained());
    bench.compare("2-MiB-leaf-loop", PEER, ROUND, large.in_a_loop(), large.peer_in_a_loop());
    // The peer calls an absent entry mapped unless it is zero; behind the one page directory entry all are.
    let gvas = hot.gvas.iter().map(|gva| gva + (1 << shift(2))).collect();
    let absent = Guest { gvas, ..Guest::hot(ram(), 4, 1, PLAIN) };
    bench.compare("absent-PDE-loop", PEER, ROUND, absent.in_a_loop(), absent.peer_in_a_loop());
    let five = Guest::hot(ram(), 5, 1, PLAIN);
    bench.compare("5-level-chained", OWN, ROUND, five.chained(), hot.chained());
    bench.compare("5-level-loop", OWN, ROUND, five.in_a_loop(), hot.in_a_loop());
    let nested = Guest::nested();
    bench.compare("nested-4x4-chained", OWN, ROUND, nested.chained(), hot.chained());
    bench.compare("nested-4x4-loop", OWN, ROUND, nested.in_a_loop(), hot.in_a_loop());
    match Ioctl::new() {
        Ok(kvm) => bench.compare(
            "hot-loop-next-to-KVM",
            IOCTL,
            ROUND_OF_IOCTLS,
            kvm.guest.in_a_loop(),
            kvm.in_a_loop(),
        ),
        Err(reason) => println!("\nSKIPPED kvm: {reason}"),
    }

    let (table, lines) = bench.report();
    println!("\n{table}");
    // A run of a few cases must not replace the record of all.
    if bench.rows.len() == bench.asked {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("pagewalk-bench");
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("walk.jsonl"), lines).unwrap();
        let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md");
        fs::write(results, format!("{}\n{table}", heading())).unwrap();
    }
}

/// A vCPU that walks the hot guest's tables.
struct Ioctl {
    guest: Guest,
    vcpu: bed::Vcpu,
}

impl Ioctl {
    fn new() -> Result<Self, String> {
        let machine = Machine::new(64 * PAGE)?;
        let guest = Guest::hot(machine.ram, 4, 1, PLAIN);
        let vcpu = machine.vcpu(0, Maker::Intel, machine.maxphyaddr()?)?;
        let mut sregs = vcpu.reset;
        long_mode(&mut sregs, guest.root);
        vcpu.fd.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))?;
        for gva in &guest.gvas {
            let kernel = vcpu.fd.translate_gva(*gva).map_err(|error| format!("KVM_TRANSLATE: {error}"))?;
            assert_eq!(Some(kernel.physical_address), guest.answer(*gva), "{gva:#x}");
        }
        Ok(Self { guest, vcpu })
    }

    fn in_a_loop(&self) -> impl FnMut(u64) -> Duration {
        let mut at = 0;
        move |times| {
            let start = Instant::now();
            for _ in 0..times {
                let gva = self.guest.gvas[at & (self.guest.gvas.len() - 1)];
                let _ = black_box(&self.vcpu.fd.translate_gva(gva));
                at += 1;
            }
            start.elapsed()
        }
    }
}

/// Where and with what the table was made.
fn heading() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("?", |(_, value)| value).to_owned()
    };
    let output = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        output.map_or("?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let lock =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock")).unwrap_or_default();
    let peer =
        lock.split_once("name = \"x86_64\"\nversion = \"").and_then(|(_, rest)| rest.split('"').next());
    format!(
        "# One walk\n\nWritten by `cargo bench -p pagewalk`; `benches/single.rs` says what is compared. Medians of interleaved rounds;\n\
         the ratio is the walker's time over the other's.\n\n\
         - machine: {} (family {}, model {}), {} cores, {}, {}\n- date: {}\n- {}; pagewalk {}, x86_64 {}\n",
        field("model name"),
        field("cpu family"),
        field("model\t"),
        available_parallelism().map_or(0, usize::from),
        consts::ARCH,
        consts::OS,
        output("date", "-u"),
        output("rustc", "--version"),
        env!("CARGO_PKG_VERSION"),
        peer.unwrap_or("?"),
    )
}
