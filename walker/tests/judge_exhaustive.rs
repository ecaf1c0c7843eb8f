//! Judge `exhaustive`: the loop-free rules, for every input that they have, against the manuals' sentences written out here.
//!
//! - which entries have reserved bits: each single bit of an entry, at each level, as a table's and as a page's, under each
//!   MAXPHYADDR, vendor, encryption bit, EFER.NXE, CR4.PSE and support of 1 GiB pages; present and absent (Intel SDM volume 3,
//!   "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging"; AMD APM volume 2, "Page-Translation-Table Entry Fields")
//! - which addresses are canonical: each pattern of bits 63:47, over lower bits of a few kinds, alone and under each way to
//!   ignore bits, for data and fetches (Intel SDM volume 1, "Canonical Addressing", volume 3, "Linear-Address Masking"; AMD APM
//!   volume 2, "Upper Address Ignore")
//! - the permission words: each access, each combination of rights, each set of protections (Intel SDM volume 3,
//!   "Determination of Access Rights")
//! - the protection-key mask, and each key under each pair of its bits ("Protection Keys")
//!
//! It stands in for proofs: none of these rules has a loop, and no other input than those counted here.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[allow(dead_code, reason = "this judge needs no bed")]
#[path = "bed/judge.rs"]
mod judge;

use std::cell::Cell;

use judge::Judge;
use libtest_mimic::{Arguments, Failed, Trial};
use pagewalk::{
    Access, AccessKind, Backing, ControlRegisters, CpuProfile, ExchangeError, FaultKind, Gpa, Gva, Memory,
    PageFormat, PageWalk, Privilege, Reason, Vendor, Walker, is_canonical,
};

const CR0: u64 = 0x8000_0001;
const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const PKS: u64 = 1 << 24;
const LAM_SUP: u64 = 1 << 28;
const LAM_U57: u64 = 1 << 61;
const LAM_U48: u64 = 1 << 62;
const LONG: u64 = 0x500;
const NXE: u64 = 1 << 11;
const UAIE: u64 = 1 << 20;

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);

fn main() {
    let arguments = Arguments::from_args();
    libtest_mimic::run(&arguments, vec![Trial::test("every_input", run)]).exit();
}

fn run() -> Result<(), Failed> {
    let mut judge = Judge::new("exhaustive")?;
    reserved_bits(&mut judge);
    canonicality(&mut judge);
    permission_words(&mut judge);
    protection_keys(&mut judge);
    judge.finish(&[
        ("reserved", None, 20_000),
        ("not reserved", None, 50_000),
        ("absent", None, 20_000),
        ("canonical", None, 10_000),
        ("not canonical", None, 50_000),
        ("permission refused", None, 100),
        ("permission granted", None, 100),
        ("key refuses", None, 20),
        ("key permits", None, 20),
    ])
}

/// One entry a level: the table of level `n` is page `n`, and every index of it holds the same.
struct Tables([Cell<u64>; 6]);

impl Memory for Tables {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        Some(self.0.get(usize::try_from(gpa.0 >> 12).ok()?)?.get())
    }

    fn load_u32(&self, gpa: Gpa) -> Option<u32> {
        self.load_u64(gpa).map(|entry| entry as u32)
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        Err(ExchangeError::ReadOnly)
    }

    fn backing(&self, _: Gpa) -> Backing {
        Backing::None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    TwoLevel,
    Pae,
    Long,
}

fn reserved_bits(judge: &mut Judge) {
    // Kind, levels, CR4, EFER without NXE.
    let modes = [
        (Kind::TwoLevel, 2, 0, 0),
        (Kind::TwoLevel, 2, PSE, 0),
        (Kind::Pae, 3, PAE, 0),
        (Kind::Long, 4, PAE, LONG),
        (Kind::Long, 5, PAE | LA57, LONG),
    ];
    let encryption = [None, Some(47), Some(48), Some(49), Some(50), Some(51)];
    for (kind, levels, cr4, efer) in modes {
        for maxphyaddr in 32..=52 {
            for number in 0..8 * encryption.len() {
                let nxe = number & 1 != 0;
                let cpu = CpuProfile {
                    vendor: if number & 2 == 0 { Vendor::Intel } else { Vendor::Amd },
                    maxphyaddr,
                    gib_pages: number & 4 != 0,
                    encryption_bit: encryption[number >> 3],
                };
                let registers = ControlRegisters {
                    cr0: CR0,
                    cr3: levels << 12,
                    cr4,
                    efer: efer | if nxe { NXE } else { 0 },
                    ..ControlRegisters::default()
                };
                let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
                for level in 1..=levels {
                    for page in [false, true] {
                        let entry = Entry { kind, pse: cr4 & PSE != 0, nxe, cpu: &cpu, level, page };
                        entry.judge(&walker, judge);
                    }
                }
            }
        }
    }
}

