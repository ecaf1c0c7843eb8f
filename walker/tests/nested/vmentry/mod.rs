//! Accesses that an L2 executes over EPT: #PF, EPT violations and EPT misconfigurations as L1 sees them in its VMCS.
//!
//! `KVM_SET_NESTED_STATE` enters L2, whose VMCS intercepts exceptions, so that every access ends in one exit: by one of
//! them, by EPT, or by the VMCALL behind the access. L1 is one instruction long, and says that it was reached; its VMCS is then
//! read by `KVM_GET_NESTED_STATE`. L2's own code is fetched through the same tables, and may be what EPT refuses.
//!
//! Who decides: which exit EPT causes, its guest-physical address, what EPT's entries allow (bits 5:3 of the qualification)
//! and EPT's accessed and dirty bits are KVM's walk of L1's EPT. What the access was (bits 2:0, 7 and 8), the guest-linear
//! address, all of #PF and the guest's accessed and dirty bits are the emulated CPU's.
//!
//! That CPU, against the manual ("Exit Qualification for EPT Violations", "Accessed and Dirty Flags for EPT"):
//! - Where EPT has accessed and dirty bits, an access to a table is a write, and reported as a read and a write; it
//!   reports a write alone. By rule: bit 0 is expected to be clear then.
//! - Where EPT has none, setting an accessed or dirty bit in a table is a write, which EPT may refuse; it does not ask EPT.
//!   By rule: such a case is made with these bits set before.
//!
//! Each case has tables of its own in both dimensions, under an EPTP of its own: KVM shadows EPT, and does not see that tables
//! change. When memory is full of cases, the memory slot is taken away and given back.

mod case;

use fastrand::Rng;
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use libtest_mimic::Failed;
use pagewalk::{
    Access, AccessKind, AdPolicy, EPT_VIOLATION_GVA_TRANSLATED, EPT_VIOLATION_READ, EPT_VIOLATION_WRITE,
    Fault, FaultKind, Gva, NoTrace, PageSize, PagingMode, Privilege, Reason, Translation, Walker, Window,
};

use self::case::{CASES_PER_SLOT, Case, LOADED, Plot, RAM_BYTES, set_stage};
use super::second::Root;
use super::vmcs12::{
    self, EXCEPTION_BITMAP, EXIT_INTERRUPTION_CODE, EXIT_INTERRUPTION_INFO, EXIT_QUALIFICATION, EXIT_REASON,
    GUEST_LINEAR_ADDRESS, GUEST_PHYSICAL_ADDRESS, Vmcs12,
};
use crate::bed::judge::{Judge, cases};
use crate::bed::shape::Shape;
use crate::bed::{Machine, Maker, PAGE_SIZE, PRESENT, RFLAGS_AC, RFLAGS_FIXED, Ram, Vcpu, WRITE, when};

const L1_CODE: u64 = 0x3000;
const L1_TABLES: [u64; 2] = [0x4000, 0x5000];
/// `out 0x40, al`
const L1_INSTRUCTION: [u8; 2] = [0xe6, 0x40];
/// What a store stores.
const STORED: u8 = 0x5a;

const REASON_EXCEPTION: u32 = 0;
const REASON_VMCALL: u32 = 18;
const REASON_EPT_VIOLATION: u32 = 48;
const REASON_EPT_MISCONFIGURATION: u32 = 49;
const GP: u32 = 13;
const PF: u32 = 14;
/// #UD, #DF, #SS, #GP, #PF.
const EXCEPTIONS: u32 = 1 << 6 | 1 << 8 | 1 << 12 | 1 << GP | 1 << PF;

/// How an access ended, as L1 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Done,
    /// The access succeeded at another address than the walker's.
    Elsewhere,
    PageFault {
        code: u32,
        cr2: u64,
    },
    GeneralProtection {
        code: u32,
    },
    Violation {
        qualification: u64,
        ngpa: u64,
        gva: u64,
    },
    Misconfiguration {
        ngpa: u64,
    },
    Other {
        reason: u32,
        info: u32,
        qualification: u64,
    },
}

