//! 32-bit and PAE paging by worked examples from Intel SDM volume 3, "32-Bit Paging" and "PAE Paging". No vCPU of this
//! kernel's backend runs these modes, so that what is written here is the manual's word.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE};
use pagewalk::{
    Access, AccessKind, AdPolicy, ControlRegisters, CpuProfile, Dimension, Fault, FaultKind, Gpa, Gva,
    NgpaWalk, NoTrace, PageSize, PageWalk, PagingMode, Privilege, Reason, StateError, Trace, Vendor, Walker,
    Window,
};

const CPU: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);
const FETCH: Access = Access::new(AccessKind::Fetch, Privilege::Supervisor);

struct Ram(Vec<AtomicU64>);

impl Ram {
    fn new() -> Self {
        Self((0..0x20_0000 / 8).map(|_| AtomicU64::new(0)).collect())
    }

    fn put64(&self, gpa: usize, entry: u64) {
        self.0[gpa / 8].store(entry, Ordering::Relaxed);
    }

    fn get64(&self, gpa: usize) -> u64 {
        self.0[gpa / 8].load(Ordering::Relaxed)
    }

    fn put32(&self, gpa: usize, entry: u32) {
        let shift = gpa % 8 * 8;
        let word = self.get64(gpa) & !(0xffff_ffff << shift);
        self.put64(gpa, word | u64::from(entry) << shift);
    }

    fn get32(&self, gpa: usize) -> u32 {
        (self.get64(gpa) >> (gpa % 8 * 8)) as u32
    }

    fn window(&self) -> Window<'_> {
        Window::new(&self.0)
    }
}

fn two_level(cr4: u64) -> ControlRegisters {
    let cr0 = CR0_PE | CR0_PG | CR0_WP;
    ControlRegisters { cr0, cr3: 0x1000, cr4, efer: EFER_NXE, ..ControlRegisters::default() }
}

fn pae(cr3: u64, efer: u64) -> ControlRegisters {
    let cr0 = CR0_PE | CR0_PG | CR0_WP;
    ControlRegisters { cr0, cr3, cr4: CR4_PAE, efer, ..ControlRegisters::default() }
}

fn walker(registers: &ControlRegisters, cpu: &CpuProfile) -> Walker {
    Walker::new(PageWalk::new(registers, cpu).unwrap())
}

