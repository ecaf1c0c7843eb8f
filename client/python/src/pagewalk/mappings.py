"""Mappings of an address space, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

import grpc

from pagewalk import convert, errors
from pagewalk.v1 import mapping_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagewalk.answers import Fault, Provenance, Translation

#: First address, and first address behind the range; None for no bound.
Range = tuple[Union[int, str, None], Union[int, str, None]]
PageSizeName = Literal["4k", "2m", "4m", "1g", "unpaged"]


@dataclass(frozen=True)
class Extent:
    """Guest virtual addresses, next to each other, that mean the same."""

    start: int
    #: Length in bytes.
    bytes: int
    #: What the first address means; the others mean as much further on. `accessed` and `dirty` are set where they are
    #: for any of the pages. A fault is that of the first address.
    outcome: Translation | Fault

    @property
    def ok(self) -> bool:
        """Whether it is mapped."""
        return self.outcome.ok

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.bytes

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}: {self.outcome}"


@dataclass(frozen=True)
class Tally:
    """What was met on the way."""

    tables: int
    entries: int
    extents: int
    mapped_bytes: int
    unbacked_tables: int
    reserved_entries: int
    nested_refusals: int


class Mappings(Iterator[Extent]):
    """Extents as they come; what is said of all of them is known when the last one has been taken.

    Closing it ends the work. A daemon that stops before the end raises an `errors.Error`.
    """

    #: Where to go on, if the budget was used up; None while extents come and where the list is complete.
    continue_at: int | None = None
    #: The address that has been reached; None before the first part of the answer, 0 at the end of a complete list. It
    #: goes on while nothing is found, for another thread to look at.
    position: int | None = None
    #: What was met so far; None before the first part of the answer.
    tally: Tally | None = None
    #: Where the answer comes from; None before its first part.
    provenance: Provenance | None = None
    _LAST: ClassVar[str] = "the daemon ended the list before its end: ask again"

    def __init__(self, stream: Any, target: str, *, tls: bool) -> None:  # noqa: ANN401, one of three calls
        self._stream = stream
        self._target = target
        self._tls = tls
        self._extents = self._all()

    def __next__(self) -> Extent:
        return next(self._extents)

    def close(self) -> None:
        """End the call, if it is still under way."""
        self._stream.cancel()

    def _all(self) -> Iterator[Extent]:
        last = False
        try:
            for part in self._stream:
                last = part.last
                self.provenance = convert.provenance(part.provenance)
                self.tally = _tally(part.tally)
                self.position = part.position
                if part.HasField("truncation"):
                    self.continue_at = part.truncation.continue_at
                for extent in part.extents:
                    outcome = convert.extent_outcome(extent, self.provenance)
                    yield Extent(start=extent.start, bytes=extent.bytes, outcome=outcome)
        except grpc.RpcError as failure:
            raise errors.from_rpc(failure, self._target, tls=self._tls) from None
        finally:
            self._stream.cancel()
        if not last:
            raise errors.Error(self._LAST, code="UNKNOWN")


def _tally(message: mapping_pb2.MappingTally) -> Tally:
    return Tally(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def to_range(bounds: Range | None) -> mapping_pb2.GvaRange | None:
    """Write a range."""
    if bounds is None:
        return None
    start, end = bounds
    return mapping_pb2.GvaRange(
        start=None if start is None else convert.to_address(start, "start"),
        end=None if end is None else convert.to_address(end, "end"),
    )


def to_filter(
    write: bool | None, execute: bool | None, user: bool | None, page_sizes: Iterable[PageSizeName]
) -> mapping_pb2.MappingFilter:
    """Write a filter."""
    sizes = types_pb2.PageSize.DESCRIPTOR
    numbers = [convert.number(sizes, size, "page_sizes") for size in page_sizes]
    return mapping_pb2.MappingFilter(write=write, execute=execute, user=user, page_sizes=numbers)


def to_budget(max_entries: int | None, max_extents: int | None) -> mapping_pb2.MappingBudget:
    """Write a budget."""
    return mapping_pb2.MappingBudget(entries=max_entries, extents=max_extents)
