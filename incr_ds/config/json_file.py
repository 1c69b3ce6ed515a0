"""Reads files that others wrote: small ones at once and within limits, large ones in blocks at memory speed."""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from incr_ds.errors import CheckpointError, IncrError

SMALL, LARGE = 16 << 20, 256 << 20  # bytes: for a config; for a file that lists every tensor or every logged step
DEEPEST = 64  # nested containers; no format that is read here has more than ten
_BLOCK = 1 << 20
_POINTER = b"version https://git-lfs"
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


def read_text(path: Path, kind: type[IncrError], hint: str = ".", most: int = SMALL) -> str:
    """Read the UTF-8 text of a regular file of at most ``most`` bytes.

    Raises ``kind`` for anything else, including a pipe or a device. The message has the path, what is wrong, and
    ``hint`` at its end.
    """
    try:
        return regular_bytes(path, most).decode("utf-8")
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror}){hint}") from error
    except ValueError as error:  # a NUL in the path, text that is not UTF-8, and what regular_bytes refuses
        raise kind(f"{path}: cannot be read ({error}){hint}") from error


def read_json(
    path: Path, kind: type[IncrError], hint: str = ".", most: int = SMALL, *, finite: bool = True
) -> dict[str, Any]:
    """Read a file that holds a JSON object, within the limits of ``read_text``.

    Also raises ``kind`` for text that is not JSON, for duplicate keys, for more than DEEPEST levels, and for numbers
    that are not finite unless ``finite`` is False.
    """
    content = parse_json(read_text(path, kind, hint, most), kind, str(path), hint, finite=finite)
    if not isinstance(content, dict):
        raise kind(f"{path}: expected a JSON object, found {type(content).__name__}{hint}")
    return content


def parse_json(text: str, kind: type[IncrError], where: str, hint: str = ".", *, finite: bool = True) -> Any:
    """Parse JSON text under the rules of ``read_json``. Errors name ``where`` as its origin."""
    too_deep = f"{where}: not valid JSON here: nested more than {DEEPEST} levels deep{hint}"
    rules: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats, **rules)
    except ValueError as error:
        raise kind(f"{where}: not valid JSON: {error}{hint}") from error
    except RecursionError as error:
        raise kind(too_deep) from error
    if _is_deep(content):
        raise kind(too_deep)
    return content


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if git-lfs left a pointer in place of the file."""
    with open(path, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path}: a git-lfs pointer in place of the file, which was not fetched: run `git lfs pull` in the repository "
                "(after `git lfs install`), or download the file."
            )


def file_blocks(path: Path, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """Yield a file's content in order, or ``length`` bytes of it from ``offset``. A block is valid until the next one.

    The buffer starts at a page boundary. A ``bytearray`` starts 16 bytes behind one, and when source and target of a
    copy are offset like that, the kernel's copy took four times as long on an AMD EPYC (see docs/DECISIONS.md).
    """
    buffer = memoryview(mmap.mmap(-1, _BLOCK))
    left = path.stat().st_size - offset if length is None else length
    with open(path, "rb", buffering=0) as stream:
        stream.seek(offset)
        while left > 0 and (count := stream.readinto(buffer[: min(_BLOCK, left)])):
            yield buffer[:count]
            left -= count


def regular_bytes(path: Path, most: int | None = None) -> bytes:
    """Read a regular file. Raises ValueError for any other kind of file or more than ``most`` bytes, and OSError."""
    content = bytearray()
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            content += block
            if most is not None and len(content) > most:
                raise ValueError(f"more than {most:,} bytes, the most that is read")
    return bytes(content)


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading. Raises ValueError for any other kind of file, and OSError."""
    # Without O_NONBLOCK, opening a pipe blocks until another process opens it for writing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise ValueError(f"{_KINDS.get(kind, 'a special file')}, not a regular file")
    return FileIO(descriptor, "rb")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _is_deep(content: Any) -> bool:
    level = _containers([content])
    for _ in range(DEEPEST):
        level = [
            inner for outer in level for inner in _containers(outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]
