"""The client against a real daemon that serves the demo machine."""

from __future__ import annotations

import pytest
from conftest import Daemon

import pagewalk

FRAME = 0x000F_FFFF_FFFF_F000
NON_CANONICAL = 0x8000_0000_0000_0000


@pytest.fixture
def paused(client: pagewalk.Client) -> pagewalk.Machine:
    """Stop the guest, where it runs, so that answers can be compared with each other."""
    machine = client.machine()
    if machine.capabilities.can_pause:
        client.pause()
    return machine


@pytest.fixture(autouse=True)
def undisturbed(client: pagewalk.Client) -> object:
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


def test_every_landmark_is_answered(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    outcomes = [
        client.translate(mark.address, "read", privilege="supervisor", trace=True, explain=True)
        for mark in paused.landmarks
    ]
    for mark, outcome in zip(paused.landmarks, outcomes):
        assert outcome.provenance.machine == paused.id
        assert outcome.explanation, mark
        assert len(outcome.steps) <= 35
    assert {outcome.ok for outcome in outcomes} == {True, False}, "the demo shows pages and faults"


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


def test_non_canonical_addresses(client: pagewalk.Client) -> None:
    plain = client.translate(NON_CANONICAL)
    assert not plain.ok
    assert (plain.kind, plain.level, plain.dimension) == ("general_protection", 0, "guest")
    stack = client.translate(NON_CANONICAL, stack=True)
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


def test_walker_state_fits_the_registers(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    state = client.walker_state()
    cr3 = client.registers().cr3
    assert cr3 is not None
    assert state.gva_walk.root == cr3 & FRAME
    page_format = state.gva_walk.format
    assert page_format.mode in ("four_level", "five_level")
    assert page_format.levels == len(page_format.reserved_leaf) == len(page_format.reserved_table)
    assert len(page_format.permissions) == 16
    assert all(0 < word < 1 << 16 for word in page_format.permissions[:1])
    assert page_format.bits is not None
    assert page_format.bits.present == 1
    assert state.ngpa_walk is None
    assert state.nested.kind == "off"


def test_watch_starts_with_the_state_of_now(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    (state,) = client.watch(max_updates=1, timeout=10)
    assert state.gva_walk == client.walker_state().gva_walk


def test_watch_follows_a_change(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    watch = client.watch(max_updates=2, timeout=10)
    first = next(watch)
    client.set_nested(pagewalk.Npt(ncr3=0), walker_only=True)
    second = next(watch)
    assert second.provenance.generation > first.provenance.generation
    assert (first.ngpa_walk is None, second.ngpa_walk is None) == (True, False)
    assert list(watch) == []


def test_nested_mode_of_the_walker_alone(client: pagewalk.Client, paused: pagewalk.Machine) -> None:
    """An nCR3 that points at nothing mapped: the walk is refused in the second dimension, and comes back after."""
    mark = next(mark for mark in paused.landmarks if client.translate(mark.address, privilege="exempt").ok)
    change = client.set_nested(pagewalk.Npt(ncr3=0), walker_only=True)
    assert change.effect == "walker_only"
    assert change.reason
    assert change.state.nested.kind == "walker_only"
    assert isinstance(change.state.nested.second_dimension, pagewalk.Npt)
    refused = client.translate(mark.address, privilege="exempt", trace=True)
    assert not refused.ok
    assert refused.dimension == "nested"
    assert refused.steps[0].dimension == "nested"
    client.nested_off()
    assert client.translate(mark.address, privilege="exempt").ok


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


def test_unix_socket(daemon: Daemon) -> None:
    with pagewalk.connect(f"unix:{daemon.socket}") as client:
        assert client.machine().source == "demo"