/// An entry of one level, as a table's or as a page's.
struct Entry<'a> {
    kind: Kind,
    pse: bool,
    nxe: bool,
    cpu: &'a CpuProfile,
    level: u64,
    page: bool,
}

impl Entry<'_> {
    fn judge(&self, walker: &Walker, judge: &mut Judge) {
        let Entry { kind, level, page, .. } = *self;
        let plain = |level: u64| {
            let rights = if kind == Kind::Pae && level == 3 { 1 } else { 7 };
            level.saturating_sub(1) << 12 | rights
        };
        let tables = Tables(std::array::from_fn(|level| Cell::new(plain(level as u64))));
        // A page's address is 0, a table's that of the next one: neither has other bits that could be reserved.
        let base = if page && level > 1 { 0x87 } else { plain(level) };
        for bit in 0..if kind == Kind::TwoLevel { 32 } else { 64 } {
            for present in [true, false] {
                let entry = if present { base | 1 << bit } else { (base | 1 << bit) & !1 };
                tables.0[level as usize].set(entry);
                judge.case();
                let outcome = walker.translate(&tables, Gva(0), &READ);
                let refused = outcome.err().filter(|fault| u64::from(fault.level) == level);
                let reason = refused.map(|fault| fault.reason);
                let (class, agrees) = if !present {
                    ("absent", reason == Some(Reason::NotPresent))
                } else if self.reserves(entry) {
                    ("reserved", reason == Some(Reason::ReservedBits))
                } else {
                    ("not reserved", reason.is_none())
                };
                judge.count(class, 0);
                if !agrees {
                    judge.disagree(|| {
                        format!("{kind:?} NXE {} PSE {} {:?} level {level}: {entry:#x} is {class}, the walker says {outcome:x?}",
                            self.nxe, self.pse, self.cpu)
                    });
                }
            }
        }
    }

    /// Whether the present `entry` has a bit set that the manuals reserve.
    fn reserves(&self, entry: u64) -> bool {
        let set = |high: u32, low: u32| (low..=high).any(|bit| entry >> bit & 1 != 0);
        let maps_page = self.level == 1 || entry >> 7 & 1 != 0 && (self.kind != Kind::TwoLevel || self.pse);
        let width = u32::from(self.cpu.maxphyaddr);
        // Address bits that the CPU lacks, up to `high`; the encryption bit is not one.
        let no_address = |high: u32| {
            (width..=high)
                .any(|bit| entry >> bit & 1 != 0 && self.cpu.encryption_bit.map(u32::from) != Some(bit))
        };
        let no_execute = set(63, 63) && !self.nxe;
        match (self.kind, self.level) {
            // "If the PSE-36 mechanism is supported, M is the minimum of 40 and MAXPHYADDR", and bits 21:(M-19) are reserved.
            (Kind::TwoLevel, 2) => maps_page && set(21, width.min(40) - 19),
            (Kind::TwoLevel, _) => false,
            // A PDPTE of PAE paging reserves bits 2:1, 8:5 and 63:MAXPHYADDR.
            (Kind::Pae, 3) => set(2, 1) || set(8, 5) || no_address(63),
            (Kind::Pae, 2) => no_address(62) || no_execute || maps_page && set(20, 13),
            (Kind::Pae, _) => no_address(62) || no_execute,
            (Kind::Long, 1) => no_address(51) || no_execute,
            (Kind::Long, 2) => no_address(51) || no_execute || maps_page && set(20, 13),
            (Kind::Long, 3) if self.cpu.gib_pages => no_address(51) || no_execute || maps_page && set(29, 13),
            (Kind::Long, 3) => no_address(51) || no_execute || set(7, 7),
            (Kind::Long, _) => {
                no_address(51) || no_execute || set(7, 7) || self.cpu.vendor == Vendor::Amd && set(8, 8)
            }
        }
    }
}

