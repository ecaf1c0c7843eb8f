//! Validated walks, on memory that changes between two loads of the test's choice.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::{Cell, RefCell};

use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, CpuProfile, ExchangeError, FaultKind, Gpa, Gva,
    MAX_ATTEMPTS, Memory, NestedGpa, NestedPhase, NgpaWalk, PageWalk, Privilege, Trace, Validated, Vendor,
    Walker,
};

/// Loads of a walk of four levels, and then as many again.
const LEVELS: usize = 4;
const DIRTY: u64 = 0x40;
const PRESENT: u64 = 3;
/// Where each level's entry lies in the one mapping, PML4E first; the other has its lower tables 16 pages above.
const ENTRIES: [u64; LEVELS] = [0x1000, 0x2000, 0x3000, 0x4000];
const OTHER: u64 = 0x1_0000;
const PAGE: u64 = 0x8_0000;
const OTHER_PAGE: u64 = 0x9_0000;
/// A frame that is never mapped: what the tables that are not in use lead to.
const NEVER: u64 = 0xa_0000;

/// Does something to the words before the load of that number.
type Event = Box<dyn Fn(&mut [u64], usize)>;

struct Changing {
    words: RefCell<Vec<u64>>,
    loads: Cell<usize>,
    happens: Event,
}

fn set(words: &mut [u64], gpa: u64, entry: u64) {
    words[gpa as usize / 8] = entry;
}

/// Has the root lead to the mapping whose tables lie at `this`, and those of the other one lead nowhere.
fn map(words: &mut [u64], this: u64, page: u64) {
    set(words, ENTRIES[3] + (OTHER - this), NEVER | PRESENT);
    set(words, ENTRIES[1] + this, (ENTRIES[2] + this) | PRESENT);
    set(words, ENTRIES[2] + this, (ENTRIES[3] + this) | PRESENT);
    set(words, ENTRIES[3] + this, page | PRESENT);
    set(words, ENTRIES[0], (ENTRIES[1] + this) | PRESENT);
}

impl Changing {
    fn new(happens: impl Fn(&mut [u64], usize) + 'static) -> Self {
        let mut words = vec![0; 0x2_0000 / 8];
        map(&mut words, OTHER, OTHER_PAGE);
        map(&mut words, 0, PAGE);
        Self { words: RefCell::new(words), loads: Cell::new(0), happens: Box::new(happens) }
    }

    fn walk(&self, policy: AdPolicy) -> Validated {
        let access = Access::new(AccessKind::Write, Privilege::Supervisor);
        walker().translate_validated(self, Gva(0x123), &access, policy, &mut Trace::new())
    }
}

impl Memory for Changing {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        let mut words = self.words.borrow_mut();
        (self.happens)(&mut words, self.loads.get());
        self.loads.set(self.loads.get() + 1);
        words.get(gpa.0 as usize / 8).copied()
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let mut words = self.words.borrow_mut();
        let word = &mut words[gpa.0 as usize / 8];
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

const REGISTERS: ControlRegisters =
    ControlRegisters { cr0: 1 << 31 | 1, cr3: ENTRIES[0], cr4: 0x20, efer: 0x500, pat: 0 };
const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Amd, maxphyaddr: 40, gib_pages: true, encryption_bit: None };

fn walker() -> Walker {
    Walker::new(PageWalk::new(&REGISTERS, &CPU).unwrap())
}

#[test]
fn what_stands_still_is_walked_once() {
    let memory = Changing::new(|_, _| {});
    let walked = memory.walk(AdPolicy::Observe);
    assert_eq!((walked.repeated, walked.torn), (0, None));
    assert_eq!(walked.settled(Gva(0x123)).unwrap().gpa, Gpa(PAGE | 0x123));
    assert_eq!(memory.loads.get(), 2 * LEVELS);
}

