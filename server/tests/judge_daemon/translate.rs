//! `Translate` against `KVM_TRANSLATE`, in every paging mode, alone and as L2 over NPT or EPT.
//!
//! Each set of tables is written into the memory of the daemon's machine and into that of a VM of the judge's own. Without
//! a second dimension the daemon's vCPU is given the registers by `SetRegisters`; with one, `SetNestedMode` has it really
//! enter L2. What the walker's own judges say of the ioctl (`judge_nested`, `judge_nested_intel`) holds here, and:
//! - The daemon only reads: accessed and dirty bits are the walker's judge's business.
//! - PDPTEs come from memory: both vCPUs load them, L2's through NPT or EPT.
//! - KVM loads PDPTEs through EPT as if it wrote them: no case is made where their page can only be read.
//! - KVM takes every other access to L2's tables for a write, also where EPT has no accessed and dirty bits: the requests ask for
//!   that (`tables_written`).
//! - KVM takes 4 MiB pages to have 36-bit addresses, and these vCPUs have more: bits 20:17 of such entries stay clear.
//! - PKRU comes with the request: it cannot be written in the daemon's vCPU.

use std::sync::atomic::Ordering;

use fastrand::Rng;
use kvm_bindings::{kvm_regs, kvm_sregs};
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::translate_response::Outcome;

use crate::bed::judge::{Judge, cases};
use crate::bed::soup::{INDICES, linear_address, twin};
use crate::bed::{
    CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA,
    EFER_LME, EFER_NXE, EFER_SVME, Machine, Maker, PAGE, PAGE_SIZE, PRESENT, RFLAGS_AC, RFLAGS_FIXED, Vcpu,
    long_mode, when,
};
use crate::daemon::Daemon;
use crate::guest::{self, CODE_32, MEMORY};
use crate::nested::second::{Root, Second};
use crate::nested::tables::{RAM_PAGES, Tables};
use crate::nested::vmcs12::CR4_VMXE;

const ADDRESSES: u64 = 16;
/// Bits that KVM reserves in the PDE of a 4 MiB page, and a CPU with more than 36 address bits does not.
const ABOVE_36_BITS: u32 = 0xf << 17;
const EPT_READ: u64 = 1 << 0;
const EPT_WRITE: u64 = 1 << 1;
/// Without any of these an entry of EPT is absent.
const EPT_RIGHTS: u64 = 0b111;

/// The guest's levels (0 without paging, 2 and 3 for 32-bit and PAE paging), and what is under it.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    levels: u32,
    second: Option<Second>,
}

const fn row(name: &'static str, levels: u32, second: Option<Second>) -> Row {
    Row { name, levels, second }
}

const NPT4: Option<Second> = Some(Second::Npt(4));
const NPT5: Option<Second> = Some(Second::Npt(5));
const EPT: Option<Second> = Some(Second::Ept);

pub(crate) const INTEL: [Row; 8] = [
    row("daemon-translate-unpaged", 0, None),
    row("daemon-translate-2", 2, None),
    row("daemon-translate-pae", 3, None),
    row("daemon-translate-4", 4, None),
    row("daemon-ept-unpaged", 0, EPT),
    row("daemon-ept-2", 2, EPT),
    row("daemon-ept-pae", 3, EPT),
    row("daemon-ept-4", 4, EPT),
];

pub(crate) const AMD: [Row; 15] = [
    row("daemon-translate-unpaged", 0, None),
    row("daemon-translate-2", 2, None),
    row("daemon-translate-pae", 3, None),
    row("daemon-translate-4", 4, None),
    row("daemon-translate-5", 5, None),
    row("daemon-npt-unpagedx4", 0, NPT4),
    row("daemon-npt-unpagedx5", 0, NPT5),
    row("daemon-npt-2x4", 2, NPT4),
    row("daemon-npt-2x5", 2, NPT5),
    row("daemon-npt-paex4", 3, NPT4),
    row("daemon-npt-paex5", 3, NPT5),
    row("daemon-npt-4x4", 4, NPT4),
    row("daemon-npt-4x5", 4, NPT5),
    row("daemon-npt-5x4", 5, NPT4),
    row("daemon-npt-5x5", 5, NPT5),
];

