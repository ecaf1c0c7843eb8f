//! The stage on which one access is executed: the guest's code, descriptor tables, handlers and stack, and room for
//! the tables of a few hundred cases.
//!
//! # What keeps stale translations out
//! A backend may shadow the guest's tables, or fill a TLB from them, and neither notices a table that is rewritten from
//! outside. So no case ever meets an entry that an earlier case used: each has its own entry in the root table and its own
//! tables below that, written before anything can have walked them and never again. When the root has no entry left, the
//! memory slot is taken away and given back, which drops every shadow, and CR3 changes, which drops every TLB entry; only
//! then are table pages used again.
//!
//! # Layout
//! Odd entries of the root table map the stage, even ones belong to cases. The stage fills the last sixteen pages below
//! each case's first address, its last page being the first of the GDT, so that a case at offset 0 of its entry lies where
//! the GDT goes on. Under PAE paging, the four page directories stand for the root table. Without paging there is one
//! stage, and all cases lie behind it. The code is the same bytes in 64-bit and in 32-bit mode.

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use pagewalk::PagingMode;

use super::shape::{PAE_DIRECTORIES, ROOT, Shape};
use super::{
    Machine, PAGE, PRESENT, RFLAGS_AC, RFLAGS_FIXED, RFLAGS_IOPL3, Ram, USER, WRITE, code_segment,
    data_segment, long_mode, table_register, when,
};

pub(crate) const RAM_BYTES: u64 = 8 << 20;
/// Frames for 4 KiB leaves.
pub(crate) const FRAMES: u64 = 0x2_0000;
pub(crate) const FRAME_COUNT: u64 = 16;

const STAGE_TABLES: [u64; 4] = [0x2000, 0x3000, 0x4000, 0x5000];
const STAGE: u64 = 0x1_0000;
const STAGE_PAGES: u64 = 16;

/// Pages of the stage, by number.
const SUPERVISOR_CODE: u64 = 0;
const USER_CODE: u64 = 1;
const HANDLERS: u64 = 2;
const IDT: u64 = 3;
const TSS: u64 = 4;
const STACK: u64 = 5;
const GDT: u64 = 15;

const KERNEL_CS: u16 = 0x08;
const KERNEL_SS: u16 = 0x10;
const USER_SS: u16 = 0x18;
const USER_CS: u16 = 0x20;
const TASK: u16 = 0x28;

/// Said by supervisor code that got past its access. Exceptions say their vector, below 32.
const DONE_PORT: u8 = 0x40;
const UD: u8 = 6;
/// `out DONE_PORT, al` for the supervisor; `ud2` for the user, to whom no port is open.
pub(crate) const SUPERVISOR_DONE: [u8; 2] = [0xe6, DONE_PORT];
pub(crate) const USER_DONE: [u8; 2] = [0x0f, 0x0b];

/// CR2 before every case, so that a fault that leaves it alone is seen.
const NO_CR2: u64 = 0xdead_0000;

/// The one access that a case makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Load,
    Store,
    Fetch,
    /// Through SS.
    StackLoad,
    StackStore,
    /// `mov fs, ax`: the CPU reads the descriptor for itself.
    DescriptorLoad,
    /// The same with a descriptor whose accessed bit is clear: the CPU also writes it.
    DescriptorTouch,
    /// `rdpkru`, which touches no memory: whether there are protection keys at all.
    ReadKeys,
}

impl Act {
    pub(crate) fn is_implicit(self) -> bool {
        matches!(self, Act::DescriptorLoad | Act::DescriptorTouch)
    }

    /// Bytes of memory that the access touches.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Act::Load | Act::Store | Act::StackLoad | Act::StackStore => 1,
            Act::Fetch => 2,
            Act::DescriptorLoad | Act::DescriptorTouch => 8,
            Act::ReadKeys => 0,
        }
    }
}

const ACTS: [(Act, &[u8]); 7] = [
    (Act::Load, &[0x8a, 0x07]),
    (Act::Store, &[0x88, 0x07]),
    (Act::StackLoad, &[0x8a, 0x45, 0x00]),
    (Act::StackStore, &[0x88, 0x45, 0x00]),
    (Act::DescriptorLoad, &[0x8e, 0xe0]),
    (Act::DescriptorTouch, &[0x8e, 0xe0]),
    (Act::ReadKeys, &[0x0f, 0x01, 0xee]),
];

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The instruction after it ran.
    Done,
    /// `cr2` is 0 unless `vector` is #PF.
    Exception { vector: u8, code: u64, cr2: u64 },
    /// KVM could not emulate the instruction.
    NotEmulated,
    /// The guest stopped in a way that no case asks for.
    Lost(&'static str),
}

