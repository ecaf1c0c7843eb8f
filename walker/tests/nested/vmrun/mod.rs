//! Accesses that an L2 executes, entered by its L1's own VMRUN: #PF error codes and EXITINFO1 as L1 sees them.
//!
//! L1 is fourteen bytes long: it executes VMRUN for one VMCB after another. Each intercepts #PF, #GP and VMMCALL, so that
//! every access ends in one exit: #PF, #GP, NPF, or the VMMCALL behind the access. L2 is in any paging mode; L1's own mode
//! selects NPT's format: 2-level (CR4.PSE set and clear), PAE, 4-level or 5-level.
//!
//! A case has L2 tables and an NPT root of its own, under which one of L2's pages has an nGPA of its own, behind a leaf of any
//! size, with or without trouble on the way. Its fetch of the instruction that makes the access goes through the same NPT
//! root, and may be refused first: it is walked first. When all VMCBs are used, the memory slot is taken away and given
//! back, which drops every shadow of NPT.
//!
//! # Who decides
//! An NPF's low 32 bits, and the accessed and dirty bits in NPT, are KVM's walk of NPT; EXITINFO1's bits 33:32, EXITINFO2
//! and all of #PF, protection keys included, are the emulated CPU's. By rule, counted:
//! - The emulated CPU reports reserved bits in L2's entries without P.
//! - KVM commits accessed and dirty bits of each nested walk that was finished, whatever becomes of the access.
//! - Where NPT is in 2-level format under EFER.NXE, KVM's code tells a fetch, for which the manual asks for CR4.PAE, too.
//! - Where L1 has CR4.SMEP and not EFER.NXE, KVM's code tells a fetch: SMEP has no say over NPT, where every access is the user's.
//!   So is every fourth batch.
//!
//! Not judged: L2's accessed and dirty bits where the access is refused, and those of PDPTEs, which the emulated CPU sets
//! early; the reserved bits of PDPTEs in NPT and most of those in L2, where KVM and the emulated CPU do not look; addresses above
//! what NPT's format can translate, whose high bits KVM ignores.

mod case;
mod memory;
mod vmcb;

use case::{Act, Case, Host, STORED, loaded};
use fastrand::Rng;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs};
use kvm_ioctls::VcpuExit;
use libtest_mimic::Failed;
use memory::{CASES, HOST_SAVE, L1_CODE, L1_TABLES, Memory, RAM_BYTES, VMCBS};
use pagewalk::{
    Access, AccessKind, ControlRegisters, Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, FaultKind,
    PFEC_FETCH, PFEC_PRESENT, PFEC_RESERVED, PageSize, PagingMode, Privilege, Reason, Step, Trace,
    Translation, Walker,
};
use vmcb::{Exit, Left};

use crate::bed::judge::{Judge, cases};
use crate::bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, DIRTY,
    EFER_LMA, EFER_LME, EFER_NXE, EFER_SVME, Machine, Maker, PAGE, RFLAGS_FIXED, Vcpu, long_mode, walk, when,
};

const VM_HSAVE_PA: u32 = 0xc001_0117;

pub(crate) fn judge(name: &'static str, l2: PagingMode, npt: PagingMode) -> Result<(), Failed> {
    let machine = Machine::new(RAM_BYTES)?;
    let vcpu = machine.vcpu(0, Maker::Amd, machine.maxphyaddr()?)?;
    let msr = kvm_msr_entry { index: VM_HSAVE_PA, data: HOST_SAVE, ..kvm_msr_entry::default() };
    let msrs = Msrs::from_entries(&[msr]).map_err(|error| format!("{error:?}"))?;
    if vcpu.fd.set_msrs(&msrs)? != 1 {
        return Err("VM_HSAVE_PA cannot be set: the vCPU has no SVM".into());
    }
    let mut judge = Judge::new(name)?;
    let mut rng = Rng::with_seed(judge.seed());
    let memory = Memory::new(machine.ram, l2, npt);
    let mut bed = Bed { machine, vcpu, memory, batches: 0 };
    // Of PAE paging in L2, KVM_TRANSLATE does not see that PDPTEs are loaded from memory.
    let wanted = cases(50_000)? / if l2 == PagingMode::Pae { 10 } else { 16 };
    while judge.cases() < wanted {
        bed.batch(&mut rng, &mut judge)?;
    }
    judge.finish(&minima(l2, npt))
}

struct Bed {
    machine: Machine,
    vcpu: Vcpu,
    memory: Memory,
    batches: u64,
}

