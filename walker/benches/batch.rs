//! What an address costs in a batch, next to `x86_64` in a loop, to memflow's batches, to our own single walks in a loop, and
//! to a lower bound: the cache lines of PDEs and PTEs touched, by prefetch, where somebody knows their addresses already.
//!
//! All contestants of a case take turns in one run, each over addresses of its own, so that what disturbs the machine disturbs
//! all; the table holds medians of the rounds, of times and of ratios. Addresses come in calls of 4096 into columns that are
//! used again. Each contestant's answers are checked against the single walk's first.
//!
//! *Hot*: 512 pages in one table. *Near*: 2^14 pages in 32 tables. *Dense*: 2^24 pages, whose PTEs (128 MiB) miss the caches.
//! *Sparse*: 2^22 pages behind 2^20 tables, 4.6 GiB, so that PDE and PTE miss. *Mixed*: as dense, a third of it 2 MiB and 1 GiB pages,
//! and one in twenty addresses absent. *Nested*: a dense guest of 2^20 pages behind NPT, by 4 KiB leaves in both dimensions.
//! Memory is in huge pages where the host has transparent ones, and pages map memory that the guest has.
//!
//! `x86_64` and memflow check presence and page size alone.
//!
//! `cargo bench -p pagewalk --bench batch -- CASE...` takes these cases alone, and their rows of the record are replaced.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

#[path = "batch/guests.rs"]
mod guests;
#[path = "batch/memflow.rs"]
mod memflow;
#[path = "batch/peers.rs"]
mod peers;
#[path = "batch/record.rs"]
mod record;
mod support;

use std::env::args;
use std::hint::black_box;
use std::time::Instant;

use guests::{Guest, read};
use pagewalk::{Gva, Instructions, PageWord, Window};
use record::{Rows, record};
use support::kept::is_test;

/// Addresses of one call, and of one contestant's turn.
const CALL: usize = 4096;
const TURN: usize = 16 * CALL;
const ROUNDS: usize = 41;

type Walks<'a> = Box<dyn FnMut(&[u64]) + 'a>;
type Contestant<'a> = (&'static str, Walks<'a>);

fn batch(guest: &Guest, instructions: Instructions, call: usize) -> impl FnMut(&[u64]) {
    let access = black_box(read());
    let mut words = vec![0; call];
    move |gvas| {
        let memory = Window::new(guest.words);
        for gvas in gvas.chunks(call) {
            let mut faults = 0_u32;
            let mut fault = |_, fault| {
                black_box(&fault);
                faults += 1;
            };
            guest.walker.translate_batch_by(instructions, &memory, &access, gvas, &mut words, &mut fault);
            black_box((&words, faults));
        }
    }
}

fn single(guest: &Guest) -> impl FnMut(&[u64]) {
    let access = black_box(read());
    move |gvas| {
        let memory = Window::new(guest.words);
        for gva in gvas {
            black_box(&guest.walker.translate(&memory, Gva(*gva), &access));
        }
    }
}

/// Batches answer what single walks do.
fn check(guest: &Guest) {
    let memory = Window::new(guest.words);
    for gvas in guest.gvas.chunks(CALL).take(8) {
        let (mut words, mut faults) = (vec![0; gvas.len()], 0);
        guest.walker.translate_batch(&memory, &read(), gvas, &mut words, &mut |_, _| faults += 1);
        for (gva, word) in gvas.iter().zip(words) {
            match guest.walker.translate(&memory, Gva(*gva), &read()) {
                Ok(page) => assert_eq!(PageWord::from_bits(word), PageWord::of(&page)),
                Err(_) => faults -= 1,
            }
        }
        assert_eq!(faults, 0);
    }
}

