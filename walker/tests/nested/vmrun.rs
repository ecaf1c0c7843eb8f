//! Accesses that an L2 executes, entered by its L1's own VMRUN: #PF error codes and EXITINFO1 as L1 sees them.
//!
//! L1 is five bytes long: `vmrun; out`. Its VMCB intercepts #PF and VMMCALL, so that every access ends in one exit: #PF,
//! NPF, or the VMMCALL behind the access. Nothing is left from case to case: the memory slot is taken away and given
//! back in between, which drops every shadow of NPT.
//!
//! Who decides: an NPF's low 32 bits are KVM's walk of NPT; its bits 33:32, EXITINFO2 and all of #PF are the emulated
//! CPU's. That CPU reports reserved bits without P and sets accessed bits early: L2's entries have no reserved bits, and
//! accessed and dirty bits are not compared. L1, and so NPT, has 4 levels; L2 has 4 or 5, without protection keys.

use fastrand::Rng;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuExit;
use libtest_mimic::Failed;
use pagewalk::{
    Access, AccessKind, ControlRegisters, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, FaultKind, Gva, NgpaWalk,
    PageSize, PageWalk, Privilege, Reason, Walker, Window,
};

use super::guest_mode::{
    CR0, CR3, CR4, DR6, DR7, EFER, GUEST_ASID, INTERCEPT_VMRUN, IOPM_BASE, MSRPM_BASE, NCR3, NESTED_CTL, PAT,
    RFLAGS,
};
use crate::bed::judge::{Judge, cases};
use crate::bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_SMAP, CR4_SMEP, DIRTY, EFER_LMA,
    EFER_LME, EFER_NXE, EFER_SVME, Machine, Maker, NO_EXECUTE, PAGE, PAGE_SIZE, PRESENT, RFLAGS_AC,
    RFLAGS_FIXED, Ram, USER, Vcpu, WRITE, long_mode, when,
};

const RAM_PAGES: u64 = 64;

// L1.
const L1_TABLES: [u64; 2] = [0x1000, 0x2000];
const L1_CODE: u64 = 0x3000;
const VMCB: u64 = 0x4000;
const HOST_SAVE: u64 = 0x5000;
const IOPM: u64 = 0x6000;
const MSRPM: u64 = 0x9000;
// L2, where nGPA and GPA are the same.
const L2_CODE: u64 = 0xb000;
const PML5: u64 = 0xc000;
const PML4: u64 = 0x1_0000;
const STAGE_TABLES: [u64; 3] = [0x1_1000, 0x1_2000, 0x1_3000];
/// The case's PDPT, page directory, page table and page: as GPAs, and as nGPAs.
const CASE_PAGES: [u64; 4] = [0x1_4000, 0x1_5000, 0x1_6000, 0x1_7000];
const CASE_HOMES: [u64; 4] = [0x2_8000, 0x2_9000, 0x2_a000, 0x2_b000];
const NPT: [u64; 4] = [0x3_0000, 0x3_1000, 0x3_2000, 0x3_3000];
/// L2's PML4E 1 maps its code, PML4E 0 is the case's.
const STAGE: u64 = 1 << 39;

// Control area.
const INTERCEPT_EXCEPTIONS: u64 = 0x08;
const EXIT_CODE: u64 = 0x70;
const EXIT_INFO_1: u64 = 0x78;
const EXIT_INFO_2: u64 = 0x80;
// Save area.
const ES: u64 = 0x400;
const CPL: u64 = 0x4c8;
const RIP: u64 = 0x578;
const RSP: u64 = 0x5d8;
const RAX: u64 = 0x5f8;
/// What a store stores.
const STORED: u8 = 0x5a;

const EXIT_EXCEPTION: u64 = 0x40;
const EXIT_VMMCALL: u64 = 0x81;
const EXIT_NPF: u64 = 0x400;
const VM_HSAVE_PA: u32 = 0xc001_0117;
const PF: u64 = 14;

const LOAD: [u8; 5] = [0x8a, 0x07, 0x0f, 0x01, 0xd9];
const STORE: [u8; 5] = [0x88, 0x07, 0x0f, 0x01, 0xd9];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