pub(crate) fn judge(name: &'static str, mode: PagingMode) -> Result<(), Failed> {
    let machine = Machine::new(RAM_BYTES)?;
    let vcpu = machine.vcpu(0, Maker::Intel, machine.maxphyaddr()?)?;
    let mut bench = Bench { machine, vcpu, shape: Shape::new(mode) };
    bench.set_stage();
    let mut judge = Judge::new(name)?;
    let mut rng = Rng::with_seed(judge.seed());
    // A case takes milliseconds.
    let wanted = cases(10_000)? / 5;
    while judge.cases() < wanted {
        let number = judge.cases() % CASES_PER_SLOT;
        if number == 0 {
            vmcs12::leave(&bench.vcpu.fd)?;
            bench.machine.renew()?;
        }
        let case = Case::sample(&mut rng, mode, bench.vcpu.maxphyaddr);
        bench.play(&case, Plot::new(number, bench.shape), &mut judge)?;
    }
    judge.finish(&minima(mode))
}

struct Bench {
    machine: Machine,
    vcpu: Vcpu,
    shape: Shape,
}

impl Bench {
    fn set_stage(&self) {
        let ram = self.machine.ram;
        // L1: one gigabyte, as it is.
        ram.write(L1_TABLES[0], L1_TABLES[1] | PRESENT | WRITE);
        ram.write(L1_TABLES[1], PAGE_SIZE | PRESENT | WRITE);
        ram.write_bytes(L1_CODE, &L1_INSTRUCTION);
        set_stage(ram, self.shape);
    }

    fn play(&mut self, case: &Case, plot: Plot, judge: &mut Judge) -> Result<(), Failed> {
        let ram = self.machine.ram;
        let mut entries = case.write(ram, plot);
        let root = Root::eptp(plot.ept_root(), case.ept_accessed_dirty);
        let sregs = case.sregs(&self.vcpu, plot);
        let gva_walk = self.vcpu.gva_walk(&sregs, case.pdptes(plot))?;
        let walker = Walker::nested(gva_walk, root.walk(&self.vcpu, false)?);
        let script = Script::new(case, plot);
        let mut expected = script.run(&walker, ram, AdPolicy::Observe);
        let writes_table = is_write_to_table(&expected);
        if writes_table && !case.ept_accessed_dirty {
            judge.exempt("accessed or dirty bit in a table that EPT protects: set before");
            entries = case.settled().write(ram, plot);
            expected = script.run(&walker, ram, AdPolicy::Observe);
        }
        let mut exit = count(case, &expected, judge)?;
        if let Exit::Violation { qualification, .. } = &mut exit
            && writes_table
            && case.ept_accessed_dirty
        {
            judge.exempt("table accessed under EPT with accessed and dirty bits: reported as a write alone");
            *qualification &= !EPT_VIOLATION_READ;
        }
        let before: Vec<u64> = entries.iter().map(|gpa| ram.read(gpa & !7)).collect();

        let seen = self.execute(case, plot, root, expected.as_ref().ok())?;
        judge.case();
        if seen != exit {
            judge.disagree(|| format!("walker {exit:x?}, L1 saw {seen:x?}\n  {case:x?}"));
        } else if expected.is_ok() {
            let left: Vec<u64> = entries.iter().map(|gpa| ram.read(gpa & !7)).collect();
            for (gpa, entry) in entries.iter().zip(&before) {
                ram.write(gpa & !7, *entry);
            }
            let _ = script.run(&walker, ram, AdPolicy::Set);
            judge.count_if("accessed or dirty bits set", left != before);
            for (gpa, left) in entries.iter().zip(left) {
                let ours = ram.read(gpa & !7);
                if ours != left {
                    judge.disagree(|| {
                        format!("entry at {gpa:#x}: walker left {ours:#x}, the L2 {left:#x}\n  {case:x?}")
                    });
                }
            }
        }
        Ok(())
    }

