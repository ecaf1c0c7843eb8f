"""What the daemon answers, as immutable values. Addresses, entries and registers are plain integers, printed in hex.

Names of choices are the contract's, in lower case: `FAULT_KIND_PAGE_FAULT` is `"page_fault"`. A choice that a newer
daemon knows and this package does not appears as `"unknown_17"`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

AccessKind = Literal["read", "write", "fetch", "shadow_stack_read", "shadow_stack_write"]
Privilege = Literal["exempt", "as_cpl", "user", "supervisor", "implicit_supervisor"]
AdPolicy = Literal["observe", "set"]
Freshness = Literal["latest", "sync"]
Vendor = Literal["intel", "amd"]
RunState = Literal["unspecified", "running", "halted", "paused", "shutdown", "internal_error", "unresponsive", "static"]
Backing = Literal["ram", "read_only", "none"]
MemoryType = Literal["uc", "wc", "wt", "wp", "wb", "uc_minus"]
FaultKind = Literal[
    "page_fault",
    "general_protection",
    "stack_fault",
    "ept_violation",
    "ept_misconfiguration",
    "nested_page_fault",
    "unbacked",
    "contended",
]
MachineState = Literal["unspecified", "alive", "lost"]
TaskListState = Literal["unspecified", "complete", "incomplete", "unknown"]
SymbolPlacement = Literal["found", "as_written", "not_found"]
NestedPhase = Literal["final", "table", "pdpte"]
Dimension = Literal["guest", "nested"]
PagingMode = Literal["none", "two_level", "pae", "four_level", "five_level", "ept_four_level", "ept_five_level"]
NestedModeKind = Literal["off", "walker_only", "real_vcpu", "observed"]
NestedEffectKind = Literal["real_vcpu", "walker_only", "unchanged"]

_SIZES = {0: "unpaged", 1 << 12: "4 KiB", 1 << 21: "2 MiB", 1 << 22: "4 MiB", 1 << 30: "1 GiB"}


def size_name(page_size: int) -> str:
    """Name a page size, given in bytes, for a person."""
    return _SIZES.get(page_size, f"{page_size} bytes")


@dataclass(frozen=True)
class Provenance:
    """Where an answer comes from, and what it is worth."""

    machine: str
    vcpu: int
    source: str
    generation: int
    run_state: RunState
    #: Seconds since the registers behind the answer were published.
    snapshot_age: float
    #: Registers that the source could not give, each with the value assumed instead: `"EFER=0xd00"`.
    assumed: tuple[str, ...]
    validated: bool
    torn: bool
    host: str
    repeated_walks: int


@dataclass(frozen=True)
class Rights:
    """Rights of a page."""

    read: bool
    write: bool
    user: bool
    execute: bool

    def __str__(self) -> str:
        letters = zip("rwxu", (self.read, self.write, self.execute, self.user))
        return "".join(letter if granted else "-" for letter, granted in letters)


@dataclass(frozen=True)
class Symbol:
    """A symbol of the guest's kernel, and how many bytes behind it an address lies."""

    name: str
    offset: int

    def __str__(self) -> str:
        return f"{self.name}+{self.offset:#x}" if self.offset else self.name


@dataclass(frozen=True)
class Step:
    """One entry read during a walk."""

    dimension: Dimension
    level: int
    table_gpa: int
    index: int
    entry_gpa: int
    entry: int
    rights_so_far: Rights
    verdict: str
    #: The address being translated: the GVA in dimension `guest`, the nGPA in `nested`.
    input: int | None
    leaf: bool
    #: How to read the entry: way of paging of its dimension.
    mode: PagingMode
    #: The nearest symbol of the entry itself, where the guest's kernel was built with its table.
    symbol: Symbol | None = None

    def __str__(self) -> str:
        return (
            f"{self.dimension} level {self.level}: [{self.entry_gpa:#x}] = {self.entry:#018x} "
            f"{self.rights_so_far} {self.verdict}"
        )


@dataclass(frozen=True)
class EptMemoryType:
    """What an EPT leaf says of a page's memory type."""

    memory_type: MemoryType
    ignore_pat: bool


