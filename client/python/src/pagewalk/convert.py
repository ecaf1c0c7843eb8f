"""From the wire's messages to this package's values, and back."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pagewalk import answers
from pagewalk.v1 import machine_pb2, mapping_pb2, memory_pb2, translation_pb2, types_pb2, vcpu_pb2, walker_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor

_PAGE_BYTES = {
    types_pb2.PAGE_SIZE_4K: 1 << 12,
    types_pb2.PAGE_SIZE_2M: 1 << 21,
    types_pb2.PAGE_SIZE_4M: 1 << 22,
    types_pb2.PAGE_SIZE_1G: 1 << 30,
}
#: The longest timeout. gRPC takes the end of a much longer one for a time that has passed.
_YEAR = 365 * 24 * 60 * 60


@cache
def choices(enum: EnumDescriptor) -> dict[str, int]:
    """Give an enum's names as this package writes them, with their numbers."""
    prefix = enum.values_by_number[0].name[: -len("UNSPECIFIED")]
    return {value.name[len(prefix) :].lower(): value.number for value in enum.values}


def number(enum: EnumDescriptor, name: str, what: str) -> Any:  # noqa: ANN401, the caller's field knows its type
    """Find the number of a choice, or say which there are."""
    known = choices(enum)
    if name not in known or name == "unspecified":
        offered = ", ".join(repr(choice) for choice in known if choice != "unspecified")
        raise ValueError(f"{what} cannot be {name!r}; it is one of {offered}")
    return known[name]


def _name(enum: EnumDescriptor, value: int) -> Any:  # noqa: ANN401, the caller's field knows its type
    for name, number_ in choices(enum).items():
        if number_ == value:
            return name
    return f"unknown_{value}"


def to_timeout(seconds: float | None) -> float | None:
    """Check how long a call may take; more than a year is None, no bound."""
    if seconds is None or seconds > _YEAR:
        return None
    # This way round, NaN is refused too.
    if not seconds >= 0:
        raise ValueError(f"timeout cannot be {seconds!r}; it is a number of seconds, float('inf') for no bound")
    return seconds


def to_vcpu(machine: str, vcpu: int) -> types_pb2.VcpuRef:
    """Name a vCPU."""
    if not 0 <= vcpu < 1 << 32:
        raise ValueError(f"there is no vCPU {vcpu}: they count from 0")
    return types_pb2.VcpuRef(machine=machine, vcpu=vcpu)


def to_word(value: int, what: str) -> int:
    """Check that a number fits the wire's 64 bits."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{what} {value:#x} does not fit 64 bits")
    return value


def to_address(address: int | str, what: str = "address") -> types_pb2.Address:
    """Send numbers as numbers and text as text, which the daemon reads."""
    if isinstance(address, str):
        return types_pb2.Address(text=address)
    return types_pb2.Address(number=to_word(address, what))


def check_reach(first: int, length: int) -> None:
    """Check that the last of so many bytes has an address."""
    if to_word(first, "address") + length > 1 << 64:
        raise ValueError(f"{first:#x} and {length} bytes reach beyond 64 bits")


def to_access(
    kind: str,
    privilege: str,
    *,
    ac: bool | None = None,
    pkru: int | None = None,
    pkrs: int | None = None,
    stack: bool = False,
) -> types_pb2.Access:
    """Describe an access; what is `None` is as the vCPU has it."""
    return types_pb2.Access(
        kind=number(types_pb2.AccessKind.DESCRIPTOR, kind, "access"),
        privilege=number(types_pb2.Privilege.DESCRIPTOR, privilege, "privilege"),
        ac=ac,
        pkru=pkru,
        pkrs=pkrs,
        stack=stack,
    )


def _to_npt(npt: answers.Npt) -> types_pb2.Npt:
    return types_pb2.Npt(
        ncr3=npt.ncr3,
        host_cr4=npt.host_cr4,
        host_efer=npt.host_efer,
        host_cr0=npt.host_cr0,
        guest_mode_execute_trap=npt.guest_mode_execute_trap,
    )


def _to_ept(ept: answers.Ept) -> types_pb2.Ept:
    return types_pb2.Ept(
        eptp=to_word(ept.eptp, "eptp"),
        mode_based_execute=ept.mode_based_execute,
        capabilities=None if ept.capabilities is None else to_word(ept.capabilities, "capabilities"),
        tables_written=ept.tables_written,
    )


def _second_dimension(second: object, choices: str) -> dict[str, Any]:
    """Give the field that takes it, by name."""
    if isinstance(second, answers.Npt):
        return {"npt": _to_npt(second)}
    if isinstance(second, answers.Ept):
        return {"ept": _to_ept(second)}
    raise ValueError(f"second_dimension cannot be {second!r}; it is {choices}")


def to_override(override: answers.WalkerOverride | None) -> types_pb2.WalkerOverride | None:
    """Send the caller's own walker state, if any."""
    if override is None:
        return None
    second = override.second_dimension
    dimension: dict[str, Any] = {}
    if second == "none":
        dimension = {"none": True}
    elif second is not None:
        dimension = _second_dimension(second, "an Npt, an Ept or 'none'")
    vendor = None if override.vendor is None else number(types_pb2.Vendor.DESCRIPTOR, override.vendor, "vendor")
    return types_pb2.WalkerOverride(
        cr0=override.cr0,
        cr3=override.cr3,
        cr4=override.cr4,
        efer=override.efer,
        maxphyaddr=override.maxphyaddr,
        pdptrs=override.pdptrs,
        pat=override.pat,
        gib_pages=override.gib_pages,
        vendor=vendor,
        **dimension,
    )