/// A way to ignore address bits: registers, and who has it.
const MASKINGS: [(u64, u64, u64, Vendor); 9] = [
    (0, 0, 0, Vendor::Intel),
    (LAM_U57, 0, 0, Vendor::Intel),
    (LAM_U48, 0, 0, Vendor::Intel),
    (LAM_U57 | LAM_U48, 0, 0, Vendor::Intel),
    (0, LAM_SUP, 0, Vendor::Intel),
    (LAM_U57, LAM_SUP, 0, Vendor::Intel),
    (LAM_U48, LAM_SUP, 0, Vendor::Intel),
    (0, 0, 0, Vendor::Amd),
    (0, 0, UAIE, Vendor::Amd),
];

fn canonicality(judge: &mut Judge) {
    let tables = Tables(std::array::from_fn(|_| Cell::new(0)));
    for la57 in [0, LA57] {
        let width: u32 = if la57 == 0 { 48 } else { 57 };
        for (cr3, cr4, efer, vendor) in MASKINGS {
            let registers = ControlRegisters {
                cr0: CR0,
                cr3: cr3 | 0x1000,
                cr4: PAE | la57 | cr4,
                efer: LONG | efer,
                ..ControlRegisters::default()
            };
            let cpu = CpuProfile { vendor, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
            let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
            for upper in 0..1_u64 << 17 {
                for lower in [0, 1, 0x7fff_ffff_f000, 0x1234_5678_9abc] {
                    let address = upper << 47 | lower;
                    let plain = all_equal(address, 63, width - 1);
                    if is_canonical(address, width) != plain {
                        judge.disagree(|| format!("is_canonical({address:#x}, {width}) is not {plain}"));
                    }
                    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
                        judge.case();
                        let data = kind != AccessKind::Fetch;
                        let canonical = match (data, address >> 63) {
                            (false, _) => plain,
                            // AMD's CPUs ignore bits 63:57 of the address.
                            _ if efer != 0 => all_equal(address, 56, width - 1),
                            // A user pointer under LAM57: bits 62:57 are ignored, under LAM48: 62:48.
                            (true, 0) if cr3 & LAM_U57 != 0 => {
                                address >> 56 & 1 == 0 && all_equal(address, 56, width - 1)
                            }
                            (true, 0) if cr3 & LAM_U48 != 0 => address >> 47 & 1 == 0,
                            // A supervisor pointer under LAM57 where there are five levels, LAM48 where there are four.
                            (true, 1) if cr4 & LAM_SUP != 0 => address >> (width - 1) & 1 == 1,
                            _ => plain,
                        };
                        let outcome =
                            walker.translate(&tables, Gva(address), &Access::new(kind, Privilege::User));
                        let refused =
                            matches!(outcome, Err(fault) if fault.kind == FaultKind::GeneralProtection);
                        judge.count(if canonical { "canonical" } else { "not canonical" }, 0);
                        if refused == canonical {
                            judge.disagree(|| {
                                format!(
                                    "{address:#x}, {kind:?}, {width} bits, CR3 {cr3:#x} CR4 {cr4:#x} EFER {efer:#x}: {outcome:x?}"
                                )
                            });
                        }
                    }
                }
            }
        }
    }
}

/// Whether bits `high` to `low` are all 0 or all 1.
fn all_equal(address: u64, high: u32, low: u32) -> bool {
    let ones = (low..=high).filter(|bit| address >> bit & 1 != 0).count() as u32;
    ones == 0 || ones == high - low + 1
}

fn formats() -> impl Iterator<Item = (ControlRegisters, PageFormat)> {
    (0..1_u64 << 6).map(|bits| {
        let when = |bit: u32, value: u64| if bits >> bit & 1 != 0 { value } else { 0 };
        let registers = ControlRegisters {
            cr0: CR0 | when(0, WP),
            cr4: PAE | when(1, SMEP) | when(2, SMAP) | when(3, PKE) | when(4, PKS),
            efer: LONG | when(5, NXE),
            ..ControlRegisters::default()
        };
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
        (registers, PageFormat::guest(&registers, &cpu).unwrap())
    })
}

