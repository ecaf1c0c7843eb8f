//! `KVM_TRANSLATE` against the walker, with and without a second dimension.
//!
//! Walked side by side are the guest's memory (by the kernel) and a copy of it (by the walker, policy `Set`); after each
//! address all entries are compared, after each set of tables all memory.

use fastrand::Rng;
use kvm_bindings::{kvm_regs, kvm_sregs};
use libtest_mimic::Failed;
use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, Dimension, EPT_VIOLATION_GVA_TRANSLATED,
    EXIT_INFO_1_TABLE, Fault, FaultKind, Gpa, Gva, Memory, NoTrace, PageSize, Privilege, Reason, Step, Trace,
    Translation, Walker, Window,
};

use super::second::{Root, Second};
use super::tables::{RAM_PAGES, Tables};
use super::vmcs12::CR4_VMXE;
use crate::bed::judge::{Judge, cases};
use crate::bed::soup::{INDICES, linear_address, twin};
use crate::bed::{
    ACCESSED, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PKE, CR4_PSE, CR4_SMAP,
    CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE, EFER_SVME, Machine, Maker, PAGE, RFLAGS_AC, RFLAGS_FIXED, Ram,
    Vcpu, long_mode, when,
};

/// What `EptControls::tables_written` is for.
const WRITES_ALONE: &str = "refused since KVM writes a table that a CPU reads";
const ADDRESSES: u64 = 16;
/// The vCPU whose MAXPHYADDR is 36: KVM takes every CPU's 4 MiB pages to have addresses of 36 bits.
const WITH_36_BITS: usize = 3;

/// One judge: the modes of both dimensions.
#[derive(Clone, Copy)]
pub(crate) struct Modes {
    pub(crate) name: &'static str,
    /// The guest's levels: 0 without paging, 2 and 3 for 32-bit and PAE paging.
    pub(crate) levels: u32,
    pub(crate) second: Option<Second>,
}

pub(crate) struct Bed {
    machine: Machine,
    vcpus: Vec<Vcpu>,
    copy: Ram,
}

impl Bed {
    pub(crate) fn of_amd() -> Result<Bed, String> {
        Bed::new(Maker::Amd, Maker::Intel)
    }

    pub(crate) fn of_intel() -> Result<Bed, String> {
        Bed::new(Maker::Intel, Maker::Amd)
    }

    /// Every CPU of one maker, and a single one of the other.
    fn new(maker: Maker, other: Maker) -> Result<Bed, String> {
        let machine = Machine::new(RAM_PAGES * PAGE)?;
        let here = machine.maxphyaddr()?;
        let wanted = [(maker, here), (other, here), (maker, 52), (maker, 36)];
        let mut vcpus = Vec::new();
        for (id, (maker, maxphyaddr)) in wanted.into_iter().enumerate() {
            vcpus.push(machine.vcpu(id as u64, maker, maxphyaddr)?);
        }
        let copy = Ram::new(machine.ram.bytes());
        Ok(Bed { machine, vcpus, copy })
    }
}

pub(crate) fn judge(bed: &Bed, modes: Modes) -> Result<(), Failed> {
    let mut judge = Judge::new(modes.name)?;
    let mut rng = Rng::with_seed(judge.seed());
    let wanted = cases(50_000)?;
    while judge.cases() < wanted {
        let vcpu = match modes.levels {
            2 => &bed.vcpus[WITH_36_BITS],
            _ => rng.choice(&bed.vcpus).unwrap(),
        };
        Round::new(&mut rng, bed, vcpu, modes)?.ask_all(&mut rng, &mut judge)?;
    }
    judge.finish(&minima(modes, &bed.machine))
}

/// One set of tables and registers.
struct Round<'a> {
    bed: &'a Bed,
    vcpu: &'a Vcpu,
    modes: Modes,
    tables: Tables,
    sregs: kvm_sregs,
    below: Option<Root>,
    walker: Walker,
    /// The same as a CPU walks, where KVM writes what a CPU reads.
    cpu: Option<Walker>,
}

