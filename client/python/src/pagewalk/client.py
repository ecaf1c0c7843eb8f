"""The connection to a daemon."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union
from urllib.parse import quote

import grpc
from google.protobuf.duration_pb2 import Duration

from pagewalk import columns, convert, errors, images
from pagewalk.answers import (
    AccessKind,
    AddressSpaces,
    AdPolicy,
    BatchTranslation,
    Ept,
    Fault,
    FaultExplanation,
    Freshness,
    Machine,
    MemoryRead,
    MemoryStop,
    NestedChange,
    NestedPhase,
    NestedTranslation,
    Npt,
    Privilege,
    Registers,
    SavedImage,
    Stepped,
    Translation,
    Vcpu,
    WalkerOverride,
    WalkerState,
)
from pagewalk.mappings import Mappings, PageSizeName, Range, to_budget, to_filter, to_range
from pagewalk.v1 import machine_pb2, mapping_pb2, memory_pb2, translation_pb2, types_pb2, vcpu_pb2, walker_pb2
from pagewalk.v1.machine_pb2_grpc import MachineServiceStub
from pagewalk.v1.mapping_pb2_grpc import MappingServiceStub
from pagewalk.v1.memory_pb2_grpc import MemoryServiceStub
from pagewalk.v1.translation_pb2_grpc import TranslationServiceStub
from pagewalk.v1.vcpu_pb2_grpc import VcpuServiceStub
from pagewalk.v1.walker_pb2_grpc import WalkerServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    # mypy's 3.9 target has no typing.Self.
    ClientT = TypeVar("ClientT", bound="Client")

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Answer = TypeVar("_Answer")
#: An answer to the largest batch, with as many faults as can be asked for, is smaller.
_LARGEST_ANSWER = 12 << 20
#: Most bytes of one `ReadMemory`.
_READ_MAX = 1 << 20
_TLS_FILE_MAX = 1 << 20
_PathLike = Union[str, "PathLike[str]"]


@dataclass(frozen=True)
class Tls:
    """Files in PEM form, at most 1 MiB each, for mutual TLS: who may have signed the daemon, and who we are."""

    ca: _PathLike
    cert: _PathLike
    key: _PathLike
    #: Name to expect in the daemon's certificate, where it is not the one in the address.
    server_name: str | None = None


def _read(path: Path) -> bytes:
    # What is no file may never end, or wait for somebody to write.
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; copy what it gives into one")
    with path.open("rb") as file:
        text = file.read(_TLS_FILE_MAX + 1)
    if len(text) > _TLS_FILE_MAX:
        raise ValueError(f"{path} is larger than 1 MiB, which no certificate or key is")
    return text


def connect(target: str, *, tls: Tls | None = None, timeout: float = 10.0) -> Client:
    """Make a client of the daemon at `"HOST:PORT"` or `"unix:/PATH"`.

    The connection is made by the first call. `timeout` bounds each call, in seconds; of more than a year, as
    `float("inf")` is, it bounds none.
    """
    return Client(target, tls=tls, timeout=timeout)


class Client:
    """A client of one daemon. May be shared by threads; close it, or use it in a `with` statement.

    Every method asks about vCPU `vcpu` of machine `machine`, by default vCPU 0 of the only one. What cannot be answered
    raises an `errors.Error`; a number that does not fit its field, or a choice that does not exist, a `ValueError`. A
    `timeout` is as in `connect`.
    """

    def __init__(self, target: str, *, tls: Tls | None = None, timeout: float = 10.0) -> None:
        self._target = target
        convert.to_timeout(timeout)
        self._timeout = timeout
        self._closed = False
        self._tls = tls is not None
        # The daemon is not behind the proxy that the environment may name for the web.
        options: list[tuple[str, str | int]] = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", _LARGEST_ANSWER),
            # Batches go in fewer, larger frames.
            ("grpc.http2.max_frame_size", 1 << 20),
            ("grpc.http2.lookahead_bytes", 8 << 20),
        ]
        if target.startswith("unix:"):
            if tls is not None:
                raise ValueError(f"{target} is a Unix socket, on which daemons speak no TLS: leave out tls")
            # The default is the socket's path, which HTTP/2 servers refuse as an authority.
            options.append(("grpc.default_authority", "localhost"))
            if "," in target:
                raise ValueError(f"{target} has a comma, which gRPC takes for the end of the path: use another path")
            # gRPC takes it for a URI.
            target = "unix:" + quote(target.removeprefix("unix:"))
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            if tls.server_name is not None:
                options.append(("grpc.ssl_target_name_override", tls.server_name))
            credentials = grpc.ssl_channel_credentials(
                root_certificates=_read(Path(tls.ca)),
                private_key=_read(Path(tls.key)),
                certificate_chain=_read(Path(tls.cert)),
            )
            self._channel = grpc.secure_channel(target, credentials, options)
        self._translation = TranslationServiceStub(self._channel)
        # The generated stubs would make a Python number of every word.
        self._batch = self._channel.unary_unary(
            "/pagewalk.v1.TranslationService/BatchTranslate",
            request_serializer=columns.BatchRequest.SerializeToString,
            response_deserializer=columns.BatchResponse.FromString,
        )
        self._stream = self._channel.stream_stream(
            "/pagewalk.v1.TranslationService/StreamTranslate",
            request_serializer=columns.StreamRequest.SerializeToString,
            response_deserializer=columns.StreamResponse.FromString,
        )
        self._mapping = MappingServiceStub(self._channel)
        self._walker = WalkerServiceStub(self._channel)
        self._vcpu = VcpuServiceStub(self._channel)
        self._machine = MachineServiceStub(self._channel)
        self._memory = MemoryServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection. Calls that are still under way fail, and later ones raise an `errors.ClosedError`."""
        self._closed = True
        self._channel.close()

    def __enter__(self: ClientT) -> ClientT:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pagewalk.Client of {self._target}>"

    def translate(
        self,
        address: int | str,
        access: AccessKind = "read",
        *,
        privilege: Privilege = "as_cpl",
        ac: bool | None = None,
        pkru: int | None = None,
        pkrs: int | None = None,
        stack: bool = False,
        ad_policy: AdPolicy = "observe",
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        trace: bool = False,
        explain: bool = False,
        validate: bool = False,
        vcpu: int = 0,
        machine: str = "",
    ) -> Translation | Fault:
        """Ask what a guest virtual address means. A fault is an answer: look at `ok`.

        An address given as text is read by the daemon: `"0xffffffff81000000"`, or `"schedule+0x10"` where the machine
        has symbols. `trace` fills `steps`, `explain` fills `explanation`. `ad_policy="set"` changes the guest's tables
        and needs the role `control`. With `validate` the entries are read again at the end, and a torn walk is
        repeated: `provenance.torn` says that it was torn every time.
        """
        request = translation_pb2.TranslateRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            address=convert.to_address(address),
            access=convert.to_access(access, privilege, ac=ac, pkru=pkru, pkrs=pkrs, stack=stack),
            ad_policy=convert.number(types_pb2.AdPolicy.DESCRIPTOR, ad_policy, "ad_policy"),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
            trace=trace,
            explain=explain,
            validate=validate,
        )
        return convert.outcome(address, self._call(self._translation.Translate, request))

    def translate_across(
        self,
        address: int | str,
        cr3s: Iterable[int] = (),
        access: AccessKind = "read",
        *,
        privilege: Privilege = "as_cpl",
        ac: bool | None = None,
        pkru: int | None = None,
        pkrs: int | None = None,
        stack: bool = False,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> dict[int, Translation | Fault]:
        """Ask what an address means in many address spaces: in which processes it is mapped, and where to.

        `cr3s` are at most 1024; without any, those of `address_spaces`. The answers come by CR3.
        """
        request = translation_pb2.TranslateAcrossRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            address=convert.to_address(address),
            access=convert.to_access(access, privilege, ac=ac, pkru=pkru, pkrs=pkrs, stack=stack),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
            cr3s=[convert.to_word(cr3, "cr3") for cr3 in cr3s],
        )
        return convert.across(self._call(self._translation.TranslateAcross, request))

    def address_spaces(self, *, machine: str = "") -> AddressSpaces:
        """List the address spaces that a machine's vCPUs were seen in, the most recently seen first.

        Of a Linux guest whose kernel's symbols the machine has, those of all processes, named by tasks.
        """
        request = mapping_pb2.ListAddressSpacesRequest(machine=machine)
        return convert.address_spaces(self._call(self._mapping.ListAddressSpaces, request))

    def translate_batch(
        self,
        addresses: Any,  # noqa: ANN401, a numpy array or numbers
        access: AccessKind = "read",
        *,
        privilege: Privilege = "as_cpl",
        ac: bool | None = None,
        pkru: int | None = None,
        pkrs: int | None = None,
        stack: bool = False,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        max_faults: int | None = None,
        validate: bool = False,
        vcpu: int = 0,
        machine: str = "",
    ) -> BatchTranslation:
        """Ask what many guest virtual addresses mean, all for the same access. Faults are answers: look at `ok`.

        `addresses` is a numpy array of integers, and the answer has numpy arrays; or any iterable of numbers. More than
        262144 go in several requests, of which each has its own registers and up to `max_faults` (4096) faults in full;
        the client's timeout bounds each. With `validate` an address whose walks were all torn has the fault
        `contended`.
        """
        column = columns.column(addresses)
        data = columns.to_bytes(column)
        head = columns.BatchRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            access=convert.to_access(access, privilege, ac=ac, pkru=pkru, pkrs=pkrs, stack=stack),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
            max_faults=max_faults,
            validate=validate,
        )
        words: list[bytes] = []
        faults: list[tuple[int, Fault]] = []
        provenances = []
        fault_count = 0
        for answer in self._batches(head, data):
            source = convert.provenance(answer.provenance)
            faults += convert.batch_faults(sum(map(len, words)) // 8, answer, source)
            words += answer.words
            provenances.append(source)
            fault_count += answer.fault_count
        return BatchTranslation(
            addresses=column,
            words=columns.from_bytes(words, column),
            faults=tuple(faults),
            fault_count=fault_count,
            provenances=tuple(provenances),
        )

    def _batches(self, head: Any, data: bytes) -> Iterator[Any]:  # noqa: ANN401, twins of the contract's messages
        size = columns.MOST * 8
        starts = range(0, len(data), size)
        if len(data) <= size:
            if data:
                head.addresses.append(data)
                yield self._whole(self._call(self._batch, head), len(data))
            return

        def requests() -> Iterator[Any]:
            for sequence, start in enumerate(starts):
                del head.addresses[:]
                head.addresses.append(data[start : start + size])
                yield columns.StreamRequest(sequence=sequence, batch=head)

        answered = 0
        stream = self._start(self._stream, requests(), self._timeout * len(starts))
        try:
            for start, response in zip(starts, stream):
                yield self._whole(response.answer, min(size, len(data) - start))
                answered += 1
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, self._target, tls=self._tls) from None
        finally:
            stream.cancel()
        if answered < len(starts):
            raise errors.Error(f"{self._target} ended the stream before its end: ask again", code="UNKNOWN")

    def _whole(self, answer: Any, size: int) -> Any:  # noqa: ANN401, twins of the contract's messages
        """Give an answer if it has a word for each address, which are `size` bytes, as many as the addresses were."""
        found = sum(map(len, answer.words))
        if found != size:
            raise errors.Error(
                f"{self._target} answered {size // 8} addresses with {found} bytes, not 8 each: update this package",
                code="INTERNAL",
            )
        return answer

    def translate_nested_gpa(
        self,
        address: int | str,
        access: AccessKind = "read",
        *,
        privilege: Privilege = "as_cpl",
        phase: NestedPhase = "final",
        ad_policy: AdPolicy = "observe",
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        trace: bool = False,
        explain: bool = False,
        validate: bool = False,
        vcpu: int = 0,
        machine: str = "",
    ) -> NestedTranslation | Fault:
        """Ask what a guest physical address of an L2 means to its L1, for an access that is intended.

        Without a second dimension it is the same address, and `identity` says so.
        """
        request = translation_pb2.TranslateNestedGpaRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            address=convert.to_address(address),
            access=convert.to_access(access, privilege),
            phase=convert.number(translation_pb2.NestedPhase.DESCRIPTOR, phase, "phase"),
            ad_policy=convert.number(types_pb2.AdPolicy.DESCRIPTOR, ad_policy, "ad_policy"),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
            trace=trace,
            explain=explain,
            validate=validate,
        )
        return convert.nested_outcome(address, self._call(self._translation.TranslateNestedGpa, request))

    def explain_fault(
        self,
        error_code: int,
        cr2: int | str,
        *,
        cr3: int | None = None,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> FaultExplanation:
        """Explain a page fault that somebody saw, by its error code and CR2."""
        request = translation_pb2.ExplainFaultRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            page_fault=translation_pb2.PageFault(error_code=error_code, cr2=convert.to_address(cr2, "cr2")),
            cr3=cr3,
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return convert.fault_explanation(cr2, self._call(self._translation.ExplainFault, request))

    def explain_nested_fault(
        self,
        exit_info_1: int,
        nested_gpa: int | str,
        *,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> FaultExplanation:
        """Explain a nested page fault that somebody saw, by its EXITINFO1 and nGPA."""
        request = translation_pb2.ExplainFaultRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            nested_page_fault=translation_pb2.NestedPageFault(
                exit_info_1=convert.to_word(exit_info_1, "exit_info_1"),
                nested_gpa=convert.to_address(nested_gpa, "nested_gpa"),
            ),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return convert.fault_explanation(nested_gpa, self._call(self._translation.ExplainFault, request))

    def explain_ept_violation(
        self,
        exit_qualification: int,
        nested_gpa: int | str,
        *,
        gva: int | str | None = None,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> FaultExplanation:
        """Explain an EPT violation that somebody saw, by its exit qualification and guest-physical address.

        `gva` is the guest-linear address, where bit 7 of the qualification says that it is valid.
        """
        request = translation_pb2.ExplainFaultRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            ept_violation=translation_pb2.EptViolation(
                exit_qualification=convert.to_word(exit_qualification, "exit_qualification"),
                nested_gpa=convert.to_address(nested_gpa, "nested_gpa"),
                gva=None if gva is None else convert.to_address(gva, "gva"),
            ),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return convert.fault_explanation(nested_gpa, self._call(self._translation.ExplainFault, request))

    def explain_ept_misconfiguration(
        self,
        nested_gpa: int | str,
        *,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> FaultExplanation:
        """Explain an EPT misconfiguration that somebody saw, by its guest-physical address."""
        request = translation_pb2.ExplainFaultRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            ept_misconfiguration=translation_pb2.EptMisconfiguration(
                nested_gpa=convert.to_address(nested_gpa, "nested_gpa")
            ),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return convert.fault_explanation(nested_gpa, self._call(self._translation.ExplainFault, request))

    def mappings(
        self,
        bounds: Range | None = None,
        *,
        write: bool | None = None,
        execute: bool | None = None,
        user: bool | None = None,
        page_sizes: Iterable[PageSizeName] = (),
        problems: bool = False,
        max_entries: int | None = None,
        max_extents: int | None = None,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        timeout: float | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> Mappings:
        """List the mappings of an address space, or from `bounds[0]` to right before `bounds[1]`, in order.

        `write`, `execute`, `user` and `page_sizes` leave those mappings that have, or have not, what they say.
        `problems` adds, as faults, what is present and leads nowhere. `timeout`, in seconds, bounds the whole list, by
        default not at all.
        """
        request = mapping_pb2.ListMappingsRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            range=to_range(bounds),
            filter=to_filter(write, execute, user, page_sizes),
            budget=to_budget(max_entries, max_extents),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
            problems=problems,
        )
        return Mappings(self._start(self._mapping.ListMappings, request, timeout), self._target, tls=self._tls)

    def find_mappings(
        self,
        gpa: int | str,
        size: int = 1,
        bounds: Range | None = None,
        *,
        write: bool | None = None,
        execute: bool | None = None,
        user: bool | None = None,
        page_sizes: Iterable[PageSizeName] = (),
        max_entries: int | None = None,
        max_extents: int | None = None,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        timeout: float | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> Mappings:
        """Find the guest virtual addresses that lead to `size` bytes of memory from `gpa` on; else as `mappings`."""
        request = mapping_pb2.FindMappingsRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            gpa=convert.to_address(gpa, "gpa"),
            bytes=convert.to_word(size, "size"),
            range=to_range(bounds),
            filter=to_filter(write, execute, user, page_sizes),
            budget=to_budget(max_entries, max_extents),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return Mappings(self._start(self._mapping.FindMappings, request, timeout), self._target, tls=self._tls)

    def translate_range(
        self,
        bounds: Range,
        access: AccessKind = "read",
        *,
        privilege: Privilege = "as_cpl",
        ac: bool | None = None,
        pkru: int | None = None,
        pkrs: int | None = None,
        stack: bool = False,
        max_entries: int | None = None,
        max_extents: int | None = None,
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        timeout: float | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> Mappings:
        """Ask what every address from `bounds[0]` to right before `bounds[1]` means for an access."""
        request = mapping_pb2.TranslateRangeRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            range=to_range(bounds),
            access=convert.to_access(access, privilege, ac=ac, pkru=pkru, pkrs=pkrs, stack=stack),
            budget=to_budget(max_entries, max_extents),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
            override=convert.to_override(override),
        )
        return Mappings(self._start(self._translation.TranslateRange, request, timeout), self._target, tls=self._tls)

    def walker_state(self, *, freshness: Freshness = "latest", vcpu: int = 0, machine: str = "") -> WalkerState:
        """Give the whole of both walkers."""
        request = walker_pb2.GetWalkerStateRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
        )
        return convert.walker_state(self._call(self._walker.GetWalkerState, request))

    def watch(
        self,
        *,
        max_updates: int | None = None,
        min_interval: float = 0.0,
        timeout: float | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> Iterator[WalkerState]:
        """Give the walker state of now, then each new one; a slow reader skips to the newest.

        `min_interval` and `timeout` are seconds; `timeout` bounds the whole watch, by default not at all. Closing the
        iterator ends the watch.
        """
        interval = Duration()
        interval.FromTimedelta(timedelta(seconds=min_interval))
        request = walker_pb2.WatchWalkerStateRequest(
            vcpu=convert.to_vcpu(machine, vcpu), max_updates=max_updates, min_interval=interval
        )
        stream = self._start(self._walker.WatchWalkerState, request, timeout)
        try:
            for state in stream:
                yield convert.walker_state(state)
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, self._target, tls=self._tls) from None
        finally:
            stream.cancel()

    def set_nested(
        self,
        second_dimension: Npt | Ept,
        *,
        l2: Registers | None = None,
        control_structure: int | None = None,
        walker_only: bool = False,
        vcpu: int = 0,
        machine: str = "",
    ) -> NestedChange:
        """Switch nested mode on. Needs the role `control`. `effect` says whether the real vCPU went along.

        `control_structure` is where VMCB12 or VMCS12 is to lie, for a real vCPU; by default it is a page of the
        daemon's own.
        """
        request = convert.to_nested(
            second_dimension,
            l2,
            convert.to_vcpu(machine, vcpu),
            control_structure=control_structure,
            walker_only=walker_only,
        )
        return convert.nested_change(self._call(self._walker.SetNestedMode, request))

    def nested_off(self, *, walker_only: bool = False, vcpu: int = 0, machine: str = "") -> NestedChange:
        """Switch nested mode off; with `walker_only`, only where walkers alone have it. Needs the role `control`."""
        request = walker_pb2.SetNestedModeRequest(
            vcpu=convert.to_vcpu(machine, vcpu), off=True, walker_only=walker_only
        )
        return convert.nested_change(self._call(self._walker.SetNestedMode, request))

    def vcpus(self, *, machine: str = "") -> list[Vcpu]:
        """List the vCPUs of a machine."""
        answer = self._call(self._vcpu.ListVcpus, vcpu_pb2.ListVcpusRequest(machine=machine))
        return [convert.vcpu(vcpu) for vcpu in answer.vcpus]

    def registers(self, *, freshness: Freshness = "latest", vcpu: int = 0, machine: str = "") -> Registers:
        """Give the registers of a vCPU."""
        request = vcpu_pb2.GetRegistersRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
        )
        answer = self._call(self._vcpu.GetRegisters, request)
        return convert.registers(answer.registers, answer.provenance)

    def set_registers(self, registers: Registers, *, vcpu: int = 0, machine: str = "") -> Registers:
        """Write the registers that are present; give all, as read back. Needs the role `control`."""
        request = vcpu_pb2.SetRegistersRequest(
            vcpu=convert.to_vcpu(machine, vcpu), registers=convert.to_registers(registers)
        )
        answer = self._call(self._vcpu.SetRegisters, request)
        return convert.registers(answer.registers, answer.provenance)

    def pause(self, *, vcpu: int = 0, machine: str = "") -> Vcpu:
        """Stop a vCPU until it is resumed. Needs the role `control`."""
        request = vcpu_pb2.PauseVcpuRequest(vcpu=convert.to_vcpu(machine, vcpu))
        return convert.vcpu(self._call(self._vcpu.PauseVcpu, request).vcpu)

    def resume(self, *, vcpu: int = 0, machine: str = "") -> Vcpu:
        """Let a stopped vCPU run on. Needs the role `control`."""
        request = vcpu_pb2.ResumeVcpuRequest(vcpu=convert.to_vcpu(machine, vcpu))
        return convert.vcpu(self._call(self._vcpu.ResumeVcpu, request).vcpu)

    def step(self, *, vcpu: int = 0, machine: str = "") -> Stepped:
        """Execute one instruction and leave the vCPU stopped. Needs the role `control`."""
        request = vcpu_pb2.StepVcpuRequest(vcpu=convert.to_vcpu(machine, vcpu))
        answer = self._call(self._vcpu.StepVcpu, request)
        return Stepped(
            vcpu=convert.vcpu(answer.vcpu),
            registers=convert.registers(answer.registers, answer.provenance),
            provenance=convert.provenance(answer.provenance),
        )

    def machines(self) -> list[Machine]:
        """List the machines that the daemon serves."""
        answer = self._call(self._machine.ListMachines, machine_pb2.ListMachinesRequest())
        return [convert.machine(machine) for machine in answer.machines]

    def machine(self, machine: str = "") -> Machine:
        """Give one machine, by default the only one."""
        request = machine_pb2.GetMachineRequest(machine=machine)
        return convert.machine(self._call(self._machine.GetMachine, request).machine)

    def read_memory(
        self,
        address: int | str,
        length: int,
        *,
        physical: bool = False,
        privilege: Privilege = "exempt",
        freshness: Freshness = "latest",
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> MemoryRead:
        """Read bytes by virtual address, or by physical one, until all are read or one cannot be: look at `stop`.

        A virtual address given as text is read by the daemon, as in `translate`. A length of more than 1 MiB takes
        several calls.
        """
        if not isinstance(address, str):
            # Integers of numpy's wrap.
            address = operator.index(address)
            convert.check_reach(address, length)
        data = bytearray()
        while True:
            at = convert.to_address(address if isinstance(address, str) else address + len(data))
            request = memory_pb2.ReadMemoryRequest(
                vcpu=convert.to_vcpu(machine, vcpu),
                gva=None if physical else at,
                gpa=at if physical else None,
                length=min(length - len(data), _READ_MAX),
                privilege=convert.number(types_pb2.Privilege.DESCRIPTOR, privilege, "privilege"),
                freshness=convert.number(types_pb2.Freshness.DESCRIPTOR, freshness, "freshness"),
                override=convert.to_override(override),
            )
            answer = self._call(self._memory.ReadMemory, request)
            if isinstance(address, str):
                # What is read next follows what was read first, wherever a symbol is by then.
                address = answer.address
                convert.check_reach(address, length)
            data += answer.data
            if answer.HasField("stop") or len(data) >= length or not answer.data:
                return convert.memory_read(address, bytes(data), answer)

    def write_memory(
        self,
        address: int | str,
        data: bytes,
        *,
        physical: bool = False,
        override: WalkerOverride | None = None,
        vcpu: int = 0,
        machine: str = "",
    ) -> MemoryStop | None:
        """Write at most 32 KiB, all of it or nothing: then the answer says why. Needs the role `control`."""
        at = convert.to_address(address)
        request = memory_pb2.WriteMemoryRequest(
            vcpu=convert.to_vcpu(machine, vcpu),
            gva=None if physical else at,
            gpa=at if physical else None,
            data=data,
            override=convert.to_override(override),
        )
        answer = self._call(self._memory.WriteMemory, request)
        return convert.memory_stop(answer.stop) if answer.HasField("stop") else None

    def attach(self, spec: str) -> Machine:
        """Have the daemon take in a machine, described as `pagewalkd --machine` takes it. Needs the role `control`.

        Files are the daemon's. Those that it makes (`console=`, `log=`) are named without a folder, and lie in that of
        its flag `--client-files`, unless its own user asks over its Unix socket.
        """
        request = machine_pb2.AttachMachineRequest(spec=spec)
        return convert.machine(self._call(self._machine.AttachMachine, request).machine)

    def detach(self, machine: str, *, end_guest: bool = False) -> None:
        """Have the daemon let go of a machine. Needs the role `control`.

        An attached guest goes on as it is. One that runs in the daemon ends, to which `end_guest` has to agree.
        """
        self._call(self._machine.DetachMachine, machine_pb2.DetachMachineRequest(machine=machine, end_guest=end_guest))

    def save_image(self, file: _PathLike, *, timeout: float | None = None, machine: str = "") -> SavedImage:
        """Save a machine as the description `file` and, next to it, its memory. Needs the role `control`.

        The memory's name has `.mem` instead of the description's extension. A guest that runs is paused meanwhile.
        Nothing is written over, and nothing stays behind unless the image is whole. Until then the files have `.part`
        behind their names; where there is such a file, another save may be under way, and this one is refused with a
        `FileExistsError`. `timeout` bounds all of it, in seconds, by default not at all.
        """
        description = Path(file)
        memory = images.memory_of(description)
        request = machine_pb2.SaveImageRequest(machine=machine, memory_file=memory.name)
        stream = self._start(self._machine.SaveImage, request, timeout)
        try:
            return images.save(stream, description, memory)
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, self._target, tls=self._tls) from None
        finally:
            stream.cancel()

    def daemon_version(self) -> str:
        """Give the version of the daemon."""
        return self._call(self._machine.ListMachines, machine_pb2.ListMachinesRequest()).daemon_version

    def _start(self, method: Callable[..., _Answer], request: object, timeout: float | None) -> _Answer:
        deadline = convert.to_timeout(timeout)
        try:
            return method(request, timeout=deadline)
        except ValueError:
            # What gRPC raises of a closed channel.
            if self._closed:
                raise errors.ClosedError("this client is closed: connect again", code="CANCELLED") from None
            raise

    def _call(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request) -> _Response:
        try:
            return self._start(method, request, self._timeout)
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, self._target, tls=self._tls) from None