@dataclass(frozen=True)
class Translation:
    """What a guest virtual address means."""

    ok: ClassVar[Literal[True]] = True

    #: The address that was asked for, as it was given.
    address: int | str
    gpa: int
    #: Bytes; 0 where paging is off.
    page_size: int
    #: Rights of the page. Whether an access is allowed also depends on the vCPU's control registers.
    rights: Rights
    protection_key: int
    accessed: bool
    dirty: bool
    backing: Backing
    pat_type: MemoryType
    #: What `gva_walk` gave and `ngpa_walk` turned into `gpa`; None without a second dimension.
    nested_gpa: int | None
    #: Bytes; None without a second dimension.
    nested_page_size: int | None
    ad_skipped: bool
    global_page: bool
    #: What the EPT leaf says; None but under EPT.
    ept_type: EptMemoryType | None
    #: The memory type of accesses to the page; None where it is not known, as without EPT.
    effective_type: MemoryType | None
    #: The entries read; empty unless asked for by `trace`.
    steps: tuple[Step, ...]
    #: The walk for a person; empty unless asked for by `explain`.
    explanation: str
    provenance: Provenance
    #: The address as a number.
    gva: int = 0
    #: The nearest symbol of the address; None where the machine has no symbols, or none is near.
    symbol: Symbol | None = None

    def __str__(self) -> str:
        through = "" if self.nested_gpa is None else f" through nGPA {self.nested_gpa:#x}"
        marks = [size_name(self.page_size), str(self.rights), self.pat_type.upper().replace("_MINUS", "-")]
        marks += [name for name, on in (("accessed", self.accessed), ("dirty", self.dirty)) if on]
        marks += ["global"] if self.global_page else []
        marks += [f"key {self.protection_key}"] if self.protection_key else []
        marks += {"ram": [], "read_only": ["read-only memory"], "none": ["no memory behind"]}.get(
            self.backing, [self.backing]
        )
        return f"{_hex(self.address)}{_name(self.symbol)} -> {self.gpa:#x}{through} ({', '.join(marks)})"


@dataclass(frozen=True)
class NestedTranslation:
    """What a guest physical address of an L2 means to its L1."""

    ok: ClassVar[Literal[True]] = True

    #: The address that was asked for, as it was given.
    address: int | str
    gpa: int
    #: There is no second dimension: `gpa` is the address itself.
    identity: bool
    #: Bytes of the page in `ngpa_walk`; None with `identity`.
    page_size: int | None
    rights: Rights
    backing: Backing
    #: What the EPT leaf says; None but under EPT.
    ept_type: EptMemoryType | None
    #: The memory type of accesses to the page; None where the guest's PAT, too, has a say.
    effective_type: MemoryType | None
    #: The entries read; empty unless asked for by `trace`.
    steps: tuple[Step, ...]
    #: The walk for a person; empty unless asked for by `explain`.
    explanation: str
    provenance: Provenance

    def __str__(self) -> str:
        marks = ["no second dimension"] if self.page_size is None else [size_name(self.page_size), str(self.rights)]
        marks += {"ram": [], "read_only": ["read-only memory"], "none": ["no memory behind"]}.get(
            self.backing, [self.backing]
        )
        return f"nGPA {_hex(self.address)} -> {self.gpa:#x} ({', '.join(marks)})"


@dataclass(frozen=True)
class Fault:
    """Why there is no translation. This is an answer, not an exception."""

    ok: ClassVar[Literal[False]] = False

    kind: FaultKind
    #: The GVA asked for.
    address: int
    #: Level of the entry that refused; 0 where no entry did.
    level: int
    dimension: Dimension
    entry_gpa: int
    entry: int
    error_code: int | None
    exit_qualification: int | None
    exit_info_1: int | None
    nested_gpa: int
    reason: str
    #: The bits of `entry` that are responsible.
    bits: int
    #: The entries read; empty unless asked for by `trace`.
    steps: tuple[Step, ...]
    #: The walk for a person; empty unless asked for by `explain`.
    explanation: str
    provenance: Provenance
    #: The nearest symbol of the address; None where the machine has no symbols, or none is near.
    symbol: Symbol | None = None

    def __str__(self) -> str:
        codes = (
            ("error code", self.error_code),
            ("exit qualification", self.exit_qualification),
            ("EXITINFO1", self.exit_info_1),
        )
        code = "".join(f" ({name} {value:#x})" for name, value in codes if value is not None)
        return f"{self.address:#x}{_name(self.symbol)}: {self.kind}{code}: {self.reason}"


