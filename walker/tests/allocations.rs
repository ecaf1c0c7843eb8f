//! A million walks, single and nested, observing and setting, mapped and refused: not one allocation.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::AtomicU64;

use pagewalk::{
    Access, AccessKind, AdPolicy, ControlRegisters, CpuProfile, Gva, NgpaWalk, NoTrace, PageWalk, Privilege,
    Trace, Vendor, Walker, Window,
};

/// The system's allocator, counting what this thread asks of it.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is handed to the system's allocator as it came; counting touches nothing that allocates.
#[allow(unsafe_code, reason = "a global allocator has no safe form")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the ones that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` through `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn a_million_walks_allocate_nothing() {
    // GVA 0: a 4 KiB page; 2 MiB: a large one; 1 GiB and up: absent; PML4E 1: reserved bits; PML4E 2: no such table.
    let mut words: Vec<AtomicU64> = (0..8 * 512).map(|_| AtomicU64::new(0)).collect();
    for (gpa, entry) in [
        (0x1000, 0x2007),
        (0x1008, 0x2007 | 1 << 51),
        (0x1010, 0x100_0007),
        (0x2000, 0x3007),
        (0x3000, 0x4007),
        (0x3008, 0x20_0087),
        (0x4000, 0x5007),
        // NPT: 1 GiB onto itself.
        (0x6000, 0x7007),
        (0x7000, 0x87),
    ] {
        words[gpa / 8] = AtomicU64::new(entry);
    }
    let memory = Window::new(&words);
    let registers = ControlRegisters {
        cr0: 0x8001_0001,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0xd00,
        ..ControlRegisters::default()
    };
    let cpu = CpuProfile { vendor: Vendor::Amd, maxphyaddr: 48, gib_pages: true, encryption_bit: None };

    let before = allocations();
    let gva_walk = PageWalk::new(&registers, &cpu).unwrap();
    let walkers = [
        Walker::new(gva_walk.clone()),
        Walker::nested(gva_walk, NgpaWalk::npt(0x6000, &registers, &cpu).unwrap()),
    ];
    let mut trace = Trace::new();
    let (mut mapped, mut refused) = (0_u32, 0_u32);
    for number in 0..1_000_000_u64 {
        let gva = Gva([0x123, 0x20_0456, 1 << 30, 1 << 39, 2 << 39, 1 << 47][number as usize % 6]);
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][number as usize / 6 % 3];
        let privilege = [Privilege::User, Privilege::Supervisor][number as usize / 18 % 2];
        let policy = [AdPolicy::Observe, AdPolicy::Set][number as usize / 36 % 2];
        let walker = &walkers[number as usize / 72 % 2];
        let access = Access::new(kind, privilege);
        let outcome = match number / 144 % 2 {
            0 => walker.translate_with(&memory, gva, &access, policy, &mut trace),
            _ => walker.translate_with(&memory, gva, &access, policy, &mut NoTrace),
        };
        match black_box(outcome) {
            Ok(_) => mapped += 1,
            Err(_) => refused += 1,
        }
    }
    let gvas: [u64; 300] = std::array::from_fn(|at| [0x123, 0x20_0456, 1 << 30, 1 << 39, 1 << 47][at % 5]);
    let (mut pages, mut faults) = ([0; 300], 0_u32);
    for number in 0..1_000 {
        let access = Access::new([AccessKind::Read, AccessKind::Write][number % 2], Privilege::User);
        walkers[number / 2 % 2].translate_batch(&memory, &access, &gvas, &mut pages, &mut |_, _| faults += 1);
        black_box(&pages);
    }
    assert_eq!(faults, 1_000 * 300 / 5 * 3);
    let after = allocations();
    assert!(mapped > 300_000 && refused > 600_000, "{mapped} mapped, {refused} refused");
    assert_eq!(after - before, 0);

    // The counter does count.
    drop(black_box(vec![0_u8; 100]));
    assert!(allocations() > after);
}
