//! An oracle: x86 address translation once more, written from the manuals, for tests alone.
//!
//! It shares nothing with the walker: no code, no table, no mask, no structure. It is slow and obvious on purpose. Each
//! paging mode is one function that reads downwards like the manual's prose; bits are tested by their number where the
//! manual numbers them; each fault's code is put together where the fault is raised.
//!
//! Sources: Intel SDM volume 3, "Paging", "Linear-Address Pre-Processing" and "VMX Support for Address Translation"; AMD APM
//! volume 2, "Page Translation and Protection" and "Nested Paging". Where the manuals are silent because the question is the
//! project's own (which entry is blamed, what an exempt access may do, when accessed bits are set), the rule cites the walker's
//! documentation instead.
//!
//! A mode is added as a function in a file next to [`long_mode`], a second dimension as a variant of [`Second`], a check as a
//! condition in [`rights`].

mod accessed_dirty;
mod ept;
mod linear;
mod long_mode;
pub(crate) mod memory_type;
mod npt;
mod pae;
mod pre_processing;
mod rights;
mod second;
mod structures;
pub(crate) mod trial;
mod two_level;
pub(crate) mod worked;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
    ShadowStackRead,
    ShadowStackWrite,
}

impl Kind {
    fn writes(self) -> bool {
        self == Kind::Write || self == Kind::ShadowStackWrite
    }
    fn of_a_shadow_stack(self) -> bool {
        self == Kind::ShadowStackRead || self == Kind::ShadowStackWrite
    }
}

/// Who makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    User,
    Supervisor,
    ImplicitSupervisor,
    Exempt,
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) linear: u64,
    pub(crate) kind: Kind,
    pub(crate) by: By,
    /// RFLAGS.AC.
    pub(crate) ac: bool,
    pub(crate) pkru: u32,
    /// IA32_PKRS.
    pub(crate) pkrs: u32,
    /// Through SS.
    pub(crate) stack: bool,
}

/// What CPUID says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cpu {
    pub(crate) amd: bool,
    pub(crate) maxphyaddr: u32,
    /// CPUID's Page1GB.
    pub(crate) page1gb: bool,
    /// The address bit that stands for encryption, where there is one: no address bit then, and not reserved.
    pub(crate) encryption_bit: Option<u32>,
}

/// The control registers, as the CPU holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
}

impl Registers {
    fn cr0_wp(&self) -> bool {
        bit(self.cr0, 16)
    }
    fn cr0_pg(&self) -> bool {
        bit(self.cr0, 31)
    }
    fn cr4_pae(&self) -> bool {
        bit(self.cr4, 5)
    }
    fn cr4_la57(&self) -> bool {
        bit(self.cr4, 12)
    }
    fn cr4_smep(&self) -> bool {
        bit(self.cr4, 20)
    }
    fn cr4_smap(&self) -> bool {
        bit(self.cr4, 21)
    }
    fn cr4_pke(&self) -> bool {
        bit(self.cr4, 22)
    }
    fn cr4_cet(&self) -> bool {
        bit(self.cr4, 23)
    }
    fn cr4_pks(&self) -> bool {
        bit(self.cr4, 24)
    }
    fn cr4_lam_sup(&self) -> bool {
        bit(self.cr4, 28)
    }
    fn cr3_lam_u57(&self) -> bool {
        bit(self.cr3, 61)
    }
    fn cr3_lam_u48(&self) -> bool {
        bit(self.cr3, 62)
    }
    fn efer_lma(&self) -> bool {
        bit(self.efer, 10)
    }
    fn efer_nxe(&self) -> bool {
        bit(self.efer, 11)
    }
    fn efer_uaie(&self) -> bool {
        bit(self.efer, 20)
    }
}

/// What L1 put under L2.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Second {
    /// Nested paging: nCR3, the registers and CPU of the host that executed VMRUN, and the VMCB's GMET.
    Npt { ncr3: u64, host: Registers, cpu: Cpu, gmet: bool },
    /// EPT: EPTP, the control "mode-based execute control for EPT", and what the CPU offers.
    Ept { eptp: u64, controls: EptControls, offers: EptOffers, cpu: Cpu },
}

