//! Judge `kvm-translate`: the walker's answer against `KVM_TRANSLATE`, the kernel's own walk of the same tables.
//!
//! Tables are a soup: every table page may be used at every level, so that tables refer to themselves, to each other
//! and to nowhere, and one entry is a PML4E on one path and a PTE on the next. Walked side by side are the guest's
//! memory (by the kernel) and a copy of it (by the walker, policy `Observe`, then `Set`); after each address all entries
//! are compared, after each soup all memory.
//!
//! What the ioctl asks, and how that is mapped:
//! - It is an explicit supervisor data *read*, whatever the vCPU's CPL: so is our access. W and execution are therefore
//!   never decided here; U/S is, under SMAP with RFLAGS.AC clear. Permissions are `judge_execution`'s business.
//! - It ignores canonicality and walks the low 48 bits: a non-canonical address is compared as its sign-extended twin,
//!   and the walker must refuse the address itself as #GP. By rule, counted.
//! - A table outside memory makes it answer "invalid" like any refusal; the walker says `Unbacked`, and must. A leaf
//!   outside memory is valid for both.
//! - On success it sets the accessed bit at every level and no dirty bit, on failure nothing: as policy `Set` does.
//!
//! Not judged: 5-level paging (CR4.LA57 is refused by the backend), 1 GiB leaves unless the vCPU has them (bit 7 of a
//! PDPTE is then reserved), error codes (the ioctl has none), PKRU (see `judge_execution`).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

mod bed;

use bed::judge::{Judge, cases, skipped};
use bed::soup::{INDICES, Recipe, linear_address, trouble, twin};
use bed::{
    CR0_WP, CR4_PKE, CR4_SMAP, CR4_SMEP, EFER_NXE, Machine, Maker, PAGE, RFLAGS_AC, RFLAGS_FIXED, Ram, Vcpu,
    long_mode, walk, when,
};
use fastrand::Rng;
use kvm_bindings::{kvm_regs, kvm_sregs};
use libtest_mimic::{Arguments, Failed, Trial};
use pagewalk::{
    Access, AccessKind, Backing, FaultKind, NoTrace, PageSize, Privilege, Reason, Translation, Walker,
};

const RAM_PAGES: u64 = 64;
const TABLES: u64 = 12;
const ADDRESSES: u64 = 64;

fn main() {
    let arguments = Arguments::from_args();
    let trials = vec![Trial::test("kvm_translate_agrees", || match Bed::new() {
        Ok(bed) => judge(&bed),
        Err(reason) => skipped("kvm", &reason),
    })];
    libtest_mimic::run(&arguments, trials).exit();
}

struct Bed {
    machine: Machine,
    vcpus: Vec<Vcpu>,
}

impl Bed {
    fn new() -> Result<Bed, String> {
        let machine = Machine::new(RAM_PAGES * PAGE)?;
        let widest = machine.maxphyaddr()?;
        let wanted = [(Maker::Intel, widest), (Maker::Amd, widest), (Maker::Intel, 40), (Maker::Amd, 36)];
        let mut vcpus = Vec::new();
        for (id, (maker, maxphyaddr)) in wanted.into_iter().enumerate() {
            vcpus.push(machine.vcpu(id as u64, maker, maxphyaddr)?);
        }
        Ok(Bed { machine, vcpus })
    }
}

fn judge(bed: &Bed) -> Result<(), Failed> {
    let mut judge = Judge::new("kvm-translate")?;
    let mut rng = Rng::with_seed(judge.seed());
    let wanted = cases(700_000)?;
    let copy = Ram::new(bed.machine.ram.bytes());
    while judge.cases() < wanted {
        let vcpu = rng.choice(&bed.vcpus).unwrap();
        let soup = Soup::cook(&mut rng, bed.machine.ram, vcpu.maxphyaddr, vcpu.gib_pages);
        soup.serve(&mut rng, bed, vcpu, copy, &mut judge)?;
    }
    judge.finish(&[
        ("mapped 4 KiB", None, 20_000),
        ("mapped 2 MiB", None, 2_000),
        ("mapped without backing", None, 5_000),
        ("refused: not present, level", Some(4), 2_000),
        ("refused: not present, level", Some(3), 2_000),
        ("refused: not present, level", Some(2), 2_000),
        ("refused: not present, level", Some(1), 1_000),
        ("refused: reserved, level", Some(4), 2_000),
        ("refused: reserved, level", Some(3), 2_000),
        ("refused: reserved, level", Some(2), 2_000),
        ("refused: reserved, level", Some(1), 400),
        ("refused: table outside memory, level", Some(4), 1_000),
        ("refused: table outside memory, level", Some(3), 1_000),
        ("refused: table outside memory, level", Some(2), 1_000),
        ("refused: table outside memory, level", Some(1), 500),
        ("refused: SMAP", None, 2_000),
        ("non-canonical", None, 5_000),
        ("table met twice on one path", None, 5_000),
    ])
}

/// One set of tables and registers, and a number of addresses to ask about.
struct Soup {
    root: u64,
    /// GPA of every entry that may be other than zero.
    entries: Vec<u64>,
}

impl Soup {
    fn cook(rng: &mut Rng, ram: Ram, maxphyaddr: u8, gib_pages: bool) -> Soup {
        ram.clear();
        let tables: Vec<u64> = (0..TABLES).map(|_| rng.u64(0..RAM_PAGES) * PAGE).collect();
        let recipe = Recipe {
            tables: &tables,
            trouble: trouble(rng),
            ram_pages: RAM_PAGES,
            width: maxphyaddr,
            maxphyaddr,
            gib_pages,
        };
        let mut entries = Vec::new();
        for table in &tables {
            for index in INDICES {
                let gpa = table + index * 8;
                ram.write(gpa, recipe.entry(rng));
                entries.push(gpa);
            }
        }
        let root = if rng.u32(0..20) == 0 { RAM_PAGES * PAGE } else { tables[0] };
        Soup { root, entries }
    }

