//! Judge `kvm-execution`: the walker's outcome against what happens when a vCPU executes the access.
//!
//! A case is one load, store, fetch, stack access or descriptor load, at CPL 3 or 0, through entries of its own.
//! The walker walks a copy of the tables with policy `Observe`, then `Set`; the vCPU executes on the guest's. Equal must
//! be: the vector, the error code and CR2, or that the access succeeded; *where* it succeeded (the byte that was loaded or stored
//! lies at the walker's GPA; the fetched instruction was put only there; an access without backing leaves the guest with
//! the walker's GPA); and all its entries afterwards, accessed and dirty bits included. Nothing else in the tables may
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
//! # Inside the bed `nested-amd`, with `npt=0`: `kvm-execution-*`
//! Without paging, and in 2-level (CR4.PSE set and clear), PAE, 4-level and 5-level paging, with leaves of every size. KVM
//! shadows the guest's tables, and its walker decides what the emulated CPU may not do by itself. By rule, counted:
//! - A fetch from a page without backing at CPL 3: KVM cannot emulate it, and delivers #UD there.
//! - The emulated CPU has no #SS for addresses that are not canonical: #GP is accepted in its place.
//! - 32-bit paging under EFER.NXE without SMEP: KVM's error code tells a fetch. The manual asks for CR4.PAE, too.
//!
//! The accessed bit of a descriptor is written through bytes 7:4: CR2 is compared without its low three bits. Implicit
//! supervisor accesses are made with AC clear under SMAP: at CPL 3 the CPU refuses a user page to them, whatever AC is,
//! and KVM, which cannot tell them from explicit ones by the CPU's error code, shadows the page again, without end. (The
//! CPU and the walker are right.) KVM takes every CPU's 4 MiB pages to have 36-bit addresses: MAXPHYADDR is 36 there. The
//! PDPTEs of PAE paging are registers, valid or absent, and their page directories lie in memory: KVM stops the guest
//! where they do not.
//!
//! # Inside the bed `nested-amd`, with `npt=1`: `keys-execution-*`
//! KVM offers protection keys only here, where the emulated CPU walks the guest's tables, and decides: 4-level and 5-level
//! paging with PKRU. By rule, counted, besides the above:
//! - The emulated CPU reports reserved bits without P.
//! - It sets accessed bits while it walks: where the walk is refused, entries above its end may have theirs.
//! - It does not reserve bit 8 of the highest levels: the vCPU is an Intel one.
//!
//! # Not judged
//! - PKRU outside that bed: the local host has no protection keys, CR4.PKE is accepted, but RDPKRU and WRPKRU are not
//!   emulated and no ioctl carries PKRU in. CR4.PKE and the entries' key bits are varied all the same, with PKRU 0: they
//!   must then refuse nothing, and not be reserved. The judge reports what RDPKRU does.
//! - 5-level paging outside that bed (CR4.LA57 is refused), 1 GiB leaves unless the vCPU has them (bit 7 of a PDPTE is then
//!   reserved), shadow stacks.
//! - Tables that refer to themselves or to each other: `judge_translate` has them.
//!
//! `PAGEWALK_FULL=1` runs an odometer instead of a sample: per level the eight combinations of W, U and NX, absent and
//! reserved; both page sizes; accessed bits of the upper levels, accessed and dirty bit of the leaf; load, store and
//! fetch; CPL; AC; WP, NXE, SMEP and SMAP: 16.9 million cases, about ten minutes in a release build.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;
mod execution;

use bed::case::{Case, Controls, Odometer};
use bed::ground::{
    Act, Brought, FRAME_COUNT, FRAMES, Ground, Outcome, Play, RAM_BYTES, SUPERVISOR_DONE, USER_DONE,
};
use bed::judge::{Judge, cases, full, skipped};
use bed::shape::PAE_DIRECTORIES;
use bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, DIRTY,
    EFER_LMA, EFER_LME, EFER_NXE, Machine, Maker, PAGE, PAGE_SIZE, PRESENT, Ram, Vcpu, walk, when,
};
use execution::Decides;
use execution::classes::{classify, minima};
use execution::expected::Expected;
use fastrand::Rng;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::SyncReg;
use libtest_mimic::{Arguments, Failed, Trial};
use pagewalk::{
    Access, AccessKind, Backing, Fault, NoTrace, PagingMode, Privilege, Reason, Translation, Walker,
};

