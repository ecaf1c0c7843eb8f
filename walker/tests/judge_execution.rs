//! Judge `kvm-execution`: the walker's outcome against what happens when a vCPU executes the access.
//!
//! A case is one load, store, fetch, stack access or descriptor load, at CPL 3 or 0, through four entries of its own.
//! The walker walks a copy of the tables with policy `Observe`, then `Set`; the vCPU executes on the guest's. Equal must be: the
//! vector, the error code and CR2, or that the access succeeded; *where* it succeeded (the byte that was loaded or stored
//! lies at the walker's GPA; the fetched instruction was put only there; an access without backing leaves the guest with
//! the walker's GPA); and all four entries afterwards, accessed and dirty bits included. Nothing else in the tables may
//! have changed.
//!
//! # What this kernel does, and how it is mapped
//! - Walks that fault leave every entry alone, as policy `Set` does. (Hardware may set upper accessed bits: a backend
//!   that does would disagree here, and rightly be looked at.)
//! - A table outside memory: KVM reports a not-present #PF, the walker `Unbacked`. By rule: the error code must be that
//!   of the access with P clear. Counted.
//! - A fetch from a page without backing: KVM cannot emulate the instruction and says so; the walker translates. By
//!   rule: that exit is expected, and the entries are still compared. Counted. Where the fetch is the supervisor's from
//!   a user page under SMAP with AC clear, KVM's way to that exit reads the page as data, and delivers the #PF that
//!   SMAP gives such a read: either is accepted. Counted apart.
//! - A descriptor load is the implicit supervisor access: the CPU reads the descriptor, and writes its accessed bit
//!   where that is clear. The second is two walks for us, a read and, if that succeeds, a write.
//!
//! # Inside the bed `nested-amd`, with `npt=0`
//! KVM shadows the guest's tables, and its walker decides what the emulated CPU may not do by itself. By rule, counted:
//! - A fetch from a page without backing at CPL 3: KVM cannot emulate it, and delivers #UD there.
//! - The emulated CPU has no #SS for addresses that are not canonical: #GP is accepted in its place.
//!
//! The accessed bit of a descriptor is written through bytes 7:4: CR2 is compared without its low three bits. Implicit
//! supervisor accesses are made with AC clear under SMAP: at CPL 3 the CPU refuses a user page to them, whatever AC is,
//! and KVM, which cannot tell them from explicit ones by the CPU's error code, shadows the page again, without end. (The
//! CPU and the walker are right.)
//!
//! # Not judged
//! - PKRU: the host has no protection keys, CR4.PKE is accepted, but RDPKRU and WRPKRU are not emulated and no ioctl
//!   carries PKRU in. CR4.PKE and the entries' key bits are varied all the same, with PKRU 0: they must then refuse
//!   nothing, and not be reserved. The judge reports what RDPKRU does.
//! - 5-level paging (CR4.LA57 is refused), 1 GiB leaves unless the vCPU has them (bit 7 of a PDPTE is then reserved),
//!   shadow stacks.
//! - Tables that refer to themselves or to each other: `judge_translate` has them.
//!
//! `PAGEWALK_FULL=1` runs an odometer instead of a sample: per level the eight combinations of W, U and NX, absent and
//! reserved; both page sizes; accessed bits of the upper levels, accessed and dirty bit of the leaf; load, store and
//! fetch; CPL; AC; WP, NXE, SMEP and SMAP: 16.9 million cases, about ten minutes in a release build.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;

use std::sync::LazyLock;

use bed::case::{Case, Controls, Odometer};
use bed::ground::{
    Act, Brought, CASES_PER_ROOT, FRAME_COUNT, FRAMES, Ground, LARGE_FRAME, Outcome, Play, RAM_BYTES,
    SUPERVISOR_DONE, USER_DONE,
};
use bed::judge::{Judge, cases, full, skipped};
use bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PKE, CR4_SMAP, CR4_SMEP, DIRTY, EFER_LMA,
    EFER_LME, EFER_NXE, Machine, Maker, PAGE, PAGE_SIZE, Ram, Vcpu, long_mode, walk, when,
};
use fastrand::Rng;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::SyncReg;
use libtest_mimic::{Arguments, Failed, Trial};
use pagewalk::{
    Access, AccessKind, Backing, Fault, FaultKind, NoTrace, PageSize, Privilege, Reason, Translation, Walker,
};

