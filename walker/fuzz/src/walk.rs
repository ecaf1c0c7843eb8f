//! Arbitrary memory, registers, second dimension, access and addresses: what holds for every walk.
//!
//! No panic; an end within the bound on steps; nothing changed by policy `Observe`; one outcome from the untraced walk (which
//! takes the fast lane), the traced one and `Set`; `Set` changes accessed and dirty bits alone, of entries that the walk read,
//! and nothing where it refuses; and on memory that changes under the walk, an end all the same.

use pagewalk::{
    Access, AdPolicy, Backing, Dimension, EPT_VIOLATION_GVA_TRANSLATED, Fault, FaultKind, Gva, MAX_ATTEMPTS,
    MAX_STEPS, NestedGpa, NestedPhase, NgpaWalk, NoTrace, PageSize, PagingMode, Trace, Translation, Walker,
};

use crate::input::Input;
use crate::memory::{PAGES, Ram};
use crate::setup;

const ADDRESSES: usize = 4;
/// Accessed and dirty bits, of EPT as well, and in either half of a word.
const ACCESSED_DIRTY: u64 = 0x60_0000_0360;
/// Indices that entries are put at and addresses are made of.
const INDICES: [u64; 20] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 256, 510, 511];

/// What a walk can end in.
pub const CLASSES: [&str; 19] = [
    "page, one dimension",
    "page, nested",
    "page without backing",
    "large page",
    "#PF",
    "#PF of two dimensions",
    "not canonical",
    "NPF, guest table",
    "NPF, final address",
    "table unbacked",
    "Set wrote bits",
    "Set skipped read-only memory",
    "contended",
    "registers refused",
    "by rule: one word, two meanings for Set",
    "EPT violation, guest table",
    "EPT violation, final address",
    "EPT misconfiguration",
    "page, over EPT",
];

/// Checks one input, and counts what it comes to by [`CLASSES`]; `ram` is cleared before and after.
pub fn check(bytes: &[u8], ram: &mut Ram, counts: &mut [u64]) {
    let mut input = Input::new(bytes);
    let Some(walker) = setup::walker(&mut input) else {
        counts[13] += 1;
        return;
    };
    let access = setup::access(&mut input);
    let addresses: [u64; ADDRESSES] = core::array::from_fn(|_| address(&mut input));
    let mut changes = Vec::new();
    while !input.is_empty() {
        let (at, entry, change) = entry(&mut input);
        if change {
            changes.push((at, entry));
        } else {
            ram.fill(at, entry);
        }
    }
    for gva in addresses {
        quiet(&walker, ram, gva, &access, counts);
    }
    // Each walk meets the changes from their beginning, and what they left is undone.
    for gva in addresses.into_iter().take(if changes.is_empty() { 0 } else { ADDRESSES }) {
        hostile(&walker, ram, gva, &access, &changes, counts);
    }
    ram.clear();
}

/// The most entries that one attempt reads.
fn bound(walker: &Walker) -> usize {
    let guest = walker.gva_walk().format().levels() as usize;
    let second = walker.ngpa_walk().map_or(0, |second| second.page_walk().format().levels() as usize);
    guest * (second + 1) + second
}

fn without_skipped(outcome: Result<Translation, Fault>) -> Result<Translation, Fault> {
    outcome.map(|page| page.with_ad_skipped(false))
}