const HERE: [(&str, PagingMode); 1] = [("kvm-execution", PagingMode::FourLevel)];
const WITH_NPT_0: [(&str, PagingMode); 5] = [
    ("kvm-execution-unpaged", PagingMode::None),
    ("kvm-execution-2", PagingMode::TwoLevel),
    ("kvm-execution-pae", PagingMode::Pae),
    ("kvm-execution-4", PagingMode::FourLevel),
    ("kvm-execution-5", PagingMode::FiveLevel),
];
const WITH_NPT_1: [(&str, PagingMode); 2] =
    [("keys-execution-4", PagingMode::FourLevel), ("keys-execution-5", PagingMode::FiveLevel)];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let decides = Decides::here();
    let judges: &[(&str, PagingMode)] = match decides {
        Decides::Kernel => &HERE,
        Decides::Shadows => &WITH_NPT_0,
        Decides::Emulator => &WITH_NPT_1,
    };
    let trial = |&(name, mode): &(&'static str, PagingMode)| {
        Trial::test(name, move || match Bed::new(decides, mode) {
            Ok(bed) => judge(bed, name),
            Err(reason) => skipped("kvm", &reason),
        })
    };
    libtest_mimic::run(&arguments, judges.iter().map(trial).collect()).exit();
}

struct Bed {
    decides: Decides,
    machine: Machine,
    copy: Ram,
    ground: Ground,
    vcpus: Vec<Vcpu>,
    /// CR4.PKE can be set.
    pke: bool,
}

impl Bed {
    fn new(decides: Decides, mode: PagingMode) -> Result<Bed, String> {
        let machine = Machine::new(RAM_BYTES)?;
        let here = machine.maxphyaddr()?;
        let makes: &[(Maker, u8)] = match (decides, mode) {
            // The emulated CPU knows one width, and does not reserve bit 8 of its highest levels.
            (Decides::Emulator, _) => &[(Maker::Intel, here)],
            // KVM takes every CPU's 4 MiB pages to have 36-bit addresses.
            (_, PagingMode::TwoLevel) => &[(Maker::Intel, 36), (Maker::Amd, 36)],
            _ => &[(Maker::Intel, here), (Maker::Amd, 40)],
        };
        let mut vcpus = Vec::new();
        for (id, (maker, maxphyaddr)) in makes.iter().enumerate() {
            let mut vcpu = machine.vcpu(id as u64, *maker, *maxphyaddr)?;
            vcpu.fd.set_sync_valid_reg(SyncReg::Register);
            vcpu.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            vcpus.push(vcpu);
        }
        if machine.has_keys() != (decides == Decides::Emulator) {
            return Err(format!(
                "{decides:?} decides, and protection keys are there: {}",
                machine.has_keys()
            ));
        }
        let copy = Ram::new(RAM_BYTES);
        let ground = Ground::new(&machine, copy, mode);
        let mut sregs = vcpus[0].reset;
        bed::long_mode(&mut sregs, ground.cr3());
        sregs.cr4 |= CR4_PKE;
        let pke = vcpus[0].fd.set_sregs(&sregs).is_ok();
        Ok(Bed { decides, machine, copy, ground, vcpus, pke })
    }
}

fn judge(mut bed: Bed, name: &'static str) -> Result<(), Failed> {
    let mut judge = Judge::new(name)?;
    let mut rng = Rng::with_seed(judge.seed());
    if bed.decides == Decides::Kernel {
        report_protection_keys(&mut bed)?;
    }
    let shape = bed.ground.shape;
    if full() && bed.decides == Decides::Kernel {
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
            if bed.decides == Decides::Emulator {
                controls.pke = rng.u32(0..8) != 0;
                controls.pkru = rng.u32(..) & rng.u32(..);
            }
            let largest = match shape.mode {
                PagingMode::TwoLevel => 1 + u32::from(controls.pse),
                PagingMode::FourLevel | PagingMode::FiveLevel if bed.vcpus[0].gib_pages => 3,
                _ => 2,
            };
            bed.root(&mut rng, controls, &mut judge, |rng| Some(Case::sample(rng, shape, largest)))?;
        }
    }
    bed.clear(&mut judge, [0; 4])?;
    judge.finish(&minima(bed.decides, shape.mode, bed.vcpus[0].gib_pages))
}

impl Bed {
    fn clear(&mut self, judge: &mut Judge, pdptes: [u64; 4]) -> Result<(), Failed> {
        if let Some(gpa) = self.ground.clear(&self.machine, pdptes)? {
            judge.disagree(|| format!("memory at {gpa:#x} changed: it is no case's entry"));
        }
        Ok(())
    }

