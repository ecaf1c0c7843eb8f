//! What guests of others cost, next to our own: how long they take to attach, and what a translation by the latest snapshot takes.
//!
//! Our guests and QEMU's have the same page tables at the same addresses, and are walked by the same walker, in turns, a round
//! each. A guest's memory is in huge pages or in small ones, whoever's it is, and walks that miss the caches take as long as
//! that has it; QEMU's memory that is not shared is fetched through `/proc/PID/mem`. QEMU is that of the bed `qemu-linux`.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[path = "../bed/mod.rs"]
mod bed;
#[path = "../../tests/dump_file/mod.rs"]
#[allow(dead_code, reason = "each uses its part")]
mod dump_file;
mod guests;
mod opening;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bed::guest::{BATCH, BATCHES, Shape, read};
use bed::kept::is_test;
use bed::report::Report;
use guests::{Pages, Qemu, Shared, Tables, memory, own};
use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{Access, AccessKind, ControlRegisters, Gva, PageWalk, Privilege, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalkd::config::Config;
use pagewalkd::machine::{GuestRam, Machine, Machines};
use pagewalkd::serve::Server;
use tonic::transport::{Channel, Endpoint};

const ABOUT: &str = "Written by `cargo bench -p pagewalkd --bench sources`; `benches/sources/main.rs` says what is compared. \
The ratio is the median of those of the rounds, the first figure over the second.\nOne process for all but QEMU, on whatever processors there are.";

const CR0: u64 = CR0_PE | CR0_PG | CR0_WP;
/// Batches of a round, so that both sides of a ratio have about the same time.
const SOME: usize = 4;
/// Addresses of a round where memory is fetched.
const FETCHED: usize = 4096;
const EFER: u64 = EFER_LME | EFER_LMA | EFER_NXE;

fn main() {
    let short = is_test();
    let rounds = if short { 1 } else { 61 };
    let mut report = Report::new("sources", "Sources", ABOUT);
    opening::sparse_dump(&mut report, rounds);
    match script() {
        Ok(script) => {
            let tables = if short { &Tables::ALL[..1] } else { &Tables::ALL };
            with_qemu(&mut report, &script, tables, rounds, short);
        }
        Err(reason) => report.skip("guests of QEMU's", &reason),
    }
    report.finish(!short);
}

/// The bed's script, or why there is no bed.
fn script() -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/beds/qemu-linux.sh");
    let check = Command::new(&script).arg("check").output().map_err(|error| error.to_string())?;
    if check.status.success() {
        return Ok(script);
    }
    Err(String::from_utf8_lossy(&check.stderr).trim().to_owned())
}

/// A guest, and how it is called in the table.
struct Contestant {
    name: &'static str,
    machine: Machine,
    fetched: bool,
}

impl Contestant {
    /// What it is asked in that round.
    fn asked<'a>(&self, batches: &'a [Vec<u64>], round: usize) -> Vec<&'a [u64]> {
        if self.fetched {
            return vec![&batches[round % batches.len()][..FETCHED]];
        }
        (0..SOME).map(|at| batches[(round * SOME + at) % batches.len()].as_slice()).collect()
    }
}

fn with_qemu(report: &mut Report, script: &Path, tables: &[Tables], rounds: usize, short: bool) {
    let ours = [Pages::Huge, Pages::Small].map(memory);
    let (shared, private) = (Shared::new(Pages::Small).unwrap(), Shared::new(Pages::Small).unwrap());
    let huge = Shared::new(Pages::Huge);
    if huge.is_none() {
        report.skip("QEMU, shared, huge pages", "the host's pool has no 4 GiB in pages of 2 MiB");
    }
    let mut all: Vec<&GuestRam> = ours.iter().collect();
    all.extend([&shared, &private].into_iter().chain(&huge).map(|shared| &shared.memory));
    for tables in tables {
        assert_eq!(tables.shape.write(&all, tables.origin), tables.root());
    }
    let [ours_huge, ours_small] = ours;
    let shared = Qemu::start(script, shared, true);
    let private = Qemu::start(script, private, false);
    let huge = huge.map(|huge| Qemu::start(script, huge, true));
    opening::attach(report, "attach to QEMU, 4 GiB, shared", &shared, rounds);
    opening::attach(report, "attach to QEMU, 4 GiB, not shared", &private, rounds);

    let contestant =
        |name, machine: Machine| Contestant { name, fetched: machine.source().memory().blocks(), machine };
    let mut contestants = vec![
        contestant("own, huge pages", own("own-huge", ours_huge)),
        contestant("own, 4 KiB pages", own("own-small", ours_small)),
        contestant("QEMU, shared, 4 KiB pages", shared.attach("shared")),
        contestant("QEMU, not shared", private.attach("private")),
    ];
    contestants.extend(huge.iter().map(|qemu| contestant("QEMU, shared, huge pages", qemu.attach("huge"))));
    for contestant in &contestants {
        println!("{}: {}", contestant.name, contestant.machine.source().description());
    }
    for tables in tables {
        walks(report, &contestants, *tables, rounds);
    }

    // Above 4 GiB is the business of walks.
    over_the_wire(report, &contestants, &tables[..tables.len().min(3)], rounds, short);
}