fn quiet(walker: &Walker, ram: &Ram, gva: u64, access: &Access, counts: &mut [u64]) {
    let bound = bound(walker);
    assert!(bound <= MAX_STEPS);
    let gva = Gva(gva);

    ram.restart();
    let plain = walker.translate(ram, gva, access);
    // The fast lane leaves what it does not know to the general walk, which starts over.
    assert!(ram.loads.get() <= 2 * bound, "{} loads, {bound} an attempt", ram.loads.get());

    ram.restart();
    let mut trace = Trace::new();
    let traced = walker.translate_with(ram, gva, access, AdPolicy::Observe, &mut trace);
    assert_eq!(plain, traced, "untraced and traced differ");
    assert!(ram.loads.get() <= bound);
    let in_registers =
        trace.steps().iter().filter(|step| step.entry_gpa.0 == 0 && step.table_gpa.0 == 0).count();
    assert!(trace.steps().len() >= ram.loads.get() && trace.steps().len() <= ram.loads.get() + in_registers);
    assert!(trace.steps().iter().all(|step| step.is_current(ram)), "quiet memory has changed");
    assert!(ram.written.borrow().is_empty(), "Observe wrote");

    let set = walker.translate_with(ram, gva, access, AdPolicy::Set, &mut NoTrace);
    if overlaps(walker, access, &trace) {
        counts[14] += 1;
        ram.undo();
        return;
    }
    assert_eq!(without_skipped(set), plain, "Observe and Set differ");
    {
        let written = ram.written.borrow();
        assert!(set.is_ok() || written.is_empty(), "Set wrote although it refuses");
        for (word, was, is) in written.iter() {
            assert_eq!((was ^ is) & !ACCESSED_DIRTY, 0, "Set changed more than accessed and dirty bits");
            assert_eq!(was & !is, 0, "Set cleared a bit");
            let read = trace.steps().iter().any(|step| step.entry_gpa.0 / 8 == *word as u64);
            assert!(read, "Set wrote an entry that the walk did not read");
        }
        counts[10] += u64::from(!written.is_empty());
    }
    if set.is_ok() && !pdpte_overlaps(walker, &trace) {
        let writes = ram.written.borrow().len();
        let again = walker.translate_with(ram, gva, access, AdPolicy::Set, &mut NoTrace);
        assert_eq!(
            again.map(|page| page.gpa),
            set.map(|page| page.gpa),
            "the bits that Set leaves change the answer"
        );
        assert_eq!(ram.written.borrow().len(), writes, "Set left a bit for a second time");
    }
    ram.undo();

    if let Some(second) = walker.ngpa_walk() {
        for phase in [NestedPhase::Table, NestedPhase::Pdpte, NestedPhase::Final] {
            ram.restart();
            let _ = second.translate(ram, NestedGpa(gva.0), access, phase, &mut trace);
            assert!(ram.loads.get() <= second.page_walk().format().levels() as usize);
        }
    }
    count(walker, set, counts);
}

/// Whether the walk met one word in both dimensions, and what `Set` leaves in it for the one means something else to the other:
/// it is a frame bit of an entry of another width, an accessed bit of EPT where the guest has another, or the dirty bit that makes
/// a page a shadow stack. Then it has to walk again.
fn overlaps(walker: &Walker, access: &Access, trace: &Trace) -> bool {
    let Some(second) = walker.ngpa_walk() else { return false };
    let same_width = walker.gva_walk().format().entry_bytes() == second.page_walk().format().entry_bytes();
    if same_width && !access.is_shadow_stack() && matches!(second, NgpaWalk::Npt(_)) {
        return false;
    }
    let words = |dimension| {
        let steps = trace.steps().iter().filter(move |step| step.dimension == dimension);
        steps.map(|step| step.entry_gpa.0 / 8)
    };
    words(Dimension::Guest).any(|word| words(Dimension::Nested).any(|other| other == word))
}

/// Whether the walk met one word as a PDPTE of PAE paging and as another entry: the other's accessed bit is reserved in the
/// first, and the next walk is refused.
fn pdpte_overlaps(walker: &Walker, trace: &Trace) -> bool {
    let is_pae = |dimension| {
        let walk = match (dimension, walker.ngpa_walk()) {
            (Dimension::Nested, Some(second)) => second.page_walk(),
            _ => walker.gva_walk(),
        };
        walk.format().mode() == PagingMode::Pae
    };
    let steps = trace.steps();
    let pdptes = steps.iter().filter(|step| step.level == 3 && is_pae(step.dimension));
    let mut words = pdptes.map(|step| step.entry_gpa.0 / 8);
    words.any(|word| steps.iter().filter(|step| step.entry_gpa.0 / 8 == word).count() > 1)
}

fn hostile(
    walker: &Walker,
    ram: &Ram,
    gva: u64,
    access: &Access,
    changes: &[(usize, u64)],
    counts: &mut [u64],
) {
    let mut trace = Trace::new();
    for policy in [AdPolicy::Observe, AdPolicy::Set] {
        ram.restart();
        ram.disturb(changes);
        let outcome = walker.translate_with(ram, Gva(gva), access, policy, &mut trace);
        // Each entry is exchanged four times at most; one of four bytes through the word that holds it, which is loaded for
        // each of sixteen attempts.
        assert!(ram.loads.get() <= bound(walker) * (1 + 4 * 16) * MAX_ATTEMPTS);
        assert!(trace.steps().len() <= MAX_STEPS);
        let contended = outcome.is_err_and(|fault| fault.kind == FaultKind::Contended);
        assert!(!contended || policy == AdPolicy::Set);
        counts[12] += u64::from(contended);
        ram.restart_with_undo();
    }
}