/// What the VMCS says of EPT beside EPTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct EptControls {
    /// "Mode-based execute control for EPT".
    pub(crate) mode_based_execute: bool,
    /// No CPU's: every access to a guest's paging structure counts as a write, as KVM has it.
    pub(crate) tables_written: bool,
}

/// What IA32_VMX_EPT_VPID_CAP says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EptOffers {
    /// Bit 0.
    pub(crate) execute_only: bool,
    /// Bit 16.
    pub(crate) pages_2_mib: bool,
    /// Bit 17.
    pub(crate) pages_1_gib: bool,
    /// Bit 22.
    pub(crate) advanced_information: bool,
}

/// Everything but the access and the memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct System {
    pub(crate) registers: Registers,
    pub(crate) cpu: Cpu,
    /// The PDPTE registers of PAE paging, where its PDPTEs do not come from memory.
    pub(crate) pdpte_registers: Option<[u64; 4]>,
    pub(crate) second: Option<Second>,
}

/// What an address leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nature {
    Ram,
    Rom,
    Nothing,
}

/// Physical memory.
pub(crate) trait Physical {
    /// The eight bytes at this multiple of eight, if memory is there.
    fn read(&self, address: u64) -> Option<u64>;
    fn nature(&self, address: u64) -> Nature;
}

/// What the entries of a walk grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) user: bool,
    pub(crate) execute: bool,
}

impl Granted {
    const EVERYTHING: Granted = Granted { read: true, write: true, user: true, execute: true };
    const NOTHING: Granted = Granted { read: false, write: false, user: false, execute: false };

    fn and(self, other: Granted) -> Granted {
        Granted {
            read: self.read && other.read,
            write: self.write && other.write,
            user: self.user && other.user,
            execute: self.execute && other.execute,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dimension {
    Guest,
    Nested,
}

/// What an entry was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Table,
    Leaf,
    NotPresent,
    Reserved,
    Misconfigured,
    Unbacked,
}

/// One entry that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    pub(crate) dimension: Dimension,
    pub(crate) level: u32,
    /// The address being translated.
    pub(crate) input: u64,
    pub(crate) table: u64,
    pub(crate) index: u32,
    pub(crate) address: u64,
    pub(crate) entry: u64,
    pub(crate) so_far: Granted,
    pub(crate) found: Found,
    /// Whether the page or structure that this walk leads to is being written.
    pub(crate) writes: bool,
    /// Size of the entry.
    pub(crate) bytes: u64,
    /// The accessed and the dirty bit of its format, if it has them.
    pub(crate) flags: Option<Flags>,
    /// Of a guest's entry behind a second dimension: its address there.
    pub(crate) nested: Option<u64>,
}

/// Numbers of the accessed and the dirty bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) accessed: u32,
    pub(crate) dirty: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Unpaged,
    FourKib,
    TwoMib,
    FourMib,
    OneGib,
}

/// What an allowed access reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) physical: u64,
    /// The address in between, with a second dimension.
    pub(crate) nested: Option<(u64, Size)>,
    pub(crate) entry: u64,
    pub(crate) size: Size,
    pub(crate) granted: Granted,
    pub(crate) key: u8,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
    pub(crate) global: bool,
    pub(crate) pat_index: Option<usize>,
    /// Of an EPT leaf: bits 5:3, and bit 6.
    pub(crate) ept_type: Option<(u64, bool)>,
    pub(crate) nature: Nature,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    PageFault(u32),
    GeneralProtection,
    StackFault,
    NestedPageFault(u64),
    /// With its exit qualification.
    EptViolation(u64),
    EptMisconfiguration,
    Unbacked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    NonCanonical,
    TooWide,
    TableUnbacked,
    NotPresent,
    ReservedBits,
    SupervisorPage,
    NoExecute,
    Smep,
    Smap,
    ReadOnly,
    /// A supervisor's shadow-stack access to a user's page.
    UserShadowStack,
    /// A shadow-stack access to a page that is none.
    NotShadowStack,
    ProtectionKey,
    /// GMET: a supervisor's fetch from a user page.
    Gmet,
    /// EPT: not readable.
    NotReadable,
    /// EPT: W without R.
    WriteWithoutRead,
    /// EPT: X without R, and the CPU offers no execute-only translations.
    ExecuteOnly,
    /// EPT: a reserved memory type.
    MemoryType,
}

