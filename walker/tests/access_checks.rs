//! What decides over one access besides the rights of a page: keys of supervisor pages, shadow stacks, pointers with
//! metadata, the encryption bit. No machine here has them, so that what is written down is the manuals' word: Intel SDM volume
//! 3, "Protection Keys", "Determination of Access Rights", "Page-Fault Exceptions" and "Linear-Address Masking"; AMD APM volume
//! 2, "Shadow Stack Protection", "Upper Address Ignore" and "Secure Memory Encryption".
#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::mode::{
    CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_LA57, CR4_LAM_SUP, CR4_PAE, CR4_PKE, CR4_PKS, CR4_SMAP, EFER_LMA,
    EFER_LME, EFER_NXE, EFER_UAIE,
};
use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, CpuProfile, ExchangeError, Fault, FaultKind,
    Gpa, Gva, Memory, NgpaWalk, NoTrace, PFEC_KEY, PFEC_PRESENT, PFEC_RESERVED, PFEC_SHADOW_STACK, PFEC_USER,
    PFEC_WRITE, PageSize, PageWalk, Privilege, Reason, StateError, Trace, Translation, Vendor, Walker,
    Window,
};

const INTEL: CpuProfile =
    CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };
const AMD: CpuProfile = CpuProfile { vendor: Vendor::Amd, ..INTEL };

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

const PML4: u64 = 0x1000;
/// Where the leaf of [`GVA`] lies.
const PTE: u64 = 0x4000 + 8 * 5;
const GVA: u64 = 5 << 12 | 0x123;
/// Page 0xa of memory.
const FRAME: u64 = 0xa000;

struct Ram(Vec<AtomicU64>);

impl Ram {
    /// Four levels to [`GVA`], the entries above the leaf with `upper`.
    fn new(upper: u64, leaf: u64) -> Ram {
        let ram = Ram((0..0x1_0000 / 8).map(|_| AtomicU64::new(0)).collect());
        for table in [PML4, 0x2000, 0x3000] {
            ram.put(table, (table + 0x1000) | P | upper);
        }
        ram.put(PTE, FRAME | leaf);
        ram
    }

    fn put(&self, gpa: u64, entry: u64) {
        self.0[gpa as usize / 8].store(entry, Ordering::Relaxed);
    }

    fn get(&self, gpa: u64) -> u64 {
        self.0[gpa as usize / 8].load(Ordering::Relaxed)
    }

    fn window(&self) -> Window<'_> {
        Window::new(&self.0)
    }
}

fn long_mode(cr0: u64, cr4: u64) -> ControlRegisters {
    ControlRegisters {
        cr0: CR0_PE | CR0_PG | cr0,
        cr3: PML4,
        cr4: CR4_PAE | cr4,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..ControlRegisters::default()
    }
}

fn walker(registers: &ControlRegisters, cpu: &CpuProfile) -> Walker {
    Walker::new(PageWalk::new(registers, cpu).unwrap())
}

fn ask(walker: &Walker, ram: &Ram, gva: u64, access: &Access) -> Result<Translation, Fault> {
    let outcome = walker.translate(&ram.window(), Gva(gva), access);
    let mut trace = Trace::new();
    let traced = walker.translate_with(&ram.window(), Gva(gva), access, AdPolicy::Observe, &mut trace);
    assert_eq!(outcome, traced);
    outcome
}

fn error_code(outcome: Result<Translation, Fault>) -> Option<u32> {
    match outcome.err()?.kind {
        FaultKind::PageFault { error_code } => Some(error_code),
        other => panic!("{other:?}"),
    }
}

fn kinds() -> [AccessKind; 5] {
    use AccessKind::{Fetch, Read, ShadowStackRead, ShadowStackWrite, Write};
    [Read, Write, Fetch, ShadowStackRead, ShadowStackWrite]
}

/// A few bits of a counter at a time.
struct Choices(u32);

impl Choices {
    fn bool(&mut self) -> bool {
        self.pick(&[false, true])
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        let chosen = of[self.0 as usize % of.len()];
        self.0 /= of.len() as u32;
        chosen
    }
}