impl<'a> Round<'a> {
    fn new(rng: &mut Rng, bed: &'a Bed, vcpu: &'a Vcpu, modes: Modes) -> Result<Self, Failed> {
        let tables = Tables::cook(rng, bed.machine.ram, vcpu, modes.levels, modes.second);
        bed.copy.copy_from(bed.machine.ram);
        let sregs = guest_registers(rng, bed, vcpu, modes, tables.root);
        let below = modes.second.zip(tables.second_root).map(|(second, root)| match second {
            Second::Npt(levels) => Root::Npt(root, host_registers(rng, levels)),
            Second::Ept => Root::eptp(root, rng.bool()),
        });
        if let Some(below) = below {
            below.leave(vcpu)?;
        }
        vcpu.fd.set_sregs(&sregs)?;
        let gva_walk = vcpu.gva_walk(&sregs, tables.pdptes)?;
        let mut cpu = None;
        let walker = match below {
            Some(below) => {
                below.enter(vcpu, &sregs)?;
                if modes.second == Some(Second::Ept) {
                    cpu = Some(Walker::nested(gva_walk.clone(), below.walk(vcpu, false)?));
                }
                Walker::nested(gva_walk, below.walk(vcpu, true)?)
            }
            None => Walker::new(gva_walk),
        };
        let held = vcpu.fd.get_sregs()?;
        if (held.cr0, held.cr3, held.cr4, held.efer) != (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) {
            return Err(format!("KVM did not keep the registers {sregs:x?}: {held:x?}").into());
        }
        // In guest mode, if there is one: L1 has PDPTE registers of its own.
        if let Some(pdptes) = tables.pdptes {
            vcpu.set_pdptes(&sregs, pdptes)?;
        }
        Ok(Round { bed, vcpu, modes, tables, sregs, below, walker, cpu })
    }

    fn ask_all(&self, rng: &mut Rng, judge: &mut Judge) -> Result<(), Failed> {
        let (ram, copy) = (self.bed.machine.ram, self.bed.copy);
        let mut access = Access::new(AccessKind::Read, Privilege::Supervisor);
        for number in 0..ADDRESSES {
            if number % (ADDRESSES / 2) == 0 {
                let keys = self.bed.machine.has_keys();
                let (ac, pkru) = (rng.bool(), if keys && rng.bool() { rng.u32(..) } else { 0 });
                let rflags = RFLAGS_FIXED | when(ac, RFLAGS_AC);
                self.vcpu.fd.set_regs(&kvm_regs { rflags, ..kvm_regs::default() })?;
                if keys {
                    self.bed.machine.set_pkru(&self.vcpu.fd, pkru)?;
                }
                access = access.with_ac(ac).with_pkru(pkru);
            }
            let gva = self.address(rng);
            judge.case();
            let tr = self.vcpu.fd.translate_gva(gva)?;
            let kernel = (tr.valid != 0).then_some(tr.physical_address);
            let ours = self.ask(gva, &access, judge);
            if ours.map(|page| page.gpa.0) != kernel {
                judge.disagree(|| {
                    let ours = ours.map_or("invalid".to_owned(), |page| format!("{:?}", page.gpa));
                    let kernel = kernel.map_or("invalid".to_owned(), |gpa| format!("{gpa:#x}"));
                    format!("translation: walker {ours}, kernel {kernel}\n{}", self.describe(gva, &access))
                });
            }
            if let Some(gpa) = self.tables.entries.iter().find(|gpa| ram.read(**gpa) != copy.read(**gpa)) {
                judge.disagree(|| {
                    let (ours, kernel) = (copy.read(*gpa), ram.read(*gpa));
                    format!(
                        "entry at {gpa:#x}: walker left {ours:#x}, kernel {kernel:#x}\n{}",
                        self.describe(gva, &access)
                    )
                });
                copy.copy_from(ram);
            }
        }
        if let Some(gpa) = ram.differs_from(copy) {
            judge.disagree(|| format!("memory at {gpa:#x} changed: no table uses it"));
        }
        Ok(())
    }

    fn address(&self, rng: &mut Rng) -> u64 {
        match self.modes.levels {
            0 if rng.bool() => rng.choice(&self.tables.homes).unwrap() & 0xffff_f000 | rng.u64(0..PAGE),
            0 | 3 => linear_address(rng, 4) & 0xffff_ffff,
            2 => {
                let mut index = || rng.choice(&INDICES).unwrap() + 512 * rng.u64(0..2);
                index() << 22 | index() << 12 | rng.u64(0..PAGE)
            }
            levels => linear_address(rng, levels),
        }
    }