fn main() {
    let arguments = Arguments::from_args();
    let trials = vec![Trial::test("kvm_execution_agrees", || match Bed::new() {
        Ok(bed) => judge(bed),
        Err(reason) => skipped("kvm", &reason),
    })];
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether this runs inside a bed, where an emulated CPU executes through KVM's shadows of the guest's tables.
static IN_BED: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PAGEWALK_BED").is_some());

struct Bed {
    machine: Machine,
    copy: Ram,
    ground: Ground,
    vcpus: Vec<Vcpu>,
    /// CR4.PKE can be set.
    pke: bool,
}

impl Bed {
    fn new() -> Result<Bed, String> {
        let machine = Machine::new(RAM_BYTES)?;
        let mut vcpus = Vec::new();
        for (id, (maker, maxphyaddr)) in
            [(Maker::Intel, machine.maxphyaddr()?), (Maker::Amd, 40)].into_iter().enumerate()
        {
            let mut vcpu = machine.vcpu(id as u64, maker, maxphyaddr)?;
            vcpu.fd.set_sync_valid_reg(SyncReg::Register);
            vcpu.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            vcpus.push(vcpu);
        }
        let copy = Ram::new(RAM_BYTES);
        let ground = Ground::new(&machine, copy);
        let mut sregs = vcpus[0].reset;
        long_mode(&mut sregs, ground.cr3());
        sregs.cr4 |= CR4_PKE;
        let pke = vcpus[0].fd.set_sregs(&sregs).is_ok();
        Ok(Bed { machine, copy, ground, vcpus, pke })
    }
}

fn judge(mut bed: Bed) -> Result<(), Failed> {
    let mut judge = Judge::new("kvm-execution")?;
    let mut rng = Rng::with_seed(judge.seed());
    report_protection_keys(&mut bed)?;
    if full() {
        for controls in Controls::all() {
            let mut odometer = Odometer::default();
            while !odometer.is_done() {
                let vcpu = rng.usize(0..bed.vcpus.len());
                bed.root(&mut rng, Controls { vcpu, ..controls }, &mut judge, |_| odometer.next())?;
            }
        }
    } else {
        let wanted = cases(300_000)?;
        while judge.cases() < wanted {
            let mut controls = Controls::sample(&mut rng, bed.vcpus.len());
            controls.pke &= bed.pke;
            bed.root(&mut rng, controls, &mut judge, |rng| Some(Case::sample(rng)))?;
        }
    }
    bed.clear(&mut judge)?;
    judge.finish(&minima())
}

/// Every outcome that the rules can produce has to have been seen often enough.
fn minima() -> Vec<(&'static str, Option<u64>, u64)> {
    let mut minima = vec![
        ("mapped 4 KiB", None, 20_000),
        ("mapped 2 MiB", None, 10_000),
        ("accessed bit set", None, 20_000),
        ("dirty bit set", None, 5_000),
    ];
    for act in [Act::Load, Act::Store, Act::Fetch] {
        minima.extend([(mapped_by(act), Some(0), 2_000), (mapped_by(act), Some(3), 2_000)]);
    }
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 9, 0xb, 0xd, 0xf, 0x10, 0x11, 0x14, 0x15, 0x19, 0x1d] {
        minima.push(("#PF, error code", Some(code), 200));
    }
    for level in 1..=4 {
        minima.push(("refused: not present, level", Some(level), 500));
        minima.push(("refused: reserved, level", Some(level), 500));
        minima.push(("refused: supervisor page, level", Some(level), 100));
        minima.push(("refused: no execute, level", Some(level), 100));
        minima.push(("refused: read-only, level", Some(level), 100));
    }
    if !full() {
        for act in [Act::StackLoad, Act::StackStore, Act::DescriptorLoad, Act::DescriptorTouch] {
            minima.extend([(mapped_by(act), Some(0), 100), (mapped_by(act), Some(3), 100)]);
        }
        minima.extend([("mapped without backing", None, 500), ("#GP", None, 500), ("#SS", None, 100)]);
        minima.extend((1..=3).map(|level| ("refused: table outside memory, level", Some(level), 200)));
    }
    minima.extend([("refused: SMEP", None, 500), ("refused: SMAP", None, 500)]);
    minima
}