/// Keys over every kind of data access, page, privilege and control bit, by the manual's sentences.
#[test]
fn keys_of_user_and_of_supervisor_pages() {
    const KEY: u32 = 11;
    let mut refused = 0;
    for combination in 0..2_u32.pow(9) * 9 {
        let mut choices = Choices(combination);
        let (pke, pks, wp) = (choices.bool(), choices.bool(), choices.bool());
        let (user_page, writable) = (choices.bool(), choices.bool());
        let (access_disable, write_disable) = (choices.bool(), choices.bool());
        let (right_register, smap) = (choices.bool(), choices.bool());
        let kind = choices.pick(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]);
        let by = choices.pick(&[Privilege::User, Privilege::Supervisor, Privilege::Exempt]);

        let leaf = P | u64::from(KEY) << 59;
        let leaf = leaf | if writable { W } else { 0 } | if user_page { U } else { 0 };
        let ram = Ram::new(W | U, leaf);
        let when = |wanted: bool, bits: u64| if wanted { bits } else { 0 };
        let cr4 = when(pke, CR4_PKE) | when(pks, CR4_PKS) | when(smap, CR4_SMAP);
        let walker = walker(&long_mode(when(wp, CR0_WP), cr4), &INTEL);
        let rights = (u32::from(access_disable) | u32::from(write_disable) << 1) << (2 * KEY);
        // All other keys are closed, and so is this one in the register that does not matter.
        let others = !(3 << (2 * KEY));
        let (mine, other) = (rights | others, u32::MAX);
        let (pkru, pkrs) = if user_page { (mine, other) } else { (other, mine) };
        let (pkru, pkrs) = if right_register { (pkru, pkrs) } else { (0, 0) };
        let access = Access::new(kind, by).with_pkru(pkru).with_pkrs(pkrs);

        // "A linear address's protection key controls only data accesses to the address."
        let enabled = if user_page { pke } else { pks };
        let user = by == Privilege::User;
        let write = kind == AccessKind::Write;
        let write_disabled = write_disable && write && (wp || user_page && user);
        let data = kind != AccessKind::Fetch && by != Privilege::Exempt;
        let by_key = data && enabled && right_register && (access_disable || write_disabled);
        let by_rights = by != Privilege::Exempt
            && (user && !user_page
                || write && !writable && (user || wp)
                || smap && user_page && !user && kind != AccessKind::Fetch);

        let code = PFEC_PRESENT
            | when(write, PFEC_WRITE.into()) as u32
            | when(user, PFEC_USER.into()) as u32
            | when(kind == AccessKind::Fetch, 1 << 4) as u32
            | when(by_key, PFEC_KEY.into()) as u32;
        let outcome = ask(&walker, &ram, GVA, &access);
        assert_eq!(error_code(outcome), (by_key || by_rights).then_some(code), "{combination}: {access:?}");
        refused += u32::from(by_key && !by_rights);
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn keys_do_not_exist_outside_long_mode() {
    let registers = ControlRegisters { efer: EFER_NXE, ..long_mode(CR0_WP, CR4_PKE | CR4_PKS) };
    let walk = PageWalk::new(&registers, &INTEL).unwrap();
    assert_eq!(walk.format().protection_key_mask(), 0);
    let long = PageWalk::new(&long_mode(CR0_WP, CR4_PKS), &INTEL).unwrap();
    // Supervisor and user reads, supervisor and user writes, to supervisor pages alone.
    assert_eq!(long.format().protection_key_mask(), 0b01 | 0b11 << 2 | 0b01 << 4 | 0b11 << 6);
}

/// Every page that is or is not a shadow stack, and every access to it.
#[test]
fn shadow_stack_accesses_reach_shadow_stacks_of_their_own_privilege() {
    let mut allowed = 0;
    for combination in 0..2_u32.pow(7) * 5 * 3 * 3 {
        let mut choices = Choices(combination);
        let (leaf_w, leaf_d, leaf_u) = (choices.bool(), choices.bool(), choices.bool());
        let (upper_w, upper_u) = (choices.bool(), choices.bool());
        let (smap, ac) = (choices.bool(), choices.bool());
        let kind = choices.pick(&kinds());
        let level = choices.pick(&[1, 2, 3]);
        let by = choices.pick(&[Privilege::User, Privilege::Supervisor, Privilege::ImplicitSupervisor]);

        let when = |wanted: bool, bits: u64| if wanted { bits } else { 0 };
        let upper = when(upper_w, W) | when(upper_u, U);
        let leaf = P | when(leaf_w, W) | when(leaf_d, D) | when(leaf_u, U);
        let ram = Ram::new(W | U, leaf);
        // The root and the leaf may lack a right, or the entry just above the leaf.
        let (leaf_at, above) = [(PTE, 0x3000), (0x3000, 0x2000), (0x2000, PML4)][level - 1];
        ram.put(above, ram.get(above) & !(W | U) | upper);
        if level > 1 {
            ram.put(leaf_at, LARGE | leaf);
        }
        let walker = walker(&long_mode(CR0_WP, CR4_CET | when(smap, CR4_SMAP)), &INTEL);
        let access = Access::new(kind, by).with_ac(ac);
        let outcome = ask(&walker, &ram, GVA, &access);

        let user = by == Privilege::User;
        let user_page = leaf_u && upper_u;
        let shadow_stack = !leaf_w && leaf_d && upper_w;
        let write = matches!(kind, AccessKind::Write | AccessKind::ShadowStackWrite);
        let ordinary = !matches!(kind, AccessKind::ShadowStackRead | AccessKind::ShadowStackWrite);
        let expected = if ordinary {
            // A shadow stack is a page that is not writable, and CR0.WP is set.
            let suspended = ac && by == Privilege::Supervisor;
            let smap = smap && user_page && !user && !suspended && kind != AccessKind::Fetch;
            (user_page || !user) && !smap && (!write || leaf_w && upper_w)
        } else {
            shadow_stack && user == user_page
        };
        let code = PFEC_PRESENT
            | when(write, PFEC_WRITE.into()) as u32
            | when(user, PFEC_USER.into()) as u32
            | when(kind == AccessKind::Fetch, 1 << 4) as u32
            | when(!ordinary, PFEC_SHADOW_STACK.into()) as u32;
        assert_eq!(error_code(outcome), (!expected).then_some(code), "{combination}: {access:?}");
        allowed += u32::from(expected && !ordinary);
    }
    assert_eq!(
        allowed,
        2 * 3 * 4 * (1 + 2 * 3),
        "each kind and level; SMAP and AC; one user's page, three supervisor's"
    );
}

#[test]
fn what_denies_a_shadow_stack_is_named() {
    let walker = walker(&long_mode(CR0_WP, CR4_CET), &INTEL);
    let named = |ram: &Ram, by| {
        let fault = ask(&walker, ram, GVA, &Access::new(AccessKind::ShadowStackRead, by)).unwrap_err();
        (fault.reason, fault.level, fault.bits)
    };
    let user = Privilege::User;
    let supervisor = Privilege::Supervisor;
    assert_eq!(named(&Ram::new(W | U, P | W | U | D), user), (Reason::NotShadowStack, 1, W));
    assert_eq!(named(&Ram::new(W | U, P | U), user), (Reason::NotShadowStack, 1, D));
    assert_eq!(named(&Ram::new(W | U, P | W | U), user), (Reason::NotShadowStack, 1, W | D));
    assert_eq!(named(&Ram::new(U, P | U | D), user), (Reason::NotShadowStack, 2, W));
    assert_eq!(named(&Ram::new(W | U, P | D), user), (Reason::SupervisorPage, 1, U));
    assert_eq!(named(&Ram::new(W, P | U | D), user), (Reason::SupervisorPage, 2, U));
    assert_eq!(named(&Ram::new(W | U, P | U | D), supervisor), (Reason::UserShadowStack, 1, U));
    let read_only = Ram::new(W | U, P | U | D);
    let write = ask(&walker, &read_only, GVA, &Access::new(AccessKind::Write, user)).unwrap_err();
    assert_eq!((write.reason, write.bits), (Reason::ReadOnly, W));
}

#[test]
fn the_shadow_stack_bit_tells_the_access_and_not_the_cause() {
    let registers = long_mode(CR0_WP, CR4_CET | CR4_PKE | CR4_PKS);
    let walker = walker(&registers, &INTEL);
    let push = Access::new(AccessKind::ShadowStackWrite, Privilege::User);
    let told = PFEC_WRITE | PFEC_USER | PFEC_SHADOW_STACK;
    let code = |leaf, access: &Access| error_code(ask(&walker, &Ram::new(W | U, leaf), GVA, access));

    assert_eq!(code(0, &push), Some(told));
    assert_eq!(code(P | U | D | 1 << 50, &push), Some(told | PFEC_PRESENT | PFEC_RESERVED));
    // Keys apply to shadow-stack accesses just as to data accesses.
    let shadow_stack = P | U | D | 3 << 59;
    assert_eq!(code(shadow_stack, &push.with_pkru(0b00 << 6)), None);
    assert_eq!(code(shadow_stack, &push.with_pkru(0b10 << 6)), Some(told | PFEC_PRESENT | PFEC_KEY));
    assert_eq!(code(shadow_stack, &push.with_pkru(0b01 << 6)), Some(told | PFEC_PRESENT | PFEC_KEY));
    assert_eq!(code(shadow_stack, &push.with_pkrs(u32::MAX)), None);
    let pop = Access::new(AccessKind::ShadowStackRead, Privilege::Supervisor);
    assert_eq!(code(P | D | 3 << 59, &pop.with_pkrs(0b10 << 6)), None);
    let refused = PFEC_PRESENT | PFEC_KEY | PFEC_SHADOW_STACK;
    assert_eq!(code(P | D | 3 << 59, &pop.with_pkrs(0b01 << 6)), Some(refused));
    // Refused twice: the page is no shadow stack, and its key is closed.
    assert_eq!(code(P | W | 3 << 59, &pop.with_pkrs(0b01 << 6)), Some(refused));
    let exempt = Access::new(AccessKind::ShadowStackWrite, Privilege::Exempt).with_pkru(u32::MAX);
    assert_eq!(code(P | W | 3 << 59, &exempt), None);
}

#[test]
fn without_cet_a_shadow_stack_access_is_a_data_access() {
    let walker = walker(&long_mode(CR0_WP, CR4_SMAP), &INTEL);
    for leaf in [P | D, P | W, P | U, P | W | U | D] {
        let ram = Ram::new(W | U, leaf);
        for by in [Privilege::User, Privilege::Supervisor, Privilege::ImplicitSupervisor, Privilege::Exempt] {
            for (data, shadow_stack) in [
                (AccessKind::Read, AccessKind::ShadowStackRead),
                (AccessKind::Write, AccessKind::ShadowStackWrite),
            ] {
                for ac in [false, true] {
                    let data = ask(&walker, &ram, GVA, &Access::new(data, by).with_ac(ac));
                    let other = ask(&walker, &ram, GVA, &Access::new(shadow_stack, by).with_ac(ac));
                    assert_eq!(data, other);
                }
            }
        }
    }
    // It sets the dirty bit, too.
    let ram = Ram::new(W | U, P | W | U);
    let write = Access::new(AccessKind::ShadowStackWrite, Privilege::User);
    walker.translate_with(&ram.window(), Gva(GVA), &write, AdPolicy::Set, &mut NoTrace).unwrap();
    assert_eq!(ram.get(PTE) & (A | D), A | D);
}

#[test]
fn shadow_stacks_outside_long_mode() {
    let cet = |efer, cr4| ControlRegisters {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: 0x1000,
        cr4: CR4_CET | cr4,
        efer,
        ..ControlRegisters::default()
    };
    let push = Access::new(AccessKind::ShadowStackWrite, Privilege::Supervisor);
    // PAE: the PDPTE has no R/W, and none is missed.
    let ram = Ram::new(0, 0);
    ram.put(0x1000, 0x2000 | P);
    ram.put(0x2000, 0x4000 | P | W);
    ram.put(PTE, FRAME | P | D);
    let pae = walker(&cet(0, CR4_PAE), &INTEL);
    assert_eq!(ask(&pae, &ram, GVA, &push).unwrap().gpa, Gpa(FRAME | 0x123));
    ram.put(0x2000, 0x4000 | P);
    let fault = ask(&pae, &ram, GVA, &push).unwrap_err();
    assert_eq!((fault.level, fault.bits), (2, W));

    let ram = Ram::new(0, 0);
    ram.put(0x1000, 0x2000 | P | W);
    ram.put(0x2010, (FRAME | P | D) << 32);
    let two_level = walker(&cet(0, 0), &INTEL);
    assert_eq!(ask(&two_level, &ram, GVA, &push).unwrap().page_size(), PageSize::Size4K);
    ram.put(0x2010, (FRAME | P | W | D) << 32);
    assert_eq!(
        error_code(ask(&two_level, &ram, GVA, &push)),
        Some(PFEC_PRESENT | PFEC_WRITE | PFEC_SHADOW_STACK)
    );
}

/// Memory whose leaf loses its dirty bit as soon as a walk has loaded it.
struct Cleaned<'a> {
    ram: &'a Ram,
    loads: Cell<u32>,
}

