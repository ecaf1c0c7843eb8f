//! What each landmark of the demo machine promises, by the manuals, and a check of all of them.

use std::collections::BTreeSet;

use pagewalk::{
    Access, AccessKind, Backing, ControlRegisters, FaultKind, Gva, NptControls, PageSize, Privilege,
    Translation, Walker,
};
use pagewalkd::machine::{GuestRam, Machine, demo};
use pagewalkd::vcpu::{EnterL2, L2Registers, SecondDimension, Snapshot};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Gpa(u64),
    PageFault(u32),
    NestedPageFault(u64),
    GeneralProtection,
    Unbacked,
}
use Outcome::{Gpa, NestedPageFault as Npf, PageFault as Pf};

/// Supervisor read, write, fetch; user read, write, fetch.
pub(crate) type Row = (&'static str, [Outcome; 6]);

/// The user half lies in other frames in each address space: these are offsets from its first frame.
const USER_FRAMES: [u64; 2] = [0x3_0000, 0x4_0000];

pub(crate) const KERNEL: &[Row] = &[
    ("kernel-text", [Gpa(0x1_0000), Pf(3), Gpa(0x1_0000), Pf(5), Pf(7), Pf(0x15)]),
    ("kernel-data", [Gpa(0x1_1000), Gpa(0x1_1000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("kernel-stack", [Gpa(0x1_2000), Gpa(0x1_2000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("read-only", [Gpa(0x1_3000), Pf(3), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("no-execute", [Gpa(0x1_4000), Gpa(0x1_4000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("not-present", [Pf(0), Pf(2), Pf(0x10), Pf(4), Pf(6), Pf(0x14)]),
    ("reserved-bit", [Pf(9), Pf(0xb), Pf(0x19), Pf(0xd), Pf(0xf), Pf(0x1d)]),
    ("page-table", [Gpa(0x2_4000), Gpa(0x2_4000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("huge-2m", [Gpa(0x40_0000), Gpa(0x40_0000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("mmio", [Gpa(0x2000_0000), Gpa(0x2000_0000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("rom", [Gpa(0x1000_0000), Gpa(0x1000_0000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("user-bit-lost", [Gpa(0x1_b000), Gpa(0x1_b000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("unbacked-table", [Outcome::Unbacked; 6]),
    ("non-canonical", [Outcome::GeneralProtection; 6]),
];

pub(crate) const GIB: Row = ("huge-1g", [Gpa(0x1_0000), Gpa(0x1_0000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]);

pub(crate) fn user(space: usize) -> Vec<Row> {
    let frame = |offset| Gpa(USER_FRAMES[space] + offset);
    vec![
        ("user-text", [frame(0), Pf(3), frame(0), frame(0), Pf(7), frame(0)]),
        ("user-data", [frame(0x1000), frame(0x1000), Pf(0x11), frame(0x1000), frame(0x1000), Pf(0x15)]),
        ("user-read-only", [frame(0x2000), Pf(3), Pf(0x11), frame(0x2000), Pf(7), Pf(0x15)]),
        ("supervisor-page", [frame(0x3000), frame(0x3000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
        ("read-only-table", [frame(0x4000), Pf(3), Pf(0x11), frame(0x4000), Pf(7), Pf(0x15)]),
    ]
}

/// In nested mode. NPT counts every access as a user access, and those to L2's tables as writes.
pub(crate) const L2: &[Row] = &[
    ("l2-code", [Gpa(0x61_0000), Pf(3), Gpa(0x61_0000), Pf(5), Pf(7), Pf(0x15)]),
    ("l2-data", [Gpa(0x61_1000), Gpa(0x61_1000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("l2-npt-hole", [Npf(0x1_0000_0004), Npf(0x1_0000_0006), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("l2-npt-read-only", [Gpa(0x61_3000), Npf(0x1_0000_0007), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("l2-not-present", [Pf(0), Pf(2), Pf(0x10), Pf(4), Pf(6), Pf(0x14)]),
    ("l2-huge-2m", [Gpa(0x40_0000), Gpa(0x40_0000), Pf(0x11), Pf(5), Pf(7), Pf(0x15)]),
    ("l2-table-hole", [Npf(0x2_0000_0006); 6]),
];

/// The overlay that the landmarks `l2-*` are for.
pub(crate) fn overlay() -> EnterL2 {
    let host = ControlRegisters { cr0: 0x8001_0001, cr4: 0x20, efer: 0x1d00, ..ControlRegisters::default() };
    let second = SecondDimension::Npt { ncr3: demo::NCR3, host, controls: NptControls::default() };
    let l2 = L2Registers { cr3: Some(demo::L2_CR3), ..L2Registers::default() };
    EnterL2 { walker_only: false, ..EnterL2::walker_only(second, l2) }
}

fn address(machine: &Machine, name: &str) -> u64 {
    let landmarks = machine.source().landmarks();
    landmarks.iter().find(|l| l.name == name).unwrap_or_else(|| panic!("no landmark {name}")).address
}

pub(crate) fn translate(
    memory: &GuestRam,
    walker: &Walker,
    gva: u64,
    kind: AccessKind,
    privilege: Privilege,
) -> (Outcome, Option<Translation>) {
    match walker.translate(memory, Gva(gva), &Access::new(kind, privilege)) {
        Ok(page) => (Gpa(page.gpa.0), Some(page)),
        Err(fault) => {
            let outcome = match fault.kind {
                FaultKind::PageFault { error_code } => Pf(error_code),
                FaultKind::NestedPageFault { exit_info_1 } => Npf(exit_info_1),
                FaultKind::GeneralProtection => Outcome::GeneralProtection,
                FaultKind::Unbacked => Outcome::Unbacked,
                other => panic!("{other:?}"),
            };
            (outcome, None)
        }
    }
}

/// Checks every landmark, one-dimensional ones in `own` and those of the L2 in `nested`.
pub(crate) fn check(machine: &Machine, own: &Snapshot, nested: &Snapshot) {
    let memory = &*machine.source().memory();
    let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];
    let space = demo::ADDRESS_SPACES.iter().position(|&root| root == own.registers.cr3).unwrap();
    let own_walker = own.walker.as_ref().unwrap();
    let l2_walker = nested.walker.as_ref().unwrap();
    let gib = machine.source().cpu().gib_pages.then_some(GIB);

    // `remapped` may be in either of its frames.
    let remapped =
        translate(memory, own_walker, address(machine, "remapped"), kinds[0], Privilege::Supervisor).0;
    assert!(demo::REMAPPED_FRAMES.map(Gpa).contains(&remapped), "{remapped:?}");
    assert_eq!(address(machine, "l2-cr3"), demo::L2_CR3);
    assert_eq!(address(machine, "l2-ncr3"), demo::NCR3);
    let mut checked = BTreeSet::from(["remapped", "l2-cr3", "l2-ncr3"]);

    let one_dimension = KERNEL.iter().copied().chain(user(space)).chain(gib).map(|row| (row, own_walker));
    for ((name, wanted), walker) in one_dimension.chain(L2.iter().map(|&row| (row, l2_walker))) {
        let gva = address(machine, name);
        let privileges = [Privilege::Supervisor, Privilege::User];
        let accesses = privileges.iter().flat_map(|&p| kinds.iter().map(move |&k| (k, p)));
        for (wanted, (kind, privilege)) in wanted.iter().zip(accesses) {
            let (found, _) = translate(memory, walker, gva, kind, privilege);
            assert_eq!(found, *wanted, "{name}: {kind:?} by {privilege:?}");
        }
        checked.insert(name);
    }
    let all: BTreeSet<&str> = machine.source().landmarks().iter().map(|l| l.name.as_str()).collect();
    assert_eq!(checked, all, "every landmark has an expectation");

    let page = |walker, name| {
        translate(memory, walker, address(machine, name), kinds[0], Privilege::Supervisor).1.unwrap()
    };
    assert_eq!(page(own_walker, "mmio").backing(), Backing::None);
    assert_eq!(page(own_walker, "rom").backing(), Backing::ReadOnly);
    assert_eq!(page(own_walker, "kernel-text").backing(), Backing::Ram);
    assert_eq!(page(own_walker, "huge-2m").page_size(), PageSize::Size2M);
    assert!(gib.is_none() || page(own_walker, "huge-1g").page_size() == PageSize::Size1G);
    let huge = page(l2_walker, "l2-huge-2m");
    let nested = huge.nested.expect("a nested page");
    assert_eq!((huge.page_size(), nested.page_size), (PageSize::Size2M, PageSize::Size2M));
    assert_eq!(nested.ngpa, pagewalk::NestedGpa(0x20_0000));
}