pub(crate) fn judge(row: Row, maker: Maker) -> Result<(), Failed> {
    let machine = Machine::new(MEMORY)?;
    let vcpu = machine.vcpu(0, maker, machine.maxphyaddr()?)?;
    let legacy = row.levels < 4 && row.second.is_none();
    let code = if legacy { guest::into_32_bit_code() } else { guest::RESTS.to_vec() };
    let daemon = Daemon::serve(&guest::write(row.name, &code)?)?;
    if legacy {
        daemon.wait_for("32-bit code", |registers| registers.cs == Some(CODE_32.into()))?;
    }
    daemon.pause()?;
    let mut judge = Judge::new(row.name)?;
    let mut rng = Rng::with_seed(judge.seed());
    let wanted = cases(1_200)?;
    while judge.cases() < wanted {
        Round::new(&mut rng, &machine, &vcpu, &daemon, row)?.ask_all(&mut rng, &mut judge)?;
    }
    judge.finish(&minima(row))
}

/// One set of tables and registers, which the daemon's vCPU and the judge's hold.
struct Round<'a> {
    machine: &'a Machine,
    vcpu: &'a Vcpu,
    daemon: &'a Daemon,
    row: Row,
    tables: Tables,
    /// What both memories hold.
    words: Vec<u64>,
    sregs: kvm_sregs,
    below: Option<Root>,
}

impl<'a> Round<'a> {
    fn new(
        rng: &mut Rng,
        machine: &'a Machine,
        vcpu: &'a Vcpu,
        daemon: &'a Daemon,
        row: Row,
    ) -> Result<Self, Failed> {
        let mut tables = Tables::cook(rng, machine.ram, vcpu, row.levels, row.second);
        if row.levels == 2 {
            clear_bits_above_36(machine, &tables);
        }
        if let (Some(second), Some(root), 0) = (row.second, tables.second_root, rng.u32(0..8)) {
            // Few walks would end this early by themselves.
            let top = root + (tables.homes[0] >> (12 + 9 * (second.levels() - 1)) & 511) * 8;
            let any = if second == Second::Ept { EPT_RIGHTS } else { PRESENT };
            machine.ram.write(top, machine.ram.read(top) & !any);
        }
        let sregs = guest_registers(rng, machine, vcpu, row, &mut tables);
        if let (3, Some(Second::Ept), Some(root)) = (row.levels, row.second, tables.second_root) {
            allow_writes(machine, root, tables.homes[0]);
        }
        let below = row.second.zip(tables.second_root).map(|(second, root)| {
            let Second::Npt(levels) = second else { return Root::eptp(root, rng.bool()) };
            let efer = EFER_SVME | EFER_LME | EFER_LMA | when(rng.u32(0..3) != 0, EFER_NXE);
            let cr4 = CR4_PAE | when(levels == 5, CR4_LA57);
            let cr0 = CR0_PE | CR0_NE | CR0_PG | when(rng.bool(), CR0_WP);
            Root::Npt(root, pagewalk::ControlRegisters { cr0, cr4, efer, ..Default::default() })
        });
        let words = machine.ram.words().iter().take((RAM_PAGES * PAGE / 8) as usize);
        let words: Vec<u64> = words.map(|word| word.load(Ordering::Relaxed)).collect();
        daemon.write(0, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())?;

        let round = Round { machine, vcpu, daemon, row, tables, words, sregs, below };
        round.set_truth()?;
        round.set_daemon(rng)?;
        Ok(round)
    }

    /// Has the judge's own vCPU hold the registers.
    fn set_truth(&self) -> Result<(), Failed> {
        let Round { vcpu, sregs, .. } = self;
        if let Some(below) = self.below {
            below.leave(vcpu)?;
        }
        vcpu.fd.set_sregs(sregs)?;
        if let Some(below) = self.below {
            below.enter(vcpu, sregs)?;
        }
        if self.row.levels == 3 {
            // All absent, and then those in memory: they stay absent where these cannot be loaded.
            vcpu.set_pdptes(sregs, [0; 4])?;
            vcpu.fd.set_sregs(sregs)?;
        }
        let held = vcpu.fd.get_sregs()?;
        if (held.cr0, held.cr3, held.cr4, held.efer) != (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) {
            return Err(format!("KVM did not keep the registers {sregs:x?}: {held:x?}").into());
        }
        Ok(())
    }