    /// Lets L2 make the access. `page` is where the walker takes it to go.
    fn execute(
        &mut self,
        case: &Case,
        plot: Plot,
        root: Root,
        page: Option<&Translation>,
    ) -> Result<Exit, Failed> {
        let Root::Eptp(eptp) = root else { return Err("there is no EPT".into()) };
        let mut vmcs = Vmcs12::new(eptp, &case.sregs(&self.vcpu, plot), &self.vcpu.reset);
        vmcs.set_host(L1_TABLES[0], L1_CODE);
        vmcs.set_u32(EXCEPTION_BITMAP, EXCEPTIONS);
        if let Some(pdptes) = case.pdptes(plot) {
            vmcs.set_pdptes(pdptes);
        }
        vmcs12::enter(&self.vcpu.fd, &vmcs)?;
        self.vcpu.fd.set_regs(&kvm_regs {
            rip: case.rip(plot),
            rax: STORED.into(),
            rdi: case.gva(plot),
            rflags: RFLAGS_FIXED | when(case.ac, RFLAGS_AC),
            ..kvm_regs::default()
        })?;
        match self.vcpu.fd.run() {
            Ok(VcpuExit::IoOut(..)) => {}
            other => return Err(format!("L2 did not exit to L1: {other:x?}\n{case:x?}").into()),
        }
        let vmcs = vmcs12::read(&self.vcpu.fd)?;
        let (reason, info) = (vmcs.get_u32(EXIT_REASON), vmcs.get_u32(EXIT_INTERRUPTION_INFO));
        let (qualification, ngpa) = (vmcs.get(EXIT_QUALIFICATION), vmcs.get(GUEST_PHYSICAL_ADDRESS));
        let code = vmcs.get_u32(EXIT_INTERRUPTION_CODE);
        Ok(match (reason, info & 0xff) {
            (REASON_VMCALL, _) => {
                let in_place = match case.kind {
                    AccessKind::Read => self.vcpu.fd.get_regs()?.rax as u8 == LOADED,
                    AccessKind::Write => {
                        page.is_some_and(|page| self.machine.ram.read_byte(page.gpa.0) == STORED)
                    }
                    // The instruction is nowhere else that an address of the case leads to.
                    _ => true,
                };
                if in_place { Exit::Done } else { Exit::Elsewhere }
            }
            (REASON_EPT_VIOLATION, _) => {
                Exit::Violation { qualification, ngpa, gva: vmcs.get(GUEST_LINEAR_ADDRESS) }
            }
            (REASON_EPT_MISCONFIGURATION, _) => Exit::Misconfiguration { ngpa },
            (REASON_EXCEPTION, PF) => Exit::PageFault { code, cr2: qualification },
            (REASON_EXCEPTION, GP) => Exit::GeneralProtection { code },
            _ => Exit::Other { reason, info, qualification },
        })
    }
}

/// The accesses that an L2 makes one after the other: the fetch of its code, unless that is the case's own, and the case's.
struct Script {
    code: Option<(Gva, Access)>,
    access: (Gva, Access),
}

impl Script {
    fn new(case: &Case, plot: Plot) -> Script {
        let privilege = if case.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let access = |kind| Access::new(kind, privilege).with_ac(case.ac);
        let code = (Gva(case.rip(plot)), access(AccessKind::Fetch));
        Script {
            code: (case.kind != AccessKind::Fetch).then_some(code),
            access: (Gva(case.gva(plot)), access(case.kind)),
        }
    }

    fn run(&self, walker: &Walker, ram: Ram, policy: AdPolicy) -> Result<Translation, Fault> {
        let memory = Window::new(ram.words());
        let ask = |(gva, access)| walker.translate_with(&memory, gva, &access, policy, &mut NoTrace);
        if let Some(code) = self.code {
            ask(code)?;
        }
        ask(self.access)
    }
}

/// Whether EPT refuses to let one of L2's tables be written.
fn is_write_to_table(answer: &Result<Translation, Fault>) -> bool {
    let Err(Fault { kind: FaultKind::EptViolation { exit_qualification }, .. }) = answer else {
        return false;
    };
    exit_qualification & EPT_VIOLATION_WRITE != 0 && exit_qualification & EPT_VIOLATION_GVA_TRANSLATED == 0
}