/// What the table compares, by the names of contestants: the same pages, then what is there without asking for any.
const PAIRS: [(&str, &str); 4] = [
    ("QEMU, shared, huge pages", "own, huge pages"),
    ("QEMU, shared, 4 KiB pages", "own, 4 KiB pages"),
    ("QEMU, shared, 4 KiB pages", "own, huge pages"),
    ("QEMU, not shared", "QEMU, shared, 4 KiB pages"),
];

fn tell(report: &mut Report, what: &str, unit: &'static str, contestants: &[Contestant], times: &[Vec<f64>]) {
    let of =
        |name| contestants.iter().position(|contestant| contestant.name == name).map(|at| times[at].clone());
    for (ours, theirs) in PAIRS {
        if let (Some(ours_times), Some(theirs_times)) = (of(ours), of(theirs)) {
            report.add(format!("{what}: {ours}"), unit, ours_times, theirs, theirs_times);
        }
    }
}

fn walker(tables: Tables, machine: &Machine) -> Walker {
    let registers = ControlRegisters {
        cr0: CR0,
        cr3: tables.root(),
        cr4: CR4_PAE,
        efer: EFER,
        ..ControlRegisters::default()
    };
    Walker::new(PageWalk::new(&registers, &machine.source().cpu()).unwrap())
}

/// In process: one by one, and in batches.
fn walks(report: &mut Report, contestants: &[Contestant], tables: Tables, rounds: usize) {
    let batches: Vec<Vec<u64>> = (0..BATCHES).map(|at| tables.shape.batch(at)).collect();
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let mut single = vec![Vec::new(); contestants.len()];
    let mut batch = vec![Vec::new(); contestants.len()];
    let mut words = vec![0; BATCH];
    // One round more: the first one finds memory that nobody has touched.
    for round in 0..=rounds {
        for (at, contestant) in contestants.iter().enumerate() {
            let walker = walker(tables, &contestant.machine);
            let memory = contestant.machine.source().memory();
            let batches = contestant.asked(&batches, round);
            let addresses = batches.iter().map(|gvas| gvas.len()).sum::<usize>() as f64;
            let mut together = || {
                let start = Instant::now();
                for gvas in &batches {
                    let words = &mut words[..gvas.len()];
                    walker.translate_batch(memory.as_ref(), &access, gvas, words, &mut |at, fault| {
                        panic!("{at}: {fault:?}");
                    });
                    std::hint::black_box(words);
                }
                nanos(start.elapsed()) / addresses
            };
            if !contestant.fetched {
                // Whoever came before has left something else in the caches.
                together();
            }
            let in_a_batch = together();
            let start = Instant::now();
            for gva in batches.iter().copied().flatten() {
                let found = walker.translate(memory.as_ref(), Gva(*gva), &access);
                assert!(std::hint::black_box(found).is_ok());
            }
            let one_by_one = nanos(start.elapsed()) / addresses;
            if round > 0 {
                single[at].push(one_by_one);
                batch[at].push(in_a_batch);
            }
        }
    }
    tell(report, &format!("one by one, {}", tables.name), "ns an address", contestants, &single);
    tell(report, &format!("in a batch, {}", tables.name), "ns an address", contestants, &batch);
}