    /// Has the daemon's vCPU hold them.
    fn set_daemon(&self, rng: &mut Rng) -> Result<(), Failed> {
        let &kvm_sregs { cr0, cr3, cr4, efer, .. } = &self.sregs;
        let registers = v1::Registers {
            cr0: Some(cr0),
            cr3: Some(cr3),
            cr4: Some(cr4),
            efer: Some(efer),
            ..Default::default()
        };
        let Some(below) = self.below else {
            return Ok(self.daemon.set_registers(registers)?);
        };
        if rng.bool() {
            self.daemon.set_nested(off())?;
        }
        let (mode, root) = match below {
            Root::Npt(ncr3, host) => {
                let npt = v1::Npt {
                    ncr3,
                    host_cr0: Some(host.cr0),
                    host_cr4: Some(host.cr4),
                    host_efer: Some(host.efer),
                    ..Default::default()
                };
                (Mode::Npt(npt), ncr3)
            }
            Root::Eptp(eptp) => {
                let ept = v1::Ept { eptp, tables_written: true, ..Default::default() };
                (Mode::Ept(ept), eptp & !0xfff)
            }
        };
        let request =
            v1::SetNestedModeRequest { mode: Some(mode), l2: Some(registers), ..Default::default() };
        let answer = self.daemon.set_nested(request)?;
        let effect = answer.effect.unwrap_or_default();
        let state = answer.state.unwrap_or_default();
        let held = state.ngpa_walk.map(|walk| walk.root);
        if effect.kind() != v1::NestedEffectKind::RealVcpu
            || state.nested.unwrap_or_default().kind() != v1::NestedModeKind::RealVcpu
            || held != Some(root)
        {
            return Err(
                format!("the vCPU did not enter L2 over {root:#x}: {effect:?}, root {held:x?}").into()
            );
        }
        Ok(())
    }

    fn ask_all(&self, rng: &mut Rng, judge: &mut Judge) -> Result<(), Failed> {
        let mut access = v1::Access::default();
        for number in 0..ADDRESSES {
            if number % (ADDRESSES / 2) == 0 {
                let keys = self.machine.has_keys();
                let (ac, pkru) = (rng.bool(), if keys && rng.bool() { rng.u32(..) } else { 0 });
                let rflags = RFLAGS_FIXED | when(ac, RFLAGS_AC);
                self.vcpu.fd.set_regs(&kvm_regs { rflags, ..kvm_regs::default() })?;
                if keys {
                    self.machine.set_pkru(&self.vcpu.fd, pkru)?;
                }
                access = v1::Access {
                    kind: v1::AccessKind::Read.into(),
                    privilege: v1::Privilege::Supervisor.into(),
                    ac: Some(ac),
                    pkru: Some(pkru),
                    ..Default::default()
                };
                if rng.bool() {
                    // The vCPU's own: it is at CPL 0.
                    let own = v1::Registers { rflags: Some(rflags), ..Default::default() };
                    self.daemon.set_registers(own)?;
                    access.privilege = v1::Privilege::AsCpl.into();
                    access.ac = None;
                }
            }
            let gva = self.address(rng);
            judge.case();
            let tr = self.vcpu.fd.translate_gva(gva)?;
            self.forget_use();
            let kernel = (tr.valid != 0).then_some(tr.physical_address);
            let ours = self.ask(gva, &access, judge)?;
            if ours != kernel {
                let explained = self.daemon.translate(v1::TranslateRequest {
                    explain: true,
                    ..asked(twin_of(gva, self.row), &access)
                })?;
                judge.disagree(|| {
                    format!(
                        "{gva:#x}: daemon {ours:x?}, kernel {kernel:x?}\n  CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x} below {:x?}\n{}",
                        self.sregs.cr0,
                        self.sregs.cr3,
                        self.sregs.cr4,
                        self.sregs.efer,
                        self.below,
                        explained.explanation
                    )
                });
            }
        }
        Ok(())
    }

