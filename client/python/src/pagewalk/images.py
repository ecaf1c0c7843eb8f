"""Write an image, as the daemon streams it, into its two files."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pagewalk.answers import SavedImage
from pagewalk.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from pagewalk.v1.machine_pb2 import SaveImageResponse


def memory_of(description: Path) -> Path:
    """Name the memory's file of a description."""
    memory = description.with_suffix(".mem")
    if memory == description:
        raise ValueError(f"{description} is no name for a description, such as guest.toml")
    return memory


def _part_of(name: Path) -> Path:
    return name.with_name(name.name + ".part")


@contextmanager
def _unfinished(name: Path) -> Iterator[BinaryIO]:
    """Give a file under a name of its own, until that is done with."""
    _check_free(name)
    part = _part_of(name)
    try:
        file = part.open("xb")
    except FileExistsError:
        advice = "another save is under way, or one was killed: wait for it, or delete this file"
        raise FileExistsError(f"{part} exists already: {advice}") from None
    try:
        with file:
            yield file
    finally:
        part.unlink(missing_ok=True)


def _finish(name: Path, file: BinaryIO) -> None:
    """Give a whole file its name, unless that is taken by now."""
    file.flush()
    part = _part_of(name)
    try:
        os.link(part, name)
    except FileExistsError:
        raise _taken(name) from None
    except OSError as problem:
        if problem.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # The file system has no hard links: there is a moment between looking and renaming.
        _check_free(name)
        part.rename(name)


def _check_free(name: Path) -> None:
    # A link that leads nowhere takes a name, too.
    if os.path.lexists(name):
        raise _taken(name)


def _taken(name: Path) -> FileExistsError:
    return FileExistsError(f"{name} exists already: remove it, or save under another name")


def save(parts: Iterable[SaveImageResponse], description: Path, memory: Path) -> SavedImage:
    """Write both files, the description last: where it is, the image is whole."""
    with _unfinished(description) as text, _unfinished(memory) as contents:
        size: int | None = None
        received = 0
        for part in parts:
            kind = part.WhichOneof("part")
            if kind == "start" and size is None:
                size = part.start.memory_file_bytes
                text.write(part.start.description.encode())
                contents.truncate(size)
            elif kind == "piece" and size is not None:
                if part.piece.offset + len(part.piece.contents) > size:
                    raise _no_image(f"a piece at {part.piece.offset:#x}, in a memory of {size:#x}")
                contents.seek(part.piece.offset)
                received += contents.write(part.piece.contents)
            elif kind == "end" and size is not None:
                if part.end.contents_bytes != received:
                    raise _no_image(f"{received} bytes came, and {part.end.contents_bytes} were sent")
                _finish(memory, contents)
                try:
                    _finish(description, text)
                except Exception:
                    memory.unlink(missing_ok=True)
                    raise
                return SavedImage(description, memory, memory_bytes=size, contents_bytes=received)
            else:
                raise _no_image(f"a part {kind} where it does not belong")
        raise _no_image("it ended before the image was whole")


def _no_image(problem: str) -> Error:
    return Error(f"the daemon's stream is no image: {problem}", code="DATA_LOSS")