fn count(walker: &Walker, outcome: Result<Translation, Fault>, counts: &mut [u64]) {
    let nested = walker.ngpa_walk().is_some();
    match outcome {
        Ok(page) => {
            counts[usize::from(nested)] += 1;
            counts[18] += u64::from(matches!(walker.ngpa_walk(), Some(NgpaWalk::Ept(_))));
            counts[2] += u64::from(page.backing() == Backing::None);
            counts[3] +=
                u64::from(matches!(page.page_size(), PageSize::Size2M | PageSize::Size4M | PageSize::Size1G));
            counts[11] += u64::from(page.ad_skipped());
            let _ = (walker.gva_walk().format().pat_type(&page), page.key(), page.global());
        }
        Err(fault) => {
            let class = match fault.kind {
                FaultKind::PageFault { .. } if nested => 5,
                FaultKind::PageFault { .. } => 4,
                FaultKind::GeneralProtection | FaultKind::StackFault => 6,
                FaultKind::NestedPageFault { exit_info_1 } if exit_info_1 >> 33 & 1 != 0 => 7,
                FaultKind::NestedPageFault { .. } => 8,
                FaultKind::Unbacked => 9,
                FaultKind::EptViolation { exit_qualification }
                    if exit_qualification & EPT_VIOLATION_GVA_TRANSLATED == 0 =>
                {
                    15
                }
                FaultKind::EptViolation { .. } => 16,
                FaultKind::EptMisconfiguration => 17,
                FaultKind::Contended => panic!("contended on quiet memory"),
            };
            counts[class] += 1;
            let second = fault.dimension == Dimension::Nested;
            assert_eq!(fault.nested_gpa.is_some(), second, "{fault:?}");
            assert!(fault.level <= 5 && !fault.reason.to_string().is_empty());
        }
    }
}

/// An address of indices that tables are filled at, canonical for some width; or eight arbitrary bytes.
fn address(input: &mut Input<'_>) -> u64 {
    let shape = input.byte();
    let word = input.u64();
    let made = word.to_le_bytes()[..5]
        .iter()
        .fold(0, |gva, byte| gva << 9 | INDICES[*byte as usize % INDICES.len()])
        << 12
        | word >> 52;
    match shape & 7 {
        0 | 1 => ((made << 16) as i64 >> 16) as u64,
        2 | 3 => ((made << 7) as i64 >> 7) as u64,
        4 => made & 0xffff_ffff,
        5 => made & (PAGES << 12 | 0xffff),
        6 => word >> (shape >> 3),
        _ => word,
    }
}

/// A place in memory and an entry for it: one that refers to a page of memory, or an arbitrary word; and whether it is
/// XORed into memory under the walk instead.
fn entry(input: &mut Input<'_>) -> (usize, u64, bool) {
    let shape = input.byte();
    let place = input.byte();
    let word = input.u64();
    let page = u64::from(shape & 15);
    let index = if place < 200 { INDICES[place as usize % INDICES.len()] } else { word >> 52 & 511 };
    let at = (page * 512 + index) as usize;
    if shape & 0x80 != 0 {
        // A change of one bit or two.
        return (at, 1 << (word & 63) | 1 << (word >> 8 & 63), true);
    }
    // Both halves refer to memory, so that they do as entries of four bytes, too.
    let table = word & 0x0000_ffff_0000_ffff;
    let entry = match shape >> 4 & 7 {
        0 => table & 0xffff | 7,
        // As EPT has them: a table, and a page of write-back memory.
        1 => table & 0xf700 | 7,
        2 => table & 0xffff & !0x38 | 0x37,
        3 => table | 7 << 32 | 7,
        4 => table & 0xffff & !0x1000 | 0x87,
        5 => table & 0xffff | word & 0xfff0_0000_0000_0000 | 1,
        6 => word | 1,
        _ => word,
    };
    (at, entry, false)
}