/// How an access ended, as L1 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Done,
    /// The access succeeded at another address than the walker's.
    Elsewhere,
    PageFault {
        code: u64,
        cr2: u64,
    },
    NestedPageFault {
        info: u64,
        ngpa: u64,
    },
    Other {
        code: u64,
        info_1: u64,
        info_2: u64,
    },
}

pub(crate) fn judge() -> Result<(), Failed> {
    let machine = Machine::new(RAM_PAGES * PAGE)?;
    let mut vcpu = machine.vcpu(0, Maker::Amd, machine.maxphyaddr()?)?;
    let msr = kvm_msr_entry { index: VM_HSAVE_PA, data: HOST_SAVE, ..kvm_msr_entry::default() };
    let msrs = Msrs::from_entries(&[msr]).map_err(|error| format!("{error:?}"))?;
    if vcpu.fd.set_msrs(&msrs)? != 1 {
        return Err("VM_HSAVE_PA cannot be set: the vCPU has no SVM".into());
    }
    let mut judge = Judge::new("vmrun-execution")?;
    let mut rng = Rng::with_seed(judge.seed());
    // A case takes milliseconds: the memory slot is replaced.
    let wanted = cases(50_000)? / 10;
    while judge.cases() < wanted {
        let case = Case::sample(&mut rng);
        case.play(&machine, &mut vcpu, &mut judge)?;
    }
    let mut minima = vec![
        ("done: read", None, 5_000),
        ("done: write", None, 5_000),
        ("done: fetch", None, 5_000),
        ("#PF by SMAP", None, 1_000),
        ("#PF by SMEP", None, 1_000),
        ("done through 2 MiB", None, 5_000),
        ("done under 5-level paging", None, 5_000),
    ];
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 0x10, 0x11, 0x14, 0x15] {
        minima.push(("#PF, error code", Some(code), 200));
    }
    for code in [4, 5, 6, 7, 0xd, 0xf, 0x14, 0x15, 0x1d] {
        minima.push(("NPF, EXITINFO1 code", Some(EXIT_INFO_1_FINAL | code), 200));
    }
    for code in [6, 7, 0xf] {
        minima.push(("NPF, EXITINFO1 code", Some(EXIT_INFO_1_TABLE | code), 200));
    }
    judge.finish(&minima)
}

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: AccessKind,
    cpl: u8,
    ac: bool,
    five_levels: bool,
    cr0: u64,
    cr4: u64,
    gva: u64,
    /// PML4E to PTE.
    entries: [u64; 4],
    /// NPT's entries for the case's pages.
    npt: [u64; 4],
}