/// What the access brought along, besides its outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Brought {
    /// AL after the access.
    pub(crate) al: u8,
    /// Bits 31:24 of FS's base.
    pub(crate) fs_base: u8,
    /// The access left memory: GPA, and the byte that was written.
    pub(crate) mmio: Option<(u64, Option<u8>)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Play {
    pub(crate) act: Act,
    pub(crate) cpl: u8,
    pub(crate) ac: bool,
    pub(crate) gva: u64,
    /// AL before the access, and what reads from outside memory return.
    pub(crate) byte: u8,
}

/// Where one case has its entries.
#[derive(Clone, Copy)]
pub(crate) struct Plot {
    /// First address of its highest entry.
    pub(crate) base: u64,
    /// Its highest entry.
    pub(crate) top: u64,
    /// Its tables, the highest first; as many as it has levels below the root.
    pub(crate) tables: [u64; 4],
}

pub(crate) struct Ground {
    pub(crate) shape: Shape,
    ram: Ram,
    copy: Ram,
    plots: u64,
    written: Vec<u64>,
    turn: u64,
    /// The PDPTEs of PAE paging.
    pub(crate) pdptes: [u64; 4],
}

impl Ground {
    /// `copy` receives the same table entries, for the walker.
    pub(crate) fn new(machine: &Machine, copy: Ram, mode: PagingMode) -> Ground {
        let pdptes = PAE_DIRECTORIES.map(|directory| directory | PRESENT);
        let shape = Shape::new(mode);
        let ground = Ground { shape, ram: machine.ram, copy, plots: 0, written: Vec::new(), turn: 0, pdptes };
        ground.set_stage_tables();
        ground.set_code();
        if shape.is_long() {
            ground.set_long_mode_tables();
        } else {
            ground.set_legacy_tables();
        }
        ground
    }

    fn set_stage_tables(&self) {
        let shape = self.shape;
        if shape.levels == 0 {
            return;
        }
        let roots: &[u64] = if shape.mode == PagingMode::Pae { &PAE_DIRECTORIES } else { &[ROOT] };
        let bytes = shape.entry_bytes();
        let entries = 1 << shape.index_bits();
        for root in roots {
            for odd in (1..entries).step_by(2) {
                shape.write(self.ram, root + odd * bytes, STAGE_TABLES[0] | PRESENT | WRITE | USER);
            }
        }
        let last = shape.levels as usize - 2;
        for pair in STAGE_TABLES[..=last].windows(2) {
            shape.write(self.ram, pair[0] + (entries - 1) * bytes, pair[1] | PRESENT | WRITE | USER);
        }
        for page in 0..STAGE_PAGES {
            let user = when(page == USER_CODE, USER);
            let at = STAGE_TABLES[last] + (entries - STAGE_PAGES + page) * bytes;
            shape.write(self.ram, at, stage_gpa(page) | PRESENT | WRITE | user);
        }
    }

    fn set_code(&self) {
        for (at, (_, code)) in ACTS.iter().enumerate() {
            for (page, done) in [(SUPERVISOR_CODE, SUPERVISOR_DONE), (USER_CODE, USER_DONE)] {
                self.ram.write_bytes(stage_gpa(page) + at as u64 * 16, code);
                self.ram.write_bytes(stage_gpa(page) + at as u64 * 16 + code.len() as u64, &done);
            }
        }
        for vector in 0..32 {
            self.ram.write_bytes(stage_gpa(HANDLERS) + vector * 16, &[0xe6, vector as u8]);
        }
    }

    fn set_long_mode_tables(&self) {
        for vector in 0..32 {
            let handler = self.stage_gva(HANDLERS) + vector * 16;
            // Interrupt gate, DPL 0, IST 1.
            self.ram.write(stage_gpa(IDT) + vector * 16, gate(handler, 1));
            self.ram.write(stage_gpa(IDT) + vector * 16 + 8, handler >> 32);
        }
        // RSP0 at offset 4 and IST1 at offset 36 are not aligned to a word.
        let top = self.stack_top();
        self.ram.write_bytes(stage_gpa(TSS) + 4, &top.to_le_bytes());
        self.ram.write_bytes(stage_gpa(TSS) + 36, &top.to_le_bytes());
        self.set_descriptors(0x00af_9b00_0000_ffff);
    }