impl Memory for Cleaned<'_> {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        let entry = self.ram.window().load_u64(gpa);
        if gpa.0 == PTE {
            self.loads.set(self.loads.get() + 1);
            self.ram.put(PTE, self.ram.get(PTE) & !D);
        }
        entry
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        self.ram.window().compare_exchange_u64(gpa, current, new)
    }

    fn backing(&self, _: Gpa) -> Backing {
        Backing::Ram
    }
}

#[test]
fn the_dirty_bit_of_a_shadow_stack_is_never_set_and_its_loss_is_a_change() {
    let walker = walker(&long_mode(CR0_WP, CR4_CET), &INTEL);
    let push = Access::new(AccessKind::ShadowStackWrite, Privilege::User);
    let ram = Ram::new(W | U, P | U | D);
    let mut trace = Trace::new();
    walker.translate_with(&ram.window(), Gva(GVA), &push, AdPolicy::Set, &mut trace).unwrap();
    assert_eq!(ram.get(PTE), FRAME | P | U | A | D);
    assert!(trace.steps().iter().all(|step| step.is_current(&ram.window())));
    ram.put(PTE, FRAME | P | U | A);
    assert!(!trace.steps()[3].is_current(&ram.window()), "the page is no shadow stack any more");

    // An ordinary read does not mind; a push walks again and finds a page that is no shadow stack. Had the exchange
    // gone through, it would have made one.
    let ram = Ram::new(W | U, P | U | D);
    let cleaned = Cleaned { ram: &ram, loads: Cell::new(0) };
    let outcome = walker.translate_with(&cleaned, Gva(GVA), &push, AdPolicy::Set, &mut NoTrace);
    assert_eq!(outcome.unwrap_err().reason, Reason::NotShadowStack);
    assert_eq!((cleaned.loads.get(), ram.get(PTE)), (2, FRAME | P | U));
    let read = Access::new(AccessKind::Read, Privilege::User);
    let ram = Ram::new(W | U, P | U | D);
    let cleaned = Cleaned { ram: &ram, loads: Cell::new(0) };
    walker.translate_with(&cleaned, Gva(GVA), &read, AdPolicy::Set, &mut NoTrace).unwrap();
    assert_eq!((cleaned.loads.get(), ram.get(PTE)), (1, FRAME | P | U | A));
}