impl Bed {
    fn clear(&mut self, judge: &mut Judge) -> Result<(), Failed> {
        if let Some(gpa) = self.ground.clear(&self.machine)? {
            judge.disagree(|| format!("memory at {gpa:#x} changed: it is no case's entry"));
        }
        Ok(())
    }

    /// Runs cases under one root until it is full or there are no more.
    fn root(
        &mut self,
        rng: &mut Rng,
        controls: Controls,
        judge: &mut Judge,
        mut next: impl FnMut(&mut Rng) -> Option<Case>,
    ) -> Result<(), Failed> {
        self.clear(judge)?;
        let vcpu = &self.vcpus[controls.vcpu];
        let mut sregs = vcpu.reset;
        sregs.cr0 = CR0_PE | CR0_NE | CR0_PG | when(controls.wp, CR0_WP);
        sregs.cr3 = self.ground.cr3();
        sregs.cr4 = CR4_PAE
            | when(controls.smep, CR4_SMEP)
            | when(controls.smap, CR4_SMAP)
            | when(controls.pke, CR4_PKE);
        sregs.efer = EFER_LME | EFER_LMA | when(controls.nxe, EFER_NXE);
        let walker = vcpu.walker(&sregs)?;
        for _ in 0..CASES_PER_ROOT {
            let Some(mut case) = next(rng) else { break };
            case.ac &= !(*IN_BED && controls.smap && case.act.is_implicit());
            self.case(rng, controls, &case, sregs, &walker, judge);
        }
        Ok(())
    }