/// The same from a client, over a Unix socket.
fn over_the_wire(
    report: &mut Report,
    contestants: &[Contestant],
    tables: &[Tables],
    rounds: usize,
    short: bool,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let machines = contestants.iter().map(|contestant| contestant.machine.clone());
    let config = Config { uds: Some(folder.path().join("socket")), ..Config::on_loopback() };
    let calls = if short { 16 } else { 256 };
    runtime.block_on(async {
        let server = Server::bind(&config, Machines::new(machines).unwrap()).await.unwrap();
        tokio::spawn(server.run(std::future::pending()));
        let socket = format!("unix:{}", folder.path().join("socket").display());
        let channel = Endpoint::from_shared(socket).unwrap().connect().await.unwrap();
        let mut client = TranslationServiceClient::new(channel).max_decoding_message_size(16 << 20);
        for tables in tables {
            let columns: Vec<Vec<u64>> = (0..BATCHES).map(|at| tables.shape.batch(at)).collect();
            let mut single = vec![Vec::new(); contestants.len()];
            let mut batch = vec![Vec::new(); contestants.len()];
            for round in 0..=rounds {
                for (at, contestant) in contestants.iter().enumerate() {
                    let mut batches = together(&mut client, contestant, &columns, *tables, round).await;
                    if !contestant.fetched {
                        // As in process: the first one was to warm up.
                        batches = together(&mut client, contestant, &columns, *tables, round).await;
                    }
                    let singles = match tables.shape {
                        Shape::Hot => singles(&mut client, contestant, *tables, calls).await,
                        // A walk is nothing next to a call, wherever it leads.
                        _ => 0.0,
                    };
                    if round > 0 {
                        single[at].push(singles);
                        batch[at].push(batches);
                    }
                }
            }
            let case = |rpc: &str| format!("{rpc}, Unix, {}", tables.name);
            if tables.shape == Shape::Hot {
                tell(report, &case("Translate"), "ns a call", contestants, &single);
            }
            tell(report, &case("BatchTranslate"), "ns an address", contestants, &batch);
        }
    });
}

fn vcpu(contestant: &Contestant) -> Option<v1::VcpuRef> {
    Some(v1::VcpuRef { machine: contestant.machine.id().to_owned(), vcpu: 0 })
}

/// QEMU's vCPU stands where it was powered on, without paging.
fn paging(tables: Tables) -> Option<v1::WalkerOverride> {
    Some(v1::WalkerOverride {
        cr0: Some(CR0),
        cr3: Some(tables.root()),
        cr4: Some(CR4_PAE),
        efer: Some(EFER),
        ..Default::default()
    })
}

async fn singles(
    client: &mut TranslationServiceClient<Channel>,
    contestant: &Contestant,
    tables: Tables,
    calls: usize,
) -> f64 {
    let requests: Vec<_> = (0..calls)
        .map(|at| v1::TranslateRequest {
            vcpu: vcpu(contestant),
            access: read(),
            r#override: paging(tables),
            ..tables.shape.single(at)
        })
        .collect();
    let start = Instant::now();
    for request in requests {
        client.translate(request).await.unwrap();
    }
    nanos(start.elapsed()) / calls as f64
}

async fn together(
    client: &mut TranslationServiceClient<Channel>,
    contestant: &Contestant,
    columns: &[Vec<u64>],
    tables: Tables,
    round: usize,
) -> f64 {
    let request = |gvas: &[u64]| v1::BatchTranslateRequest {
        head: v1::BatchTranslateRequestHead {
            vcpu: vcpu(contestant),
            access: read(),
            r#override: paging(tables),
            ..Default::default()
        },
        column: gvas.iter().copied().collect(),
    };
    let asked = contestant.asked(columns, round);
    let requests: Vec<_> = asked.iter().map(|gvas| request(gvas)).collect();
    let start = Instant::now();
    for (request, gvas) in requests.into_iter().zip(&asked) {
        let answer = client.batch_translate(request).await.unwrap().into_inner();
        assert_eq!((answer.column.len(), answer.head.fault_count), (Some(gvas.len()), 0));
    }
    nanos(start.elapsed()) / asked.iter().map(|gvas| gvas.len()).sum::<usize>() as f64
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}