/// A refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) event: Event,
    pub(crate) cause: Cause,
    pub(crate) linear: u64,
    pub(crate) dimension: Dimension,
    /// The entry to blame: its level, its address, its value; zeros where there is none.
    pub(crate) level: u32,
    pub(crate) at: u64,
    pub(crate) entry: u64,
    /// The bits to blame in it.
    pub(crate) bits: u64,
    pub(crate) nested: Option<u64>,
}

/// One entry as the access leaves it, where accessed and dirty bits are to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) address: u64,
    pub(crate) entry: u64,
    pub(crate) bytes: u64,
}

/// All there is to say about one access.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) outcome: Result<Page, Refusal>,
    pub(crate) visits: Vec<Visit>,
    /// Entries that setting accessed and dirty bits changes.
    pub(crate) written: Vec<Written>,
    /// Whether a bit stays clear because its entry lies in read-only memory.
    pub(crate) skipped: bool,
    /// Whether entries overlap, so that what setting bits leads to is up to the CPU.
    pub(crate) overlap: bool,
}

/// A walk under way.
struct Walk<'a, P> {
    system: &'a System,
    memory: &'a P,
    request: Request,
    visits: Vec<Visit>,
}

/// What `request` means.
pub(crate) fn translate<P: Physical>(system: &System, memory: &P, request: Request) -> Answer {
    let request = without_cet(system, request);
    let mut walk = Walk { system, memory, request, visits: Vec::with_capacity(8) };
    let outcome = walk.linear_address();
    walk.finish(outcome)
}

/// What the second dimension alone makes of the nested physical address `request.linear`.
pub(crate) fn translate_nested<P: Physical>(
    system: &System,
    memory: &P,
    request: Request,
    purpose: Purpose,
) -> Answer {
    let nested = request.linear;
    let mut walk =
        Walk { system, memory, request: Request { linear: 0, ..request }, visits: Vec::with_capacity(8) };
    let outcome = walk.second_alone(nested, purpose);
    walk.finish(outcome)
}

/// The project's own rule (`AccessKind`): where CR4.CET is clear, and no CPU makes shadow-stack accesses, they are ordinary ones.
fn without_cet(system: &System, request: Request) -> Request {
    let kind = match request.kind {
        _ if system.registers.cr4_cet() => request.kind,
        Kind::ShadowStackRead => Kind::Read,
        Kind::ShadowStackWrite => Kind::Write,
        ordinary => ordinary,
    };
    Request { kind, ..request }
}

pub(crate) use second::Purpose;

impl<P: Physical> Walk<'_, P> {
    fn finish(self, outcome: Result<Page, Refusal>) -> Answer {
        let (written, skipped) = match outcome {
            Ok(_) => accessed_dirty::written(self.memory, &self.visits),
            Err(_) => (Vec::new(), false),
        };
        let ept = matches!(self.system.second, Some(Second::Ept { .. }));
        let overlap = accessed_dirty::overlap(&self.visits, ept);
        Answer { outcome, visits: self.visits, written, skipped, overlap }
    }
}

/// Bit `number` of `value`.
fn bit(value: u64, number: u32) -> bool {
    (value >> number) & 1 == 1
}

/// Bits `high` to `low` of `value`, where they stand; nothing if `high` is below `low`.
fn bits(value: u64, high: u32, low: u32) -> u64 {
    if high < low {
        return 0;
    }
    // Out with those above, and back; then out with those below.
    let without_above = value << (63 - high) >> (63 - high);
    without_above >> low << low
}

/// Bits `high` to `low` of `value` as a number.
fn number(value: u64, high: u32, low: u32) -> u64 {
    bits(value, high, low) >> low
}