    fn case(
        &mut self,
        rng: &mut Rng,
        controls: Controls,
        case: &Case,
        mut sregs: kvm_sregs,
        walker: &Walker,
        judge: &mut Judge,
    ) {
        let plot = self.ground.plot().expect("a root has room for CASES_PER_ROOT cases");
        let vcpu = &mut self.vcpus[controls.vcpu];
        // A descriptor lies where the GDT goes on, everything else anywhere; a fetch needs two bytes of its page.
        let mut gva = plot.base;
        if case.act.is_implicit() {
            gva += rng.u64(0..PAGE / 8) * 8;
        } else {
            gva += rng.u64(0..1 << 39);
            gva -= u64::from(case.act == Act::Fetch && gva % PAGE == PAGE - 1);
        }
        let mut at = [plot.pml4e, 0, 0, 0];
        for (level, table) in plot.tables.into_iter().enumerate() {
            at[level + 1] = table + (gva >> (30 - 9 * level) & 511) * 8;
        }
        let depth = if case.large { 3 } else { 4 };
        let mut before = [0; 4];
        for level in 0..depth {
            let leaf = level + 1 == depth;
            let frame = match (leaf, case.large) {
                (false, _) => plot.tables[level],
                (true, false) => FRAMES + rng.u64(0..FRAME_COUNT) * PAGE,
                (true, true) => LARGE_FRAME | PAGE_SIZE,
            };
            before[level] = case.entry(rng, level, frame, vcpu.maker, vcpu.maxphyaddr);
            self.ground.set_entry(at[level], before[level]);
        }
        if case.non_canonical {
            // Off by one bit, or just past the edge.
            gva = match rng.u32(0..4) {
                0 => 1 << 47,
                1 => !(1 << 47),
                _ => gva ^ 1 << rng.u32(48..64),
            };
        }

        let play = Play { act: case.act, cpl: case.cpl, ac: case.ac, gva, byte: rng.u8(..) };
        let (answer, prop) = ask(walker, self.copy, &play, judge);
        let expected = Expected::new(&answer, controls, &play);
        classify(judge, &answer, &expected, &play);

        let ram = self.machine.ram;
        let loaded = play.byte.wrapping_add(0x55);
        if let Some(gpa) = prop {
            prepare(ram, gpa, &play, loaded);
        }
        self.ground.dress(&mut sregs, &play);
        let (mut outcome, brought) = self.ground.run(&mut vcpu.fd, &sregs, &play);
        if let Outcome::Exception { cr2, .. } = &mut outcome
            && *IN_BED
            && play.act == Act::DescriptorTouch
        {
            *cr2 &= !7;
        }

        judge.case();
        let place = match (outcome, prop) {
            (Outcome::Done, Some(gpa)) => in_place(ram, gpa, &play, loaded, &brought),
            // #UD, by rule.
            (Outcome::Done, None) if play.act == Act::Fetch => brought.mmio.is_none(),
            (Outcome::Done, None) => outside(&answer, &play, &brought),
            _ => brought.mmio.is_none(),
        };
        let left: [u64; 4] = std::array::from_fn(|level| if level < depth { ram.read(at[level]) } else { 0 });
        let ours: [u64; 4] =
            std::array::from_fn(|level| if level < depth { self.copy.read(at[level]) } else { 0 });
        if (outcome != expected.outcome && Some(outcome) != expected.or) || !place || left != ours {
            judge.disagree(|| {
                format!(
                    "{controls:x?} {play:x?}\n  walker {answer:x?}\n  expected {:x?}, got {outcome:x?}, {brought:x?}, in the right place: {place}\n  entries  {before:x?}\n  walker   {ours:x?}\n  kernel   {left:x?}",
                    expected.outcome
                )
            });
        }
        for level in 0..depth {
            judge.count_if("accessed bit set", (before[level] ^ left[level]) & ACCESSED != 0);
            judge.count_if("dirty bit set", (before[level] ^ left[level]) & DIRTY != 0);
        }
        if let Some(gpa) = prop {
            ram.write_bytes(gpa, &[0; 8][..play.act.bytes()]);
        }
    }
}

/// What has to happen when the guest executes the access.
struct Expected {
    outcome: Outcome,
    /// What may happen instead, by rule.
    or: Option<Outcome>,
    fetch_unreported: bool,
}

impl Expected {
    fn new(answer: &Result<Translation, Fault>, controls: Controls, play: &Play) -> Expected {
        let reports_fetch = controls.nxe || controls.smep;
        let fetch_unreported = play.act == Act::Fetch && !reports_fetch;
        let exception = |vector, code, cr2| Outcome::Exception { vector, code, cr2 };
        let outcome = match answer {
            Ok(page) if page.backing == Backing::None && play.act == Act::Fetch => Outcome::NotEmulated,
            Ok(_) => Outcome::Done,
            Err(fault) => match fault.kind {
                FaultKind::PageFault { error_code } => exception(14, u64::from(error_code), fault.address),
                FaultKind::GeneralProtection => exception(13, 0, 0),
                FaultKind::StackFault => exception(12, 0, 0),
                FaultKind::Unbacked => {
                    let user = play.cpl == 3 && !play.act.is_implicit();
                    // A descriptor is read before it is written.
                    let write = matches!(play.act, Act::Store | Act::StackStore);
                    let fetch = play.act == Act::Fetch && reports_fetch;
                    exception(
                        14,
                        u64::from(write) << 1 | u64::from(user) << 2 | u64::from(fetch) << 4,
                        play.gva,
                    )
                }
                FaultKind::NestedPageFault { .. } | FaultKind::Contended => {
                    Outcome::Lost("not an outcome of this bed")
                }
            },
        };
        let or = match answer {
            Ok(_) if *IN_BED && outcome == Outcome::NotEmulated && play.cpl == 3 => Some(Outcome::Done),
            Err(_) if *IN_BED && outcome == exception(12, 0, 0) => Some(exception(13, 0, 0)),
            Ok(page)
                if outcome == Outcome::NotEmulated
                    && play.cpl != 3
                    && controls.smap
                    && !play.ac
                    && page.rights.user() =>
            {
                Some(exception(14, 1 | u64::from(reports_fetch) << 4, play.gva))
            }
            _ => None,
        };
        Expected { outcome, or, fetch_unreported }
    }
}