#[test]
fn npt_takes_a_shadow_stack_access_for_data_and_tells_it() {
    // L2's tables and page at their own addresses; the NPT's one table per level from page 5 on.
    let guest = long_mode(CR0_WP, CR4_CET);
    let host = long_mode(0, 0);
    let npt = |ram: &Ram, last: u64| {
        for table in [0x5000, 0x6000, 0x7000] {
            ram.put(table, (table + 0x1000) | P | W | U);
        }
        for page in 0..16 {
            ram.put(0x8000 + 8 * page, page << 12 | P | W | U);
        }
        ram.put(0x8000 + 8 * (FRAME >> 12), last);
    };
    let gva_walk = PageWalk::new(&guest, &AMD).unwrap();
    let walker = Walker::nested(gva_walk, NgpaWalk::npt(0x5000, &host, &AMD).unwrap());
    let ask = |kind, last| {
        let ram = Ram::new(W | U, P | D);
        npt(&ram, last);
        let outcome = ask(&walker, &ram, GVA, &Access::new(kind, Privilege::Supervisor));
        outcome.map(|page| page.gpa).map_err(|fault| fault.kind)
    };
    let npf = |bits: u64| Err(FaultKind::NestedPageFault { exit_info_1: 1 << 32 | bits });
    let (pop, push) = (AccessKind::ShadowStackRead, AccessKind::ShadowStackWrite);
    assert_eq!(ask(push, FRAME | P | W | U), Ok(Gpa(FRAME | 0x123)));
    assert_eq!(ask(pop, FRAME | P | U), Ok(Gpa(FRAME | 0x123)));
    assert_eq!(ask(push, FRAME | P | U), npf(0x47), "SS, U/S, W/R, P");
    assert_eq!(ask(pop, 0), npf(0x44));
    // The write sets the dirty bit of the NPT's leaf, as any write does.
    let ram = Ram::new(W | U, P | D);
    npt(&ram, FRAME | P | W | U);
    let push = Access::new(push, Privilege::Supervisor);
    walker.translate_with(&ram.window(), Gva(GVA), &push, AdPolicy::Set, &mut NoTrace).unwrap();
    assert_eq!(ram.get(0x8050) & (A | D), A | D);
}