    /// The walker's answer in the ioctl's terms, counted by class.
    fn ask(&self, gva: u64, access: &Access, judge: &mut Judge) -> Option<Translation> {
        let memory = Window::new(self.bed.copy.words());
        let mut taken_for = gva;
        if self.modes.levels > 3 && twin(gva, self.modes.levels) != gva {
            taken_for = twin(gva, self.modes.levels);
            judge.count("non-canonical", 0);
            judge.exempt("non-canonical, walked as its sign-extended twin");
            let refused = self.walker.translate_with(&memory, Gva(gva), access, AdPolicy::Set, &mut NoTrace);
            if refused.map_err(|fault| fault.kind) != Err(FaultKind::GeneralProtection) {
                judge.disagree(|| format!("{gva:#x} is not canonical; the walker says {refused:?}"));
            }
        }
        let mut trace = Trace::new();
        let outcome = self.walker.translate_with(&memory, Gva(taken_for), access, AdPolicy::Set, &mut trace);
        match outcome {
            Ok(page) => {
                judge.count(size_class(page), 0);
                judge.count_if("mapped without backing", page.backing() == Backing::None);
                judge.count_if(
                    "mapped by a large guest page",
                    matches!(page.page_size(), PageSize::Size2M | PageSize::Size4M | PageSize::Size1G),
                );
                judge.count_if("mapped under PCID", self.sregs.cr4 & CR4_PCIDE != 0);
                let changed = |step: &Step, bit| {
                    // PDPTE registers have neither bit.
                    let register =
                        step.dimension == Dimension::Guest && (self.modes.levels, step.level) == (3, 3);
                    let now = u64::from(self.bed.copy.read_u32(step.entry_gpa.0));
                    !register && step.entry & bit == 0 && now & bit != 0
                };
                let steps = |dimension| trace.steps().iter().filter(move |step| step.dimension == dimension);
                let mut guest = steps(Dimension::Guest);
                judge.count_if(
                    "accessed bit set in the guest's entry",
                    guest.any(|step| changed(step, ACCESSED)),
                );
                let (accessed, dirty) = self.below.map_or((0, 0), |below| below.accessed_dirty());
                for (class, bit) in [
                    ("accessed bit set in a nested entry", accessed),
                    ("dirty bit set in a nested entry", dirty),
                ] {
                    judge.count_if(class, steps(Dimension::Nested).any(|step| changed(step, bit)));
                }
                Some(page)
            }
            Err(fault) => {
                count_fault(&fault, judge);
                if self.cpu.as_ref().is_some_and(|cpu| cpu.translate(&memory, Gva(taken_for), access).is_ok())
                {
                    judge.count(WRITES_ALONE, 0);
                    judge.exempt(WRITES_ALONE);
                }
                if self.commit_finished_nested_walks(trace.steps()) {
                    judge.exempt("refused, with accessed or dirty bits of finished nested walks set");
                }
                None
            }
        }
    }

    /// KVM commits a nested walk as soon as that is done, whatever becomes of the guest's walk; policy `Set` commits
    /// nothing of a refused walk. Does to the copy what KVM does.
    fn commit_finished_nested_walks(&self, steps: &[Step]) -> bool {
        let (accessed, dirty) = self.below.map_or((0, 0), |below| below.accessed_dirty());
        let memory = Window::new(self.bed.copy.words());
        let mut changed = false;
        for finished in steps.split_inclusive(|step| step.dimension == Dimension::Guest) {
            let Some((guest, nested)) = finished.split_last() else { continue };
            if guest.dimension != Dimension::Guest {
                break;
            }
            for (at, step) in nested.iter().enumerate() {
                let entry = self.bed.copy.read(step.entry_gpa.0);
                let wanted = entry | accessed | when(at + 1 == nested.len(), dirty);
                changed |= wanted != entry;
                let _ = memory.compare_exchange_u64(Gpa(step.entry_gpa.0), entry, wanted);
            }
        }
        changed
    }