/// The guest maps the page elsewhere before the load of any number: the answer is what is mapped then.
#[test]
fn a_change_at_any_moment_is_seen() {
    for moment in 0..2 * LEVELS {
        let memory = Changing::new(move |words, load| {
            if load == moment {
                map(words, OTHER, OTHER_PAGE);
            }
        });
        let walked = memory.walk(AdPolicy::Observe);
        assert_eq!((walked.repeated, walked.torn), (u32::from(moment > 0), None), "{moment}");
        assert_eq!(walked.outcome.unwrap().gpa, Gpa(OTHER_PAGE | 0x123), "{moment}");
        // The same without a second look mixes the two.
        if (1..LEVELS).contains(&moment) {
            map(&mut memory.words.borrow_mut(), 0, PAGE);
            memory.loads.set(0);
            let access = Access::new(AccessKind::Read, Privilege::Supervisor);
            assert_eq!(walker().translate(&memory, Gva(0), &access).unwrap().gpa, Gpa(NEVER), "{moment}");
        }
    }
}

#[test]
fn what_never_stands_still_is_torn() {
    let memory =
        Changing::new(|words, load| set(words, ENTRIES[3], (PAGE + ((load as u64) << 12)) | PRESENT));
    let walked = memory.walk(AdPolicy::Observe);
    assert_eq!(walked.repeated as usize, MAX_ATTEMPTS - 1);
    let step = walked.torn.unwrap();
    let fault = walked.settled(Gva(0x123)).unwrap_err();
    assert_eq!((fault.kind, fault.address), (FaultKind::Contended, 0x123));
    assert_eq!((fault.level, fault.entry_gpa, fault.entry), (step.level, step.entry_gpa, step.entry));
    // By `Set` there is one walk only.
    let walked = memory.walk(AdPolicy::Set);
    assert_eq!((walked.repeated, walked.torn.is_some()), (0, true));
}

#[test]
fn accessed_and_dirty_bits_are_no_change() {
    let memory =
        Changing::new(|words, load| words[ENTRIES[3] as usize / 8] |= if load > 3 { DIRTY } else { 0 });
    assert_eq!(memory.walk(AdPolicy::Observe).torn, None);
    assert_eq!(memory.walk(AdPolicy::Set).torn, None);
    assert_eq!(memory.walk(AdPolicy::Observe).repeated, 0);
}

/// A fault is validated, too: the entry that refused is read again.
#[test]
fn a_fault_that_is_over_is_walked_again() {
    let memory = Changing::new(|words, load| {
        set(words, ENTRIES[2], if load < 3 { 0 } else { ENTRIES[3] | PRESENT });
    });
    let walked = memory.walk(AdPolicy::Observe);
    assert_eq!((walked.repeated, walked.torn), (1, None));
    assert_eq!(walked.outcome.unwrap().gpa, Gpa(PAGE | 0x123));
}

/// What values cannot tell: entries that change and change back between the two looks at them. The guest has the root lead to
/// the first mapping whenever it is read, and to the other one while all the rest is: the walk is a mix, and looks sound.
#[test]
fn entries_that_come_back_are_not_seen_to_have_changed() {
    let memory = Changing::new(|words, load| match load % LEVELS {
        0 => map(words, 0, PAGE),
        _ => map(words, OTHER, OTHER_PAGE),
    });
    let walked = memory.walk(AdPolicy::Observe);
    assert_eq!((walked.repeated, walked.torn), (0, None));
    assert_eq!(walked.outcome.unwrap().gpa, Gpa(NEVER | 0x123));
}

#[test]
fn a_second_dimension_alone_is_validated_too() {
    let ngpa_walk = NgpaWalk::npt(ENTRIES[0], &REGISTERS, &CPU).unwrap();
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let walk = |memory: &Changing| {
        // NPT's pages have to be the user's.
        memory.words.borrow_mut().iter_mut().filter(|entry| **entry != 0).for_each(|entry| *entry |= 4);
        let (ngpa, phase) = (NestedGpa(0x123), NestedPhase::Final);
        ngpa_walk.translate_validated(memory, ngpa, &access, phase, AdPolicy::Observe, &mut Trace::new())
    };
    let walked = walk(&Changing::new(|words, load| {
        if load == 2 {
            map(words, OTHER, OTHER_PAGE);
            words.iter_mut().filter(|entry| **entry != 0).for_each(|entry| *entry |= 4);
        }
    }));
    assert_eq!((walked.repeated, walked.torn), (1, None));
    assert_eq!(walked.outcome.unwrap().gpa, Gpa(OTHER_PAGE | 0x123));
}