/// A canonical address, its tag, and what masking makes of it.
#[test]
fn pointers_with_metadata() {
    const LAM_U57: u64 = 1 << 61;
    const LAM_U48: u64 = 1 << 62;
    let page = |walker: &Walker, ram: &Ram, pointer, kind| {
        let outcome = ask(walker, ram, pointer, &Access::new(kind, Privilege::User));
        outcome.map(|page| page.gpa.0).map_err(|fault| (fault.kind, fault.address))
    };
    let gp = |pointer| Err((FaultKind::GeneralProtection, pointer));
    let ram = Ram::new(W | U, P | W | U);
    let with = |cr3, cr4, efer, cpu| {
        let registers = long_mode(CR0_WP, cr4);
        walker(&ControlRegisters { cr3: PML4 | cr3, efer: registers.efer | efer, ..registers }, cpu)
    };
    let (read, fetch) = (AccessKind::Read, AccessKind::Fetch);
    let (six, fifteen) = (0x2a << 57 | GVA, 0x2a55 << 48 | GVA);

    let plain = with(0, 0, 0, &INTEL);
    assert_eq!(page(&plain, &ram, six, read), gp(six));
    let lam57 = with(LAM_U57 | LAM_U48, 0, 0, &INTEL);
    assert_eq!(page(&lam57, &ram, six, read), Ok(FRAME | 0x123));
    assert_eq!(page(&lam57, &ram, six, fetch), gp(six));
    // Bits 56:47 have to be equal still, and equal to bit 63.
    assert_eq!(page(&lam57, &ram, fifteen, read), gp(fifteen));
    assert_eq!(page(&lam57, &ram, six | 1 << 56, read), gp(six | 1 << 56));
    assert_eq!(page(&lam57, &ram, six | 1 << 63, read), gp(six | 1 << 63));
    let lam48 = with(LAM_U48, 0, 0, &INTEL);
    assert_eq!(page(&lam48, &ram, fifteen, read), Ok(FRAME | 0x123));
    assert_eq!(page(&lam48, &ram, fifteen | 1 << 47, read), gp(fifteen | 1 << 47));
    // CR2 has no metadata.
    let absent = fifteen | 1 << 20;
    assert_eq!(
        page(&lam48, &ram, absent, read),
        Err((FaultKind::PageFault { error_code: PFEC_USER }, GVA | 1 << 20))
    );

    // Supervisor pointers: bit 63 says so, and not who asks.
    ram.put(PML4 + 8 * 511, 0x2000 | P | W | U);
    let high = 0xffff_ff80_0000_0000 | GVA;
    let tagged = high & !(0x35 << 57);
    let supervisor = with(0, CR4_LAM_SUP, 0, &INTEL);
    assert_eq!(page(&supervisor, &ram, tagged, read), Ok(FRAME | 0x123));
    assert_eq!(page(&supervisor, &ram, high & !(1 << 50), read), Ok(FRAME | 0x123));
    assert_eq!(page(&supervisor, &ram, tagged, fetch), gp(tagged));
    assert_eq!(page(&supervisor, &ram, six, read), gp(six));
    assert_eq!(page(&lam57, &ram, tagged, read), gp(tagged));

    // Five levels: LAM48 ignores bits that translate, even of a canonical address, and even where they lead to a page.
    ram.put(0x9000, PML4 | P | W | U);
    ram.put(0x9000 + 8 * 0x54, 0xb000 | P | W | U);
    ram.put(0xb000, 0xc000 | P | W | U);
    ram.put(0xc000, LARGE | P | W | U);
    let five = |cr3, cr4| with(cr3 | 0x9000 ^ PML4, CR4_LA57 | cr4, 0, &INTEL);
    assert_eq!(page(&five(LAM_U48, 0), &ram, 0x55 << 48 | GVA, read), Ok(FRAME | 0x123));
    assert_eq!(page(&five(LAM_U48, 0), &ram, fifteen, read), Ok(FRAME | 0x123));
    assert_eq!(page(&five(LAM_U48, 0), &ram, 0x54 << 48 | GVA, read), Ok(FRAME | 0x123));
    assert_eq!(page(&five(LAM_U48, 0), &ram, 0x54 << 48 | GVA, fetch), Ok(GVA));
    let translated = 0x55 << 48 | GVA;
    assert_eq!(
        page(&five(LAM_U48, 0), &ram, translated, fetch),
        Err((FaultKind::PageFault { error_code: PFEC_USER | 1 << 4 }, translated))
    );
    assert_eq!(
        page(&five(LAM_U57, 0), &ram, translated | 1 << 60, read),
        Err((FaultKind::PageFault { error_code: PFEC_USER }, translated))
    );
    assert_eq!(page(&five(0, CR4_LAM_SUP), &ram, high & !(1 << 50), read).unwrap_err().1, high & !(1 << 50));

    // AMD ignores bit 63 with the six below it, and checks bits 56:47.
    let uai = with(0, 0, EFER_UAIE, &AMD);
    assert_eq!(page(&uai, &ram, six | 1 << 63, read), Ok(FRAME | 0x123));
    assert_eq!(page(&uai, &ram, high & !(0x7f << 57), read), Ok(FRAME | 0x123));
    assert_eq!(page(&uai, &ram, six, fetch), gp(six));
    assert_eq!(page(&uai, &ram, fifteen, read), gp(fifteen));
    let stack = Access::new(read, Privilege::User).through_stack(true);
    assert_eq!(ask(&uai, &ram, six, &stack).unwrap_err().kind, FaultKind::StackFault);
    assert_eq!(ask(&lam57, &ram, six, &stack).unwrap().gpa.0, FRAME | 0x123);
}