impl Case {
    fn sample(rng: &mut Rng) -> Case {
        let kind = *rng.choice(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]).unwrap();
        let large = rng.u32(0..4) == 0;
        let mut gva = rng.u64(0..1 << 39) & !0xfff | rng.u64(0..PAGE - 8);
        if large {
            gva = gva & !0x1f_ffff | CASE_HOMES[3] | gva & 0xfff;
        }
        let depth = if large { 3 } else { 4 };
        let trouble_in_guest = rng.bool();
        let entries = std::array::from_fn(|level| {
            let mut chance = |percent: u32| trouble_in_guest && rng.u32(0..100) < percent;
            let mut entry = match level + 1 {
                it if it > depth => return 0,
                3 if large => PAGE_SIZE,
                _ => CASE_HOMES[level],
            };
            let user = !chance(12);
            entry |= when(!chance(6), PRESENT) | when(!chance(12), WRITE) | when(user, USER);
            entry |= when(chance(8), NO_EXECUTE);
            entry | rng.u64(..) & (ACCESSED | DIRTY)
        });
        let troubled = rng.usize(0..8);
        let npt = std::array::from_fn(|page| {
            let good = CASE_PAGES[page] | PRESENT | WRITE | USER | rng.u64(..) & (ACCESSED | DIRTY);
            if page != troubled {
                return good;
            }
            match rng.u32(0..5) {
                0 => good & !PRESENT,
                1 => good & !WRITE,
                2 => good & !USER,
                3 => good | 1 << 51,
                _ => good | NO_EXECUTE,
            }
        });
        let cpl = if rng.bool() { 3 } else { 0 };
        let five_levels = rng.u32(0..3) == 0;
        Case {
            kind,
            cpl,
            ac: rng.bool(),
            five_levels,
            cr0: CR0_PE | CR0_NE | CR0_PG | when(rng.bool(), CR0_WP),
            cr4: CR4_PAE
                | when(five_levels, CR4_LA57)
                | when(rng.u32(0..3) == 0, CR4_SMEP)
                | when(rng.u32(0..3) == 0, CR4_SMAP),
            gva,
            entries,
            npt,
        }
    }

    fn registers(&self) -> ControlRegisters {
        ControlRegisters {
            cr0: self.cr0,
            cr3: if self.five_levels { PML5 } else { PML4 },
            cr4: self.cr4,
            efer: EFER_SVME | EFER_LME | EFER_LMA | EFER_NXE,
            ..ControlRegisters::default()
        }
    }

    fn play(&self, machine: &Machine, vcpu: &mut Vcpu, judge: &mut Judge) -> Result<(), Failed> {
        let ram = machine.ram;
        machine.renew()?;
        self.set_stage(ram);
        let (expected, gpa) = self.expect(ram, vcpu, judge)?;

        let mut sregs: kvm_sregs = vcpu.reset;
        long_mode(&mut sregs, L1_TABLES[0]);
        sregs.efer |= EFER_SVME;
        vcpu.fd.set_sregs(&sregs)?;
        vcpu.fd.set_regs(&kvm_regs {
            rip: L1_CODE,
            rax: VMCB,
            rdi: self.gva,
            rflags: RFLAGS_FIXED,
            ..kvm_regs::default()
        })?;
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(..)) => {}
            other => return Err(format!("L1 did not come back from VMRUN: {other:?}\n{self:x?}").into()),
        }
        let at = |offset| ram.read(VMCB + offset);
        let (code, info_1, info_2) = (at(EXIT_CODE), at(EXIT_INFO_1), at(EXIT_INFO_2));
        let seen = match code {
            EXIT_VMMCALL => {
                let in_place = match self.kind {
                    AccessKind::Read => at(RAX) as u8 == VMMCALL[0],
                    AccessKind::Write => gpa.is_some_and(|gpa| ram.read_byte(gpa) == STORED),
                    // The instruction is nowhere else.
                    _ => true,
                };
                if in_place { Exit::Done } else { Exit::Elsewhere }
            }
            EXIT_NPF => Exit::NestedPageFault { info: info_1, ngpa: info_2 },
            _ if code == EXIT_EXCEPTION + PF => Exit::PageFault { code: info_1, cr2: info_2 },
            _ => Exit::Other { code, info_1, info_2 },
        };
        judge.case();
        if seen != expected {
            judge.disagree(|| format!("walker {expected:x?}, L1 saw {seen:x?}\n  {self:x?}"));
        }
        Ok(())
    }

    /// The exit, and where an access that succeeds goes.
    fn expect(&self, ram: Ram, vcpu: &Vcpu, judge: &mut Judge) -> Result<(Exit, Option<u64>), Failed> {
        let registers = self.registers();
        let gva_walk = PageWalk::new(&registers, &vcpu.profile())?;
        let host = ControlRegisters { cr4: CR4_PAE, cr3: 0, ..registers };
        let walker = Walker::nested(gva_walk, NgpaWalk::npt(NPT[0], &host, &vcpu.profile())?);
        let privilege = if self.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let access = Access::new(self.kind, privilege).with_ac(self.ac);
        let answer = walker.translate(&Window::new(ram.words()), Gva(self.gva), &access);
        let exit = match answer {
            Ok(page) => {
                judge.count_if("done through 2 MiB", page.page_size == PageSize::Size2M);
                judge.count_if("done under 5-level paging", self.five_levels);
                let class = match self.kind {
                    AccessKind::Read => "done: read",
                    AccessKind::Write => "done: write",
                    _ => "done: fetch",
                };
                judge.count(class, 0);
                Exit::Done
            }
            Err(fault) => match fault.kind {
                FaultKind::PageFault { error_code } => {
                    judge.count("#PF, error code", u64::from(error_code));
                    judge.count_if("#PF by SMAP", fault.reason == Reason::Smap);
                    judge.count_if("#PF by SMEP", fault.reason == Reason::Smep);
                    Exit::PageFault { code: error_code.into(), cr2: self.gva }
                }
                FaultKind::NestedPageFault { exit_info_1 } => {
                    judge.count("NPF, EXITINFO1 code", exit_info_1);
                    let ngpa = fault.nested_gpa.map_or(0, |ngpa| ngpa.0);
                    Exit::NestedPageFault { info: exit_info_1, ngpa }
                }
                _ => return Err(format!("no case is made for {fault:?}").into()),
            },
        };
        Ok((exit, answer.ok().map(|page| page.gpa.0)))
    }

    fn set_stage(&self, ram: Ram) {
        ram.clear();
        let open = PRESENT | WRITE | USER;
        // L1: one gigabyte, as it is.
        ram.write(L1_TABLES[0], L1_TABLES[1] | open);
        ram.write(L1_TABLES[1], PAGE_SIZE | PRESENT | WRITE);
        ram.write_bytes(L1_CODE, &[0x0f, 0x01, 0xd8, 0xe6, 0x40]);
        // L2: its code, and the case.
        ram.write_bytes(L2_CODE, &LOAD);
        ram.write_bytes(L2_CODE + 16, &STORE);
        ram.write(PML5, PML4 | open);
        ram.write(PML4 + 8, STAGE_TABLES[0] | open);
        ram.write(STAGE_TABLES[0], STAGE_TABLES[1] | open);
        ram.write(STAGE_TABLES[1], STAGE_TABLES[2] | open);
        ram.write(STAGE_TABLES[2], L2_CODE | PRESENT | WRITE | when(self.cpl == 3, USER));
        let tables = [PML4, CASE_PAGES[0], CASE_PAGES[1], CASE_PAGES[2]];
        for (level, (table, entry)) in tables.into_iter().zip(self.entries).enumerate() {
            ram.write(table + (self.gva >> (39 - 9 * level) & 511) * 8, entry);
        }
        ram.write_bytes(CASE_PAGES[3] + self.gva % PAGE, &VMMCALL);
        // NPT.
        for level in 0..3 {
            ram.write(NPT[level], NPT[level + 1] | open);
        }
        for page in 0..RAM_PAGES {
            ram.write(NPT[3] + page * 8, (page * PAGE) | open);
        }
        for (home, entry) in CASE_HOMES.into_iter().zip(self.npt) {
            ram.write(NPT[3] + home / PAGE * 8, entry);
        }
        self.write_vmcb(ram);
    }

    fn write_vmcb(&self, ram: Ram) {
        let registers = self.registers();
        let rip = match self.kind {
            AccessKind::Read => STAGE,
            AccessKind::Write => STAGE + 16,
            _ => self.gva,
        };
        let dpl = u64::from(self.cpl) << 5;
        // Selector, attributes, limit.
        let code = 0x0a9b_0008 | dpl << 16 | u64::from(self.cpl) | 0xffff_ffff << 32;
        let data = 0x0c93_0010 | dpl << 16 | u64::from(self.cpl) | 0xffff_ffff << 32;
        for (at, segment) in (ES..).step_by(16).zip([data, code, data, data, data, data]) {
            ram.write(VMCB + at, segment);
        }
        for (at, value) in [
            (INTERCEPT_EXCEPTIONS, 1 << 6 | 1 << 8 | 1 << 12 | 1 << 13 | 1 << PF | 1 << (32 + 31)),
            (INTERCEPT_VMRUN as u64, 0b11),
            (IOPM_BASE as u64, IOPM),
            (MSRPM_BASE as u64, MSRPM),
            (GUEST_ASID as u64, 1),
            (NESTED_CTL as u64, 1),
            (NCR3 as u64, NPT[0]),
            (CPL, u64::from(self.cpl) << 24),
            (EFER as u64, registers.efer),
            (CR4 as u64, registers.cr4),
            (CR3 as u64, registers.cr3),
            (CR0 as u64, registers.cr0),
            (DR7 as u64, 0x400),
            (DR6 as u64, 0xffff_0ff0),
            (RFLAGS as u64, RFLAGS_FIXED | when(self.ac, RFLAGS_AC)),
            (RIP, rip),
            (RSP, 0),
            (RAX, u64::from(STORED)),
            (PAT as u64, registers.pat),
        ] {
            ram.write(VMCB + at, value);
        }
    }
}