/// The walker's answer for the access, with its accessed and dirty bits set in `copy`; and where in memory the access
/// begins, if it does.
fn ask(
    walker: &Walker,
    copy: Ram,
    play: &Play,
    judge: &mut Judge,
) -> (Result<Translation, Fault>, Option<u64>) {
    let kind = match play.act {
        Act::Store | Act::StackStore => AccessKind::Write,
        Act::Fetch => AccessKind::Fetch,
        _ => AccessKind::Read,
    };
    let privilege = match (play.act.is_implicit(), play.cpl) {
        (true, _) => Privilege::ImplicitSupervisor,
        (false, 3) => Privilege::User,
        (false, _) => Privilege::Supervisor,
    };
    let stack = matches!(play.act, Act::StackLoad | Act::StackStore);
    let access = Access::new(kind, privilege).with_ac(play.ac).through_stack(stack);
    let mut walk = |access: &Access| walk(walker, copy, play.gva, access, &mut NoTrace, judge);
    let first = walk(&access);
    let prop = first.ok().filter(|page| page.backing != Backing::None).map(|page| page.gpa.0);
    match play.act {
        Act::DescriptorTouch if first.is_ok() => {
            (walk(&Access::new(AccessKind::Write, privilege).with_ac(play.ac).through_stack(stack)), prop)
        }
        _ => (first, prop),
    }
}

/// Puts what the access will meet where the walker says that it goes.
fn prepare(ram: Ram, gpa: u64, play: &Play, loaded: u8) {
    match play.act {
        Act::Load | Act::StackLoad => ram.write_byte(gpa, loaded),
        Act::Store | Act::StackStore => ram.write_byte(gpa, !play.byte),
        Act::Fetch => ram.write_bytes(gpa, if play.cpl == 3 { &USER_DONE } else { &SUPERVISOR_DONE }),
        // A data segment of DPL 3 whose base says where it was found.
        Act::DescriptorLoad => ram.write(gpa, 0x00cf_f300_0000_ffff | u64::from(loaded) << 56),
        Act::DescriptorTouch => ram.write(gpa, 0x00cf_f200_0000_ffff | u64::from(loaded) << 56),
        Act::ReadKeys => {}
    }
}

/// Whether the access went to `gpa`.
fn in_place(ram: Ram, gpa: u64, play: &Play, loaded: u8, brought: &Brought) -> bool {
    brought.mmio.is_none()
        && match play.act {
            Act::Load | Act::StackLoad => brought.al == loaded,
            Act::Store | Act::StackStore => ram.read_byte(gpa) == play.byte,
            // The instruction was nowhere else.
            Act::Fetch | Act::ReadKeys => true,
            Act::DescriptorLoad | Act::DescriptorTouch => {
                brought.fs_base == loaded && ram.read(gpa) >> 40 & 1 == 1
            }
        }
}

/// Whether an access without backing left the guest at the walker's GPA.
fn outside(answer: &Result<Translation, Fault>, play: &Play, brought: &Brought) -> bool {
    let store = matches!(play.act, Act::Store | Act::StackStore);
    let expected = answer.map(|page| (page.gpa.0, store.then_some(play.byte)));
    brought.mmio == expected.ok() && (store || brought.al == play.byte)
}