#[test]
fn masking_belongs_to_a_vendor_and_to_long_mode() {
    let reserved = |registers: &ControlRegisters, cpu: &CpuProfile| match PageWalk::new(registers, cpu) {
        Ok(_) => None,
        Err(StateError::ReservedBits { register, bits }) => Some((register, bits)),
        Err(other) => panic!("{other}"),
    };
    let lam = ControlRegisters { cr3: PML4 | 3 << 61, ..long_mode(0, 0) };
    assert_eq!(reserved(&lam, &INTEL), None);
    assert_eq!(PageWalk::new(&lam, &INTEL).unwrap().root(), PML4);
    assert_eq!(reserved(&lam, &AMD), Some(("CR3", 3 << 61)));
    // PAE paging ignores them, with all of the upper half.
    assert_eq!(reserved(&ControlRegisters { efer: 0, ..lam }, &INTEL), None);
    assert_eq!(reserved(&ControlRegisters { cr3: PML4 | 7 << 61, ..lam }, &INTEL), Some(("CR3", 1 << 63)));
    assert_eq!(
        NgpaWalk::npt(3 << 61, &long_mode(0, 0), &INTEL).unwrap_err(),
        StateError::ReservedBits { register: "nCR3", bits: 3 << 61 }
    );
    assert_eq!(reserved(&long_mode(0, CR4_LAM_SUP), &INTEL), None);
    assert_eq!(reserved(&long_mode(0, CR4_LAM_SUP), &AMD), Some(("CR4", CR4_LAM_SUP)));
    let uai = ControlRegisters { efer: EFER_LME | EFER_LMA | EFER_UAIE, ..long_mode(0, 0) };
    assert_eq!(reserved(&uai, &AMD), None);
    assert_eq!(reserved(&uai, &INTEL), Some(("EFER", EFER_UAIE)));
}