def to_nested(
    second: answers.Npt | answers.Ept,
    l2: answers.Registers | None,
    vcpu: types_pb2.VcpuRef,
    *,
    control_structure: int | None,
    walker_only: bool,
) -> walker_pb2.SetNestedModeRequest:
    """Send a switch of nested mode on."""
    message = walker_pb2.SetNestedModeRequest(
        vcpu=vcpu,
        l2=None if l2 is None else to_registers(l2),
        walker_only=walker_only,
        **_second_dimension(second, "an Npt or an Ept"),
    )
    if control_structure is not None:
        place = to_word(control_structure, "control_structure")
        if isinstance(second, answers.Npt):
            message.vmcb12 = place
        else:
            message.vmcs12 = place
    return message


def to_registers(registers: answers.Registers) -> types_pb2.Registers:
    """Send the registers that are present."""
    message = types_pb2.Registers()
    for name, value in registers.known().items():
        try:
            setattr(message, name, value)
        except ValueError as error:
            raise ValueError(f"{name} cannot be {value:#x}: it does not fit the register") from error
    return message


def provenance(message: types_pb2.Provenance) -> answers.Provenance:
    """Convert."""
    return answers.Provenance(
        machine=message.machine,
        vcpu=message.vcpu,
        source=message.source,
        generation=message.generation,
        run_state=_name(types_pb2.RunState.DESCRIPTOR, message.run_state),
        snapshot_age=message.snapshot_age.ToTimedelta().total_seconds(),
        assumed=tuple(message.assumed),
        validated=message.validated,
        torn=message.torn,
        host=message.host,
        repeated_walks=message.repeated_walks,
    )


def outcome(address: int | str, message: translation_pb2.TranslateResponse) -> answers.Translation | answers.Fault:
    """Convert."""
    steps = tuple(map(_step, message.steps))
    source = provenance(message.provenance)
    symbol = _symbol(message.symbol) if message.HasField("symbol") else None
    if message.HasField("fault"):
        return replace(_fault(message.fault, steps, message.explanation, source), symbol=symbol)
    page = _translation(address, message.translation, steps, message.explanation, source)
    return replace(page, gva=message.address, symbol=symbol)


def _symbol(message: types_pb2.Symbol) -> answers.Symbol:
    return answers.Symbol(name=message.name, offset=message.offset)


def extent_outcome(message: mapping_pb2.Extent, source: answers.Provenance) -> answers.Translation | answers.Fault:
    """Convert."""
    if message.HasField("fault"):
        return _fault(message.fault, (), "", source)
    return replace(_translation(message.start, message.translation, (), "", source), gva=message.start)


def batch_faults(
    start: int, message: translation_pb2.BatchTranslateResponse, source: answers.Provenance
) -> list[tuple[int, answers.Fault]]:
    """Convert the faults of a batch whose addresses are the ones from `start` on."""
    return [(start + told.index, _fault(told.fault, (), "", source)) for told in message.faults]


