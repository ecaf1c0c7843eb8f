"""Batches: each word means what a single translation says, for sequences and for numpy arrays."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import pytest

import pagewalk
from pagewalk.columns import MOST

if TYPE_CHECKING:
    from conftest import Daemon

np = pytest.importorskip("numpy")


def addresses(client: pagewalk.Client) -> list[int]:
    return [mark.address + offset for mark in client.machine().landmarks for offset in (0, 8)]


def agree(client: pagewalk.Client, batch: pagewalk.BatchTranslation, asked: list[int]) -> None:
    assert len(batch) == len(asked)
    told = dict(batch.faults)
    mapped = 0
    for at, address in enumerate(asked):
        single = client.translate(address, privilege="supervisor")
        assert bool(batch.ok[at]) == single.ok, hex(address)
        if single.ok:
            assert int(batch.gpa[at]) == single.gpa, hex(address)
            mapped += 1
        else:
            assert batch.gpa[at] == 0
            fault = told.pop(at)
            assert (fault.kind, fault.error_code, fault.entry) == (single.kind, single.error_code, single.entry)
    assert not told
    assert batch.fault_count == len(batch.faults) == len(asked) - mapped
    assert mapped > 0


@pytest.fixture
def still(client: pagewalk.Client) -> list[int]:
    if client.machine().capabilities.can_pause:
        client.pause()
    return addresses(client)


def test_numbers(client: pagewalk.Client, still: list[int]) -> None:
    batch = client.translate_batch(still, privilege="supervisor")
    assert isinstance(batch.words, array)
    agree(client, batch, still)


def test_numbers_that_come_once(client: pagewalk.Client, still: list[int]) -> None:
    batch = client.translate_batch(iter(still), privilege="supervisor")
    assert list(batch.addresses) == still
    agree(client, batch, still)


def test_validated(client: pagewalk.Client, still: list[int]) -> None:
    batch = client.translate_batch(still, privilege="supervisor", validate=True)
    agree(client, batch, still)
    assert [(source.validated, source.torn) for source in batch.provenances] == [(True, False)]


@pytest.mark.parametrize("dtype", ["<u8", ">u8"])
def test_arrays(client: pagewalk.Client, still: list[int], dtype: str) -> None:
    column = np.array(still, dtype=np.uint64).astype(dtype)
    batch = client.translate_batch(column, privilege="supervisor")
    assert isinstance(batch.words, np.ndarray)
    agree(client, batch, still)


def test_more_than_one_request(client: pagewalk.Client, still: list[int]) -> None:
    column = np.resize(np.array(still, dtype=np.uint64), 2 * MOST + 17)
    batch = client.translate_batch(column, privilege="supervisor", max_faults=2)
    assert len(batch.provenances) == 3
    alone = client.translate_batch(column[: len(still)], privilege="supervisor")
    assert (batch.words == np.resize(alone.words, len(column))).all()
    assert [at for at, _ in batch.faults][:1] == [alone.faults[0][0]]
    assert max(at for at, _ in batch.faults) > MOST


def test_nothing_asked(client: pagewalk.Client) -> None:
    empty: list[Any] = [[], np.array([], dtype=np.uint64)]
    for nothing in empty:
        batch = client.translate_batch(nothing)
        assert (len(batch), batch.fault_count, batch.provenances) == (0, 0, ())


@pytest.mark.parametrize("bad", [[1 << 64], [-1], np.array([-1]), np.array([1.5]), np.zeros((2, 2), dtype=np.uint64)])
def test_what_is_no_column_of_addresses(client: pagewalk.Client, bad: Any) -> None:
    with pytest.raises(ValueError, match="address"):
        client.translate_batch(bad)


def test_refusals(client: pagewalk.Client, daemon: Daemon) -> None:
    with pytest.raises(pagewalk.InvalidArgumentError, match="max_faults"):
        client.translate_batch([0], max_faults=1 << 20)
    with pytest.raises(pagewalk.NotFoundError):
        client.translate_batch(np.zeros(MOST + 1, dtype=np.uint64), machine="no such machine")
    with pagewalk.connect(f"unix:{daemon.socket}") as local:
        assert len(local.translate_batch([0])) == 1