/// The walker's answer as L1 would see it, counted by class.
fn count(case: &Case, answer: &Result<Translation, Fault>, judge: &mut Judge) -> Result<Exit, Failed> {
    let fault = match answer {
        Ok(page) => {
            let class = match case.kind {
                AccessKind::Read => "done: read",
                AccessKind::Write => "done: write",
                _ => "done: fetch",
            };
            judge.count(class, 0);
            let large = |size| !matches!(size, PageSize::Size4K | PageSize::Unpaged);
            judge.count_if("done through a large guest page", large(page.page_size()));
            judge.count_if(
                "done through a large EPT page",
                page.nested.is_some_and(|nested| large(nested.page_size)),
            );
            return Ok(Exit::Done);
        }
        Err(fault) => fault,
    };
    let ngpa = fault.nested_gpa.map_or(0, |ngpa| ngpa.0);
    Ok(match fault.kind {
        FaultKind::PageFault { error_code } => {
            judge.count("#PF, error code", error_code.into());
            judge.count_if("#PF by SMAP", fault.reason == Reason::Smap);
            judge.count_if("#PF by SMEP", fault.reason == Reason::Smep);
            Exit::PageFault { code: error_code, cr2: fault.address }
        }
        FaultKind::GeneralProtection => {
            judge.count("#GP", 0);
            Exit::GeneralProtection { code: 0 }
        }
        FaultKind::EptViolation { exit_qualification } => {
            judge.count("EPT violation, qualification code", exit_qualification);
            judge.count("EPT violation, level", fault.level.into());
            Exit::Violation { qualification: exit_qualification, ngpa, gva: fault.address }
        }
        FaultKind::EptMisconfiguration => {
            judge.count("EPT misconfiguration, level", fault.level.into());
            judge.count_if(
                "EPT misconfiguration: write without read",
                fault.reason == Reason::WriteWithoutRead,
            );
            judge.count_if("EPT misconfiguration: memory type", fault.reason == Reason::MemoryType);
            judge.count_if("EPT misconfiguration: reserved bits", fault.reason == Reason::ReservedBits);
            Exit::Misconfiguration { ngpa }
        }
        _ => return Err(format!("no case is made for {fault:?}").into()),
    })
}

fn minima(mode: PagingMode) -> Vec<(&'static str, Option<u64>, u64)> {
    let mut minima = vec![
        ("done: read", None, 4_000),
        ("done: write", None, 4_000),
        ("done: fetch", None, 4_000),
        ("done through a large EPT page", None, 2_000),
        ("accessed or dirty bits set", None, 4_000),
        ("EPT misconfiguration: write without read", None, 4_000),
        ("EPT misconfiguration: memory type", None, 2_000),
        ("EPT misconfiguration: reserved bits", None, 2_000),
    ];
    for level in 1..=4 {
        minima.push(("EPT violation, level", Some(level), 400));
        minima.push(("EPT misconfiguration, level", Some(level), 400));
    }
    // Of the accessed page: read, written or fetched, where no right or others are left.
    for code in [0x181, 0x182, 0x184, 0x1a1, 0x1aa, 0x18c, 0x19c] {
        minima.push(("EPT violation, qualification code", Some(code), 40));
    }
    if mode != PagingMode::None {
        // Of a table: read, and written, too.
        for code in [0x81, 0x83, 0x8b, 0xab] {
            minima.push(("EPT violation, qualification code", Some(code), 100));
        }
        minima.push(("done through a large guest page", None, 2_000));
        minima.push(("#PF by SMAP", None, 400));
        minima.push(("#PF by SMEP", None, 400));
        for code in [0, 1, 2, 3, 4, 5, 6, 7, 0x11] {
            minima.push(("#PF, error code", Some(code), 40));
        }
    }
    if matches!(mode, PagingMode::Pae | PagingMode::FourLevel) {
        for code in [9, 0xb, 0xd, 0xf, 0x14, 0x15] {
            minima.push(("#PF, error code", Some(code), 40));
        }
    }
    if mode.is_long() {
        minima.push(("#GP", None, 400));
    }
    minima
}
