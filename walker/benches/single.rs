//! What one walk costs, next to `x86_64`'s `OffsetPageTable::translate`, memflow's `virt_to_phys`, and the ioctl
//! `KVM_TRANSLATE`.
//!
//! All sides walk the same tables and make their complete answer, which is consumed by reference. *Chained*: each address
//! comes out of the answer before, so that the time is a latency. *Loop*: addresses come from a list. Criterion drives the
//! measurement; within it the two sides take turns of a fraction of a millisecond, and the table holds the medians of
//! these rounds: what disturbs the machine disturbs both, or falls out.
//!
//! *Hot*: 512 pages in one table. *Dense*: 2^24 pages, whose PTEs alone miss the caches. *Sparse*: 2^22 pages behind 2^20
//! tables, 4.5 GiB of them, so that PDE and PTE miss; all cold guests in huge pages.
//!
//! The peers check less: presence and page size only, where the walker checks canonicality, reserved bits, rights,
//! protection keys and what backs the page. They have no 5-level and no nested walk; those rows are compared with the
//! walker's own hot walk.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench that reports on standard output"
)]

mod support;

use support::bed::{PAGE, PAGE_SIZE, Ram};
use support::guest::{Guest, PLAIN, dense_bytes};
use support::kept::is_test;
use support::record::Bench;
use support::{kvm, memflow, offset_page_table};

const OWN: &str = "pagewalk hot walk";
/// Walks a round.
const HOT: u64 = 10_000;
const MISSES: u64 = 1_000;
const SLOW: u64 = 50;

fn main() {
    let mut bench = Bench::new("walk");
    let ram = || Ram::new(64 * PAGE);

    let hot = Guest::hot(ram(), 4, 1, PLAIN);
    beside_offset_page_table(&mut bench, "hot", HOT, &hot);
    beside_memflow(&mut bench, "hot", MISSES, &hot);
    let large = Guest::hot(ram(), 4, 2, PLAIN | PAGE_SIZE);
    beside_offset_page_table(&mut bench, "2-MiB-leaf", HOT, &large);
    // The peer calls an absent entry mapped unless it is zero; behind the one page directory entry all are.
    let absent = Guest::absent(ram());
    bench.compare(
        "absent-PDE-loop",
        offset_page_table::NAME,
        HOT,
        absent.in_a_loop(),
        offset_page_table::in_a_loop(&absent),
    );
    let five = Guest::hot(ram(), 5, 1, PLAIN);
    for (case, guest) in
        [("5-level", five), ("NPT-4x4", Guest::behind_npt(ram())), ("EPT-4x4", Guest::behind_ept(ram()))]
    {
        bench.compare(&format!("{case}-chained"), OWN, HOT, guest.chained(), hot.chained());
        bench.compare(&format!("{case}-loop"), OWN, HOT, guest.in_a_loop(), hot.in_a_loop());
    }

    let ptes = if is_test() { 1 << 15 } else { 128 << 20 };
    let dense = Guest::dense(ptes);
    beside_offset_page_table(&mut bench, "dense", MISSES, &dense);
    beside_memflow(&mut bench, "dense", MISSES, &dense);
    drop(dense);
    let sparse = Guest::sparse(if is_test() { 1 << 6 } else { 1 << 20 });
    beside_offset_page_table(&mut bench, "sparse", MISSES, &sparse);
    beside_memflow(&mut bench, "sparse", MISSES, &sparse);

    let hot = kvm::Ioctl::new(64 * PAGE, |ram| Guest::hot(ram, 4, 1, PLAIN));
    beside_kvm(&mut bench, "hot-loop", hot);
    let ptes = ptes / 8;
    let dense = kvm::Ioctl::new(dense_bytes(ptes), |ram| Guest::dense_in(ram, ptes));
    beside_kvm(&mut bench, "dense-16-MiB-loop", dense);

    let title = "# One walk\n\nWritten by `cargo bench -p pagewalk --bench single`, which says what is compared. Medians of interleaved\n\
                 rounds; the ratio is the walker's time over the other's.";
    bench.record("RESULTS.md", title, &["x86_64", "memflow"]);
}

fn beside_offset_page_table(bench: &mut Bench, case: &str, round: u64, guest: &Guest) {
    let peer = offset_page_table::NAME;
    bench.compare(
        &format!("{case}-chained"),
        peer,
        round,
        guest.chained(),
        offset_page_table::chained(guest),
    );
    bench.compare(
        &format!("{case}-loop"),
        peer,
        round,
        guest.in_a_loop(),
        offset_page_table::in_a_loop(guest),
    );
}

fn beside_memflow(bench: &mut Bench, case: &str, round: u64, guest: &Guest) {
    let peer = memflow::NAME;
    bench.compare(&format!("{case}-chained"), peer, round, guest.chained(), memflow::chained(guest));
    bench.compare(&format!("{case}-loop"), peer, round, guest.in_a_loop(), memflow::in_a_loop(guest));
}

fn beside_kvm(bench: &mut Bench, case: &str, machine: Result<kvm::Ioctl, String>) {
    match machine {
        Ok(kvm) => bench.compare(case, kvm::NAME, SLOW, kvm.guest.in_a_loop(), kvm.in_a_loop()),
        Err(reason) => println!("\nSKIPPED kvm: {reason}"),
    }
}
