//! A page that its guest maps elsewhere all the time, and what an answer about it may be.
//!
//! Two trees of tables, a PDPT, a PD and a PT each, take turns under one PML4E. The guest completes the tree that is not in use,
//! from the PTE up, points the PML4E at it, and then has each entry of the other tree lead astray, from the top down. So at every
//! moment the page is mapped to one frame; only a walk that reads some entries before and some after such a change ends at
//! a frame that it never had.
//!
//! Each mapping has a number, its generation, and a frame by that number. Frames astray have it as well, so that no PTE comes
//! to hold a value again before all numbers were used: whoever finds a PTE as it was knows that the guest has not been around
//! meanwhile. A guest of few numbers is one whose entries do come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use pagewalk::{CpuProfile, Gpa, Memory as _, Vendor};
use pagewalkd::machine::{
    Capabilities, GuestRam, Health, LocalSource, Machine, MemoryError, OpenError, Region,
};
use pagewalkd::vcpu::{PlainBackend, Registers, Vcpu};

/// The page, under the PML4's second entry.
pub(crate) const GVA: u64 = 1 << 39;
/// Numbers there are: bits 36:12 of a frame. Bits 39:37 say what it is, and above there may be none.
pub(crate) const GENERATIONS: u64 = 1 << 25;
/// The page's own frames.
pub(crate) const FRAME: u64 = 1 << 37;
/// Frames of a walk that was led astray, by the level of the entry that did.
pub(crate) const ASTRAY: [u64; 3] = [2 << 37, 3 << 37, 4 << 37];
const CLASS: u64 = 7 << 37;

/// Where the number of the mapping is, once it is in use.
const MAPPED: u64 = 0x20_0000;
const ASTRAY_PD: u64 = 0x20_1000;
const ASTRAY_PT3: u64 = 0x20_2000;
const ASTRAY_PT2: u64 = 0x20_3000;
const TREES: u64 = 0x21_0000;
const TREE_BYTES: u64 = 0x4000;
const MEMORY: u64 = 0x22_0000;
const PML4: u64 = 0x1000;
const PAGE: u64 = 0x1000;
const LINK: u64 = 3;

/// What a translated address says.
pub(crate) enum Found {
    /// The page's frame by the mapping of that number.
    Mapping(u64),
    /// A mix of two mappings: an entry of that level led astray.
    Mix(usize),
    /// No frame of this guest's.
    Nothing,
}

pub(crate) fn found(gpa: u64) -> Found {
    let number = (gpa & !CLASS) >> 12;
    match (gpa & CLASS, ASTRAY.iter().position(|astray| gpa & CLASS == *astray)) {
        _ if number >= GENERATIONS => Found::Nothing,
        (FRAME, _) => Found::Mapping(number),
        (_, Some(below)) => Found::Mix(below + 1),
        _ => Found::Nothing,
    }
}

/// The number of the mapping, as the guest tells: that in use, or the one before.
pub(crate) fn mapped(memory: &GuestRam) -> u64 {
    memory.load_u64(Gpa(MAPPED)).unwrap_or_default()
}

/// The guest as a thread that writes plain memory.
pub(crate) struct Remapping {
    pub(crate) machine: Machine,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), MemoryError>>>,
}

impl Remapping {
    /// A guest that uses so many numbers.
    pub(crate) fn start(generations: u64) -> Result<Self, OpenError> {
        let memory =
            Arc::new(GuestRam::allocate(&[Region { start: Gpa(0), size: MEMORY, read_only: false }])?);
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
        let registers =
            Registers { cr0: 1 << 31 | 1, cr3: PML4, cr4: 1 << 5, efer: 0x500, ..Registers::default() };
        let vcpu = Vcpu::spawn("remapping", 0, cpu, PlainBackend::new(registers, "a thread does it all"))?;
        let source = LocalSource {
            kind: "thread",
            description: "a thread that maps a page elsewhere all the time".into(),
            vcpus: vec![vcpu],
            memory: Arc::clone(&memory),
            capabilities: Capabilities {
                live: true,
                can_pause: false,
                can_step: false,
                can_set_registers: false,
                can_write_memory: false,
                ends_when_detached: true,
                real_nested: false,
                nested_reason: String::new(),
            },
            cpu,
            landmarks: Vec::new(),
            health: Health::default(),
        };
        let over = Arc::new(AtomicBool::new(false));
        memory.write_u64(Gpa(ASTRAY_PD), ASTRAY_PT3 | LINK)?;
        remap(&memory, 1, generations)?;
        let thread = std::thread::spawn({
            let over = Arc::clone(&over);
            move || {
                let mut generation = 1;
                while !over.load(Ordering::Relaxed) {
                    generation += 1;
                    remap(&memory, generation, generations)?;
                }
                Ok(())
            }
        });
        Ok(Self { machine: Machine::new("remapping", Arc::new(source)), over, thread: Some(thread) })
    }
}

impl Drop for Remapping {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(Ok(())))), "the guest ended early: {ended:?}");
    }
}

/// Maps the page anew. `guest.c` does the same.
fn remap(memory: &GuestRam, generation: u64, generations: u64) -> Result<(), MemoryError> {
    let number = ((generation % generations) << 12) | LINK;
    let tree = TREES + generation % 2 * TREE_BYTES;
    let last = TREES + (generation + 1) % 2 * TREE_BYTES;
    let put = |gpa, value| memory.write_u64(Gpa(gpa), value);
    put(tree + 2 * PAGE, FRAME | number)?;
    put(tree + PAGE, (tree + 2 * PAGE) | LINK)?;
    put(tree, (tree + PAGE) | LINK)?;
    put(PML4 + 8, tree | LINK)?;
    put(MAPPED, generation)?;
    put(ASTRAY_PT3, ASTRAY[2] | number)?;
    put(ASTRAY_PT2, ASTRAY[1] | number)?;
    put(last, ASTRAY_PD | LINK)?;
    put(last + PAGE, ASTRAY_PT2 | LINK)?;
    put(last + 2 * PAGE, ASTRAY[0] | number)
}
