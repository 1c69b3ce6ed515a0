"""A file's bytes from front to back, at the speed of memory; and whether they are its own."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from incr_ds.errors import CheckpointError

_BLOCK = 1 << 20
_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """CheckpointError if a file is what git-lfs leaves in place of one that was not fetched."""
    with open(path, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path}: a git-lfs pointer in place of the file, which was not fetched: run `git lfs pull` in the repository "
                "(after `git lfs install`), or download the file."
            )


def file_blocks(path: Path, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """A file's content, or ``length`` bytes of it from ``offset``, in order. Each block is valid until the next is asked for.

    The buffer begins on a page. One that ``bytearray`` makes begins 16 bytes behind one, and where source and target of a
    copy lie so in their pages, the kernel's copy took four times as long on an AMD EPYC (see docs/DECISIONS.md).
    """
    buffer = memoryview(mmap.mmap(-1, _BLOCK))
    left = path.stat().st_size - offset if length is None else length
    with open(path, "rb", buffering=0) as stream:
        stream.seek(offset)
        while left > 0 and (count := stream.readinto(buffer[: min(_BLOCK, left)])):
            yield buffer[:count]
            left -= count
