"""Files that others wrote: small ones whole, within bounds; large ones in blocks, at the speed of memory."""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from incr_ds.errors import CheckpointError, IncrError

SMALL, LARGE = 16 << 20, 256 << 20  # bytes: of a config; of a file that lists every tensor, or every logged step
DEEPEST = 64  # containers within containers; no format that is read here has more than ten
_BLOCK = 1 << 20
_POINTER = b"version https://git-lfs"
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


def read_text(path: Path, kind: type[IncrError], hint: str = ".", most: int = SMALL) -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes.

    Raises ``kind`` for anything else, a pipe or a device included: the path, what is wrong, and ``hint``, the rest of the
    message.
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
    """The JSON object in a file, as ``read_text`` reads it.

    Raises ``kind`` also for text that is not JSON, for keys that appear twice, for more than DEEPEST levels, and unless
    ``finite`` is False, for numbers that are not finite.
    """
    content = parse_json(read_text(path, kind, hint, most), kind, str(path), hint, finite=finite)
    if not isinstance(content, dict):
        raise kind(f"{path}: expected a JSON object, found {type(content).__name__}{hint}")
    return content


def parse_json(text: str, kind: type[IncrError], where: str, hint: str = ".", *, finite: bool = True) -> Any:
    """JSON text under the rules of ``read_json``; ``where`` names its origin."""
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


def regular_bytes(path: Path, most: int | None = None) -> bytes:
    """A regular file's content. ValueError if the file is of another kind, or has more than ``most`` bytes; OSError."""
    # Without O_NONBLOCK, opening a pipe waits for whoever writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise ValueError(f"{_KINDS.get(kind, 'a special file')}, not a regular file")
        content = bytearray()
        while block := os.read(descriptor, _BLOCK):
            content += block
            if most is not None and len(content) > most:
                raise ValueError(f"more than {most:,} bytes, the largest that is read")
    finally:
        os.close(descriptor)
    return bytes(content)


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