def fault_explanation(address: int | str, message: translation_pb2.ExplainFaultResponse) -> answers.FaultExplanation:
    """Convert."""
    steps = tuple(map(_step, message.steps))
    source = provenance(message.provenance)
    now: answers.Translation | answers.Fault
    symbol = _symbol(message.symbol) if message.HasField("symbol") else None
    if message.would_fault_now:
        now = replace(_fault(message.fault, steps, message.explanation, source), symbol=symbol)
    else:
        gva = next((step.input for step in steps if step.dimension == "guest"), None) or 0
        page = _translation(address, message.translation, steps, message.explanation, source)
        now = replace(page, gva=gva, symbol=symbol)
    return answers.FaultExplanation(
        now=now,
        matches=message.matches,
        explanation=message.explanation,
        decoded=tuple(
            answers.DecodedBit(bit=bit.bit, name=bit.name, set=bit.set, meaning=bit.meaning) for bit in message.decoded
        ),
        steps=steps,
        provenance=source,
    )


def _translation(
    address: int | str,
    message: types_pb2.Translation,
    steps: tuple[answers.Step, ...],
    explanation: str,
    source: answers.Provenance,
) -> answers.Translation:
    nested = message.HasField("nested_gpa")
    return answers.Translation(
        address=address,
        gpa=message.gpa,
        page_size=_PAGE_BYTES.get(message.page_size, 0),
        rights=_rights(message.effective),
        protection_key=message.protection_key,
        accessed=message.accessed,
        dirty=message.dirty,
        backing=_name(types_pb2.Backing.DESCRIPTOR, message.backing),
        pat_type=_name(types_pb2.MemoryType.DESCRIPTOR, message.pat_type),
        nested_gpa=message.nested_gpa if nested else None,
        nested_page_size=_PAGE_BYTES.get(message.nested_page_size, 0) if nested else None,
        ad_skipped=message.ad_skipped,
        global_page=getattr(message, "global"),
        ept_type=_ept_type(message),
        effective_type=_effective_type(message),
        steps=steps,
        explanation=explanation,
        provenance=source,
    )


def _ept_type(message: types_pb2.Translation) -> answers.EptMemoryType | None:
    if not message.HasField("ept_type"):
        return None
    said = message.ept_type
    return answers.EptMemoryType(
        memory_type=_name(types_pb2.MemoryType.DESCRIPTOR, said.memory_type), ignore_pat=said.ignore_pat
    )


def _effective_type(message: types_pb2.Translation) -> answers.MemoryType | None:
    if not message.HasField("effective_type"):
        return None
    name: answers.MemoryType = _name(types_pb2.MemoryType.DESCRIPTOR, message.effective_type)
    return name


def nested_outcome(
    address: int | str, message: translation_pb2.TranslateNestedGpaResponse
) -> answers.NestedTranslation | answers.Fault:
    """Convert."""
    steps = tuple(map(_step, message.steps))
    source = provenance(message.provenance)
    if message.HasField("fault"):
        return _fault(message.fault, steps, message.explanation, source)
    page = message.translation
    return answers.NestedTranslation(
        address=address,
        gpa=page.gpa,
        identity=message.identity,
        page_size=None if message.identity else _PAGE_BYTES.get(page.nested_page_size, 0),
        rights=_rights(page.effective),
        backing=_name(types_pb2.Backing.DESCRIPTOR, page.backing),
        ept_type=_ept_type(page),
        effective_type=_effective_type(page),
        steps=steps,
        explanation=message.explanation,
        provenance=source,
    )


def _fault(
    message: types_pb2.Fault,
    steps: tuple[answers.Step, ...],
    explanation: str,
    source: answers.Provenance,
) -> answers.Fault:
    return answers.Fault(
        kind=_name(types_pb2.FaultKind.DESCRIPTOR, message.kind),
        address=message.address,
        level=message.level,
        dimension=_name(types_pb2.Dimension.DESCRIPTOR, message.dimension),
        entry_gpa=message.entry_gpa,
        entry=message.entry,
        error_code=message.error_code if message.HasField("error_code") else None,
        exit_qualification=message.exit_qualification if message.HasField("exit_qualification") else None,
        exit_info_1=message.exit_info_1 if message.HasField("exit_info_1") else None,
        nested_gpa=message.nested_gpa,
        reason=message.reason,
        bits=message.bits,
        steps=steps,
        explanation=explanation,
        provenance=source,
    )


def _step(message: types_pb2.Step) -> answers.Step:
    return answers.Step(
        dimension=_name(types_pb2.Dimension.DESCRIPTOR, message.dimension),
        level=message.level,
        table_gpa=message.table_gpa,
        index=message.index,
        entry_gpa=message.entry_gpa,
        entry=message.entry,
        rights_so_far=_rights(message.rights_so_far),
        verdict=message.verdict,
        input=message.input if message.HasField("input") else None,
        leaf=message.leaf,
        mode=_name(types_pb2.PagingMode.DESCRIPTOR, message.mode),
        symbol=_symbol(message.symbol) if message.HasField("symbol") else None,
    )