    fn serve(
        &self,
        rng: &mut Rng,
        bed: &Bed,
        vcpu: &Vcpu,
        copy: Ram,
        judge: &mut Judge,
    ) -> Result<(), Failed> {
        let ram = bed.machine.ram;
        let mut sregs = vcpu.reset;
        // CR3's low bits select cacheability, not a root.
        long_mode(&mut sregs, self.root | rng.u64(0..4) << 3);
        sregs.cr0 &= !when(rng.bool(), CR0_WP);
        sregs.efer &= !when(rng.u32(0..3) == 0, EFER_NXE);
        sregs.cr4 |= when(rng.bool(), CR4_SMEP);
        sregs.cr4 |= when(rng.u32(0..3) == 0, CR4_SMAP);
        sregs.cr4 |= when(rng.bool(), CR4_PKE);
        vcpu.fd.set_sregs(&sregs)?;
        let walker = vcpu.walker(&sregs)?;
        copy.copy_from(ram);

        let mut ac = false;
        for number in 0..ADDRESSES {
            if number % (ADDRESSES / 2) == 0 {
                ac = rng.bool();
                let rflags = RFLAGS_FIXED | when(ac, RFLAGS_AC);
                vcpu.fd.set_regs(&kvm_regs { rflags, ..kvm_regs::default() })?;
            }
            let gva = linear_address(rng, 4);
            judge.case();
            let tr = vcpu.fd.translate_gva(gva)?;
            let kernel = (tr.valid != 0).then_some(tr.physical_address);
            let ours = ask(&walker, copy, gva, ac, judge);
            if ours.map(|page| page.gpa.0) != kernel {
                judge.disagree(|| {
                    let ours = ours.map_or("invalid".to_owned(), |page| format!("{:?}", page.gpa));
                    let kernel = kernel.map_or("invalid".to_owned(), |gpa| format!("{gpa:#x}"));
                    format!(
                        "translation: walker {ours}, kernel {kernel}\n{}",
                        self.describe(copy, gva, ac, &sregs, vcpu)
                    )
                });
            }
            if let Some(gpa) = self.entries.iter().find(|gpa| ram.read(**gpa) != copy.read(**gpa)) {
                judge.disagree(|| {
                    let (ours, kernel) = (copy.read(*gpa), ram.read(*gpa));
                    format!(
                        "entry at {gpa:#x}: walker left {ours:#x}, kernel {kernel:#x}\n{}",
                        self.describe(copy, gva, ac, &sregs, vcpu)
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

    fn describe(&self, copy: Ram, gva: u64, ac: bool, sregs: &kvm_sregs, vcpu: &Vcpu) -> String {
        let mut text = format!(
            "  {:?} MAXPHYADDR {} CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x} AC {ac} GVA {gva:#x}",
            vcpu.maker, vcpu.maxphyaddr, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer
        );
        let mut table = self.root;
        for level in (1..=4).rev() {
            let gpa = table + (gva >> (12 + 9 * (level - 1)) & 511) * 8;
            if !copy.holds(gpa) {
                break;
            }
            text += &format!("\n  level {level}: [{gpa:#x}] = {:#x}", copy.read(gpa));
            table = copy.read(gpa) & 0x000f_ffff_ffff_f000;
        }
        text
    }
}

/// The walker's answer in the ioctl's terms, counted by class.
fn ask(walker: &Walker, copy: Ram, gva: u64, ac: bool, judge: &mut Judge) -> Option<Translation> {
    let access = Access::new(AccessKind::Read, Privilege::Supervisor).with_ac(ac);
    let twin = twin(gva, 4);
    if twin != gva {
        judge.count("non-canonical", 0);
        judge.exempt("non-canonical, walked as its sign-extended twin");
        let refused = walk(walker, copy, gva, &access, &mut NoTrace, judge);
        if refused.map_err(|fault| fault.kind) != Err(FaultKind::GeneralProtection) {
            judge.disagree(|| format!("{gva:#x} is not canonical; the walker says {refused:?}"));
        }
    }
    let mut trace = pagewalk::Trace::new();
    let outcome = walk(walker, copy, twin, &access, &mut trace, judge);
    let steps = trace.steps();
    if steps
        .iter()
        .enumerate()
        .any(|(at, step)| steps[..at].iter().any(|other| other.table_gpa == step.table_gpa))
    {
        judge.count("table met twice on one path", 0);
    }
    match outcome {
        Ok(page) => {
            judge.count(
                match page.page_size() {
                    PageSize::Size4K => "mapped 4 KiB",
                    PageSize::Size2M => "mapped 2 MiB",
                    PageSize::Size1G => "mapped 1 GiB",
                    _ => "mapped otherwise",
                },
                0,
            );
            if page.backing() == Backing::None {
                judge.count("mapped without backing", 0);
            }
            Some(page)
        }
        Err(fault) => {
            let class = match fault.reason {
                Reason::NotPresent => "refused: not present, level",
                Reason::ReservedBits => "refused: reserved, level",
                Reason::TableUnbacked => "refused: table outside memory, level",
                Reason::Smap => "refused: SMAP",
                _ => "refused otherwise",
            };
            judge.count(class, if fault.reason == Reason::Smap { 0 } else { u64::from(fault.level) });
            None
        }
    }
}