    /// 32-bit mode: half as long gates, and a TSS that names a stack for CPL 0 alone.
    fn set_legacy_tables(&self) {
        for vector in 0..32 {
            let handler = self.stage_gva(HANDLERS) + vector * 16;
            self.ram.write(stage_gpa(IDT) + vector * 8, gate(handler, 0));
        }
        // ESP0 and SS0.
        self.ram.write_u32(stage_gpa(TSS) + 4, self.stack_top() as u32);
        self.ram.write_u32(stage_gpa(TSS) + 8, KERNEL_SS.into());
        self.set_descriptors(0x00cf_9b00_0000_ffff);
    }

    fn set_descriptors(&self, code: u64) {
        let dpl_3 = 3 << 45;
        for (selector, descriptor) in [
            (KERNEL_CS, code),
            (KERNEL_SS, 0x00cf_9300_0000_ffff),
            (USER_SS, 0x00cf_f300_0000_ffff),
            (USER_CS, code | dpl_3),
        ] {
            self.ram.write(stage_gpa(GDT) + u64::from(selector), descriptor);
        }
    }

    /// Page `page` of the stage, where code runs: under the root table's entry 1.
    fn stage_gva(&self, page: u64) -> u64 {
        match self.shape.levels {
            0 => stage_gpa(page),
            _ => 2 * self.shape.span() - (STAGE_PAGES - page) * PAGE,
        }
    }

    fn stack_top(&self) -> u64 {
        self.stage_gva(STACK) + PAGE
    }

    /// A fresh root, and with it fresh tables, under these PDPTEs where the paging mode has them. Answers where the last
    /// root's cases left anything behind that is not one of their entries.
    pub(crate) fn clear(&mut self, machine: &Machine, pdptes: [u64; 4]) -> Result<Option<u64>, String> {
        for gpa in self.written.drain(..) {
            self.shape.write(self.ram, gpa, 0);
            self.shape.write(self.copy, gpa, 0);
        }
        let first = self.shape.case_tables();
        let stray = (first..first + self.shape.tables_bytes(self.plots))
            .step_by(8)
            .find(|gpa| self.ram.read(*gpa) != 0 || self.copy.read(*gpa) != 0);
        self.plots = 0;
        self.turn += 1;
        if self.shape.mode == PagingMode::Pae {
            self.pdptes = pdptes;
            for (at, pdpte) in (ROOT..).step_by(8).zip(pdptes) {
                self.ram.write(at, pdpte);
            }
        }
        machine.renew()?;
        Ok(stray)
    }

    pub(crate) fn plot(&mut self) -> Option<Plot> {
        if self.plots == self.shape.cases_per_root() {
            return None;
        }
        let (top, base) = self.shape.slot(self.plots);
        let first = self.shape.case_tables() + self.shape.tables_bytes(self.plots);
        self.plots += 1;
        Some(Plot { base, top, tables: [first, first + PAGE, first + 2 * PAGE, first + 3 * PAGE] })
    }

    pub(crate) fn set_entry(&mut self, gpa: u64, value: u64) {
        self.shape.write(self.ram, gpa, value);
        self.shape.write(self.copy, gpa, value);
        self.written.push(gpa);
    }

    /// CR3 differs from one root to the next although the root page is the same: PWT selects no root.
    pub(crate) fn cr3(&self) -> u64 {
        ROOT | (self.turn & 1) << 3
    }