def _rights(message: types_pb2.Rights) -> answers.Rights:
    return answers.Rights(read=message.read, write=message.write, user=message.user, execute=message.execute)


def walker_state(message: walker_pb2.GetWalkerStateResponse) -> answers.WalkerState:
    """Convert."""
    return answers.WalkerState(
        gva_walk=_page_walk(message.gva_walk),
        ngpa_walk=_page_walk(message.ngpa_walk) if message.HasField("ngpa_walk") else None,
        nested=_nested_mode(message.nested),
        provenance=provenance(message.provenance),
    )


def nested_change(message: walker_pb2.SetNestedModeResponse) -> answers.NestedChange:
    """Convert."""
    return answers.NestedChange(
        effect=_name(walker_pb2.NestedEffectKind.DESCRIPTOR, message.effect.kind),
        reason=message.effect.reason,
        state=walker_state(message.state),
    )


def _page_walk(message: types_pb2.PageWalk) -> answers.PageWalk:
    return answers.PageWalk(root=message.root, pdptrs=tuple(message.pdptrs), format=_page_format(message.format))


def _page_format(message: types_pb2.PageFormat) -> answers.PageFormat:
    return answers.PageFormat(
        mode=_name(types_pb2.PagingMode.DESCRIPTOR, message.mode),
        levels=message.levels,
        reserved_leaf=tuple(message.reserved_leaf),
        reserved_table=tuple(message.reserved_table),
        permissions=tuple(message.permissions),
        protection_key_mask=message.protection_key_mask,
        bad_memory_type_xwr=message.bad_memory_type_xwr,
        linear_width=message.linear_width,
        maxphyaddr=message.maxphyaddr,
        fetch_bit_reported=message.fetch_bit_reported,
        entry_bytes=message.entry_bytes,
        index_bits=message.index_bits,
        bits=_entry_bits(message.bits) if message.HasField("bits") else None,
        shadow_stacks=message.shadow_stacks,
        pointer_masking=_pointer_masking(message),
        encryption_mask=message.encryption_mask,
        mode_based_execute=message.mode_based_execute,
        supervisor_shadow_stack_control=message.supervisor_shadow_stack_control,
    )


def _pointer_masking(message: types_pb2.PageFormat) -> answers.PointerMasking | None:
    if not message.HasField("pointer_masking"):
        return None
    masking = message.pointer_masking
    return answers.PointerMasking(
        user_width=masking.user_width,
        supervisor_width=masking.supervisor_width,
        bit_63_ignored=masking.bit_63_ignored,
    )


def _entry_bits(message: types_pb2.EntryBits) -> answers.EntryBits:
    return answers.EntryBits(
        present=message.present,
        write=message.write,
        user=message.user,
        no_execute=message.no_execute,
        execute=message.execute,
        accessed=message.accessed,
        dirty=message.dirty,
        page_size=message.page_size,
        global_page=getattr(message, "global"),
        protection_key=message.protection_key,
        frame=message.frame,
    )


def _nested_mode(message: types_pb2.NestedMode) -> answers.NestedMode:
    second: answers.Npt | answers.Ept | None = None
    if message.HasField("npt"):
        npt = message.npt
        second = answers.Npt(
            ncr3=npt.ncr3,
            host_cr4=npt.host_cr4 if npt.HasField("host_cr4") else None,
            host_efer=npt.host_efer if npt.HasField("host_efer") else None,
            host_cr0=npt.host_cr0 if npt.HasField("host_cr0") else None,
            guest_mode_execute_trap=npt.guest_mode_execute_trap,
        )
    elif message.HasField("ept"):
        ept = message.ept
        second = answers.Ept(
            eptp=ept.eptp,
            mode_based_execute=ept.mode_based_execute,
            capabilities=ept.capabilities if ept.HasField("capabilities") else None,
            tables_written=ept.tables_written,
        )
    return answers.NestedMode(
        kind=_name(types_pb2.NestedModeKind.DESCRIPTOR, message.kind), reason=message.reason, second_dimension=second
    )


def registers(message: types_pb2.Registers, source: types_pb2.Provenance) -> answers.Registers:
    """Convert."""
    known = {field.name: value for field, value in message.ListFields()}
    return answers.Registers(**known, provenance=provenance(source))