fn classify(judge: &mut Judge, answer: &Result<Translation, Fault>, expected: &Expected, play: &Play) {
    match answer {
        Ok(page) => {
            judge.count(mapped_by(play.act), u64::from(play.cpl));
            judge.count(
                match page.page_size {
                    PageSize::Size4K => "mapped 4 KiB",
                    PageSize::Size2M => "mapped 2 MiB",
                    PageSize::Size1G => "mapped 1 GiB",
                    _ => "mapped otherwise",
                },
                0,
            );
            if page.backing == Backing::None {
                judge.count("mapped without backing", 0);
                if expected.or == Some(Outcome::Done) {
                    judge.exempt("fetch without backing at CPL 3, #UD");
                } else if expected.or.is_some() {
                    judge.exempt("fetch without backing, under SMAP");
                } else if play.act == Act::Fetch {
                    judge.exempt("fetch without backing, KVM cannot emulate it");
                }
            }
        }
        Err(fault) => {
            let level = u64::from(fault.level);
            match fault.reason {
                Reason::NotPresent => judge.count("refused: not present, level", level),
                Reason::ReservedBits => judge.count("refused: reserved, level", level),
                Reason::SupervisorPage => judge.count("refused: supervisor page, level", level),
                Reason::NoExecute => judge.count("refused: no execute, level", level),
                Reason::ReadOnly => judge.count("refused: read-only, level", level),
                Reason::Smep => judge.count("refused: SMEP", 0),
                Reason::Smap => judge.count("refused: SMAP", 0),
                Reason::TableUnbacked => {
                    judge.count("refused: table outside memory, level", level);
                    judge.exempt("table outside memory, #PF with P clear");
                }
                Reason::NonCanonical => judge.count("refused: not canonical", 0),
                _ => judge.count("refused otherwise", 0),
            }
        }
    }
    match expected.outcome {
        Outcome::Exception { vector: 14, code, .. } => {
            judge.count("#PF, error code", code);
            judge.count_if("#PF on a fetch without I/D", expected.fetch_unreported);
            judge.count_if("#PF on an implicit supervisor access", play.act.is_implicit());
        }
        Outcome::Exception { vector: 13, .. } => judge.count("#GP", 0),
        Outcome::Exception { vector: 12, .. } => {
            judge.count("#SS", 0);
            if expected.or.is_some() {
                judge.exempt("#SS expected, #GP accepted");
            }
        }
        _ => {}
    }
}

fn mapped_by(act: Act) -> &'static str {
    match act {
        Act::Load => "mapped: load, CPL",
        Act::Store => "mapped: store, CPL",
        Act::Fetch => "mapped: fetch, CPL",
        Act::StackLoad => "mapped: stack load, CPL",
        Act::StackStore => "mapped: stack store, CPL",
        Act::DescriptorLoad => "mapped: descriptor read, CPL",
        Act::DescriptorTouch => "mapped: descriptor read and write, CPL",
        Act::ReadKeys => "no access",
    }
}

/// Says whether protection keys could be judged here.
fn report_protection_keys(bed: &mut Bed) -> Result<(), Failed> {
    if !bed.pke {
        println!("  PKRU is not judged: CR4.PKE is refused");
        return Ok(());
    }
    bed.ground.clear(&bed.machine)?;
    let vcpu = &mut bed.vcpus[0];
    let mut sregs = vcpu.reset;
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.cr4 = CR4_PAE | CR4_PKE;
    sregs.efer = EFER_LME | EFER_LMA;
    let play = Play { act: Act::ReadKeys, cpl: 0, ac: false, gva: 0, byte: 0 };
    bed.ground.dress(&mut sregs, &play);
    let (outcome, _) = bed.ground.run(&mut vcpu.fd, &sregs, &play);
    println!("  PKRU is not judged, only CR4.PKE with PKRU 0: RDPKRU under CR4.PKE gives {outcome:?}");
    Ok(())
}