fn page_fault(outcome: Result<pagewalk::Translation, Fault>) -> (u32, u32, Reason) {
    match outcome.unwrap_err() {
        Fault { kind: FaultKind::PageFault { error_code }, level, reason, .. } => (error_code, level, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_level_4_kib_pages_and_their_bits() {
    let ram = Ram::new();
    // PDE 0x301, PTE 5: the odd entry of a 64-bit word, whose neighbour must stay as it is.
    ram.put32(0x1000 + 4 * 0x301, 0x2000 | 3);
    ram.put32(0x1000 + 4 * 0x300, 0xdead_beee);
    ram.put32(0x2000 + 4 * 5, 0x7000 | 3);
    ram.put32(0x2000 + 4 * 4, 0xffff_fffe);
    let gva = Gva(0x301 << 22 | 5 << 12 | 0xabc);
    let walker = walker(&two_level(0), &CPU);

    let page = walker.translate(&ram.window(), gva, &READ).unwrap();
    assert_eq!((page.gpa, page.page_size(), page.key()), (Gpa(0x7abc), PageSize::Size4K, 0));
    assert!(page.rights().write() && page.rights().execute() && !page.rights().user());
    // Linear addresses are 32 bits wide.
    assert_eq!(walker.translate(&ram.window(), Gva(gva.0 | 1 << 40), &READ).unwrap().gpa, page.gpa);

    let mut trace = Trace::new();
    let written = walker.translate_with(&ram.window(), gva, &WRITE, AdPolicy::Set, &mut trace).unwrap();
    assert!(!written.accessed() && !written.dirty());
    let levels: Vec<_> =
        trace.steps().iter().map(|step| (step.level, step.index, step.entry_gpa.0)).collect();
    assert_eq!(levels, [(2, 0x301, 0x1000 + 4 * 0x301), (1, 5, 0x2014)]);
    assert_eq!(ram.get32(0x1000 + 4 * 0x301), 0x2000 | 0x23);
    assert_eq!(ram.get32(0x2014), 0x7000 | 0x63);
    assert_eq!((ram.get32(0x1000 + 4 * 0x300), ram.get32(0x2010)), (0xdead_beee, 0xffff_fffe));
    assert!(trace.steps().iter().all(|step| step.is_current(&ram.window())));
    ram.put32(0x2014, 0x8000 | 0x63);
    assert!(!trace.steps()[1].is_current(&ram.window()));
}

#[test]
fn pse_decides_whether_bit_7_of_a_pde_is_a_page() {
    let ram = Ram::new();
    ram.put32(0x1000 + 4, 0x0040_0083);
    let gva = Gva(1 << 22 | 0x1234);
    let large = walker(&two_level(CR4_PSE), &CPU).translate(&ram.window(), gva, &READ).unwrap();
    assert_eq!((large.gpa, large.page_size()), (Gpa(0x0040_1234), PageSize::Size4M));
    // Without PSE the entry refers to a table at 4 MiB, outside of this memory.
    let fault = walker(&two_level(0), &CPU).translate(&ram.window(), gva, &READ).unwrap_err();
    assert_eq!((fault.kind, fault.level), (FaultKind::Unbacked, 1));
}

#[test]
fn pse_36_moves_bits_20_to_13_above_4_gib() {
    let ram = Ram::new();
    // Address bits 39:32 = 0xa5, 31:22 = 1.
    ram.put32(0x1000, 0x0040_0083 | 0xa5 << 13);
    let page = |maxphyaddr| {
        walker(&two_level(CR4_PSE), &CpuProfile { maxphyaddr, ..CPU }).translate(
            &ram.window(),
            Gva(0x10),
            &READ,
        )
    };
    assert_eq!(page(40).unwrap().gpa, Gpa(0xa5_0040_0010));
    // With 36 bits, entry bits 21:17 are reserved: of 0xa5, those are 0xa.
    let fault = page(36).unwrap_err();
    assert_eq!((fault.reason, fault.bits), (Reason::ReservedBits, 0xa << 17));
    assert_eq!(page_fault(page(32)), (9, 2, Reason::ReservedBits));
    // Bit 21 is reserved however wide addresses are.
    ram.put32(0x1000, 0x0060_0083);
    assert_eq!(page(52).unwrap_err().bits, 1 << 21);
}

#[test]
fn two_level_has_no_nx_and_tells_fetches_under_smep_only() {
    let ram = Ram::new();
    assert_eq!(page_fault(walker(&two_level(0), &CPU).translate(&ram.window(), Gva(0), &FETCH)).0, 0);
    let smep = walker(&two_level(CR4_SMEP), &CPU);
    assert_eq!(page_fault(smep.translate(&ram.window(), Gva(0), &FETCH)).0, 0x10);
    ram.put32(0x1000, 0x2007);
    ram.put32(0x2000, 0x3007);
    assert_eq!(page_fault(smep.translate(&ram.window(), Gva(0), &FETCH)), (0x11, 1, Reason::Smep));
}

#[test]
fn pae_root_is_aligned_to_32_bytes_and_grants_nothing() {
    let ram = Ram::new();
    // The third PDPTE of a table at 0x1fe0; PDPTEs have neither R/W nor U/S, and no accessed bit.
    ram.put64(0x1fe0 + 2 * 8, 0x3001);
    ram.put64(0x3000 + 8 * 3, 0x4007);
    ram.put64(0x4000 + 8 * 4, 0x9007);
    let gva = Gva(2 << 30 | 3 << 21 | 4 << 12 | 5);
    let walker = walker(&pae(0x1fe0 | 0x18, EFER_NXE), &CPU);
    assert_eq!((walker.gva_walk().root(), walker.gva_walk().format().levels()), (0x1fe0, 3));
    let user_write = Access::new(AccessKind::Write, Privilege::User);
    let page = walker.translate_with(&ram.window(), gva, &user_write, AdPolicy::Set, &mut NoTrace).unwrap();
    assert_eq!((page.gpa, page.page_size()), (Gpa(0x9005), PageSize::Size4K));
    assert_eq!((ram.get64(0x1ff0), ram.get64(0x3018), ram.get64(0x4020)), (0x3001, 0x4027, 0x9067));
}

#[test]
fn pae_large_pages_reach_above_4_gib() {
    let ram = Ram::new();
    ram.put64(0x1000, 0x3001);
    ram.put64(0x3000, 0x12_3460_0083);
    let page = walker(&pae(0x1000, 0), &CPU).translate(&ram.window(), Gva(0x1f_ffff), &READ).unwrap();
    assert_eq!((page.gpa, page.page_size()), (Gpa(0x12_347f_ffff), PageSize::Size2M));
}

#[test]
fn pae_reserves_high_bits_and_honours_nx() {
    let ram = Ram::new();
    ram.put64(0x1000, 0x3001);
    let outcome = |efer, entry| {
        ram.put64(0x3000, entry);
        page_fault(walker(&pae(0x1000, efer), &CPU).translate(&ram.window(), Gva(0), &FETCH))
    };
    for bit in [40, 52, 59, 62] {
        assert_eq!(outcome(EFER_NXE, 0x83 | 1 << bit), (0x19, 2, Reason::ReservedBits), "bit {bit}");
    }
    assert_eq!(outcome(EFER_NXE, 0x83 | 1 << 63), (0x11, 2, Reason::NoExecute));
    assert_eq!(outcome(0, 0x83 | 1 << 63), (9, 2, Reason::ReservedBits));
    for bits in [1 << 1, 1 << 2, 1 << 5, 1 << 8, 1 << 40, 1 << 63] {
        ram.put64(0x1000, 0x3001 | bits);
        let fault = walker(&pae(0x1000, EFER_NXE), &CPU).translate(&ram.window(), Gva(0), &READ).unwrap_err();
        assert_eq!((fault.kind, fault.level, fault.bits), (FaultKind::PageFault { error_code: 9 }, 3, bits));
    }
}

#[test]
fn pdpte_registers_stand_in_for_memory() {
    let ram = Ram::new();
    ram.put64(0x3000, 0x83);
    let registers = pae(0x1000, 0);
    let walk = PageWalk::with_pdptes(&registers, [0x3001, 0, 0x3001, 0x6], &CPU).unwrap();
    let walker = Walker::new(walk);
    let mut trace = Trace::new();
    let page = walker.translate_with(&ram.window(), Gva(0x10), &READ, AdPolicy::Set, &mut trace).unwrap();
    assert_eq!((page.gpa, trace.steps().len(), trace.steps()[0].entry_gpa), (Gpa(0x10), 2, Gpa(0)));
    assert!(trace.steps()[0].is_current(&ram.window()), "a register is not re-read from memory");
    assert_eq!(walker.translate(&ram.window(), Gva(0x8000_0010), &READ).unwrap().gpa, Gpa(0x10));
    assert_eq!(page_fault(walker.translate(&ram.window(), Gva(1 << 30), &READ)), (0, 3, Reason::NotPresent));
    // A present PDPTE with reserved bits cannot be in a register.
    for bits in [1 << 1, 1 << 8, 1 << 40, 1 << 63] {
        let refused = PageWalk::with_pdptes(&registers, [0x3001 | bits, 0, 0, 0], &CPU);
        assert_eq!(refused, Err(StateError::ReservedBits { register: "PDPTE", bits }));
    }
    let long = ControlRegisters { efer: EFER_LME | EFER_LMA, ..registers };
    assert!(matches!(PageWalk::with_pdptes(&long, [0; 4], &CPU), Err(StateError::Contradiction { .. })));
}

#[test]
fn the_upper_half_of_cr3_is_ignored_outside_long_mode() {
    for registers in [two_level(0), pae(0x1000, 0)] {
        let high = ControlRegisters { cr3: registers.cr3 | 0xffff_ffff << 32, ..registers };
        assert_eq!(PageWalk::new(&high, &CPU), PageWalk::new(&registers, &CPU));
        // No VMRUN takes it for nCR3.
        let refused = NgpaWalk::npt(0x1_0000_1000, &registers, &CPU);
        assert_eq!(refused, Err(StateError::ReservedBits { register: "nCR3", bits: 1 << 32 }));
    }
}

#[test]
fn a_fault_tells_an_address_of_32_bits_outside_long_mode() {
    let ram = Ram::new();
    for registers in [two_level(0), pae(0x1000, 0)] {
        let walker = Walker::new(PageWalk::new(&registers, &CPU).unwrap());
        // As a debugger extends the sign of a pointer of 32 bits.
        let fault = walker.translate(&ram.window(), Gva(0xffff_ffff_c000_1234), &READ).unwrap_err();
        assert_eq!((fault.reason, fault.address), (Reason::NotPresent, 0xc000_1234));
    }
}

#[test]
fn npt_in_pae_format_covers_4_gib_and_reads_its_pdptes_from_memory() {
    let ram = Ram::new();
    // nGPA 0..2 MiB is GPA 0..2 MiB; nGPA 3 GiB has a PDPTE with a reserved bit.
    ram.put64(0x1000, 0x3001);
    ram.put64(0x1018, 0x3001 | 1 << 1);
    ram.put64(0x3000, 0x87);
    let ngpa_walk = NgpaWalk::npt(0x1000, &pae(0, EFER_NXE), &CPU).unwrap();
    assert_eq!(ngpa_walk.page_walk().format().mode(), PagingMode::Pae);
    let unpaged = PageWalk::new(&ControlRegisters::default(), &CPU).unwrap();
    let walker = Walker::nested(unpaged, ngpa_walk.clone());
    assert_eq!(walker.translate(&ram.window(), Gva(0x1234), &READ).unwrap().gpa, Gpa(0x1234));
    let fault = walker.translate(&ram.window(), Gva(3 << 30), &READ).unwrap_err();
    assert_eq!((fault.dimension, fault.level, fault.bits), (Dimension::Nested, 3, 1 << 1));
    assert_eq!(fault.kind, FaultKind::NestedPageFault { exit_info_1: 1 << 32 | 0xd });

    // A long-mode L2 whose table lies above 4 GiB is out of reach.
    let long = ControlRegisters { cr3: 1 << 32, cr4: CR4_PAE, efer: EFER_LME | EFER_LMA, ..two_level(0) };
    let walker = Walker::nested(PageWalk::new(&long, &CPU).unwrap(), ngpa_walk);
    let fault = walker.translate(&ram.window(), Gva(0), &READ).unwrap_err();
    assert_eq!(
        (fault.reason, fault.kind),
        (Reason::TooWide, FaultKind::NestedPageFault { exit_info_1: 1 << 33 | 6 })
    );
}