@dataclass(frozen=True)
class BatchTranslation:
    """What many addresses mean, as columns: numpy arrays where the addresses were one, else `array.array`."""

    #: The addresses asked for: the numpy array that was given, else an `array.array` of the numbers.
    addresses: Any
    #: One 64-bit word an address; `BatchTranslateResponse.words` in translation.proto says what its bits mean.
    words: Any
    #: The first faults in full, with the places of their addresses; each has its `reason` left empty.
    faults: tuple[tuple[int, Fault], ...]
    #: How many addresses met a fault.
    fault_count: int
    #: Where the answer comes from: one for each 262144 addresses, which are a request of their own.
    provenances: tuple[Provenance, ...]

    def __len__(self) -> int:
        return len(self.words)

    @property
    def ok(self) -> Any:  # noqa: ANN401, a column
        """Whether each address is mapped, and the access allowed."""
        return self._column(lambda words: words & 1 != 0)

    @property
    def gpa(self) -> Any:  # noqa: ANN401, a column
        """The guest physical address of each address; 0 where there is a fault: see `ok`."""
        if isinstance(self.words, array):
            pairs = zip(self.words, self.addresses)
            return [word & _FRAME | address & 0xFFF if word & 1 else 0 for word, address in pairs]
        # A signed column would not mix with the words.
        addresses = self.addresses.astype(self.words.dtype)
        return (self.words & _FRAME | addresses & 0xFFF) * (self.words & 1)

    def _column(self, of: Callable[[Any], Any]) -> Any:  # noqa: ANN401, a column
        return [of(word) for word in self.words] if isinstance(self.words, array) else of(self.words)


_FRAME = 0x000F_FFFF_FFFF_F000

#: What `Client.translate` answers; `ok` tells them apart.
Outcome = Union[Translation, Fault]


@dataclass(frozen=True)
class EntryBits:
    """Where the meanings sit in an entry, as masks; 0: there is no such bit, or it is off."""

    present: int
    write: int
    user: int
    no_execute: int
    execute: int
    accessed: int
    dirty: int
    page_size: int
    global_page: int
    protection_key: int
    frame: int


@dataclass(frozen=True)
class PointerMasking:
    """Which bits of a pointer are ignored before its address is checked: by LAM or UAI."""

    #: Low bits that are kept where bit 63 is clear: 48 or 57; 64 is all.
    user_width: int
    #: The same where bit 63 is set.
    supervisor_width: int
    bit_63_ignored: bool


@dataclass(frozen=True)
class PageFormat:
    """Everything about the entries of one dimension that the control registers and the CPU decide."""

    mode: PagingMode
    levels: int
    #: Bits that must be 0 in an entry that maps a page; index 0 is level 1.
    reserved_leaf: tuple[int, ...]
    #: Bits that must be 0 in an entry that points to a table; index 0 is level 1.
    reserved_table: tuple[int, ...]
    #: The sixteen permission words; `types.proto` says how to index them.
    permissions: tuple[int, ...]
    protection_key_mask: int
    bad_memory_type_xwr: int
    linear_width: int
    maxphyaddr: int
    fetch_bit_reported: bool
    entry_bytes: int
    index_bits: int
    bits: EntryBits | None
    #: CR4.CET: there are shadow-stack accesses.
    shadow_stacks: bool
    #: None where no bits of a pointer are ignored.
    pointer_masking: PointerMasking | None
    #: The bit that marks memory as encrypted; 0 where there is none.
    encryption_mask: int
    #: EPT: bit 10 of an entry is the user's right to execute.
    mode_based_execute: bool
    #: EPT: a supervisor's shadow-stack access needs bit 60 of the leaf.
    supervisor_shadow_stack_control: bool


@dataclass(frozen=True)
class PageWalk:
    """A root and a page format: everything that one dimension needs."""

    root: int
    pdptrs: tuple[int, ...]
    format: PageFormat


@dataclass(frozen=True)
class Npt:
    """A second dimension by AMD's nested page tables. Absent fields get the daemon's defaults."""

    ncr3: int
    host_cr4: int | None = None
    host_efer: int | None = None
    host_cr0: int | None = None
    guest_mode_execute_trap: bool = False