/// What an access has to end in.
struct Expected {
    exit: Exit,
    /// The page that it goes to, where it succeeds.
    gpa: Option<u64>,
}

impl Bed {
    fn batch(&mut self, rng: &mut Rng, judge: &mut Judge) -> Result<(), Failed> {
        let cpu = self.vcpu.profile();
        let host = self.host(rng);
        self.batches += 1;
        self.machine.renew()?;
        self.memory.clear(rng);
        let mut batch = Vec::new();
        for number in 0..CASES {
            let case = Case::make(rng, &mut self.memory, &host, &cpu);
            vmcb::write(&self.memory, number, &case);
            let walker = case.walker(&host, &cpu)?;
            batch.push((case, walker));
        }
        self.run(&host)?;

        for (number, (case, walker)) in (0..).zip(&batch) {
            let expected = self.expect(case, walker, &host, judge)?;
            let left = vmcb::read(self.machine.ram, number, self.memory.l2.mode);
            let seen = self.seen(case, &left, expected.gpa);
            judge.case();
            if seen != expected.exit {
                judge.disagree(|| {
                    format!(
                        "walker {:x?}, L1 saw {seen:x?}\n{}",
                        expected.exit,
                        self.describe(case, walker, &host)
                    )
                });
            }
            if let Some(what) = self.compare_entries(case, expected.exit) {
                judge.disagree(|| format!("{what}\n{}", self.describe(case, walker, &host)));
            }
        }
        // The NPT that all cases share, and what is no entry in that of one.
        let mut pages = self.memory.shared_npt().iter().chain(&batch[0].0.npt_pages);
        if let Some(what) = pages.find_map(|page| self.differs((*page..page + PAGE).step_by(8))) {
            judge.disagree(|| format!("after the batch: {what} {host:x?}"));
        }
        Ok(())
    }

    /// L1's registers: NPT's format, and much that must not matter to it.
    fn host(&self, rng: &mut Rng) -> Host {
        let npt = self.memory.npt;
        let smep_alone = self.batches.is_multiple_of(4);
        let nxe = !smep_alone && rng.u32(0..4) != 0;
        let registers = ControlRegisters {
            cr0: CR0_PE | CR0_NE | CR0_PG | when(rng.bool(), CR0_WP),
            cr3: L1_TABLES[0],
            cr4: when(npt.levels > 2, CR4_PAE)
                | when(npt.levels == 5, CR4_LA57)
                | when(rng.u32(0..3) != 0, CR4_PSE)
                | when(smep_alone || rng.bool(), CR4_SMEP)
                | when(rng.bool(), CR4_SMAP),
            efer: EFER_SVME | when(npt.is_long(), EFER_LME | EFER_LMA) | when(nxe, EFER_NXE),
            ..ControlRegisters::default()
        };
        Host { registers, pkru: rng.u32(..) & rng.u32(..) }
    }

    /// Has L1 execute VMRUN for every VMCB.
    fn run(&mut self, host: &Host) -> Result<(), Failed> {
        let mut sregs = self.vcpu.reset;
        long_mode(&mut sregs, host.registers.cr3);
        (sregs.cr0, sregs.cr4, sregs.efer) = (host.registers.cr0, host.registers.cr4, host.registers.efer);
        if !self.memory.npt.is_long() {
            (sregs.cs.l, sregs.cs.db) = (0, 1);
        }
        self.vcpu.fd.set_sregs(&sregs)?;
        self.machine.set_pkru(&self.vcpu.fd, host.pkru)?;
        self.vcpu.fd.set_regs(&kvm_regs {
            rip: L1_CODE,
            rax: VMCBS,
            rbx: VMCBS + CASES * PAGE,
            rcx: STORED.into(),
            rflags: RFLAGS_FIXED,
            ..kvm_regs::default()
        })?;
        loop {
            match self.vcpu.fd.run() {
                Ok(VcpuExit::IoOut(..)) => return Ok(()),
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == 4 => {}
                other => {
                    let other = format!("{other:?}");
                    let (rip, rax) = self.vcpu.fd.get_regs().map(|regs| (regs.rip, regs.rax))?;
                    return Err(format!("L1 came to {other} at {rip:#x}, VMCB {rax:#x}: {host:x?}").into());
                }
            }
        }
    }

    fn seen(&self, case: &Case, left: &Left, gpa: Option<u64>) -> Exit {
        let in_place = match case.act {
            Act::Load => left.rax as u8 == loaded(case.gva),
            Act::Store => self.machine.ram.read_byte(case.page + case.gva % PAGE) == STORED,
            Act::Fetch => left.rip == case.gva,
        };
        let there = gpa.is_none_or(|gpa| gpa == case.page + case.gva % PAGE);
        match left.exit {
            Exit::Done if !in_place || !there => Exit::Elsewhere,
            exit => exit,
        }
    }

