"""The client against a server in the same process: what goes over the wire, how failures come back, TLS and sockets."""

from __future__ import annotations

import errno
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

import pagewalk
from pagewalk import images
from pagewalk.columns import MOST
from pagewalk.v1 import machine_pb2, mapping_pb2, memory_pb2, translation_pb2, types_pb2, walker_pb2
from pagewalk.v1.machine_pb2_grpc import MachineServiceServicer, add_MachineServiceServicer_to_server
from pagewalk.v1.memory_pb2_grpc import MemoryServiceServicer, add_MemoryServiceServicer_to_server
from pagewalk.v1.translation_pb2_grpc import (
    TranslationServiceServicer,
    add_TranslationServiceServicer_to_server,
)
from pagewalk.v1.walker_pb2_grpc import WalkerServiceServicer, add_WalkerServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Scripted(TranslationServiceServicer, WalkerServiceServicer, MachineServiceServicer, MemoryServiceServicer):
    """Keeps the last request, and answers what the test prepared."""

    def __init__(self) -> None:
        self.request: Any = None
        self.answer: Any = None
        self.failure: tuple[grpc.StatusCode, str, ErrorInfo | None] | None = None

    def _reply(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.request = request
        if self.failure is None:
            return self.answer
        code, message, info = self.failure
        if info is not None:
            packed = AnyMessage()
            packed.Pack(info)
            number, _ = code.value
            status = Status(code=number, message=message, details=[packed])
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        return context.abort(code, message)

    def Translate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def ExplainFault(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def GetWalkerState(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def SetNestedMode(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def BatchTranslate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def StreamTranslate(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        yield from self._reply(next(request_iterator), context)

    def TranslateAcross(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def TranslateNestedGpa(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def WatchWalkerState(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._reply(request, context)

    def ListMachines(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def GetMachine(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def TranslateRange(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._reply(request, context)

    def AttachMachine(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def DetachMachine(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def ReadMemory(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def WriteMemory(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._reply(request, context)

    def SaveImage(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._reply(request, context)


def serve(scripted: Scripted) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    add_TranslationServiceServicer_to_server(scripted, server)
    add_WalkerServiceServicer_to_server(scripted, server)
    add_MachineServiceServicer_to_server(scripted, server)
    add_MemoryServiceServicer_to_server(scripted, server)
    return server


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def local(scripted: Scripted) -> Iterator[pagewalk.Client]:
    server = serve(scripted)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pagewalk.connect(f"127.0.0.1:{port}", timeout=5) as client:
        yield client
    server.stop(None).wait()


MAPPED = types_pb2.Translation(
    gpa=0x1234_5000,
    page_size=types_pb2.PAGE_SIZE_2M,
    effective=types_pb2.Rights(read=True, write=True, execute=False, user=True),
    protection_key=3,
    accessed=True,
    backing=types_pb2.BACKING_READ_ONLY,
    pat_type=types_pb2.MEMORY_TYPE_UC_MINUS,
)


def test_nested_gpa_sends_what_was_asked(local: pagewalk.Client, scripted: Scripted) -> None:
    page = types_pb2.Translation(
        gpa=0x61_1000,
        page_size=types_pb2.PAGE_SIZE_UNPAGED,
        nested_gpa=0x1_1000,
        nested_page_size=types_pb2.PAGE_SIZE_4K,
        effective=types_pb2.Rights(read=True),
        backing=types_pb2.BACKING_RAM,
        ept_type=types_pb2.EptMemoryType(memory_type=types_pb2.MEMORY_TYPE_WB, ignore_pat=True),
        effective_type=types_pb2.MEMORY_TYPE_WB,
    )
    scripted.answer = translation_pb2.TranslateNestedGpaResponse(translation=page)
    second = pagewalk.Ept(eptp=0x5_001E, mode_based_execute=True, capabilities=0, tables_written=True)
    found = local.translate_nested_gpa(
        "0x11000",
        "write",
        privilege="user",
        phase="table",
        freshness="sync",
        override=pagewalk.WalkerOverride(second_dimension=second),
        trace=True,
        explain=True,
        validate=True,
    )
    assert scripted.request == translation_pb2.TranslateNestedGpaRequest(
        vcpu=types_pb2.VcpuRef(),
        address=types_pb2.Address(text="0x11000"),
        access=types_pb2.Access(kind=types_pb2.ACCESS_KIND_WRITE, privilege=types_pb2.PRIVILEGE_USER),
        phase=translation_pb2.NESTED_PHASE_TABLE,
        ad_policy=types_pb2.AD_POLICY_OBSERVE,
        freshness=types_pb2.FRESHNESS_SYNC,
        override=types_pb2.WalkerOverride(
            ept=types_pb2.Ept(eptp=0x5_001E, mode_based_execute=True, capabilities=0, tables_written=True)
        ),
        trace=True,
        explain=True,
        validate=True,
    )
    assert found.ok
    assert (found.gpa, found.page_size, found.identity) == (0x61_1000, 4096, False)
    assert found.ept_type == pagewalk.EptMemoryType(memory_type="wb", ignore_pat=True)
    assert found.effective_type == "wb"
    assert str(found).startswith("nGPA 0x11000 -> 0x611000 (4 KiB")


def test_nested_gpa_without_a_second_dimension(local: pagewalk.Client, scripted: Scripted) -> None:
    page = types_pb2.Translation(gpa=0x5000, page_size=types_pb2.PAGE_SIZE_UNPAGED, backing=types_pb2.BACKING_RAM)
    scripted.answer = translation_pb2.TranslateNestedGpaResponse(translation=page, identity=True)
    found = local.translate_nested_gpa(0x5000)
    assert found.ok
    assert (found.gpa, found.page_size, found.identity, found.ept_type) == (0x5000, None, True, None)
    assert str(found) == "nGPA 0x5000 -> 0x5000 (no second dimension)"


def test_translate_sends_what_was_asked(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = translation_pb2.TranslateResponse(translation=MAPPED)
    local.translate(
        0xFFFF_8000_0000_0000,
        "shadow_stack_write",
        privilege="implicit_supervisor",
        ac=False,
        pkru=0,
        pkrs=4,
        stack=True,
        ad_policy="set",
        freshness="sync",
        override=pagewalk.WalkerOverride(cr3=0, second_dimension="none", vendor="amd", gib_pages=False),
        trace=True,
        vcpu=2,
        machine="m",
    )
    assert scripted.request == translation_pb2.TranslateRequest(
        vcpu=types_pb2.VcpuRef(machine="m", vcpu=2),
        address=types_pb2.Address(number=0xFFFF_8000_0000_0000),
        access=types_pb2.Access(
            kind=types_pb2.ACCESS_KIND_SHADOW_STACK_WRITE,
            privilege=types_pb2.PRIVILEGE_IMPLICIT_SUPERVISOR,
            ac=False,
            pkru=0,
            pkrs=4,
            stack=True,
        ),
        ad_policy=types_pb2.AD_POLICY_SET,
        freshness=types_pb2.FRESHNESS_SYNC,
        override=types_pb2.WalkerOverride(cr3=0, none=True, vendor=types_pb2.VENDOR_AMD, gib_pages=False),
        trace=True,
    )


def test_text_addresses_are_the_daemons_to_read(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = translation_pb2.TranslateResponse(translation=MAPPED)
    answer = local.translate("0x10")
    assert scripted.request.address == types_pb2.Address(text="0x10")
    assert answer.address == "0x10"


def test_translation_arrives_whole(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = translation_pb2.TranslateResponse(
        translation=MAPPED,
        steps=[types_pb2.Step(dimension=types_pb2.DIMENSION_GUEST, level=2, entry=0x83, leaf=True)],
        explanation="ladder",
        provenance=types_pb2.Provenance(machine="m", generation=7, assumed=["EFER=0xd00"]),
    )
    scripted.answer.provenance.snapshot_age.FromMilliseconds(1500)
    answer = local.translate(0x5000)
    assert isinstance(answer, pagewalk.Translation)
    assert answer.ok
    assert (answer.gpa, answer.page_size, answer.protection_key) == (0x1234_5000, 2 << 20, 3)
    assert answer.rights == pagewalk.Rights(read=True, write=True, user=True, execute=False)
    assert (answer.backing, answer.pat_type) == ("read_only", "uc_minus")
    assert (answer.accessed, answer.dirty) == (True, False)
    assert (answer.nested_gpa, answer.nested_page_size) == (None, None)
    assert (answer.steps[0].dimension, answer.steps[0].entry, answer.steps[0].leaf) == ("guest", 0x83, True)
    assert answer.explanation == "ladder"
    assert answer.provenance.snapshot_age == 1.5
    assert answer.provenance.assumed == ("EFER=0xd00",)
    assert str(answer) == "0x5000 -> 0x12345000 (2 MiB, rw-u, UC-, accessed, key 3, read-only memory)"


def test_fault_is_an_answer(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = translation_pb2.TranslateResponse(
        fault=types_pb2.Fault(
            kind=types_pb2.FAULT_KIND_PAGE_FAULT,
            address=0x5000,
            level=1,
            dimension=types_pb2.DIMENSION_GUEST,
            error_code=0,
            reason="the PTE is not present",
        )
    )
    answer = local.translate(0x5000)
    assert isinstance(answer, pagewalk.Fault)
    assert not answer.ok
    assert answer.error_code == 0, "present and zero is not absent"
    assert answer.exit_info_1 is None
    assert str(answer) == "0x5000: page_fault (error code 0x0): the PTE is not present"


def test_a_choice_of_a_newer_daemon_has_a_name(local: pagewalk.Client, scripted: Scripted) -> None:
    newer = types_pb2.Fault.FromString(b"\x08\x63")
    scripted.answer = translation_pb2.TranslateResponse(fault=newer)
    answer = local.translate(0)
    assert isinstance(answer, pagewalk.Fault)
    assert str(answer.kind) == "unknown_99"


def test_across_sends_what_was_asked(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = translation_pb2.TranslateAcrossResponse()
    answers = local.translate_across(0x5000, [0x1000], "write", privilege="user", ac=False, pkru=4, pkrs=8, stack=True)
    assert answers == {}
    assert scripted.request == translation_pb2.TranslateAcrossRequest(
        vcpu=types_pb2.VcpuRef(),
        address=types_pb2.Address(number=0x5000),
        access=types_pb2.Access(
            kind=types_pb2.ACCESS_KIND_WRITE,
            privilege=types_pb2.PRIVILEGE_USER,
            ac=False,
            pkru=4,
            pkrs=8,
            stack=True,
        ),
        freshness=types_pb2.FRESHNESS_LATEST,
        cr3s=[0x1000],
    )


def test_nested_off_and_on_are_told_apart(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = walker_pb2.SetNestedModeResponse(
        effect=walker_pb2.NestedEffect(kind=walker_pb2.NESTED_EFFECT_KIND_WALKER_ONLY, reason="why")
    )
    change = local.nested_off()
    assert scripted.request.WhichOneof("mode") == "off"
    assert scripted.request.off
    assert not scripted.request.walker_only
    assert (change.effect, change.reason) == ("walker_only", "why")
    local.nested_off(walker_only=True)
    assert scripted.request.walker_only
    local.set_nested(pagewalk.Npt(ncr3=0x1000, host_cr4=0), l2=pagewalk.Registers(cr3=0x2000), walker_only=True)
    assert scripted.request == walker_pb2.SetNestedModeRequest(
        vcpu=types_pb2.VcpuRef(),
        npt=types_pb2.Npt(ncr3=0x1000, host_cr4=0),
        l2=types_pb2.Registers(cr3=0x2000),
        walker_only=True,
    )


@pytest.mark.parametrize("second", ["npt", 0x1000, {"ncr3": 0x1000}, ()], ids=str)
def test_what_is_no_second_dimension_is_refused(local: pagewalk.Client, second: Any) -> None:
    override = pagewalk.WalkerOverride(second_dimension=second)
    with pytest.raises(ValueError, match=r"second_dimension cannot be .*; it is an Npt, an Ept or 'none'"):
        local.translate(0, override=override)
    with pytest.raises(ValueError, match=r"second_dimension cannot be .*; it is an Npt or an Ept"):
        local.set_nested(second)


def test_nothing_does_not_switch_nested_mode_off(local: pagewalk.Client) -> None:
    with pytest.raises(ValueError, match="second_dimension cannot be None"):
        local.set_nested(None)  # type: ignore[arg-type]


def test_watch_ends_with_the_stream(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.answer = [
        walker_pb2.GetWalkerStateResponse(provenance=types_pb2.Provenance(generation=generation))
        for generation in (1, 4)
    ]
    seen = [state.provenance.generation for state in local.watch(max_updates=2, min_interval=0.25)]
    assert seen == [1, 4]
    assert scripted.request.max_updates == 2
    assert scripted.request.min_interval.ToMilliseconds() == 250


def test_failure_carries_reason_and_advice(local: pagewalk.Client, scripted: Scripted) -> None:
    info = ErrorInfo(reason="UNKNOWN_MACHINE", domain="pagewalk", metadata={"machine": "x"})
    scripted.failure = (grpc.StatusCode.NOT_FOUND, "no machine x; there is: demo", info)
    with pytest.raises(pagewalk.NotFoundError, match="there is: demo") as raised:
        local.translate(0, machine="x")
    assert raised.value.code == "NOT_FOUND"
    assert raised.value.reason == "UNKNOWN_MACHINE"
    assert raised.value.details == {"machine": "x"}
    assert isinstance(raised.value, pagewalk.Error)


def test_another_service_is_taken_for_one(local: pagewalk.Client) -> None:
    with pytest.raises(pagewalk.UnimplementedError, match="another service"):
        local.vcpus()


def test_failure_of_a_stream_is_ours_too(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.failure = (grpc.StatusCode.FAILED_PRECONDITION, "not here", None)
    with pytest.raises(pagewalk.FailedPreconditionError, match="not here"):
        list(local.watch())


def test_draining_daemon_is_no_missing_daemon(local: pagewalk.Client, scripted: Scripted) -> None:
    scripted.failure = (grpc.StatusCode.UNAVAILABLE, "stopping", ErrorInfo(reason="STOPPING"))
    with pytest.raises(pagewalk.UnavailableError) as raised:
        local.machines()
    assert not isinstance(raised.value, pagewalk.ConnectError)


def test_garbage_in_the_details_does_not_hide_the_failure(local: pagewalk.Client, scripted: Scripted) -> None:
    def reply(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        return context.abort(grpc.StatusCode.NOT_FOUND, "no such vCPU")

    scripted._reply = reply  # type: ignore[method-assign]
    with pytest.raises(pagewalk.NotFoundError, match="no such vCPU"):
        local.machines()


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_address_beyond_64_bits_is_refused_here(local: pagewalk.Client, address: int) -> None:
    with pytest.raises(ValueError, match="does not fit 64 bits"):
        local.translate(address)


def test_unknown_choice_lists_the_known(local: pagewalk.Client) -> None:
    with pytest.raises(ValueError, match=r"access cannot be 'execute'; it is one of 'read', 'write', 'fetch'"):
        local.translate(0, "execute")  # type: ignore[arg-type]


def test_refused_connection_says_what_to_do() -> None:
    with pagewalk.connect("127.0.0.1:1", timeout=5) as client, pytest.raises(pagewalk.ConnectError) as raised:
        client.machines()
    assert "127.0.0.1:1" in str(raised.value)
    assert "cargo run --release -- demo" in str(raised.value)


@pytest.mark.parametrize("timeout", [float("nan"), -1, float("-inf")])
def test_a_timeout_is_a_span_of_time(local: pagewalk.Client, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout cannot be"):
        pagewalk.connect("127.0.0.1:1", timeout=timeout)
    with pytest.raises(ValueError, match="timeout cannot be"):
        local.mappings(timeout=timeout)


@pytest.mark.parametrize("timeout", [float("inf"), 1e10, 1e12, 10**400], ids=["inf", "1e10", "1e12", "1e400"])
def test_a_timeout_of_ages_is_none(local: pagewalk.Client, scripted: Scripted, timeout: float) -> None:
    scripted.answer = machine_pb2.ListMachinesResponse(daemon_version="1.2.3")
    with pagewalk.connect(local._target, timeout=timeout) as client:
        assert client.daemon_version() == "1.2.3"
    scripted.answer = [walker_pb2.GetWalkerStateResponse()]
    assert len(list(local.watch(timeout=timeout))) == 1


def test_a_closed_client_says_so(local: pagewalk.Client, tmp_path: Path) -> None:
    local.close()
    calls: list[Callable[[], object]] = [
        local.machines,
        local.mappings,
        lambda: next(local.watch()),
        lambda: local.translate_batch([0]),
        lambda: local.translate_batch(range(MOST + 1)),
        lambda: local.save_image(tmp_path / "guest.toml"),
    ]
    for call in calls:
        with pytest.raises(pagewalk.ClosedError, match="this client is closed: connect again"):
            call()


def test_missing_socket_says_what_to_do(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/none.sock"
    with pagewalk.connect(target, timeout=5) as client, pytest.raises(pagewalk.ConnectError, match="demo"):
        client.machines()


@pytest.fixture
def secure_port(certificates: Path, scripted: Scripted) -> Iterator[int]:
    scripted.answer = machine_pb2.ListMachinesResponse(daemon_version="1.2.3")
    server = serve(scripted)
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (certificates / "ca.pem").read_bytes(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield port
    server.stop(None).wait()


def test_mutual_tls_with_lab_certificates(certificates: Path, secure_port: int) -> None:
    tls = pagewalk.Tls(ca=certificates / "ca.pem", cert=certificates / "client.pem", key=certificates / "client.key")
    with pagewalk.connect(f"127.0.0.1:{secure_port}", tls=tls, timeout=5) as client:
        assert client.daemon_version() == "1.2.3"


def test_without_tls_the_refusal_mentions_it(secure_port: int) -> None:
    plain = pagewalk.connect(f"127.0.0.1:{secure_port}", timeout=5)
    with plain as client, pytest.raises(pagewalk.ConnectError, match="TLS"):
        client.daemon_version()


def test_server_certificate_is_no_client_certificate(certificates: Path, secure_port: int) -> None:
    tls = pagewalk.Tls(ca=certificates / "ca.pem", cert=certificates / "server.pem", key=certificates / "server.key")
    wrong = pagewalk.connect(f"127.0.0.1:{secure_port}", tls=tls, timeout=5)
    with wrong as client, pytest.raises(pagewalk.ConnectError, match="certificates"):
        client.daemon_version()


def test_tls_files_that_do_not_end_are_refused(certificates: Path, tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large.pem"
    os.mkfifo(pipe)
    large.write_bytes(bytes((1 << 20) + 1))
    tls = pagewalk.Tls(ca=certificates / "ca.pem", cert=certificates / "client.pem", key=certificates / "client.key")
    for path, reason in ((Path("/dev/zero"), "not a regular file"), (pipe, "not a regular file"), (large, "1 MiB")):
        for broken in (replace(tls, ca=path), replace(tls, cert=path), replace(tls, key=path)):
            with pytest.raises(ValueError, match=reason):
                pagewalk.connect("127.0.0.1:1", tls=broken)


def test_unix_sockets_speak_no_tls(certificates: Path) -> None:
    tls = pagewalk.Tls(ca=certificates / "ca.pem", cert=certificates / "client.pem", key=certificates / "client.key")
    with pytest.raises(ValueError, match="leave out tls"):
        pagewalk.connect("unix:/run/x", tls=tls)


def test_a_comma_in_a_socket_path_is_refused() -> None:
    with pytest.raises(ValueError, match="comma"):
        pagewalk.connect("unix:/run/a,b")


@pytest.mark.parametrize("words", [[], [1], [1, 1, 1]])
def test_a_batch_has_a_word_for_each_address(local: pagewalk.Client, scripted: Scripted, words: list[int]) -> None:
    scripted.answer = translation_pb2.BatchTranslateResponse(words=words)
    with pytest.raises(pagewalk.Error, match=f"answered 2 addresses with {8 * len(words)} bytes, not 8 each"):
        local.translate_batch([0, 0])


def test_a_stream_of_batches_is_whole(local: pagewalk.Client, scripted: Scripted) -> None:
    def answer(sequence: int, words: int) -> translation_pb2.StreamTranslateResponse:
        batch = translation_pb2.BatchTranslateResponse(words=[1] * words)
        return translation_pb2.StreamTranslateResponse(sequence=sequence, answer=batch)

    addresses = array("Q", bytes(8 * (MOST + 1)))
    scripted.answer = [answer(0, MOST), answer(1, 1)]
    assert len(local.translate_batch(addresses)) == MOST + 1
    scripted.answer = [answer(0, MOST)]
    with pytest.raises(pagewalk.Error, match="ended the stream before its end: ask again"):
        local.translate_batch(addresses)
    scripted.answer = [answer(0, MOST), answer(1, 2)]
    with pytest.raises(pagewalk.Error, match="answered 1 addresses with 16 bytes"):
        local.translate_batch(addresses)


def test_mappings_tell_how_far_they_are(local: pagewalk.Client, scripted: Scripted) -> None:
    def part(position: int, *starts: int) -> mapping_pb2.TranslateRangeResponse:
        extents = [mapping_pb2.Extent(start=start, bytes=0x1000, translation=MAPPED) for start in starts]
        return mapping_pb2.TranslateRangeResponse(extents=extents, position=position, last=position == 0)

    scripted.answer = [part(0x1000), part(0x3000, 0x1000, 0x2000), part(0)]
    mappings = local.translate_range((0, None))
    positions = [mappings.position]
    positions += [mappings.position for _ in mappings]
    positions.append(mappings.position)
    assert positions == [None, 0x3000, 0x3000, 0]


def test_memory_ends_with_64_bits(local: pagewalk.Client, scripted: Scripted) -> None:
    piece, end = 1 << 20, 1 << 64
    scripted.answer = memory_pb2.ReadMemoryResponse(data=bytes(piece), address=end - piece)
    assert len(local.read_memory(end - 2 * piece, 2 * piece).data) == 2 * piece
    assert scripted.request.gva.number == end - piece
    scripted.request = None
    with pytest.raises(ValueError, match="0xfffffffffff00000 and 2097152 bytes reach beyond 64 bits"):
        local.read_memory(end - piece, 2 * piece)
    assert scripted.request is None
    with pytest.raises(ValueError, match="0xfffffffffff00000 and 2097152 bytes reach beyond 64 bits"):
        local.read_memory("top", 2 * piece)


def image() -> list[machine_pb2.SaveImageResponse]:
    """Two pages, the second of which is set."""
    return [
        machine_pb2.SaveImageResponse(
            start=machine_pb2.ImageStart(description="# guest.mem\n", memory_file_bytes=0x2000)
        ),
        machine_pb2.SaveImageResponse(piece=machine_pb2.ImagePiece(offset=0x1000, contents=bytes([7]) * 0x1000)),
        machine_pb2.SaveImageResponse(end=machine_pb2.ImageEnd(contents_bytes=0x1000)),
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("hard_links", [True, False])
def test_an_image_is_whole_or_not_there(
    local: pagewalk.Client, scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr("os.link", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
    scripted.answer = image()[:2]
    with pytest.raises(pagewalk.Error, match="it ended before the image was whole"):
        local.save_image(tmp_path / "guest.toml")
    assert names(tmp_path) == []
    scripted.answer = image()
    saved = local.save_image(tmp_path / "guest.toml")
    assert (saved.memory_bytes, saved.contents_bytes) == (0x2000, 0x1000)
    assert saved.description.read_text() == "# guest.mem\n"
    assert saved.memory.read_bytes() == bytes(0x1000) + bytes([7]) * 0x1000
    assert names(tmp_path) == ["guest.mem", "guest.toml"]


@pytest.mark.parametrize("name", ["guest.toml.part", "guest.mem.part", "guest.toml", "guest.mem"])
@pytest.mark.parametrize("link", ["own", "nowhere", None])
def test_what_is_there_already_stays(
    local: pagewalk.Client, scripted: Scripted, tmp_path: Path, name: str, link: str | None
) -> None:
    scripted.answer = image()
    (tmp_path / "own").write_text("own")
    if link is None:
        (tmp_path / name).write_text("own")
    else:
        (tmp_path / name).symlink_to(link)
    with pytest.raises(FileExistsError, match=f"{name} exists already") as raised:
        local.save_image(tmp_path / "guest.toml")
    assert ("another save is under way" in str(raised.value)) == name.endswith(".part")
    assert names(tmp_path) == sorted([name, "own"])
    assert (tmp_path / "own").read_text() == "own"
    if link is None:
        assert (tmp_path / name).read_text() == "own"


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("name", ["guest.toml", "guest.mem"])
def test_what_comes_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr("os.link", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))

    def parts() -> Iterator[machine_pb2.SaveImageResponse]:
        for part in image():
            (tmp_path / name).write_text("mine")
            yield part

    with pytest.raises(FileExistsError, match=f"{name} exists already"):
        images.save(parts(), tmp_path / "guest.toml", tmp_path / "guest.mem")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_types_tell_the_outcomes_apart(local: pagewalk.Client, scripted: Scripted) -> None:
    """Checked by mypy: `ok` narrows the union."""
    scripted.answer = translation_pb2.TranslateResponse(translation=MAPPED)
    answer = local.translate(0)
    said = f"{answer.gpa:#x}" if answer.ok else answer.reason
    assert said == "0x12345000"