    fn describe(&self, gva: u64, access: &Access) -> String {
        let memory = Window::new(self.bed.copy.words());
        let mut trace = Trace::new();
        let outcome = self.walker.translate_with(&memory, Gva(gva), access, AdPolicy::Observe, &mut trace);
        let mut text = format!(
            "  {:?} MAXPHYADDR {} CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x} below {:x?} GVA {gva:#x} {access:x?}\n  now {outcome:x?}",
            self.vcpu.maker,
            self.vcpu.maxphyaddr,
            self.sregs.cr0,
            self.sregs.cr3,
            self.sregs.cr4,
            self.sregs.efer,
            self.below
        );
        for step in trace.steps() {
            text += &format!(
                "\n  {:?} level {}: [{:#x}] = {:#x} for {:#x}: {:?}",
                step.dimension, step.level, step.entry_gpa, step.entry, step.input, step.verdict
            );
        }
        text
    }
}

fn guest_registers(rng: &mut Rng, bed: &Bed, vcpu: &Vcpu, modes: Modes, root: u64) -> kvm_sregs {
    let mut sregs = vcpu.reset;
    let pcid = modes.levels > 3 && bed.machine.has_pcid() && rng.bool();
    // CR3's low bits select cacheability, or are a PCID; none is part of the root.
    long_mode(&mut sregs, root | if pcid { rng.u64(0..PAGE) } else { rng.u64(0..4) << 3 });
    sregs.cr4 |= when(pcid, CR4_PCIDE);
    sregs.cr0 &= !when(rng.bool(), CR0_WP);
    sregs.efer &= !when(rng.u32(0..3) == 0, EFER_NXE);
    sregs.cr4 |= when(modes.levels == 5, CR4_LA57);
    sregs.cr4 |= when(rng.bool(), CR4_SMEP);
    sregs.cr4 |= when(rng.u32(0..3) == 0, CR4_SMAP);
    sregs.cr4 |= when(bed.machine.has_keys() && rng.bool(), CR4_PKE);
    if modes.levels < 4 {
        sregs.cr0 &= !when(modes.levels == 0, CR0_PG);
        sregs.cr4 &= !when(modes.levels < 3, CR4_PAE);
        sregs.cr4 |= when(rng.bool(), CR4_PSE);
        sregs.efer &= !(EFER_LMA | EFER_LME);
        sregs.cs.l = 0;
        sregs.cs.db = 1;
    }
    match modes.second {
        Some(Second::Npt(_)) => sregs.efer |= EFER_SVME,
        Some(Second::Ept) => sregs.cr4 |= CR4_VMXE,
        None => {}
    }
    sregs
}

/// L1's registers at VMRUN. WP, SMEP, SMAP and PKE must not matter to NPT.
fn host_registers(rng: &mut Rng, npt_levels: u32) -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_NE | CR0_PG | when(rng.bool(), CR0_WP),
        cr3: 0,
        cr4: CR4_PAE
            | when(npt_levels == 5, CR4_LA57)
            | when(rng.bool(), CR4_SMEP)
            | when(rng.bool(), CR4_SMAP)
            | when(rng.bool(), CR4_PKE),
        efer: EFER_SVME | EFER_LME | EFER_LMA | when(rng.u32(0..3) != 0, EFER_NXE),
        ..ControlRegisters::default()
    }
}

