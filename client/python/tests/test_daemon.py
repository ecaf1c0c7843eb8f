"""The client against a real daemon that serves the demo machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Daemon

import pagewalk

Landmarks = dict[str, int]

FRAME = 0x000F_FFFF_FFFF_F000


@pytest.fixture
def paused(client: pagewalk.Client) -> pagewalk.Machine:
    """Stop the guest, where it runs, so that answers can be compared with each other."""
    machine = client.machine()
    if machine.capabilities.can_pause:
        client.pause()
    return machine


@pytest.fixture
def landmarks(paused: pagewalk.Machine) -> Landmarks:
    """Give the addresses worth asking about, by name, of the stopped guest."""
    return {mark.name: mark.address for mark in paused.landmarks}


@pytest.fixture(autouse=True)
def undisturbed(client: pagewalk.Client) -> Iterator[None]:
    """Leave the guest as it was found: running, and without a nested mode of ours."""
    yield
    if client.walker_state().nested.kind in ("walker_only", "real_vcpu"):
        client.nested_off()
    if client.machine().capabilities.can_pause:
        client.resume()


def test_machine_describes_itself(client: pagewalk.Client) -> None:
    (machine,) = client.machines()
    assert machine == client.machine() == client.machine(machine.id)
    assert machine.source == "demo"
    assert machine.description
    assert machine.memory_bytes == sum(region.size for region in machine.regions) > 0
    assert machine.vcpus == len(client.vcpus()) > 0
    assert machine.landmarks
    assert client.daemon_version()


def test_symbols_stand_for_addresses(client: pagewalk.Client, landmarks: Landmarks, tmp_path: Path) -> None:
    text, data = landmarks["kernel-text"], landmarks["kernel-data"]
    symbols = tmp_path / "System.map"
    symbols.write_text(f"{text:016x} T start\n{data:016x} D counter\n")
    machine = client.attach(f"named=demo:plain,symbols={symbols}")
    try:
        assert machine.symbols is not None
        assert (machine.symbols.file, machine.symbols.count) == (str(symbols), 2)
        assert (machine.symbols.placement, machine.symbols.slide) == ("as_written", None)
        page = client.translate("counter + 0x10", explain=True, machine="named")
        assert page.ok
        assert (page.gva, page.symbol) == (data + 0x10, pagewalk.Symbol("counter", 0x10))
        assert "<counter+0x10>" in page.explanation
        assert str(page).startswith("counter + 0x10 <counter+0x10> -> ")
        read = client.read_memory("start", 8, machine="named")
        assert (read.address, read.data) == (text, client.read_memory(text, 8, machine="named").data)
        extent = next(client.mappings(("start", "start+0x1000"), machine="named"))
        assert extent.start == text
        explained = client.explain_fault(0, "start", machine="named")
        assert explained.now.symbol == pagewalk.Symbol("start", 0)
        with pytest.raises(pagewalk.InvalidArgumentError, match="close to it are `counter`"):
            client.translate("countr", machine="named")
    finally:
        client.detach("named", end_guest=True)
    with pytest.raises(pagewalk.InvalidArgumentError, match="has no symbols"):
        client.translate("start")


def test_one_address_in_many_address_spaces(client: pagewalk.Client, landmarks: Landmarks) -> None:
    spaces = client.address_spaces()
    (space, *_) = spaces
    assert len(spaces) == len(spaces.spaces) > 0
    assert space.sightings > 0
    assert space.tasks == ()
    assert spaces.task_list.state == "unknown"
    assert "symbols=FILE" in spaces.task_list.reason
    assert space.isolation_pair is None
    user = landmarks["user-text"]
    outcomes = client.translate_across(user, [0x20000, 0x21000], privilege="user")
    assert list(outcomes) == [0x20000, 0x21000]
    for cr3, outcome in outcomes.items():
        alone = client.translate(user, privilege="user", override=pagewalk.WalkerOverride(cr3=cr3))
        assert alone.ok
        assert outcome.ok
        assert (outcome.gpa, outcome.gva) == (alone.gpa, user)
    assert space.cr3 in client.translate_across(landmarks["kernel-text"])
    with pytest.raises(pagewalk.InvalidArgumentError, match="more than 1024"):
        client.translate_across(user, range(0, 1025 << 12, 1 << 12))


def test_every_landmark_is_answered(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    outcomes = [
        client.translate(mark.address, "read", privilege="supervisor", trace=True, explain=True)
        for mark in paused.landmarks
    ]
    for mark, outcome in zip(paused.landmarks, outcomes):
        assert len(outcome.steps) <= 4
        assert outcome.provenance.machine == paused.id
        assert outcome.explanation, mark
    assert {outcome.ok for outcome in outcomes} == {True, False}, "the demo shows pages and faults"


def test_mappings_say_what_translations_say(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    mappings = client.mappings(problems=True)
    extents = list(mappings)
    assert mappings.continue_at is None
    assert mappings.tally is not None
    assert mappings.provenance is not None
    assert mappings.provenance.machine == paused.id
    assert mappings.tally.extents == len(extents) > 5
    assert {extent.ok for extent in extents} == {True, False}
    for extent in extents:
        single = client.translate(extent.start, privilege="exempt")
        assert single.ok == extent.ok
        if single.ok and extent.outcome.ok:
            assert (single.gpa, single.rights, single.page_size) == (
                extent.outcome.gpa,
                extent.outcome.rights,
                extent.outcome.page_size,
            )
        assert str(extent)
    assert all(it.ok and it.outcome.rights.write for it in client.mappings(write=True) if it.outcome.ok)
    assert [it.bytes for it in client.mappings(page_sizes=["2m"])] == [2 << 20]


def test_mappings_stop_at_the_budget_and_go_on(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    starts = [extent.start for extent in client.mappings()]
    first = client.mappings(max_extents=2)
    head = [extent.start for extent in first]
    assert first.continue_at is not None
    rest = [extent.start for extent in client.mappings((first.continue_at, None))]
    assert head + rest == starts
    assert len(head) == 2
    with pytest.raises(pagewalk.InvalidArgumentError):
        list(client.mappings((0x2000, 0x1000)))
    with pytest.raises(ValueError, match="page_sizes"):
        client.mappings(page_sizes=["3k"])  # type: ignore[list-item]


def test_mappings_found_by_their_memory(client: pagewalk.Client, landmarks: Landmarks) -> None:
    gva = landmarks["kernel-text"]
    page = client.translate(gva, privilege="exempt")
    assert page.ok
    assert [(it.start, it.bytes) for it in client.find_mappings(page.gpa + 0x123)] == [(gva + 0x123, 1)]
    assert list(client.find_mappings(0x7FFF_0000)) == []
    extents = list(client.translate_range((gva, gva + 0x10000), "write", privilege="user"))
    assert sum(it.bytes for it in extents) == 0x10000
    assert not any(it.ok for it in extents)


READ_ONLY = 1 << 1
USER_BIT = 1 << 2
NX = 1 << 63

REFUSALS: list[tuple[str, pagewalk.AccessKind, pagewalk.Privilege, int, int, int]] = [
    # landmark, access, privilege, error code, level and bits of the entry responsible
    ("not-present", "read", "supervisor", 0b0_0000, 1, 1),
    ("read-only", "write", "supervisor", 0b0_0011, 1, READ_ONLY),
    ("no-execute", "fetch", "supervisor", 0b1_0001, 1, NX),
    ("reserved-bit", "read", "supervisor", 0b0_1001, 2, 1 << 13),
    ("user-bit-lost", "read", "user", 0b0_0101, 2, USER_BIT),
    ("supervisor-page", "write", "user", 0b0_0111, 1, USER_BIT),
    ("read-only-table", "write", "user", 0b0_0111, 2, READ_ONLY),
]


@pytest.mark.parametrize(
    ("name", "access", "privilege", "code", "level", "bits"), REFUSALS, ids=lambda value: str(value)
)
def test_refusals_name_the_entry_and_the_bits(
    client: pagewalk.Client,
    landmarks: Landmarks,
    name: str,
    access: pagewalk.AccessKind,
    privilege: pagewalk.Privilege,
    code: int,
    level: int,
    bits: int,
) -> None:
    met = client.translate(landmarks[name], access, privilege=privilege, trace=True)
    assert not met.ok
    assert (met.kind, met.error_code, met.level, met.bits) == ("page_fault", code, level, bits)
    assert met.reason
    (entry,) = (step.entry for step in met.steps if step.level == level)
    assert met.entry == entry


def test_what_lies_behind_a_page(client: pagewalk.Client, landmarks: Landmarks) -> None:
    for name, backing in (("kernel-text", "ram"), ("rom", "read_only"), ("mmio", "none")):
        met = client.translate(landmarks[name], privilege="supervisor")
        assert met.ok, name
        assert met.backing == backing, name
    unbacked = client.translate(landmarks["unbacked-table"])
    assert not unbacked.ok
    assert unbacked.kind == "unbacked"


def test_leaf_entry_gives_the_translation(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    """Works the frame out of the raw leaf entry, without the daemon's word for it."""
    checked = 0
    for mark in paused.landmarks:
        answer = client.translate(mark.address, privilege="exempt", trace=True)
        if not answer.ok or answer.nested_gpa is not None:
            continue
        leaf = answer.steps[-1]
        offset = answer.page_size - 1
        assert leaf.leaf
        assert answer.gpa == (leaf.entry & FRAME & ~offset) | (mark.address & offset), mark
        assert answer.rights == leaf.rights_so_far
        assert [step.level for step in answer.steps] == sorted((step.level for step in answer.steps), reverse=True)
        checked += 1
    assert checked > 0