    /// The exit, with the accessed and dirty bits of the case in the copy.
    fn expect(
        &self,
        case: &Case,
        walker: &Walker,
        host: &Host,
        judge: &mut Judge,
    ) -> Result<Expected, Failed> {
        let access = |kind| {
            let privilege = if case.user { Privilege::User } else { Privilege::Supervisor };
            Access::new(kind, privilege).with_ac(case.ac).with_pkru(host.pkru)
        };
        let code = self.memory.code(case.user, case.act == Act::Store);
        let accesses = match case.act {
            Act::Load => [Some((code, AccessKind::Fetch)), Some((case.gva, AccessKind::Read))],
            Act::Store => [Some((code, AccessKind::Fetch)), Some((case.gva, AccessKind::Write))],
            Act::Fetch => [None, Some((case.gva, AccessKind::Fetch))],
        };
        let mut page = None;
        for (gva, kind) in accesses.into_iter().flatten() {
            let mut trace = Trace::new();
            match walk(walker, self.memory.copy, gva, &access(kind), &mut trace, judge) {
                Ok(translation) => page = Some(translation),
                Err(fault) => {
                    judge.count_if("refused on the way to the access", gva != case.gva);
                    if self.commit_finished_nested_walks(trace.steps()) {
                        judge.exempt("refused, with accessed or dirty bits of finished nested walks set");
                    }
                    let exit = self.exit(&fault, kind == AccessKind::Fetch, host, judge)?;
                    return Ok(Expected { exit, gpa: None });
                }
            }
        }
        let page = page.ok_or("a case makes an access")?;
        count_page(&page, case, judge);
        Ok(Expected { exit: Exit::Done, gpa: Some(page.gpa.0) })
    }

    fn exit(&self, fault: &Fault, fetch: bool, host: &Host, judge: &mut Judge) -> Result<Exit, Failed> {
        count_fault(fault, judge);
        match fault.kind {
            FaultKind::GeneralProtection => Ok(Exit::GeneralProtection),
            FaultKind::PageFault { error_code } => {
                let mut code = error_code;
                if code & PFEC_RESERVED != 0 {
                    judge.exempt("reserved bits in L2 reported without P");
                    code &= !PFEC_PRESENT;
                }
                judge.count("#PF, error code", code.into());
                Ok(Exit::PageFault { code: code.into(), cr2: fault.address })
            }
            FaultKind::NestedPageFault { exit_info_1 } => {
                let mut info = exit_info_1;
                let two_level = self.memory.npt.mode == PagingMode::TwoLevel;
                let of_final = info & EXIT_INFO_1_FINAL != 0;
                if fetch && of_final {
                    let nxe = host.registers.efer & EFER_NXE != 0;
                    let smep = host.registers.cr4 & CR4_SMEP != 0;
                    if two_level && nxe {
                        judge.exempt("fetch reported under EFER.NXE in 2-level NPT");
                        info |= u64::from(PFEC_FETCH);
                    } else if !nxe && smep {
                        judge.exempt("fetch reported under CR4.SMEP without EFER.NXE");
                        judge.count("NPF of a fetch under SMEP alone", 0);
                        info |= u64::from(PFEC_FETCH);
                    }
                }
                judge.count("NPF, EXITINFO1 code", info);
                Ok(Exit::NestedPageFault { info, ngpa: fault.nested_gpa.map_or(0, |ngpa| ngpa.0) })
            }
            _ => Err(format!("no case is made for {fault:?}").into()),
        }
    }

    /// KVM commits a nested walk as soon as that is done, whatever becomes of the access; policy `Set` commits nothing of a
    /// refused one. Does to the copy what KVM does.
    fn commit_finished_nested_walks(&self, steps: &[Step]) -> bool {
        let npt = self.memory.npt;
        let mut changed = false;
        for finished in steps.split_inclusive(|step| step.dimension == Dimension::Guest) {
            let Some((guest, nested)) = finished.split_last() else { continue };
            if guest.dimension != Dimension::Guest {
                break;
            }
            for (at, step) in nested.iter().enumerate() {
                if (npt.mode, step.level) == (PagingMode::Pae, 3) {
                    continue;
                }
                let dirty = when(at + 1 == nested.len(), DIRTY);
                let entry = npt.read(self.memory.copy, step.entry_gpa.0);
                let wanted = entry | ACCESSED | dirty;
                changed |= wanted != entry;
                npt.write(self.memory.copy, step.entry_gpa.0, wanted);
            }
        }
        changed
    }

