"""Reads input files as batches of documents, in an order and in pieces that depend on the files alone.

    name                             a document is
    *.jsonl, *.json.gz, *.json.zst   a line: a JSON object whose text key holds it
    *.parquet, *.arrow               a row: its text column holds it
    any other                        the whole file

.gz and .zst files are decompressed while they are read. A batch says where reading goes on after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incr_ds.config.json_file import open_regular
from incr_ds.data.blocks import text_blocks
from incr_ds.data.selection import Selection
from incr_ds.errors import ConfigError

BATCH_BYTES, BATCH_PIECES = 1 << 18, 64
LONGEST_DOCUMENT = 1 << 30  # bytes; a tokenizer needs about twenty times as much memory for it
_TOO_LONG = f"longer than {LONGEST_DOCUMENT:,} bytes, the most that one document may have; cut it into several."
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")


@dataclass(frozen=True, order=True)
class InputPlace:
    """Where reading stands: in file number ``file``, before record ``record`` (a line or a row, from 0).

    In a file of lines, ``offset`` is the number of bytes of the decompressed text before that line.
    """

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Records:
    """Some records of a file that follow one another: a whole text or whole lines as bytes, or rows as they were read.

    ``first`` is the number of the first record, from 1.
    """

    path: Path
    first: int
    content: bytes | list[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of text, about."""
        return len(self.content) if isinstance(self.content, bytes) else sum(len(text or "") for text in self.content)


@dataclass(frozen=True)
class Batch:
    """Pieces that are tokenized together. ``after`` is the place behind them, and ``read`` the bytes of files up to it."""

    pieces: tuple[Records, ...]
    after: InputPlace
    read: int


@dataclass(frozen=True)
class NotText:
    """A file that should be one document, and is not UTF-8 from byte ``position`` on."""

    path: Path
    position: int


def read_batches(selection: Selection, start: InputPlace, key: str) -> Iterator[Batch]:
    """Yield the records of the selected files from ``start`` on. Raises ConfigError for a file that cannot be read."""
    pieces: list[Records] = []
    num_bytes, before = 0, sum(selection.sizes[: start.file])
    for number in range(start.file, len(selection.files)):
        inner = start if number == start.file else InputPlace(number)
        for piece, after, read in _pieces(selection.files[number], inner, key):
            pieces.append(piece)
            num_bytes += piece.num_bytes
            if num_bytes >= BATCH_BYTES or len(pieces) == BATCH_PIECES:
                yield Batch(tuple(pieces), after, before + read)
                pieces, num_bytes = [], 0
        before += selection.sizes[number]
    if pieces:
        yield Batch(tuple(pieces), InputPlace(len(selection.files)), before)


def most_batches(selection: Selection) -> int:
    """About the number of batches of the files, if they are not compressed."""
    return 1 + selection.total_bytes // BATCH_BYTES


def documents_of(piece: Records, key: str) -> Iterator[str | NotText]:
    """The documents of a piece, empty ones left out. Raises ConfigError that names file, line or row, and what was found."""
    if isinstance(piece.content, list):
        yield from _rows(piece, piece.content, key)
    elif _is_lines(piece.path):
        yield from _json_lines(piece, piece.content, key)
    elif piece.content:
        try:
            yield piece.content.decode("utf-8")
        except UnicodeDecodeError as error:
            yield NotText(piece.path, error.start)


def check_readers(files: Sequence[Path]) -> None:
    """Import what the files need beyond the packages of every installation. Raises ModuleNotFoundError if it is missing."""
    if any(path.suffix == ".zst" for path in files):
        import zstandard  # noqa: F401
    if any(_is_table(path) for path in files):
        import incr_ds.data.tables  # noqa: F401


def _is_lines(path: Path) -> bool:
    return path.name.endswith(_LINES)


def _is_table(path: Path) -> bool:
    return path.suffix in (".parquet", ".arrow")