fn size_class(page: Translation) -> &'static str {
    use PageSize::{Size1G, Size2M, Size4K, Size4M, Unpaged};
    match (page.page_size(), page.nested.map(|nested| nested.page_size)) {
        (Unpaged, None) => "mapped unpaged",
        (Size4K, None) => "mapped 4 KiB",
        (Size2M, None) => "mapped 2 MiB",
        (Size4M, None) => "mapped 4 MiB",
        (Size1G, None) => "mapped 1 GiB",
        (Unpaged, Some(Size4K)) => "mapped unpaged over 4 KiB",
        (Unpaged, Some(Size2M)) => "mapped unpaged over 2 MiB",
        (Unpaged, Some(Size1G)) => "mapped unpaged over 1 GiB",
        (Size4K, Some(Size4K)) => "mapped 4 KiB over 4 KiB",
        (Size4K, Some(Size2M)) => "mapped 4 KiB over 2 MiB",
        (Size4K, Some(Size1G)) => "mapped 4 KiB over 1 GiB",
        (Size2M, Some(Size4K)) => "mapped 2 MiB over 4 KiB",
        (Size2M, Some(Size2M)) => "mapped 2 MiB over 2 MiB",
        (Size2M, Some(Size1G)) => "mapped 2 MiB over 1 GiB",
        (Size4M, Some(Size4K)) => "mapped 4 MiB over 4 KiB",
        (Size4M, Some(Size2M)) => "mapped 4 MiB over 2 MiB",
        (Size4M, Some(Size1G)) => "mapped 4 MiB over 1 GiB",
        (Size1G, Some(Size4K)) => "mapped 1 GiB over 4 KiB",
        (Size1G, Some(Size2M)) => "mapped 1 GiB over 2 MiB",
        (Size1G, Some(Size1G)) => "mapped 1 GiB over 1 GiB",
        _ => "mapped otherwise",
    }
}

fn count_fault(fault: &Fault, judge: &mut Judge) {
    let class = match (fault.dimension, fault.reason) {
        (Dimension::Guest, Reason::NotPresent) => "guest: not present, level",
        (Dimension::Guest, Reason::ReservedBits) => "guest: reserved, level",
        (Dimension::Guest, Reason::TableUnbacked) => "guest: table outside memory, level",
        (Dimension::Guest, Reason::Smap) => "guest: SMAP",
        (Dimension::Guest, Reason::ProtectionKey) => "guest: protection key",
        (Dimension::Nested, Reason::NotPresent) => "nested: not present, level",
        (Dimension::Nested, Reason::ReservedBits) => "nested: reserved, level",
        (Dimension::Nested, Reason::TableUnbacked) => "nested: table outside memory, level",
        (Dimension::Nested, Reason::SupervisorPage) => "nested: supervisor page, level",
        (Dimension::Nested, Reason::ReadOnly) => "nested: read-only, level",
        (Dimension::Nested, Reason::NotReadable) => "nested: not readable, level",
        (Dimension::Nested, Reason::WriteWithoutRead) => "nested: writable and not readable, level",
        (Dimension::Nested, Reason::MemoryType) => "nested: memory type, level",
        _ => "refused otherwise",
    };
    let leveled = class.ends_with("level");
    judge.count(class, if leveled { u64::from(fault.level) } else { 0 });
    let of_table = match fault.kind {
        FaultKind::NestedPageFault { exit_info_1 } => Some(exit_info_1 & EXIT_INFO_1_TABLE != 0),
        FaultKind::EptViolation { exit_qualification } => {
            Some(exit_qualification & EPT_VIOLATION_GVA_TRANSLATED == 0)
        }
        _ => None,
    };
    if let Some(of_table) = of_table {
        let class = if of_table { "nested fault for a table" } else { "nested fault for the final address" };
        judge.count(class, 0);
    }
}