    /// Takes back the accessed bits that the kernel's walk has set, which the daemon's memory does not have: a word that is an
    /// entry of both dimensions may mean something else with them.
    fn forget_use(&self) {
        for (word, was) in self.machine.ram.words().iter().zip(&self.words) {
            if word.load(Ordering::Relaxed) != *was {
                word.store(*was, Ordering::Relaxed);
            }
        }
    }

    fn address(&self, rng: &mut Rng) -> u64 {
        match self.row.levels {
            0 if rng.bool() => rng.choice(&self.tables.homes).unwrap() & 0xffff_f000 | rng.u64(0..PAGE),
            0 | 3 => linear_address(rng, 4) & 0xffff_ffff,
            2 => {
                let mut index = || rng.choice(&INDICES).unwrap() + 512 * rng.u64(0..2);
                index() << 22 | index() << 12 | rng.u64(0..PAGE)
            }
            levels => linear_address(rng, levels),
        }
    }

    /// The daemon's answer in the ioctl's terms, counted by class.
    fn ask(&self, gva: u64, access: &v1::Access, judge: &mut Judge) -> Result<Option<u64>, Failed> {
        let taken_for = twin_of(gva, self.row);
        if taken_for != gva {
            judge.count("non-canonical", 0);
            judge.exempt("non-canonical, walked as its sign-extended twin");
            let answer = self.daemon.translate(asked(gva, access))?;
            let refused = matches!(&answer.outcome, Some(Outcome::Fault(fault))
                if fault.kind() == v1::FaultKind::GeneralProtection);
            if !refused {
                judge.disagree(|| format!("{gva:#x} is not canonical; the daemon says {:?}", answer.outcome));
            }
        }
        let answer = self.daemon.translate(asked(taken_for, access))?;
        let gpa = match &answer.outcome {
            Some(Outcome::Translation(page)) => {
                judge.count(
                    match page.page_size() {
                        v1::PageSize::Unpaged => "mapped unpaged",
                        v1::PageSize::PageSize4k => "mapped 4 KiB",
                        _ => "mapped by a large guest page",
                    },
                    0,
                );
                judge.count_if(
                    "mapped over 4 KiB",
                    page.nested_page_size == Some(v1::PageSize::PageSize4k.into()),
                );
                judge.count_if(
                    "mapped over a large page",
                    page.nested_page_size.is_some_and(|size| size != i32::from(v1::PageSize::PageSize4k)),
                );
                Some(page.gpa)
            }
            Some(Outcome::Fault(fault)) => {
                let nested = fault.dimension() == v1::Dimension::Nested;
                let class = match (fault.kind(), nested) {
                    (v1::FaultKind::PageFault, false) => "guest: page fault, level",
                    (v1::FaultKind::NestedPageFault, true) => "nested: page fault, level",
                    (v1::FaultKind::EptViolation, true) => "nested: violation, level",
                    (v1::FaultKind::EptMisconfiguration, true) => "nested: misconfiguration, level",
                    (v1::FaultKind::Unbacked, false) => "guest: table outside memory, level",
                    (v1::FaultKind::Unbacked, true) => "nested: table outside memory, level",
                    _ => "refused otherwise",
                };
                judge.count(class, fault.level.into());
                None
            }
            None => return Err("an answer without an outcome".into()),
        };
        Ok(gpa)
    }
}

fn asked(gva: u64, access: &v1::Access) -> v1::TranslateRequest {
    v1::TranslateRequest {
        address: Some(v1::Address { value: Some(v1::address::Value::Number(gva)) }),
        access: Some(*access),
        ..Default::default()
    }
}

/// What KVM takes the address for, which does not look whether it is canonical.
fn twin_of(gva: u64, row: Row) -> u64 {
    if row.levels > 3 { twin(gva, row.levels) } else { gva }
}

pub(crate) fn off() -> v1::SetNestedModeRequest {
    v1::SetNestedModeRequest { mode: Some(Mode::Off(true)), ..Default::default() }
}

fn clear_bits_above_36(machine: &Machine, tables: &Tables) {
    for word in &tables.entries {
        for gpa in [*word, word + 4] {
            let entry = machine.ram.read_u32(gpa);
            // Entries of NPT and EPT have none of these bits either: their frames are below 256 KiB, or far above.
            if u64::from(entry) & PAGE_SIZE != 0 {
                machine.ram.write_u32(gpa, entry & !ABOVE_36_BITS);
            }
        }
    }
}