    /// `sregs` with everything but the paging controls set for `play`.
    pub(crate) fn dress(&self, sregs: &mut kvm_sregs, play: &Play) {
        let (cr0, cr4, efer) = (sregs.cr0, sregs.cr4, sregs.efer);
        long_mode(sregs, self.cr3());
        (sregs.cr0, sregs.cr4, sregs.efer) = (cr0, cr4, efer);
        sregs.cr2 = NO_CR2;
        if play.cpl == 3 {
            sregs.cs = code_segment(USER_CS, 3);
            let data = data_segment(USER_SS, 3);
            (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        }
        if !self.shape.is_long() {
            (sregs.cs.l, sregs.cs.db) = (0, 1);
        }
        let gdt = match play.act {
            // The stage's alias right below the case.
            act if act.is_implicit() => (play.gva & !(PAGE - 1)).wrapping_sub(PAGE),
            _ => self.stage_gva(GDT),
        };
        sregs.gdt = table_register(gdt, 0x1fff);
        sregs.idt = table_register(self.stage_gva(IDT), 0x1ff);
        sregs.tr = kvm_bindings::kvm_segment {
            base: self.stage_gva(TSS),
            // The bed's emulated CPU takes a stack from a 32-bit TSS only while its type is "available".
            type_: if self.shape.is_long() { 11 } else { 9 },
            limit: 0x67,
            s: 0,
            l: 0,
            g: 0,
            ..code_segment(TASK, 0)
        };
    }

    /// Executes one access.
    pub(crate) fn run(&self, vcpu: &mut VcpuFd, sregs: &kvm_sregs, play: &Play) -> (Outcome, Brought) {
        let code = self.stage_gva(if play.cpl == 3 { USER_CODE } else { SUPERVISOR_CODE });
        let number = ACTS.iter().position(|(act, _)| *act == play.act);
        let (rip, done) = match number {
            None => (play.gva, play.gva),
            Some(number) => {
                let rip = code + number as u64 * 16;
                (rip, rip + ACTS[number].1.len() as u64)
            }
        };
        let rax = match play.act {
            act if act.is_implicit() => (PAGE + play.gva % PAGE) | 3,
            _ => u64::from(play.byte),
        };
        let rflags = RFLAGS_FIXED | RFLAGS_IOPL3 | when(play.ac, RFLAGS_AC);
        let sync = vcpu.sync_regs_mut();
        sync.sregs = *sregs;
        sync.regs = kvm_regs {
            rip,
            rax,
            rdi: play.gva,
            rbp: play.gva,
            rsp: if self.shape.is_long() { self.stage_gva(STACK + 2) } else { self.stack_top() },
            rflags,
            ..kvm_regs::default()
        };
        vcpu.set_sync_dirty_reg(SyncReg::Register);
        vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);

        let mut brought = Brought::default();
        // An access, its completion if it leaves memory, and one more for an exit that a signal caused.
        for _ in 0..8 {
            let port = match vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) => port as u8,
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    data.fill(play.byte);
                    brought.mmio = Some((gpa, None));
                    continue;
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    brought.mmio = Some((gpa, data.first().copied()));
                    continue;
                }
                Ok(VcpuExit::Intr) => continue,
                Ok(VcpuExit::InternalError) => return (Outcome::NotEmulated, brought),
                Ok(VcpuExit::Shutdown) => return (Outcome::Lost("shutdown"), brought),
                Ok(_) => return (Outcome::Lost("unexpected exit"), brought),
                Err(error) if error.errno() == 4 => continue,
                Err(_) => return (Outcome::Lost("KVM_RUN failed"), brought),
            };
            let sync = vcpu.sync_regs();
            brought.al = sync.regs.rax as u8;
            brought.fs_base = (sync.sregs.fs.base >> 24) as u8;
            if port == DONE_PORT {
                return (Outcome::Done, brought);
            }
            let stack = sync.regs.rsp.wrapping_sub(self.stage_gva(0)).wrapping_add(STAGE);
            if !(stage_gpa(STACK)..stage_gpa(STACK + 1)).contains(&stack) {
                return (Outcome::Lost("a handler ran on a foreign stack"), brought);
            }
            let pushed =
                if self.shape.is_long() { self.ram.read(stack) } else { self.ram.read_u32(stack).into() };
            return match port {
                UD if play.cpl == 3 && pushed == done => (Outcome::Done, brought),
                14 => (Outcome::Exception { vector: 14, code: pushed, cr2: sync.sregs.cr2 }, brought),
                8 | 10..=13 | 17 => (Outcome::Exception { vector: port, code: pushed, cr2: 0 }, brought),
                _ => (Outcome::Exception { vector: port, code: 0, cr2: 0 }, brought),
            };
        }
        (Outcome::Lost("no end"), brought)
    }
}

fn stage_gpa(page: u64) -> u64 {
    STAGE + page * PAGE
}

/// An interrupt gate to `handler`, DPL 0, on this stack of the interrupt stack table; its low eight bytes.
fn gate(handler: u64, stack: u64) -> u64 {
    let code = u64::from(KERNEL_CS) << 16;
    handler & 0xffff | code | 0x8e00 << 32 | stack << 32 | (handler >> 16 & 0xffff) << 48
}
