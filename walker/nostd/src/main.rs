//! Walks page tables without std, without an allocator and without a C library, and exits with 0 if every answer is
//! right, or else with the number of the first check that is not.
//!
//! `tests/no_std.rs` builds it, runs it, and looks for panics in what was linked.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::hint::black_box;
use core::ops::ControlFlow;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use pagewalk::map::{Map, Progress, Report};
use pagewalk::{
    Access, AccessKind, AdPolicy, ControlRegisters, CpuProfile, Dimension, Fault, FaultKind, Gpa, Gva,
    NgpaWalk, NoTrace, PageWalk, PageWord, Privilege, Reason, StateError, Trace, Translation, Vendor, Walker,
    Window,
};

// The kernel enters with the stack aligned to 16 bytes; a function expects it so before the call that entered it.
global_asm!(".global _start", "_start:", "xor ebp, ebp", "call {main}", "ud2", main = sym main);

// The compiler calls these for large values; there is no C library to bring them.
global_asm!(
    ".global memcpy",
    "memcpy: mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".global memset",
    "memset: mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
);

const WORDS: usize = 0x1_0000 / 8;
static MEMORY: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];

const REGISTERS: ControlRegisters = ControlRegisters {
    cr0: 0x8001_0001,
    cr3: 0x1000,
    cr4: 0x20 | 1 << 20 | 1 << 21 | 1 << 22,
    efer: 0xd00,
    pat: pagewalk::mode::PAT_RESET,
};
const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Amd, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;

fn put(gpa: usize, entry: u64) {
    if let Some(word) = MEMORY.get(gpa / 8) {
        word.store(entry, Ordering::Relaxed);
    }
}