    fn registers(&self, controls: Controls) -> kvm_sregs {
        let mode = self.ground.shape.mode;
        let mut sregs = self.vcpus[controls.vcpu].reset;
        sregs.cr0 = CR0_PE | CR0_NE | when(mode != PagingMode::None, CR0_PG) | when(controls.wp, CR0_WP);
        sregs.cr3 = self.ground.cr3();
        sregs.cr4 = when(mode == PagingMode::Pae || mode.is_long(), CR4_PAE)
            | when(mode == PagingMode::FiveLevel, CR4_LA57)
            | when(controls.pse, CR4_PSE)
            | when(controls.smep, CR4_SMEP)
            | when(controls.smap, CR4_SMAP)
            | when(controls.pke, CR4_PKE);
        sregs.efer = when(mode.is_long(), EFER_LME | EFER_LMA) | when(controls.nxe, EFER_NXE);
        sregs
    }

    /// Runs cases under one root until it is full or there are no more.
    fn root(
        &mut self,
        rng: &mut Rng,
        controls: Controls,
        judge: &mut Judge,
        mut next: impl FnMut(&mut Rng) -> Option<Case>,
    ) -> Result<(), Failed> {
        self.clear(judge, pdptes(rng))?;
        let sregs = self.registers(controls);
        let vcpu = &self.vcpus[controls.vcpu];
        let shape = self.ground.shape;
        let registers = (shape.mode == PagingMode::Pae).then_some(self.ground.pdptes);
        let walker = Walker::new(vcpu.gva_walk(&sregs, registers)?);
        if self.decides == Decides::Emulator {
            self.machine.set_pkru(&vcpu.fd, controls.pkru)?;
        }
        for _ in 0..shape.cases_per_root() {
            let Some(mut case) = next(rng) else { break };
            case.ac &= !(self.decides != Decides::Kernel && controls.smap && case.act.is_implicit());
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
        let plot = self.ground.plot().expect("a root has room for as many cases");
        let vcpu = &mut self.vcpus[controls.vcpu];
        let shape = self.ground.shape;
        let mut act = case.act;
        if shape.mode == PagingMode::Pae
            && act.is_implicit()
            && self.ground.pdptes[(plot.base >> 30) as usize] & 1 == 0
        {
            // The GDT would be out of the handlers' reach.
            act = Act::Load;
        }
        let mut gva = address(rng, shape, act, case.leaf, plot.base);
        // By level, the PTE first: where the entry lies, and what it holds.
        let mut at = [0; 5];
        let mut before = [0; 5];
        let levels = if shape.levels == 0 { 0..0 } else { case.leaf as usize - 1..shape.levels as usize };
        for below in levels.clone().rev() {
            let level = below as u32 + 1;
            let depth = (shape.levels - level) as usize;
            at[below] = match depth {
                0 => plot.top,
                _ => plot.tables[depth - 1] + shape.offset(level, gva),
            };
            let frame = match level {
                _ if level != case.leaf => plot.tables[depth],
                1 => FRAMES + rng.u64(0..FRAME_COUNT) * PAGE,
                _ => shape.large_frame(level),
            };
            before[below] = case.entry(rng, shape, level, frame, vcpu);
            if shape.mode == PagingMode::TwoLevel && level == 2 && !controls.pse {
                before[below] |= when(rng.bool(), PAGE_SIZE);
            }
            if self.decides == Decides::Emulator && level == case.leaf {
                before[below] |= rng.u64(..) & 0xf << 59;
            }
            self.ground.set_entry(at[below], before[below]);
        }
        if case.non_canonical {
            // Off by one bit, or just past the edge.
            let width = shape.linear_width();
            gva = match rng.u32(0..4) {
                0 => 1 << (width - 1),
                1 => !(1 << (width - 1)),
                _ => gva ^ 1 << rng.u32(width..64),
            };
        }

        let play = Play { act, cpl: case.cpl, ac: case.ac, gva, byte: rng.u8(..) };
        let (answer, prop) = ask(walker, self.copy, &play, controls.pkru, judge);
        let expected = Expected::new(&answer, self.decides, shape.mode, controls, &play);
        classify(judge, &answer, &expected, &play);
        judge.count_if(
            "allowed by a key that withholds",
            answer.is_ok_and(|page| {
                controls.pke && page.rights().user() && controls.pkru >> (2 * page.key()) & 0b11 != 0
            }),
        );

        let ram = self.machine.ram;
        let loaded = play.byte.wrapping_add(0x55);
        if let Some(gpa) = prop {
            prepare(ram, gpa, &play, loaded);
        }
        self.ground.dress(&mut sregs, &play);
        let (mut outcome, brought) = self.ground.run(&mut vcpu.fd, &sregs, &play);
        if let Outcome::Exception { cr2, .. } = &mut outcome
            && self.decides != Decides::Kernel
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
        let mut left = [0; 5];
        let mut ours = [0; 5];
        for below in levels.clone() {
            left[below] = shape.read(ram, at[below]);
            ours[below] = shape.read(self.copy, at[below]);
        }
        let same_entries = left == ours || self.sets_accessed_early(&answer, case.leaf, left, ours, judge);
        if (outcome != expected.outcome && Some(outcome) != expected.or) || !place || !same_entries {
            judge.disagree(|| {
                format!(
                    "{controls:x?} {play:x?}\n  walker {answer:x?}\n  expected {:x?}, got {outcome:x?}, {brought:x?}, in the right place: {place}\n  entries, PTE first: {before:x?}\n  walker   {ours:x?}\n  machine  {left:x?}",
                    expected.outcome
                )
            });
        }
        for below in levels {
            judge.count_if("accessed bit set", (before[below] ^ left[below]) & ACCESSED != 0);
            judge.count_if("dirty bit set", (before[below] ^ left[below]) & DIRTY != 0);
        }
        if let Some(gpa) = prop {
            ram.write_bytes(gpa, &[0; 8][..play.act.bytes()]);
        }
    }

    /// The emulated CPU sets the accessed bit of each table entry before it looks at the next, and of a PDPTE before it
    /// looks at its rights.
    fn sets_accessed_early(
        &self,
        answer: &Result<Translation, Fault>,
        leaf: u32,
        left: [u64; 5],
        ours: [u64; 5],
        judge: &mut Judge,
    ) -> bool {
        let end = match answer {
            Err(Fault {
                reason: Reason::NotPresent | Reason::ReservedBits | Reason::TableUnbacked,
                level,
                ..
            }) => *level,
            // Rights are decided at the leaf, whoever withholds them.
            Err(fault) if fault.level > 0 => leaf,
            _ => return false,
        };
        let early = (1..=5).zip(left.into_iter().zip(ours)).all(|(level, (left, ours))| {
            left == ours | left & when(level > end || (level, end) == (3, 3), ACCESSED)
        });
        let allowed = self.decides == Decides::Emulator && early;
        if allowed {
            judge.exempt("refused, with accessed bits set above the end of the walk");
        }
        allowed
    }
}

/// An address under the case's highest entry, from `base`. A descriptor lies where the GDT goes on, everything else
/// anywhere; a fetch needs two bytes of its page.
fn address(rng: &mut Rng, shape: bed::shape::Shape, act: Act, leaf: u32, base: u64) -> u64 {
    if act.is_implicit() {
        return base + rng.u64(0..PAGE / 8) * 8;
    }
    let frames = |rng: &mut Rng| match rng.u32(0..8) {
        0 => FRAMES + rng.u64(0..FRAME_COUNT * PAGE),
        _ => shape.large_frame(2) + rng.u64(0..PAGE << 9),
    };
    let gva = match shape.levels {
        // Addresses are physical: those of frames, or of nothing.
        0 if rng.u32(0..4) == 0 => rng.u64(RAM_BYTES..1 << 32),
        0 => frames(rng),
        // A page of 1 GiB shows all of memory: its frames are used.
        _ if leaf == 3 => base + (rng.u64(0..shape.span()) & !0x3fff_ffff) + frames(rng),
        _ => base + rng.u64(0..shape.span()),
    };
    gva - u64::from(act == Act::Fetch && gva % PAGE == PAGE - 1)
}

/// PDPTEs as registers may hold them: without reserved bits, and with page directories in memory. The stage needs the
/// first.
fn pdptes(rng: &mut Rng) -> [u64; 4] {
    let mut number = 0;
    PAE_DIRECTORIES.map(|directory| {
        number += 1;
        let ignored = rng.u64(..) & (0b11 << 3 | 0b111 << 9);
        if number > 1 && rng.u32(0..8) == 0 { rng.u64(..) & !PRESENT } else { directory | ignored | PRESENT }
    })
}

/// The walker's answer for the access, with its accessed and dirty bits set in `copy`; and where in memory the access
/// begins, if it does.
fn ask(
    walker: &Walker,
    copy: Ram,
    play: &Play,
    pkru: u32,
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
    let access = |kind| Access::new(kind, privilege).with_ac(play.ac).with_pkru(pkru).through_stack(stack);
    let mut walk = |access: &Access| walk(walker, copy, play.gva, access, &mut NoTrace, judge);
    let first = walk(&access(kind));
    let prop = first.ok().filter(|page| page.backing() != Backing::None).map(|page| page.gpa.0);
    match play.act {
        Act::DescriptorTouch if first.is_ok() => (walk(&access(AccessKind::Write)), prop),
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

/// Says whether protection keys could be judged here.
fn report_protection_keys(bed: &mut Bed) -> Result<(), Failed> {
    if !bed.pke {
        println!("  PKRU is not judged: CR4.PKE is refused");
        return Ok(());
    }
    bed.ground.clear(&bed.machine, [0; 4])?;
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