@dataclass(frozen=True)
class Ept:
    """A second dimension by Intel's extended page tables. Absent capabilities are all that there are."""

    eptp: int
    mode_based_execute: bool = False
    #: IA32_VMX_EPT_VPID_CAP (MSR 0x48c).
    capabilities: int | None = None
    #: Access guest paging structures as writes always, as KVM does.
    tables_written: bool = False


@dataclass(frozen=True)
class NestedMode:
    """Whether there is a second dimension, and who put it there."""

    kind: NestedModeKind
    reason: str
    second_dimension: Npt | Ept | None


@dataclass(frozen=True)
class WalkerState:
    """State of a vCPU's page walkers."""

    gva_walk: PageWalk
    #: None without a second dimension.
    ngpa_walk: PageWalk | None
    nested: NestedMode
    provenance: Provenance


@dataclass(frozen=True)
class NestedChange:
    """What a switch of nested mode did, and the state after it."""

    effect: NestedEffectKind
    reason: str
    state: WalkerState


@dataclass(frozen=True)
class WalkerOverride:
    """The caller's own walker state. Absent fields come from the vCPU."""

    cr0: int | None = None
    cr3: int | None = None
    cr4: int | None = None
    efer: int | None = None
    maxphyaddr: int | None = None
    pdptrs: tuple[int, ...] = ()
    #: `"none"` removes the one that the vCPU has.
    second_dimension: Npt | Ept | Literal["none"] | None = None
    pat: int | None = None
    gib_pages: bool | None = None
    vendor: Vendor | None = None


@dataclass(frozen=True)
class Registers:
    """Registers of a vCPU. None: the source cannot give it; in a request: leave it as it is."""

    cr0: int | None = None
    cr2: int | None = None
    cr3: int | None = None
    cr4: int | None = None
    efer: int | None = None
    rax: int | None = None
    rbx: int | None = None
    rcx: int | None = None
    rdx: int | None = None
    rsi: int | None = None
    rdi: int | None = None
    rbp: int | None = None
    rsp: int | None = None
    r8: int | None = None
    r9: int | None = None
    r10: int | None = None
    r11: int | None = None
    r12: int | None = None
    r13: int | None = None
    r14: int | None = None
    r15: int | None = None
    rip: int | None = None
    rflags: int | None = None
    cr8: int | None = None
    pat: int | None = None
    pkru: int | None = None
    cpl: int | None = None
    fs_base: int | None = None
    gs_base: int | None = None
    cs: int | None = None
    ss: int | None = None
    ds: int | None = None
    es: int | None = None
    fs: int | None = None
    gs: int | None = None
    #: Can only be read.
    pkrs: int | None = None
    #: None in a request. Does not count when registers are compared.
    provenance: Provenance | None = field(default=None, compare=False)

    def known(self) -> dict[str, int]:
        """Give the registers that are present, by name."""
        values = ((register.name, getattr(self, register.name)) for register in fields(self))
        return {name: value for name, value in values if isinstance(value, int)}

    def __str__(self) -> str:
        return "\n".join(f"{name:8}{value:#x}" for name, value in self.known().items())


@dataclass(frozen=True)
class Vcpu:
    """One vCPU, as it last published."""

    index: int
    run_state: RunState
    run_state_reason: str
    generation: int
    mode: PagingMode
    nested: NestedMode
    cr3: int
    rip: int
    #: Seconds since it published.
    snapshot_age: float


@dataclass(frozen=True)
class Task:
    """A process of a Linux guest."""

    pid: int
    #: Of the guest's choice; control characters and bytes that are no UTF-8 are written as `\\u{1b}` and `\\xff`.
    name: str

    def __str__(self) -> str:
        return f"{self.pid} {self.name}"


@dataclass(frozen=True)
class AddressSpace:
    """An address space that a vCPU was seen in, or that a process of a Linux guest has."""

    #: Without PCID and flags: what `WalkerOverride.cr3` takes.
    cr3: int
    #: How often it was seen, by all vCPUs; 0 where none did.
    sightings: int
    #: The vCPU that saw it last, and the generation of its walkers then.
    vcpu: int
    generation: int
    #: Seconds since then; None where no vCPU saw it.
    age: float | None
    #: CR3 of the process's other half under page-table isolation; None where the tables show none.
    isolation_pair: int | None
    #: This is the half for user mode.
    user_half: bool
    #: The processes whose address space it is, at most 16, and how many more there are. Empty where none is known.
    tasks: tuple[Task, ...]
    tasks_left_out: int

    def __str__(self) -> str:
        half = "user" if self.user_half else "kernel"
        pair = "" if self.isolation_pair is None else f" ({half} half, with {self.isolation_pair:#x})"
        tasks = "".join(f", {task}" for task in self.tasks)
        return f"CR3 {self.cr3:#x}{pair}: seen {self.sightings} times{tasks}"