def _pieces(path: Path, start: InputPlace, key: str) -> Iterator[tuple[Records, InputPlace, int]]:
    """The pieces of a file, each with the place behind it and the bytes of the file that were read so far."""
    try:
        with open_regular(path) as stream:
            if _is_table(path):
                from incr_ds.data.tables import read_rows  # pyarrow takes a moment to import, and is an extra

                for first, rows, read in read_rows(stream, path, start.record, key):
                    yield Records(path, first + 1, rows), InputPlace(start.file, first + len(rows)), read
            elif _is_lines(path):
                for lines, before, after in _whole_lines(text_blocks(stream, path, start.offset), path, start):
                    yield Records(path, before.record + 1, lines), after, stream.tell()
            else:
                yield (
                    Records(path, 1, _whole_text(text_blocks(stream, path), path)),
                    InputPlace(start.file + 1),
                    stream.tell(),
                )
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:  # a pipe or a device
        raise ConfigError(f"--input {path}: cannot be read ({error}).") from error


def _whole_lines(
    blocks: Iterator[bytes], path: Path, start: InputPlace
) -> Iterator[tuple[bytes, InputPlace, InputPlace]]:
    """Cut blocks behind their last line break. Yields the lines, and the places before and behind them."""
    place, held, length = start, list[bytes](), 0
    for block in blocks:
        cut = block.rfind(b"\n") + 1
        if cut:
            lines = b"".join([*held, block[:cut]])
            after = InputPlace(place.file, place.record + lines.count(b"\n"), place.offset + len(lines))
            yield lines, place, after
            place, held, length = after, [], 0
        held.append(block[cut:])
        length += len(block) - cut
        if length > LONGEST_DOCUMENT:
            raise ConfigError(f"--input {path}, line {place.record + 1}: {_TOO_LONG}")
    if length:
        yield b"".join(held), place, InputPlace(place.file, place.record + 1, place.offset + length)


def _whole_text(blocks: Iterator[bytes], path: Path) -> bytes:
    text = bytearray()
    for block in blocks:
        text += block
        if len(text) > LONGEST_DOCUMENT:
            raise ConfigError(f"--input {path}: {_TOO_LONG}")
    return bytes(text)


def _json_lines(piece: Records, content: bytes, key: str) -> Iterator[str]:
    for number, line in enumerate(content.split(b"\n"), start=piece.first):
        try:
            if not (shown := line.decode("utf-8")).strip():
                continue
            found = json.loads(shown)
        except UnicodeDecodeError as error:
            raise ConfigError(f"--input {piece.path}, line {number}: not UTF-8 text (byte {error.start}).") from error
        except (ValueError, RecursionError) as error:
            raise _no_object(piece, number, key, f"no JSON ({error})") from error
        if not isinstance(found, dict):
            raise _no_object(piece, number, key, f"a {type(found).__name__}")
        if key not in found:
            raise _no_object(piece, number, key, f"the keys {', '.join(found)}" if found else "no keys")
        yield from _checked(found[key], f"{piece.path}, line {number}", key)


def _no_object(piece: Records, number: int, key: str, found: str) -> ConfigError:
    return ConfigError(
        f"--input {piece.path}, line {number}: expected a JSON object with the key {key} (option --text-key), "
        f"found {found:.300}."
    )


def _rows(piece: Records, rows: list[Any], key: str) -> Iterator[str]:
    for number, text in enumerate(rows, start=piece.first):
        yield from _checked(text, f"{piece.path}, row {number}", key)


def _checked(text: Any, where: str, key: str) -> Iterator[str]:
    """A text that is not empty, as it is."""
    if not isinstance(text, str):
        raise ConfigError(f"--input {where}: {key} is {type(text).__name__}, expected a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--input {where}: {key} has half of a surrogate pair ({text[error.start]!r}), which is not valid Unicode."
        ) from error
    if text:
        yield text