/// Lets all take turns, each over other addresses.
fn rounds(guest: &Guest, mut contestants: Vec<Contestant<'_>>, rows: &mut Rows, case: &str, short: bool) {
    let mut times = vec![Vec::new(); contestants.len()];
    let turns = guest.gvas.len() / TURN;
    let mut at = 0;
    for round in 0..if short { 1 } else { ROUNDS + 1 } {
        for ((_, contestant), times) in contestants.iter_mut().zip(&mut times) {
            at += 5;
            let start = at % turns * TURN;
            let gvas = &guest.gvas[start..start + TURN];
            // Whoever asks has just made the column, whatever the one before has driven out of the caches.
            black_box(gvas.iter().fold(0, |all, gva| all ^ gva));
            let begin = Instant::now();
            contestant(gvas);
            let time = begin.elapsed().as_nanos() as f64 / TURN as f64;
            if round > 0 || short {
                times.push(time);
            }
        }
    }
    let names = contestants.iter().map(|(name, _)| *name);
    rows.add(case, &names.collect::<Vec<_>>(), &times);
}

fn one_dimension<'a>(guest: &'a Guest, peers: bool) -> Vec<Contestant<'a>> {
    let mut contestants: Vec<Contestant<'a>> = vec![
        ("batch", Box::new(batch(guest, Instructions::best(), CALL))),
        ("batch, portable", Box::new(batch(guest, Instructions::Portable, CALL))),
        ("single walks", Box::new(single(guest))),
    ];
    if peers {
        contestants.push(("x86_64", Box::new(peers::x86_64(guest))));
        contestants.push((memflow::LIST, Box::new(memflow::list(guest))));
        contestants.push((memflow::ITER, Box::new(memflow::iter(guest))));
    }
    contestants
}

fn main() {
    let arguments: Vec<String> = args().skip(1).filter(|argument| argument != "--bench").collect();
    let short = is_test();
    let wanted = |case: &str| {
        let mut cases = arguments.iter().filter(|argument| !argument.starts_with("--")).peekable();
        cases.peek().is_none() || cases.any(|wanted| wanted == case)
    };
    let scale = |size: u64| if short { size >> 8 } else { size };
    let mut rows = Rows::new(short);

    if wanted("hot") {
        let guest = Guest::dense(512);
        check(&guest);
        rounds(&guest, one_dimension(&guest, true), &mut rows, "hot", short);
    }
    if wanted("near") {
        let guest = Guest::dense(1 << 14);
        check(&guest);
        rounds(&guest, one_dimension(&guest, true), &mut rows, "near", short);
    }
    if wanted("dense") || wanted("mixed") {
        let guest = Guest::dense(scale(1 << 24));
        if wanted("dense") {
            check(&guest);
            let floor = peers::floor(&guest);
            let mut contestants = one_dimension(&guest, true);
            contestants.push(("floor", Box::new(floor)));
            contestants.push(("batch, 16 a call", Box::new(batch(&guest, Instructions::best(), 16))));
            rounds(&guest, contestants, &mut rows, "dense", short);
        }
        if wanted("mixed") {
            let mixed = Guest::mixed(scale(1 << 24));
            check(&mixed);
            two_guests(&mixed, &guest, &mut rows, short);
        }
    }
    if wanted("sparse") {
        let guest = Guest::sparse(scale(1 << 20));
        check(&guest);
        let floor = peers::floor(&guest);
        let mut contestants = one_dimension(&guest, true);
        contestants.push(("floor", Box::new(floor)));
        rounds(&guest, contestants, &mut rows, "sparse", short);
    }
    if wanted("nested") {
        let guest = Guest::nested(scale(1 << 20));
        check(&guest);
        rounds(&guest, one_dimension(&guest, false), &mut rows, "nested", short);
    }
    record(&rows, short);
}

/// The same walks over another guest's tables.
fn two_guests(mixed: &Guest, plain: &Guest, rows: &mut Rows, short: bool) {
    let mut ours = batch(mixed, Instructions::best(), CALL);
    let mut theirs = batch(plain, Instructions::best(), CALL);
    // The contestants get the mixed guest's addresses, and mean pages of their own by them.
    let contestants: Vec<Contestant<'_>> = vec![
        ("batch", Box::new(move |gvas: &[u64]| ours(gvas))),
        ("all of 4 KiB", Box::new(move |gvas: &[u64]| theirs(gvas))),
        ("single walks", Box::new(single(mixed))),
    ];
    rounds(mixed, contestants, rows, "mixed", short);
}