@dataclass(frozen=True)
class Stepped:
    """A vCPU that executed one instruction, and its registers after it."""

    vcpu: Vcpu
    registers: Registers
    provenance: Provenance


@dataclass(frozen=True)
class MemoryRegion:
    """A stretch of a machine's memory."""

    start: int
    size: int
    read_only: bool


@dataclass(frozen=True)
class Capabilities:
    """What can be done with a machine."""

    real_nested: bool
    can_step: bool
    can_pause: bool
    can_set_registers: bool
    live: bool
    can_write_memory: bool
    ends_when_detached: bool


@dataclass(frozen=True)
class Landmark:
    """An address worth asking about."""

    name: str
    address: int
    description: str


@dataclass(frozen=True)
class Symbols:
    """The symbols of a machine's kernel, and what is known of where it lies."""

    file: str
    count: int
    placement: SymbolPlacement
    #: What is added to the file's addresses; None unless the kernel is found.
    slide: int | None
    #: How that is known, or why it is not.
    reason: str


@dataclass(frozen=True)
class Machine:
    """A guest: its memory, its vCPUs, and the source it comes from."""

    id: str
    source: str
    description: str
    memory_bytes: int
    regions: tuple[MemoryRegion, ...]
    vcpus: int
    capabilities: Capabilities
    landmarks: tuple[Landmark, ...]
    maxphyaddr: int
    state: MachineState
    #: Why it is lost; empty while it is there.
    state_reason: str
    #: The symbols of its kernel; None where it was given none.
    symbols: Symbols | None = None
    #: Only in a list that would be too large: regions, landmarks and symbols are left out; ask for the machine alone.
    abridged: bool = False


@dataclass(frozen=True)
class SavedImage:
    """A machine that was saved as two files."""

    description: Path
    memory: Path
    memory_bytes: int
    #: How many of them were sent; the rest are holes.
    contents_bytes: int


@dataclass(frozen=True)
class TaskList:
    """What was found of a Linux guest's tasks."""

    state: TaskListState
    #: Tasks that were found, kernel threads among them.
    count: int
    #: Why it is not all.
    reason: str


@dataclass(frozen=True)
class AddressSpaces:
    """Address spaces, the most recently seen first. Goes through them as a sequence does."""

    spaces: tuple[AddressSpace, ...]
    #: How many were left out, or forgotten.
    left_out: int
    #: The tasks that they are named by.
    task_list: TaskList

    def __iter__(self) -> Iterator[AddressSpace]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)


@dataclass(frozen=True)
class MemoryStop:
    """Why bytes from `address` on were not read or written."""

    #: Virtual, or physical where a physical address was asked for.
    address: int
    #: The kind of fault, error code and entry are in its reason; `None` where the walk found a page.
    fault_kind: FaultKind | None
    error_code: int | None
    gpa: int
    reason: str


@dataclass(frozen=True)
class MemoryRead:
    """Bytes that were read."""

    data: bytes
    #: Why there are fewer than were asked for; `None` where there are not.
    stop: MemoryStop | None
    provenance: Provenance
    #: Where they begin.
    address: int = 0


@dataclass(frozen=True)
class DecodedBit:
    """One bit of an error code."""

    bit: int
    name: str
    set: bool
    meaning: str


@dataclass(frozen=True)
class FaultExplanation:
    """A fault that somebody saw, explained."""

    #: What the same access meets now.
    now: Translation | Fault
    #: The code seen is the one that the walk gives now.
    matches: bool
    explanation: str
    decoded: tuple[DecodedBit, ...]
    steps: tuple[Step, ...]
    provenance: Provenance

    @property
    def would_fault_now(self) -> bool:
        """Whether the same access would fault now."""
        return not self.now.ok

    def __str__(self) -> str:
        return self.explanation


def _name(symbol: Symbol | None) -> str:
    return "" if symbol is None else f" <{symbol}>"


def _hex(address: int | str) -> str:
    return address if isinstance(address, str) else f"{address:#x}"