    /// Where the accessed and dirty bits that the case left differ from the walker's.
    fn compare_entries(&self, case: &Case, exit: Exit) -> Option<String> {
        let l2 = self.memory.l2;
        let in_npt = self.differs(case.npt_words.iter().copied());
        if in_npt.is_some() || exit != Exit::Done {
            return in_npt;
        }
        let entries = match case.entries.split_last() {
            Some((_pdpte, below)) if l2.mode == PagingMode::Pae => below,
            _ => &case.entries,
        };
        self.differs(entries.iter().map(|gpa| gpa & !7))
    }

    fn differs(&self, mut words: impl Iterator<Item = u64>) -> Option<String> {
        let gpa = words.find(|gpa| self.memory.copy.read(*gpa) != self.machine.ram.read(*gpa))?;
        let (ours, theirs) = (self.memory.copy.read(gpa), self.machine.ram.read(gpa));
        Some(format!("entry at {gpa:#x}: walker left {ours:#x}, the machine {theirs:#x}"))
    }

    fn describe(&self, case: &Case, walker: &Walker, host: &Host) -> String {
        let mut text = format!("  {case:x?}\n  {host:x?}");
        let privilege = if case.user { Privilege::User } else { Privilege::Supervisor };
        let code = (self.memory.code(case.user, case.act == Act::Store), AccessKind::Fetch);
        for (gva, kind) in [code, (case.gva, AccessKind::Read)] {
            let access = Access::new(kind, privilege).with_ac(case.ac).with_pkru(host.pkru);
            let mut trace = Trace::new();
            let memory = pagewalk::Window::new(self.memory.copy.words());
            let observe = pagewalk::AdPolicy::Observe;
            let now = walker.translate_with(&memory, pagewalk::Gva(gva), &access, observe, &mut trace);
            text += &format!("\n  {kind:?} of {gva:#x}, now {now:x?}");
            for step in trace.steps() {
                text += &format!(
                    "\n    {:?} level {}: [{:#x}] = {:#x} for {:#x}: {:?}",
                    step.dimension, step.level, step.entry_gpa, step.entry, step.input, step.verdict
                );
            }
        }
        text
    }
}

fn count_page(page: &Translation, case: &Case, judge: &mut Judge) {
    let cpl = u64::from(case.user) * 3;
    let class = match case.act {
        Act::Load => "done: read, CPL",
        Act::Store => "done: write, CPL",
        Act::Fetch => "done: fetch, CPL",
    };
    judge.count(class, cpl);
    judge.count(
        match page.page_size() {
            PageSize::Unpaged => "done unpaged",
            PageSize::Size4K => "done through 4 KiB",
            PageSize::Size2M => "done through 2 MiB",
            PageSize::Size4M => "done through 4 MiB",
            PageSize::Size1G => "done through 1 GiB",
        },
        0,
    );
    judge.count(
        match page.nested.map(|page| page.page_size) {
            Some(PageSize::Size4K) => "done over 4 KiB",
            Some(PageSize::Size2M) => "done over 2 MiB",
            Some(PageSize::Size4M) => "done over 4 MiB",
            Some(PageSize::Size1G) => "done over 1 GiB",
            _ => "done over nothing",
        },
        0,
    );
}

fn count_fault(fault: &Fault, judge: &mut Judge) {
    let class = match (fault.dimension, fault.reason) {
        (Dimension::Guest, Reason::NotPresent) => "#PF: not present, level",
        (Dimension::Guest, Reason::ReservedBits) => "#PF: reserved, level",
        (Dimension::Guest, Reason::SupervisorPage) => "#PF: supervisor page, level",
        (Dimension::Guest, Reason::ReadOnly) => "#PF: read-only, level",
        (Dimension::Guest, Reason::NoExecute) => "#PF: no execute, level",
        (Dimension::Guest, Reason::Smap) => "#PF: SMAP",
        (Dimension::Guest, Reason::Smep) => "#PF: SMEP",
        (Dimension::Guest, Reason::ProtectionKey) => "#PF: protection key",
        (Dimension::Guest, Reason::NonCanonical) => "#GP",
        (Dimension::Nested, Reason::NotPresent) => "NPF: not present, level",
        (Dimension::Nested, Reason::ReservedBits) => "NPF: reserved, level",
        (Dimension::Nested, Reason::SupervisorPage) => "NPF: supervisor page, level",
        (Dimension::Nested, Reason::ReadOnly) => "NPF: read-only, level",
        (Dimension::Nested, Reason::NoExecute) => "NPF: no execute, level",
        _ => "refused otherwise",
    };
    let leveled = class.ends_with("level");
    judge.count(class, if leveled { fault.level.into() } else { 0 });
    if matches!(fault.reason, Reason::SupervisorPage | Reason::ReadOnly | Reason::NoExecute) {
        let nested = fault.dimension == Dimension::Nested;
        judge.count(if nested { "NPF: rights, level" } else { "#PF: rights, level" }, fault.level.into());
    }
    if let FaultKind::NestedPageFault { exit_info_1 } = fault.kind {
        let table = exit_info_1 & EXIT_INFO_1_TABLE != 0;
        judge.count(if table { "NPF for a table" } else { "NPF for the final address" }, 0);
    }
}