fn permission_words(judge: &mut Judge) {
    for (registers, format) in formats() {
        for (index, word) in format.permissions().iter().enumerate() {
            let [write, user_mode, ac, fetch] = [1, 2, 4, 8].map(|bit| index & bit != 0);
            if write && fetch {
                // No access does both.
                continue;
            }
            for rights in 0..16 {
                let [readable, writable, user_page, executable] = [1, 2, 4, 8].map(|bit| rights & bit != 0);
                // Guest paging makes every page readable: without that right, only whether it can be read is asked.
                if !readable && (write || fetch) {
                    continue;
                }
                let smap = registers.cr4 & SMAP != 0;
                let smep = registers.cr4 & SMEP != 0;
                let wp = registers.cr0 & WP != 0;
                let allowed = match (user_mode, user_page) {
                    // "Access-right checks for user-mode accesses": nothing is allowed to a supervisor-mode address.
                    (true, false) => false,
                    (true, true) if fetch => executable,
                    (true, true) if write => writable,
                    (true, true) => readable,
                    // "Supervisor-mode accesses" to user-mode addresses.
                    (false, true) if fetch => executable && !smep,
                    (false, true) if write => (writable || !wp) && (!smap || ac),
                    (false, true) => readable && (!smap || ac),
                    // To supervisor-mode addresses.
                    (false, false) if fetch => executable,
                    (false, false) if write => writable || !wp,
                    (false, false) => readable,
                };
                judge.case();
                judge.count(if allowed { "permission granted" } else { "permission refused" }, 0);
                if (word >> rights & 1 == 0) != allowed {
                    judge.disagree(|| {
                        format!(
                            "word {index:#06b}, rights {rights:#06b}, {registers:x?}: allowed is {allowed}"
                        )
                    });
                }
            }
        }
    }
}

fn protection_keys(judge: &mut Judge) {
    let tables = Tables(std::array::from_fn(|_| Cell::new(0)));
    for (registers, format) in formats() {
        let wp = registers.cr0 & WP != 0;
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
        let registers = ControlRegisters { cr3: 4 << 12, cr4: registers.cr4 & !(SMAP | SMEP), ..registers };
        let walker = Walker::new(PageWalk::new(&registers, &cpu).unwrap());
        for (user_page, kind, privilege, bits, key) in (0..2 * 3 * 3 * 4 * 16).map(|n: u64| {
            let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][(n / 2 % 3) as usize];
            let privilege = [Privilege::User, Privilege::Supervisor, Privilege::ImplicitSupervisor];
            (n & 1 != 0, kind, privilege[(n / 6 % 3) as usize], (n / 18 % 4) as u32, n / 72)
        }) {
            let enabled = registers.cr4 & if user_page { PKE } else { PKS } != 0;
            let write = kind == AccessKind::Write;
            let user_mode = privilege == Privilege::User;
            // ADi refuses every data access; WDi refuses writes: the user's, and with CR0.WP everybody's. Fetches have no key.
            let disabled = bits & 1 != 0 || bits & 2 != 0 && write && (user_mode && user_page || wp);
            let refuses = enabled && kind != AccessKind::Fetch && disabled;
            judge.case();
            judge.count(if refuses { "key refuses" } else { "key permits" }, 0);

            let index = usize::from(write)
                | usize::from(user_mode) << 1
                | usize::from(user_page) << 2
                | usize::from(kind == AccessKind::Fetch) << 3;
            let field = format.protection_key_mask() >> (2 * index) & 3;
            if (field & bits != 0) != refuses {
                judge.disagree(|| {
                    format!("field {index:#06b} is {field}, {registers:x?}: refuses is {refuses}")
                });
            }
            // And in a walk, where only the key can refuse: the page's own register decides, all other keys are closed.
            if user_mode && !user_page {
                continue;
            }
            let rights = if user_page { 7 } else { 3 };
            for level in 1..=4_u64 {
                tables.0[level as usize]
                    .set((level - 1) << 12 | rights | if level == 1 { key << 59 } else { 0 });
            }
            let own = !(3 << (2 * key)) | bits << (2 * key);
            let (pkru, pkrs) = if user_page { (own, u32::MAX) } else { (u32::MAX, own) };
            let access = Access::new(kind, privilege).with_pkru(pkru).with_pkrs(pkrs);
            let outcome = walker.translate(&tables, Gva(0), &access);
            let refused = matches!(outcome, Err(fault) if fault.reason == Reason::ProtectionKey);
            if refused != refuses || outcome.is_ok() == refuses {
                judge.disagree(|| format!("key {key} {bits:#b} {access:?} {registers:x?}: {outcome:x?}"));
            }
        }
    }
}
