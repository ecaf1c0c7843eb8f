"""Write an image, as the daemon streams it, into its two files."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
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


@contextmanager
def _unfinished(name: Path) -> Iterator[BinaryIO]:
    """Give a file under a name of its own, which gets its name when all went well."""
    if name.exists():
        raise FileExistsError(f"{name} exists already: remove it, or save under another name")
    part = name.with_name(name.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
        part.rename(name)
    finally:
        part.unlink(missing_ok=True)


def save(parts: Iterable[SaveImageResponse], description: Path, memory: Path) -> SavedImage:
    """Write both files, the description last: where it is, the image is whole."""
    with ExitStack() as files:
        # Left in the opposite order.
        text = files.enter_context(_unfinished(description))
        contents = files.enter_context(_unfinished(memory))
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
                return SavedImage(description, memory, memory_bytes=size, contents_bytes=received)
            else:
                raise _no_image(f"a part {kind} where it does not belong")
        raise _no_image("it ended before the image was whole")


def _no_image(problem: str) -> Error:
    return Error(f"the daemon's stream is no image: {problem}", code="DATA_LOSS")