/// For 200,000 cases.
fn minima(l2: PagingMode, npt: PagingMode) -> Vec<(&'static str, Option<u64>, u64)> {
    let mut minima = Vec::new();
    for class in ["done: read, CPL", "done: write, CPL", "done: fetch, CPL"] {
        minima.extend([(class, Some(0), 4_000), (class, Some(3), 4_000)]);
    }
    let l2_levels = u64::from(crate::bed::shape::Shape::in_memory(l2).levels);
    let npt_levels = u64::from(crate::bed::shape::Shape::in_memory(npt).levels);
    let through: &[&str] = match l2 {
        PagingMode::None => &["done unpaged"],
        PagingMode::TwoLevel => &["done through 4 KiB", "done through 4 MiB"],
        PagingMode::Pae => &["done through 4 KiB", "done through 2 MiB"],
        _ => &["done through 4 KiB", "done through 2 MiB", "done through 1 GiB"],
    };
    minima.extend(through.iter().map(|class| (*class, None, 5_000)));
    let over: &[&str] = match npt {
        PagingMode::TwoLevel => &["done over 4 KiB", "done over 4 MiB"],
        PagingMode::Pae => &["done over 4 KiB", "done over 2 MiB"],
        _ => &["done over 4 KiB", "done over 2 MiB", "done over 1 GiB"],
    };
    minima.extend(over.iter().map(|class| (*class, None, 1_000)));
    for level in 1..=l2_levels {
        minima.push(("#PF: not present, level", Some(level), 300));
        // A PDPTE grants everything.
        if (l2, level) != (PagingMode::Pae, 3) {
            minima.push(("#PF: rights, level", Some(level), 400));
        }
        if l2 != PagingMode::TwoLevel || level == 2 {
            minima.push(("#PF: reserved, level", Some(level), 100));
        }
    }
    for level in 1..=npt_levels {
        minima.push(("NPF: not present, level", Some(level), 300));
        if (npt, level) == (PagingMode::Pae, 3) {
            continue;
        }
        minima.push(("NPF: rights, level", Some(level), 600));
        if npt != PagingMode::TwoLevel || level == 2 {
            minima.push(("NPF: reserved, level", Some(level), 100));
        }
    }
    minima.extend([("NPF: supervisor page, level", None, 2_000), ("NPF for the final address", None, 5_000)]);
    minima.push(("NPF of a fetch under SMEP alone", None, 400));
    if npt != PagingMode::TwoLevel {
        minima.push(("NPF: no execute, level", None, 800));
    }
    for code in [4, 5, 6, 7, 0x15] {
        minima.push(("NPF, EXITINFO1 code", Some(EXIT_INFO_1_FINAL | code), 200));
    }
    if l2_levels > 0 {
        for code in [6, 7, 0xf] {
            minima.push(("NPF, EXITINFO1 code", Some(EXIT_INFO_1_TABLE | code), 200));
        }
        for code in [0, 1, 2, 3, 4, 5, 6, 7] {
            minima.push(("#PF, error code", Some(code), 200));
        }
        minima.extend([
            ("NPF for a table", None, 5_000),
            ("NPF: read-only, level", None, 2_000),
            ("#PF: supervisor page, level", None, 2_000),
            ("#PF: read-only, level", None, 2_000),
            ("#PF: SMAP", None, 1_000),
            ("#PF: SMEP", None, 400),
        ]);
    }
    if l2_levels > 2 {
        minima.push(("#PF: no execute, level", None, 1_000));
        for code in [0x10, 0x11, 0x14, 0x15] {
            minima.push(("#PF, error code", Some(code), 100));
        }
    }
    if l2.is_long() {
        minima.extend([("#PF: protection key", None, 400), ("#GP", None, 800)]);
    }
    minima
}