/// Has EPT let the page of PDPTEs be written where it may be read: KVM loads these as if it wrote them, a CPU reads them.
fn allow_writes(machine: &Machine, root: u64, ngpa: u64) {
    let mut table = root;
    for level in (1..=4).rev() {
        let at = table + (ngpa >> (12 + 9 * (level - 1)) & 511) * 8;
        let entry = machine.ram.read(at);
        machine.ram.write(at, entry | when(entry & EPT_READ != 0, EPT_WRITE));
        table = entry & 0x000f_ffff_ffff_f000;
        if entry & PAGE_SIZE != 0 || table >= RAM_PAGES * PAGE {
            break;
        }
    }
}

fn guest_registers(
    rng: &mut Rng,
    machine: &Machine,
    vcpu: &Vcpu,
    row: Row,
    tables: &mut Tables,
) -> kvm_sregs {
    let mut sregs = vcpu.reset;
    let mut root = tables.root;
    if let Some(pdptes) = tables.pdptes {
        // PDPTEs in memory, where no other entry is: index 64 of L2's first table.
        root = tables.homes[0] + 0x200;
        for (at, pdpte) in (tables.first_table + 0x200..).step_by(8).zip(pdptes) {
            machine.ram.write(at, pdpte);
        }
    }
    // CR3's low bits select cacheability and are no part of the root.
    long_mode(&mut sregs, root | rng.u64(0..4) << 3 & when(row.levels != 3, u64::MAX));
    sregs.cr0 &= !when(rng.bool(), CR0_WP);
    sregs.efer &= !when(rng.u32(0..3) == 0, EFER_NXE);
    sregs.cr4 |= when(row.levels == 5, CR4_LA57);
    sregs.cr4 |= when(rng.bool(), CR4_SMEP);
    sregs.cr4 |= when(rng.u32(0..3) == 0, CR4_SMAP);
    sregs.cr4 |= when(machine.has_keys() && rng.bool(), CR4_PKE);
    if row.levels < 4 {
        sregs.cr0 &= !when(row.levels == 0, CR0_PG);
        sregs.cr4 &= !when(row.levels < 3, CR4_PAE);
        sregs.cr4 |= when(rng.bool(), CR4_PSE);
        sregs.efer &= !(EFER_LMA | EFER_LME);
        sregs.cs.l = 0;
        sregs.cs.db = 1;
    }
    match row.second {
        Some(Second::Npt(_)) => sregs.efer |= EFER_SVME,
        Some(Second::Ept) => sregs.cr4 |= CR4_VMXE,
        None => {}
    }
    sregs
}

/// For 200,000 cases.
fn minima(row: Row) -> Vec<(&'static str, Option<u64>, u64)> {
    let mut minima = Vec::new();
    let levels = u64::from(row.levels);
    if levels == 0 {
        minima.push(("mapped unpaged", None, 10_000));
    } else {
        minima.push(("mapped 4 KiB", None, 5_000));
        // Over a second dimension, few sets of tables lead to one: not all runs meet it, and the library's rows have to.
        if row.second.is_none() {
            minima.push(("mapped by a large guest page", None, 1_000));
        }
    }
    for level in 1..=levels.min(if levels == 3 { 2 } else { levels }) {
        minima.push(("guest: page fault, level", Some(level), 500));
    }
    match row.second {
        None => {}
        Some(Second::Npt(npt)) => {
            for level in [1, 2, 3, npt.into()] {
                minima.push(("nested: page fault, level", Some(level), 500));
            }
        }
        Some(Second::Ept) => {
            for level in [1, 4] {
                minima.push(("nested: violation, level", Some(level), 500));
            }
            minima.push(("nested: violation, level", None, 20_000));
            minima.push(("nested: misconfiguration, level", None, 2_000));
        }
    }
    if row.second.is_some() {
        minima.extend([("mapped over 4 KiB", None, 5_000), ("mapped over a large page", None, 2_000)]);
    }
    if levels > 3 {
        minima.push(("non-canonical", None, 5_000));
    }
    minima
}