def test_text_and_number_mean_the_same(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    for mark in paused.landmarks:
        number = client.translate(mark.address, privilege="supervisor")
        text = client.translate(f"{mark.address:#x}", privilege="supervisor")
        if number.ok and text.ok:
            assert (number.gpa, number.page_size, number.rights) == (text.gpa, text.page_size, text.rights)
        else:
            assert not number.ok
            assert not text.ok
            assert (number.kind, number.error_code, number.entry) == (text.kind, text.error_code, text.entry)


def test_own_cr3_is_the_same_address_space(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    cr3 = client.registers().cr3
    for mark in paused.landmarks:
        plain = client.translate(mark.address, privilege="exempt")
        overridden = client.translate(mark.address, privilege="exempt", override=pagewalk.WalkerOverride(cr3=cr3))
        assert plain.ok == overridden.ok
        if plain.ok and overridden.ok:
            assert plain.gpa == overridden.gpa


def test_non_canonical_addresses(client: pagewalk.Client, landmarks: Landmarks) -> None:
    plain = client.translate(landmarks["non-canonical"])
    assert not plain.ok
    assert (plain.kind, plain.level, plain.dimension) == ("general_protection", 0, "guest")
    stack = client.translate(landmarks["non-canonical"], stack=True)
    assert not stack.ok
    assert stack.kind == "stack_fault"


def test_seen_fault_is_explained(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    explained = 0
    for mark in paused.landmarks:
        met = client.translate(mark.address, "write", privilege="user")
        if met.ok or met.error_code is None:
            continue
        said = client.explain_fault(met.error_code, mark.address)
        assert said.would_fault_now
        assert said.matches
        assert not said.now.ok
        assert (said.now.error_code, said.now.entry, said.now.bits) == (met.error_code, met.entry, met.bits)
        assert {bit.bit for bit in said.decoded if bit.set} == {bit for bit in range(32) if met.error_code >> bit & 1}
        assert said.explanation
        explained += 1
    assert explained > 0


def test_seen_nested_fault_is_explained(client: pagewalk.Client, landmarks: Landmarks) -> None:
    client.set_nested(
        pagewalk.Npt(ncr3=landmarks["l2-ncr3"]), l2=pagewalk.Registers(cr3=landmarks["l2-cr3"]), walker_only=True
    )
    met = client.translate(landmarks["l2-npt-read-only"], "write", privilege="supervisor")
    assert not met.ok
    assert met.exit_info_1 is not None
    said = client.explain_nested_fault(met.exit_info_1, met.nested_gpa)
    assert said.matches
    assert not said.now.ok
    assert (said.now.exit_info_1, said.now.entry, said.now.bits) == (met.exit_info_1, met.entry, READ_ONLY)
    other = client.explain_nested_fault(met.exit_info_1 & ~1, met.nested_gpa)
    assert other.would_fault_now
    assert not other.matches


def test_seen_ept_exits_are_explained(client: pagewalk.Client, landmarks: Landmarks) -> None:
    # The demo machine's nested tables are sound EPT entries as well: walk length 4, write-back.
    ept = pagewalk.Ept(eptp=landmarks["l2-ncr3"] | 0x1E)
    state = pagewalk.WalkerOverride(cr3=landmarks["l2-cr3"], second_dimension=ept)
    met = client.translate(landmarks["l2-npt-read-only"], "write", privilege="supervisor", override=state)
    assert not met.ok
    assert met.exit_qualification is not None
    said = client.explain_ept_violation(
        met.exit_qualification, met.nested_gpa, gva=landmarks["l2-npt-read-only"], override=state
    )
    assert said.matches
    assert not said.now.ok
    assert (said.now.entry, said.now.bits) == (met.entry, READ_ONLY)
    sound = client.explain_ept_misconfiguration(met.nested_gpa, override=state)
    assert sound.now.ok
    assert not sound.matches


def test_nested_gpa_sets_bits(client: pagewalk.Client, landmarks: Landmarks) -> None:
    state = pagewalk.WalkerOverride(second_dimension=pagewalk.Npt(ncr3=landmarks["l2-ncr3"]))
    for policy, accessed in (("observe", False), ("set", True)):
        client.translate_nested_gpa(0x11000, "write", ad_policy=policy, override=state)  # type: ignore[arg-type]
        steps = client.translate_nested_gpa(0x11000, override=state, trace=True).steps
        assert all(bool(step.entry & 0x20) == accessed for step in steps), policy


def test_walker_state_fits_the_registers(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    state = client.walker_state()
    cr3 = client.registers().cr3
    assert cr3 is not None
    assert state.gva_walk.root == cr3 & FRAME
    page_format = state.gva_walk.format
    assert page_format.mode in ("four_level", "five_level")
    assert page_format.levels == len(page_format.reserved_leaf) == len(page_format.reserved_table)
    assert len(page_format.permissions) == 16
    assert not page_format.shadow_stacks
    assert page_format.pointer_masking is None
    assert all(0 < word < 1 << 16 for word in page_format.permissions[:1])
    assert page_format.bits is not None
    assert page_format.bits.present == 1
    assert state.ngpa_walk is None
    assert state.nested.kind == "off"


def test_watch_starts_with_the_state_of_now(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    (state,) = client.watch(max_updates=1, timeout=10)
    assert state.gva_walk == client.walker_state().gva_walk


def test_watch_follows_a_change(client: pagewalk.Client, landmarks: Landmarks) -> None:
    watch = client.watch(max_updates=2, timeout=10)
    first = next(watch)
    client.set_nested(pagewalk.Npt(ncr3=landmarks["l2-ncr3"]), walker_only=True)
    second = next(watch)
    assert second.provenance.generation > first.provenance.generation
    assert (first.ngpa_walk is None, second.ngpa_walk is None) == (True, False)
    assert list(watch) == []


def test_nested_mode_of_the_walker_alone(client: pagewalk.Client, landmarks: Landmarks) -> None:
    before = client.translate(landmarks["kernel-text"], privilege="exempt")
    change = client.set_nested(
        pagewalk.Npt(ncr3=landmarks["l2-ncr3"]), l2=pagewalk.Registers(cr3=landmarks["l2-cr3"]), walker_only=True
    )
    assert change.effect == "walker_only"
    assert change.reason
    assert change.state.nested.kind == "walker_only"
    second = change.state.nested.second_dimension
    assert isinstance(second, pagewalk.Npt)
    assert (second.ncr3, second.host_efer) == (landmarks["l2-ncr3"], 0x1D00)
    assert change.state.ngpa_walk is not None
    assert change.state.ngpa_walk.root == landmarks["l2-ncr3"]

    code = client.translate(landmarks["l2-code"], "fetch", privilege="supervisor", trace=True)
    assert code.ok
    assert code.nested_gpa is not None
    assert code.nested_gpa != code.gpa
    assert len(code.steps) == 4 * (4 + 1) + 4
    huge = client.translate(landmarks["l2-huge-2m"], privilege="supervisor")
    assert huge.ok
    assert (huge.page_size, huge.nested_page_size) == (2 << 20, 2 << 20)
    # EXITINFO1: bit 32 for the final address, bit 33 for a table, which is accessed as a user write.
    for name, access, exit_info_1 in (
        ("l2-npt-hole", "read", 1 << 32 | 0b100),
        ("l2-npt-read-only", "write", 1 << 32 | 0b111),
        ("l2-table-hole", "read", 1 << 33 | 0b110),
    ):
        met = client.translate(landmarks[name], access, privilege="supervisor")  # type: ignore[arg-type]
        assert not met.ok, name
        assert (met.kind, met.dimension, met.exit_info_1) == ("nested_page_fault", "nested", exit_info_1), name
    absent = client.translate(landmarks["l2-not-present"], privilege="supervisor")
    assert not absent.ok
    assert (absent.kind, absent.dimension, absent.error_code) == ("page_fault", "guest", 0)

    assert client.nested_off().state.ngpa_walk is None
    after = client.translate(landmarks["kernel-text"], privilege="exempt")
    assert before.ok
    assert after.ok
    assert (after.gpa, after.nested_gpa) == (before.gpa, None)


def test_pause_step_resume(client: pagewalk.Client) -> None:
    can = client.machine().capabilities
    if not can.can_step:
        with pytest.raises(pagewalk.FailedPreconditionError):
            client.step()
        return
    assert client.pause().run_state == "paused"
    before = client.registers()
    assert client.registers() == before, "a stopped vCPU does not change"
    stepped = client.step()
    assert stepped.vcpu.run_state == "paused"
    assert stepped.registers.rip == stepped.vcpu.rip
    assert stepped.registers != before
    assert client.resume().run_state in ("running", "halted")


def test_registers_are_written_and_read_back(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    if not paused.capabilities.can_set_registers:
        with pytest.raises(pagewalk.FailedPreconditionError):
            client.set_registers(pagewalk.Registers(r15=1))
        return
    before = client.registers().r15
    assert before is not None
    assert client.set_registers(pagewalk.Registers(r15=before ^ 0xABCD)).r15 == before ^ 0xABCD
    assert client.set_registers(pagewalk.Registers(r15=before)).r15 == before
    with pytest.raises(pagewalk.InvalidArgumentError):
        client.set_registers(pagewalk.Registers(cpl=3))


def test_sync_answers_are_young(client: pagewalk.Client) -> None:
    answer = client.translate(client.machine().landmarks[0].address, privilege="exempt", freshness="sync")
    assert answer.provenance.snapshot_age < 5


def test_unknown_names_are_errors_with_reasons(client: pagewalk.Client) -> None:
    with pytest.raises(pagewalk.NotFoundError) as machine:
        client.translate(0, machine="no such machine")
    assert machine.value.reason
    assert client.machine().id in machine.value.message
    with pytest.raises(pagewalk.NotFoundError) as vcpu:
        client.translate(0, vcpu=4096)
    assert vcpu.value.reason


@pytest.mark.parametrize("text", ["", "0x", "zzz", "0x1ffffffffffffffff", "-1", "0x" + "0" * 4096 + "g"])
def test_unreadable_addresses_are_refused(client: pagewalk.Client, text: str) -> None:
    with pytest.raises(pagewalk.InvalidArgumentError) as raised:
        client.translate(text)
    assert raised.value.reason


def test_impossible_registers_are_refused(client: pagewalk.Client) -> None:
    paging_without_protection = pagewalk.WalkerOverride(cr0=1 << 31)
    with pytest.raises(pagewalk.InvalidArgumentError) as raised:
        client.translate(0, override=paging_without_protection)
    assert "CR0" in raised.value.message


def test_a_socket_path_may_have_any_character_but_a_comma(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "a%20b c#?ü"
    path.symlink_to(daemon.socket)
    with pagewalk.connect(f"unix:{path}") as client:
        assert client.vcpus()


def test_unix_socket(daemon: Daemon) -> None:
    with pagewalk.connect(f"unix:{daemon.socket}") as client:
        assert client.machine().source == "demo"


def test_mutual_tls(certificates: Path, tmp_path: Path) -> None:
    def file(name: str) -> Path:
        return certificates / name

    options: list[str | Path]
    options = ["--tls-cert", file("server.pem"), "--tls-key", file("server.key"), "--client-ca", file("ca.pem")]
    daemon = Daemon(tmp_path, *options)
    try:
        tls = pagewalk.Tls(ca=file("ca.pem"), cert=file("client.pem"), key=file("client.key"))
        with pagewalk.connect(daemon.target, tls=tls) as client:
            assert client.machine().source == "demo"
        with pagewalk.connect(daemon.target) as client, pytest.raises(pagewalk.ConnectError, match="TLS"):
            client.machine()
        stranger = pagewalk.Tls(ca=file("ca.pem"), cert=file("server.pem"), key=file("server.key"))
        with pagewalk.connect(daemon.target, tls=stranger) as client, pytest.raises(pagewalk.ConnectError):
            client.machine()
    finally:
        daemon.stop()


def test_an_image_answers_as_its_machine_does(
    client: pagewalk.Client, paused: pagewalk.Machine, tmp_path: Path
) -> None:
    saved = client.save_image(tmp_path / "demo.toml", machine=paused.id)
    assert saved.memory == tmp_path / "demo.mem"
    assert saved.memory.stat().st_size == saved.memory_bytes == paused.memory_bytes
    assert 0 < saved.contents_bytes < saved.memory_bytes
    copy = client.attach(f"copy=image:{saved.description}")
    try:
        assert copy.landmarks == paused.landmarks
        assert copy.regions == paused.regions
        for mark in paused.landmarks:
            own, saved_one = (client.translate(mark.address, machine=name) for name in (paused.id, copy.id))
            assert (own.ok, str(own)) == (saved_one.ok, str(saved_one)), mark
        with pytest.raises(pagewalk.FailedPreconditionError):
            client.set_registers(pagewalk.Registers(cr3=0x1000), machine=copy.id)
    finally:
        client.detach(copy.id)
    with pytest.raises(FileExistsError):
        client.save_image(saved.description, machine=paused.id)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.mem", "demo.toml"]
