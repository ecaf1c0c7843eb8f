"""Columns: `repeated fixed64` fields that hold tens of thousands of words.

Packed, such a field is plain little-endian words on the wire. The generated messages turn it into a Python number for
each word; the twins here, which have the same encoding, call it bytes.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from pagewalk.v1 import translation_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

#: As many addresses as one request may have.
MOST = 1 << 18

_COLUMNS = {
    "BatchTranslateRequest": "addresses",
    "BatchTranslateResponse": "words",
    "StreamTranslateRequest": None,
    "StreamTranslateResponse": None,
}
_PACKAGE = "pagewalk.columns"


def _twins() -> dict[str, Any]:
    contract = descriptor_pb2.FileDescriptorProto()
    translation_pb2.DESCRIPTOR.CopyToProto(contract)
    file = descriptor_pb2.FileDescriptorProto(
        name="pagewalk/columns.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[contract.name, *contract.dependency],
    )
    for message in contract.message_type:
        if message.name not in _COLUMNS:
            continue
        twin = file.message_type.add()
        twin.CopyFrom(message)
        for field in twin.field:
            if field.name == _COLUMNS[message.name]:
                # Repeated, as a packed field may come in pieces.
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
            elif field.type_name.rpartition(".")[2] in _COLUMNS:
                field.type_name = f".{_PACKAGE}.{field.type_name.rpartition('.')[2]}"
    pool = descriptor_pool.Default()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _COLUMNS
    }


_TWINS = _twins()
BatchRequest: Any = _TWINS["BatchTranslateRequest"]
BatchResponse: Any = _TWINS["BatchTranslateResponse"]
StreamRequest: Any = _TWINS["StreamTranslateRequest"]
StreamResponse: Any = _TWINS["StreamTranslateResponse"]


def numpy_of(column: object) -> Any:  # noqa: ANN401, the module, which may not be there
    """Give numpy if `column` is an array of its kind, else None."""
    module: Any = sys.modules.get("numpy")
    return module if module is not None and isinstance(column, module.ndarray) else None


def column(addresses: Any) -> Any:  # noqa: ANN401, a numpy array or numbers
    """Give a numpy array as it is, and other numbers, which may come but once, as an `array.array`."""
    if numpy_of(addresses) is not None:
        return addresses
    try:
        return array("Q", addresses)
    except OverflowError as error:
        raise ValueError(f"an address does not fit 64 bits: {error}") from None


def to_bytes(addresses: Any) -> bytes:  # noqa: ANN401, what `column` gives
    """Turn a column of addresses into little-endian words."""
    numpy = numpy_of(addresses)
    if numpy is not None:
        if addresses.ndim != 1 or addresses.dtype.kind not in "ui":
            raise ValueError(f"addresses must be one column of integers, not {addresses.ndim} of {addresses.dtype}")
        if addresses.dtype.kind == "i" and addresses.size and addresses.min() < 0:
            raise ValueError("addresses cannot be negative: use dtype uint64")
        return bytes(numpy.ascontiguousarray(addresses, dtype="<u8").tobytes())
    if sys.byteorder == "big":
        addresses = addresses[:]
        addresses.byteswap()
    return bytes(addresses.tobytes())


def from_bytes(pieces: Iterable[bytes], like: object) -> Any:  # noqa: ANN401, a numpy array or an array
    """Turn little-endian words into a column of the same kind as `like`; one piece is not copied for numpy."""
    whole = list(pieces)
    data = whole[0] if len(whole) == 1 else b"".join(whole)
    numpy = numpy_of(like)
    if numpy is not None:
        return numpy.frombuffer(data, dtype="<u8")
    words = array("Q", data)
    if sys.byteorder == "big":
        words.byteswap()
    return words