fn get(gpa: usize) -> u64 {
    MEMORY.get(gpa / 8).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// Guest tables at 0x1000 to 0x4fff; NPT tables at 0x8000 to 0xbfff that map the first 2 MiB one to one, but for the page
/// at 0x6000.
fn lay_out() {
    put(0x1000, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x4007);
    put(0x4000, 0x5007);
    put(0x4008, 0x5001);
    put(0x4010, 0x6007);
    put(0x4018, 1 << 50 | 0x5007);
    put(0x4020, 0x7f_f007);
    put(0x3008, 0x20_0087);
    put(0x8000, 0x9007);
    put(0x9000, 0xa007);
    put(0xa000, 0xb007);
    for page in (0..512).filter(|page| *page != 6) {
        put(0xb000 + page * 8, (page << 12) as u64 | 7);
    }
}

fn access(kind: AccessKind, privilege: Privilege) -> Access {
    black_box(Access::new(kind, privilege))
}

fn error_code(outcome: Result<Translation, Fault>) -> Option<u32> {
    match outcome {
        Err(Fault { kind: FaultKind::PageFault { error_code }, .. }) => Some(error_code),
        _ => None,
    }
}

/// The number of the first wrong answer, or 0.
fn check() -> Result<u8, StateError> {
    lay_out();
    let memory = Window::new(&MEMORY);
    let gva_walk = PageWalk::new(black_box(&REGISTERS), &CPU)?;
    let walker = Walker::new(gva_walk.clone());
    let nested = Walker::nested(gva_walk, NgpaWalk::npt(0x8000, black_box(&REGISTERS), &CPU)?);
    let load = access(AccessKind::Read, Privilege::User);
    let store = access(AccessKind::Write, Privilege::User);
    let gpa = |outcome: Result<Translation, Fault>| outcome.ok().map(|page| page.gpa);

    let mut trace = Trace::new();
    let checks = [
        gpa(walker.translate(&memory, Gva(0x123), &load)) == Some(Gpa(0x5123)),
        gpa(walker.translate(&memory, Gva(0x20_1234), &load)) == Some(Gpa(0x20_1234)),
        error_code(walker.translate(&memory, Gva(0x5000), &load)) == Some(0b00100),
        error_code(walker.translate(&memory, Gva(0x3000), &load)) == Some(0b01101),
        error_code(walker.translate(&memory, Gva(0x1000), &store)) == Some(0b00111),
        walker.translate(&memory, Gva(1 << 63), &load).map_err(|fault| fault.kind)
            == Err(FaultKind::GeneralProtection),
        walker
            .translate(&memory, Gva(0), &access(AccessKind::Read, Privilege::Supervisor))
            .map_err(|fault| fault.reason)
            == Err(Reason::Smap),
        gpa(nested.translate(&memory, Gva(0x123), &load)) == Some(Gpa(0x5123)),
        nested.translate(&memory, Gva(0x2000), &load).map_err(|fault| (fault.dimension, fault.kind))
            == Err((Dimension::Nested, FaultKind::NestedPageFault { exit_info_1: 1 << 32 | 0b00100 })),
        get(0x4000) == 0x5007,
        gpa(walker.translate_with(&memory, Gva(0), &store, AdPolicy::Set, &mut NoTrace)) == Some(Gpa(0x5000)),
        get(0x4000) == 0x5007 | ACCESSED | DIRTY && get(0x3000) == 0x4007 | ACCESSED,
        gpa(nested.translate_with(&memory, Gva(0), &store, AdPolicy::Set, &mut trace)) == Some(Gpa(0x5000)),
        trace_is_whole(&trace) && get(0xb028) == 0x5007 | ACCESSED | DIRTY,
        gpa(walker.translate_with(&memory, Gva(0), &load, AdPolicy::Observe, &mut trace))
            == Some(Gpa(0x5000)),
        gpa(nested
            .translate_validated(&memory, Gva(0), &load, AdPolicy::Observe, &mut trace)
            .settled(Gva(0)))
            == Some(Gpa(0x5000)),
        batches_are_right(&walker, &memory, &load) && batches_are_right(&nested, &memory, &load),
        mapped(Map::new(walker)) == Some((0x20_4000, 0x1000)),
        mapped(Map::new(nested)) == Some((0x2000, 0x20_3000)),
    ];
    let wrong = checks.iter().position(|right| !right);
    Ok(wrong.map_or(0, |number| number as u8 + 1))
}

/// How much is mapped, and how much is present and leads nowhere.
fn mapped(map: Map) -> Option<(u64, u64)> {
    let mut map = black_box(map.reporting(Report::Problems));
    let (mut pages, mut problems) = (0, 0);
    let sink = |extent: pagewalk::map::Extent| {
        let bytes = if extent.outcome.is_ok() { &mut pages } else { &mut problems };
        *bytes += extent.bytes;
        ControlFlow::Continue(())
    };
    let progress = map.advance(&Window::new(&MEMORY), u64::MAX, sink);
    (progress == Progress::Done).then_some((pages, problems))
}

/// More than a block: pages of both sizes, and every ninth address a fault.
fn batches_are_right(walker: &Walker, memory: &Window<'_>, access: &Access) -> bool {
    let gvas: [u64; 100] = core::array::from_fn(|at| match at % 9 {
        8 => 1 << 63,
        _ => at as u64,
    });
    let (mut words, mut faults, mut ascending) = ([0; 100], 0, true);
    walker.translate_batch(memory, access, &gvas, &mut words, &mut |at, _| {
        ascending &= at % 9 == 8 && at / 9 == faults;
        faults += 1;
    });
    let right = |(gva, word): (&u64, &u64)| match *gva {
        gva if gva >> 63 == 1 => *word == 0,
        gva => PageWord::from_bits(*word).gpa(gva) == Some(Gpa(0x5000 + gva)),
    };
    ascending && faults == 11 && gvas.iter().zip(&words).all(right)
}

/// 4 x (4 + 1) + 4 entries.
fn trace_is_whole(trace: &Trace) -> bool {
    trace.steps().len() == 24
}

extern "C" fn main() -> ! {
    #[cfg(feature = "panicking")]
    if black_box(0) == 1 {
        panic!("never reached, but linked");
    }
    exit(check().unwrap_or(100))
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    panic_is_reachable()
}

/// Kept whole, so that it has a symbol if anything that panics was linked.
#[inline(never)]
fn panic_is_reachable() -> ! {
    exit(101)
}

fn exit(code: u8) -> ! {
    // SAFETY: the exit system call (60) takes one integer and does not return.
    unsafe { asm!("syscall", in("rax") 60, in("rdi") u64::from(code), options(noreturn, nostack)) }
}
