//! Policy `Set` on memory that changes: what a lost compare-exchange leads to.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::{Cell, RefCell};

use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, CpuProfile, ExchangeError, Fault, FaultKind,
    Gpa, Gva, MAX_ATTEMPTS, Memory, NestedGpa, NestedPhase, NgpaWalk, NoTrace, PageWalk, Privilege, Reason,
    Translation, Vendor, Walker,
};

const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
/// The leaf of GVA 0.
const PTE: usize = 0x4000 / 8;

/// Something done to a word before the compare-exchange of that number.
type Event = Box<dyn Fn(&mut u64, usize)>;

/// Tables at 0x1000 to 0x4000, in which something happens just before a compare-exchange of the leaf.
struct Busy {
    words: RefCell<Vec<u64>>,
    happens: Event,
    loads: Cell<usize>,
    exchanges: Cell<usize>,
}

impl Busy {
    fn new(leaf: u64, happens: impl Fn(&mut u64, usize) + 'static) -> Busy {
        let mut words = vec![0; 0x5000 / 8];
        for table in 1..4 {
            words[table * 512] = (table as u64 + 1) << 12 | 7 | ACCESSED;
        }
        words[PTE] = leaf;
        let (loads, exchanges) = (Cell::new(0), Cell::new(0));
        Busy { words: RefCell::new(words), happens: Box::new(happens), loads, exchanges }
    }

    fn write(&self) -> Result<Translation, Fault> {
        let registers = ControlRegisters {
            cr0: 0x8000_0001,
            cr3: 0x1000,
            cr4: 0x20,
            efer: 0xd00,
            ..ControlRegisters::default()
        };
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
        let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
        let access = Access::new(AccessKind::Write, Privilege::User);
        walker.translate_with(self, Gva(0), &access, AdPolicy::Set, &mut NoTrace)
    }

    fn leaf(&self) -> u64 {
        self.words.borrow()[PTE]
    }
}

impl Memory for Busy {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        self.loads.set(self.loads.get() + 1);
        self.words.borrow().get(gpa.0 as usize / 8).copied()
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let mut words = self.words.borrow_mut();
        let word = &mut words[gpa.0 as usize / 8];
        (self.happens)(word, self.exchanges.get());
        self.exchanges.set(self.exchanges.get() + 1);
        if *word != current {
            return Err(ExchangeError::Changed(*word));
        }
        *word = new;
        Ok(())
    }

    fn backing(&self, _: Gpa) -> Backing {
        Backing::Ram
    }
}

#[test]
fn a_lost_exchange_walks_again() {
    let memory = Busy::new(0x1_0007, |leaf, number| {
        if number == 0 {
            *leaf = 0x2_0007;
        }
    });
    assert_eq!(memory.write().unwrap().gpa, Gpa(0x2_0000), "the answer is of the page whose bits were set");
    assert_eq!(memory.leaf(), 0x2_0007 | ACCESSED | DIRTY);
    assert_eq!(memory.loads.get(), 8, "two walks");
}

#[test]
fn what_the_new_entry_refuses_is_refused() {
    let memory = Busy::new(0x1_0007, |leaf, _| *leaf = 0x1_0005);
    let fault = memory.write().unwrap_err();
    assert_eq!((fault.kind, fault.reason), (FaultKind::PageFault { error_code: 7 }, Reason::ReadOnly));
    assert_eq!(memory.leaf(), 0x1_0005, "nothing is set for an access that is refused");
}

#[test]
fn bits_that_somebody_else_sets_are_no_change() {
    let memory = Busy::new(0x1_0007, |leaf, number| {
        if number == 0 {
            *leaf |= ACCESSED;
        }
    });
    assert_eq!(memory.write().unwrap().gpa, Gpa(0x1_0000));
    assert_eq!(memory.leaf(), 0x1_0007 | ACCESSED | DIRTY);
    assert_eq!(memory.loads.get(), 4, "one walk");
}

#[test]
fn an_entry_that_never_stands_still_is_contended() {
    let memory = Busy::new(0x1_0007, |leaf, _| *leaf ^= 1 << 9);
    let fault = memory.write().unwrap_err();
    assert_eq!((fault.kind, fault.reason, fault.level), (FaultKind::Contended, Reason::Changing, 1));
    assert_eq!(memory.loads.get(), 4 * MAX_ATTEMPTS);
    assert_eq!(memory.leaf() & (ACCESSED | DIRTY), 0);
}

/// NPT over the same tables.
#[test]
fn an_ngpa_that_never_stands_still_is_contended() {
    let host = ControlRegisters { cr0: 0x8000_0001, cr4: 0x20, efer: 0xd00, ..ControlRegisters::default() };
    let cpu = CpuProfile { vendor: Vendor::Amd, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
    let walk = NgpaWalk::npt(0x1000, &host, &cpu).unwrap();
    let write = |memory: &Busy| {
        let access = Access::new(AccessKind::Write, Privilege::User);
        let ngpa = NestedGpa(0x123);
        walk.translate_with(memory, ngpa, &access, NestedPhase::Final, AdPolicy::Set, &mut NoTrace)
    };
    let memory = Busy::new(0x1_0007, |leaf, _| *leaf ^= 1 << 9);
    let fault = write(&memory).unwrap_err();
    assert_eq!((fault.kind, fault.reason, fault.level), (FaultKind::Contended, Reason::Changing, 1));
    assert_eq!((fault.nested_gpa, fault.address), (Some(NestedGpa(0x123)), 0));
    assert_eq!(memory.loads.get(), 4 * MAX_ATTEMPTS);
    assert_eq!(memory.leaf() & (ACCESSED | DIRTY), 0);
    let calm = Busy::new(0x1_0007, |_, _| {});
    assert_eq!(write(&calm).unwrap().gpa, Gpa(0x1_0123));
    assert_eq!(calm.leaf(), 0x1_0007 | ACCESSED | DIRTY);
}