def vcpu(message: vcpu_pb2.VcpuInfo) -> answers.Vcpu:
    """Convert."""
    return answers.Vcpu(
        index=message.index,
        run_state=_name(types_pb2.RunState.DESCRIPTOR, message.run_state),
        run_state_reason=message.run_state_reason,
        generation=message.generation,
        mode=_name(types_pb2.PagingMode.DESCRIPTOR, message.mode),
        nested=_nested_mode(message.nested),
        cr3=message.cr3,
        rip=message.rip,
        snapshot_age=message.snapshot_age.ToTimedelta().total_seconds(),
    )


def across(message: translation_pb2.TranslateAcrossResponse) -> dict[int, answers.Translation | answers.Fault]:
    """Convert, by CR3."""
    source = provenance(message.provenance)
    symbol = _symbol(message.symbol) if message.HasField("symbol") else None
    outcomes: dict[int, answers.Translation | answers.Fault] = {}
    for space in message.spaces:
        if space.HasField("fault"):
            outcomes[space.cr3] = replace(_fault(space.fault, (), "", source), symbol=symbol)
        else:
            page = _translation(message.address, space.translation, (), "", source)
            outcomes[space.cr3] = replace(page, gva=message.address, symbol=symbol)
    return outcomes


def address_space(message: mapping_pb2.AddressSpace) -> answers.AddressSpace:
    """Convert."""
    return answers.AddressSpace(
        cr3=message.cr3,
        sightings=message.sightings,
        vcpu=message.vcpu,
        generation=message.generation,
        age=message.age.ToTimedelta().total_seconds() if message.HasField("age") else None,
        isolation_pair=message.isolation_pair if message.HasField("isolation_pair") else None,
        user_half=message.user_half,
        tasks=tuple(answers.Task(pid=task.pid, name=task.name) for task in message.tasks),
        tasks_left_out=message.tasks_left_out,
    )


def address_spaces(message: mapping_pb2.ListAddressSpacesResponse) -> answers.AddressSpaces:
    """Convert."""
    listed = message.task_list
    return answers.AddressSpaces(
        spaces=tuple(map(address_space, message.spaces)),
        left_out=message.left_out,
        task_list=answers.TaskList(
            state=_name(mapping_pb2.TaskListState.DESCRIPTOR, listed.state), count=listed.count, reason=listed.reason
        ),
    )


def memory_stop(message: memory_pb2.MemoryStop) -> answers.MemoryStop:
    """Convert."""
    faulted = message.HasField("fault")
    return answers.MemoryStop(
        address=message.address,
        fault_kind=_name(types_pb2.FaultKind.DESCRIPTOR, message.fault.kind) if faulted else None,
        error_code=message.fault.error_code if message.fault.HasField("error_code") else None,
        gpa=message.gpa,
        reason=message.reason,
    )


def memory_read(address: int, data: bytes, message: memory_pb2.ReadMemoryResponse) -> answers.MemoryRead:
    """Convert the last answer of several, with the bytes of all."""
    return answers.MemoryRead(
        data=data,
        stop=memory_stop(message.stop) if message.HasField("stop") else None,
        provenance=provenance(message.provenance),
        address=address,
    )


def machine(message: machine_pb2.Machine) -> answers.Machine:
    """Convert."""
    can = message.capabilities
    return answers.Machine(
        id=message.id,
        source=message.source,
        description=message.description,
        memory_bytes=message.memory_bytes,
        regions=tuple(
            answers.MemoryRegion(start=region.start, size=region.size, read_only=region.read_only)
            for region in message.regions
        ),
        vcpus=message.vcpus,
        capabilities=answers.Capabilities(
            real_nested=can.real_nested,
            can_step=can.can_step,
            can_pause=can.can_pause,
            can_set_registers=can.can_set_registers,
            live=can.live,
            can_write_memory=can.can_write_memory,
            ends_when_detached=can.ends_when_detached,
        ),
        landmarks=tuple(
            answers.Landmark(name=mark.name, address=mark.address, description=mark.description)
            for mark in message.landmarks
        ),
        maxphyaddr=message.maxphyaddr,
        state=_name(machine_pb2.MachineState.DESCRIPTOR, message.state),
        state_reason=message.state_reason,
        symbols=_symbols(message.symbols) if message.HasField("symbols") else None,
        abridged=message.abridged,
    )


def _symbols(message: machine_pb2.Symbols) -> answers.Symbols:
    return answers.Symbols(
        file=message.file,
        count=message.count,
        placement=_name(machine_pb2.SymbolPlacement.DESCRIPTOR, message.placement),
        slide=message.slide if message.HasField("slide") else None,
        reason=message.reason,
    )
