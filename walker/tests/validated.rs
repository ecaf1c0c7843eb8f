//! What validation is worth: a walk whose entries are read again, and found as they were, mixes no two mappings.
//!
//! A guest moves one page from table to table without pause. It fills the next table, points the PDE at it, and only then
//! gives the last one back, whose entry becomes a frame that the page never had. A walk that reads the PDE before and the PTE
//! after such a move meets that frame: it mixes two mappings. The tables take turns, so that an entry comes to hold a value again only
//! after 511 moves.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pagewalk::{
    Access, AccessKind, AdPolicy, ControlRegisters, CpuProfile, Gva, PageWalk, Privilege, Trace, Vendor,
    Walker, Window,
};

const WALKS: u64 = 10_000_000;
const TABLES: u64 = 512;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const FIRST_TABLE: u64 = 0x10_0000;
/// Frames that the page has had, by the number of the table that led there; and the one that it never had.
const FIRST_FRAME: u64 = 0x4000_0000;
const NEVER: u64 = 0x7fff_f000;
const PRESENT_WRITE: u64 = 3;
const BYTES: u64 = FIRST_TABLE + TABLES * 4096;

#[test]
fn no_validated_walk_mixes_two_mappings() {
    let words: Vec<AtomicU64> = (0..BYTES / 8).map(|_| AtomicU64::new(0)).collect();
    let store = |gpa: u64, value: u64| words[gpa as usize / 8].store(value, Ordering::Release);
    let table = |number: u64| FIRST_TABLE + number % TABLES * 4096;
    let frame = |number: u64| FIRST_FRAME + number % TABLES * 4096;
    store(PML4, PDPT | PRESENT_WRITE);
    store(PDPT, PD | PRESENT_WRITE);
    for number in 0..TABLES {
        store(table(number), NEVER | PRESENT_WRITE);
    }
    store(table(0), frame(0) | PRESENT_WRITE);
    store(PD, table(0) | PRESENT_WRITE);

    let control =
        ControlRegisters { cr0: 1 << 31 | 1, cr3: PML4, cr4: 1 << 5, efer: 0x500, ..Default::default() };
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
    let walker = Walker::new(PageWalk::new(&control, &cpu).unwrap());
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);

    let over = AtomicBool::new(false);
    let (mut torn, mut mixed, mut mixed_and_validated, mut seen) = (0u64, 0u64, 0u64, 0u64);
    let moves = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                store(table(number + 1), frame(number + 1) | PRESENT_WRITE);
                store(PD, table(number + 1) | PRESENT_WRITE);
                store(table(number), NEVER | PRESENT_WRITE);
                number += 1;
            }
            number
        });
        let memory = Window::new(&words);
        for _ in 0..WALKS {
            let mut trace = Trace::new();
            let page =
                walker.translate_with(&memory, Gva(0x123), &access, AdPolicy::Observe, &mut trace).unwrap();
            let current = trace.steps().iter().all(|step| step.is_current(&memory));
            let never = page.gpa.0 == NEVER + 0x123;
            torn += u64::from(!current);
            mixed += u64::from(never);
            mixed_and_validated += u64::from(never && current);
            // What is validated is one of the page's own mappings, by the table that led to it.
            let pde = trace.steps().iter().find(|step| step.level == 2).unwrap().entry & !0xfff;
            let own = frame((pde - FIRST_TABLE) / 4096) + 0x123;
            if current && page.gpa.0 != own {
                mixed_and_validated += 1;
            }
            seen += u64::from(current);
        }
        over.store(true, Ordering::Relaxed);
        guest.join().unwrap()
    });
    println!(
        "{WALKS} walks over {moves} moves: {torn} torn, {mixed} mixed, {mixed_and_validated} of them validated"
    );
    assert_eq!(mixed_and_validated, 0);
    // Else nothing was put to the test.
    assert!(
        moves > 100_000 && torn > 100 && mixed > 0 && seen > WALKS / 1000,
        "{moves} {torn} {mixed} {seen}"
    );
}