fn minima(modes: Modes, machine: &Machine) -> Vec<(&'static str, Option<u64>, u64)> {
    let mut minima = Vec::new();
    let levels = u64::from(modes.levels);
    let second_levels = modes.second.map_or(0, |second| second.levels().into());
    // A PDPTE register lies in no table, and holds no reserved bits.
    for level in 1..=if levels == 3 { 2 } else { levels } {
        minima.extend([
            ("guest: not present, level", Some(level), 1_500),
            ("guest: table outside memory, level", Some(level), 400),
        ]);
        // Few walks over EPT come as far as a reserved bit in L2's lowest table; those without EPT do.
        let lowest_over_ept = level == 1 && modes.second == Some(Second::Ept);
        if (levels > 2 || level == 2) && !lowest_over_ept {
            minima.push(("guest: reserved, level", Some(level), if level == 1 { 40 } else { 80 }));
        }
    }
    // Where a set of tables leads to a class, it does so for many addresses: counts scatter far more than single cases would, and
    // a minimum is a small part of what is usual. EPT is judged with fewer cases.
    let least = if modes.second == Some(Second::Ept) { 10 } else { 50 };
    for level in 1..=second_levels {
        minima.extend([
            ("nested: not present, level", Some(level), least),
            ("nested: reserved, level", Some(level), least),
        ]);
        if modes.second == Some(Second::Ept) {
            minima.push(("nested: writable and not readable, level", Some(level), least));
        } else {
            minima.push(("nested: supervisor page, level", Some(level), least));
        }
        if levels > 0 {
            minima.push(("nested: read-only, level", Some(level), least));
        }
        if level + 1 < second_levels {
            minima.push(("nested: table outside memory, level", Some(level), least));
        }
    }
    if modes.second == Some(Second::Ept) {
        minima.extend([
            ("nested: memory type, level", None, 100),
            // L2's tables are written: there, execute-only counts as read-only.
            ("nested: not readable, level", None, if levels == 0 { 500 } else { least }),
        ]);
    }
    let sizes: &[(&str, u64)] = match (levels, second_levels) {
        (0, 0) => &[("mapped unpaged", 200_000)],
        (2, 0) => &[("mapped 4 KiB", 20_000), ("mapped 4 MiB", 5_000)],
        (3, 0) => &[("mapped 4 KiB", 20_000), ("mapped 2 MiB", 5_000)],
        (_, 0) => &[("mapped 4 KiB", 20_000), ("mapped 2 MiB", 1_500), ("mapped 1 GiB", 1_500)],
        (0, _) => &[
            ("mapped unpaged over 4 KiB", 20_000),
            ("mapped unpaged over 2 MiB", 5_000),
            ("mapped unpaged over 1 GiB", 5_000),
        ],
        (2.., _) if modes.second == Some(Second::Ept) => &[
            ("mapped 4 KiB over 4 KiB", 5_000),
            ("mapped 4 KiB over 2 MiB", 1_500),
            ("mapped 4 KiB over 1 GiB", 1_500),
            ("mapped by a large guest page", 200),
        ],
        (2, _) => &[
            ("mapped 4 KiB over 4 KiB", 5_000),
            ("mapped 4 KiB over 2 MiB", 1_500),
            ("mapped 4 KiB over 1 GiB", 1_500),
            ("mapped 4 MiB over 4 KiB", 200),
            ("mapped 4 MiB over 2 MiB", 200),
            ("mapped 4 MiB over 1 GiB", 200),
        ],
        (_, _) => &[
            ("mapped 4 KiB over 4 KiB", 5_000),
            ("mapped 4 KiB over 2 MiB", 1_500),
            ("mapped 4 KiB over 1 GiB", 1_500),
            ("mapped 2 MiB over 4 KiB", 200),
            ("mapped 2 MiB over 2 MiB", 20),
            ("mapped 2 MiB over 1 GiB", 50),
        ],
    };
    minima.extend(sizes.iter().map(|(class, minimum)| (*class, None, *minimum)));
    if levels > 0 {
        minima.extend([
            ("guest: SMAP", None, 1_000),
            ("mapped without backing", None, 500),
            ("accessed bit set in the guest's entry", None, 5_000),
        ]);
    }
    if levels > 3 {
        minima.push(("non-canonical", None, 5_000));
        if machine.has_keys() {
            minima.push(("guest: protection key", None, 1_000));
        }
        if machine.has_pcid() {
            minima.push(("mapped under PCID", None, 5_000));
        }
    }
    if second_levels > 0 {
        minima.extend([
            ("nested fault for the final address", None, 2_000),
            ("accessed bit set in a nested entry", None, 2_000),
        ]);
    }
    if levels > 0 && modes.second == Some(Second::Ept) {
        minima.push((WRITES_ALONE, None, 60));
    }
    if levels > 3 && matches!(modes.second, Some(Second::Npt(_))) {
        minima.extend([
            ("mapped 1 GiB over 4 KiB", None, 200),
            ("mapped 1 GiB over 2 MiB", None, 20),
            ("mapped 1 GiB over 1 GiB", None, 50),
        ]);
    }
    if levels > 0 && second_levels > 0 {
        minima.extend([
            ("nested fault for a table", None, 20_000),
            ("dirty bit set in a nested entry", None, 1_000),
        ]);
    }
    minima
}