#[test]
fn cet_wants_write_protection() {
    let refused = StateError::Contradiction { register: "CR4", problem: "CET is set while CR0.WP is clear" };
    assert_eq!(PageWalk::new(&long_mode(0, CR4_CET), &INTEL), Err(refused));
    assert!(PageWalk::new(&long_mode(CR0_WP, CR4_CET), &INTEL).is_ok());
    let unpaged = ControlRegisters { cr4: CR4_CET, ..ControlRegisters::default() };
    assert_eq!(PageWalk::new(&unpaged, &INTEL), Err(refused));
}

#[test]
fn the_encryption_bit_is_no_address_bit() {
    const C: u64 = 1 << 51;
    let sev = CpuProfile { encryption_bit: Some(51), ..AMD };
    let read = Access::new(AccessKind::Read, Privilege::User);
    let ram = Ram::new(W | U | C, P | W | U | C);
    let registers = ControlRegisters { cr3: PML4 | C, ..long_mode(0, 0) };
    let encrypted = walker(&registers, &sev);
    assert_eq!(encrypted.gva_walk().root(), PML4);
    let page = ask(&encrypted, &ram, GVA, &read).unwrap();
    assert_eq!((page.gpa, page.entry), (Gpa(FRAME | 0x123), FRAME | P | W | U | C));
    // At the leaf alone.
    let leaf = ask(&walker(&long_mode(0, 0), &sev), &Ram::new(W | U, P | U | C), GVA, &read).unwrap();
    assert_eq!(leaf.gpa, Gpa(FRAME | 0x123));
    // Without the bit it is reserved, and so is every other one above MAXPHYADDR.
    assert!(PageWalk::new(&registers, &AMD).is_err());
    let fault = ask(&walker(&long_mode(0, 0), &AMD), &ram, GVA, &read).unwrap_err();
    assert_eq!((fault.reason, fault.level, fault.bits), (Reason::ReservedBits, 4, C));
    ram.put(PTE, FRAME | P | U | C | 1 << 50);
    assert_eq!(ask(&encrypted, &ram, GVA, &read).unwrap_err().bits, 1 << 50);

    // Below MAXPHYADDR it would be an address bit. Large pages, PAE and the second dimension follow suit.
    let wide = CpuProfile { maxphyaddr: 52, encryption_bit: Some(47), ..AMD };
    let low = 1 << 47;
    ram.put(0x3000, LARGE | P | U | low);
    for table in [PML4, 0x2000] {
        ram.put(table, ram.get(table) & !C | low);
    }
    assert_eq!(ask(&walker(&long_mode(0, 0), &wide), &ram, GVA, &read).unwrap().gpa, Gpa(GVA));
    let pae = ControlRegisters { cr3: 0x2000, efer: 0, ..long_mode(0, 0) };
    ram.put(0x2000, 0x3000 | P | low);
    assert_eq!(ask(&walker(&pae, &wide), &ram, GVA, &read).unwrap().gpa, Gpa(GVA));
    let registers = PageWalk::with_pdptes(&pae, [0x3000 | P | low, 0, 0, 0], &wide).unwrap();
    assert_eq!(ask(&Walker::new(registers), &ram, GVA, &read).unwrap().gpa, Gpa(GVA));
    assert!(PageWalk::with_pdptes(&pae, [0x3000 | P | C, 0, 0, 0], &sev).is_ok());
    assert!(PageWalk::with_pdptes(&pae, [0x3000 | P | C, 0, 0, 0], &AMD).is_err());

    let ram = Ram::new(W | U, LARGE | P | U);
    ram.put(0x3000, LARGE | P | W | U | low);
    let npt = NgpaWalk::npt(PML4 | low, &long_mode(0, 0), &wide).unwrap();
    let unpaged = PageWalk::new(&ControlRegisters::default(), &wide).unwrap();
    assert_eq!(ask(&Walker::nested(unpaged, npt), &ram, GVA, &read).unwrap().gpa, Gpa(GVA));

    for bit in [0, 46, 52, 255] {
        let cpu = CpuProfile { encryption_bit: Some(bit), ..AMD };
        assert_eq!(PageWalk::new(&long_mode(0, 0), &cpu), Err(StateError::EncryptionBit(bit)));
    }
}
