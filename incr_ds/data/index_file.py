"""The index of a Megatron data set (PREFIX.idx): checked before megatron-core maps it and trusts it, and written.

The file holds a header, then the length (int32) and the position in PREFIX.bin (int64, bytes) of each sequence. Last come
the number of the first sequence of each document and the number of sequences (int64).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from incr_ds.errors import ConfigError

# Magic, version, type code, number of sequences, number of document starts.
HEADER, MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"
# megatron-core's type codes of integers; 6 and 7 are floating point.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class DataIndex:
    """The header of an index file whose size agrees with it, and whose .bin is a list of whole tokens."""

    prefix: str
    dtype: np.dtype[Any]
    num_sequences: int
    num_document_starts: int

    @property
    def path(self) -> Path:
        """The .idx file."""
        return Path(self.prefix + ".idx")

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in the .bin file."""
        return os.path.getsize(self.prefix + ".bin") // self.dtype.itemsize

    def check(self) -> None:
        """Check every entry: sequences follow one another in the .bin, and documents consist of whole sequences.

        Raises ConfigError that names the first wrong entry.
        """
        lengths = self._array(np.int32, 0, self.num_sequences)
        pointers = self._array(np.int64, 4 * self.num_sequences, self.num_sequences)
        end = 0
        for first, stop in _blocks(self.num_sequences):
            sizes = lengths[first:stop].astype(np.int64)
            ends = end + np.cumsum(sizes) * self.dtype.itemsize
            self._check_all(sizes >= 0, first, "sequence {} has a negative length")
            self._check_all(pointers[first:stop] == ends - sizes * self.dtype.itemsize, first,
                            "sequence {} does not start where the one before it ends")  # fmt: skip
            end = int(ends[-1])
        if end != (found := os.path.getsize(self.prefix + ".bin")):
            raise ConfigError(
                f"{self.prefix}.bin: {found} bytes, but its .idx describes {end}; prepare the data again."
            )
        self._check_documents()

    def _check_documents(self) -> None:
        starts = self._array(np.int64, 12 * self.num_sequences, self.num_document_starts)
        if not len(starts) or starts[0] != 0 or starts[-1] != self.num_sequences:
            raise ConfigError(
                f"{self.path}: its documents do not start at sequence 0 and end at {self.num_sequences}; the file is damaged. "
                "Prepare the data again."
            )
        for first, stop in _blocks(len(starts) - 1):
            part = starts[first : stop + 1]
            self._check_all(part[:-1] <= part[1:], first, "document {} ends before it starts")

    def _array(self, dtype: Any, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=HEADER.size + offset, shape=(count,))

    def _check_all(self, correct: np.ndarray, first: int, what: str) -> None:
        if not correct.all():
            number = first + int(np.argmin(correct))
            raise ConfigError(f"{self.path}: {what.format(number)}; the file is damaged. Prepare the data again.")


def open_index(prefix: str) -> DataIndex:
    """Read the header of PREFIX.idx. The entries are not read: see ``DataIndex.check``.

    Raises ConfigError if a file is missing, is not an index of tokens, or has a size that its header does not describe.
    """
    for ending in (".bin", ".idx"):
        if not Path(prefix + ending).is_file():
            raise ConfigError(
                f"{prefix}{ending}: no such file; expected the path of a Megatron data set without the extension "
                "(tools/prepare_data.py makes one)."
            )
    path = Path(prefix + ".idx")
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or (fields := HEADER.unpack(header))[:2] != (MAGIC, 1):
        raise ConfigError(f"{path}: not a Megatron index file of version 1; prepare the data again.")
    _, _, code, sequences, starts = fields
    if code not in TOKEN_TYPES:
        raise ConfigError(
            f"{path}: type code {code} is not a type of token ids (expected one of {', '.join(map(str, TOKEN_TYPES))}); "
            "prepare the data again."
        )
    expected, found = HEADER.size + sequences * (4 + 8) + starts * 8, path.stat().st_size
    if expected != found:
        raise ConfigError(f"{path}: {found} bytes, but its header describes {expected}; prepare the data again.")
    index = DataIndex(prefix, np.dtype(TOKEN_TYPES[code]), sequences, starts)
    if left := os.path.getsize(prefix + ".bin") % index.dtype.itemsize:
        raise ConfigError(
            f"{prefix}.bin: ends {left} bytes into a token of {index.dtype.itemsize} bytes; copy it again."
        )
    return index


def write_index(path: Path, lengths: Path, dtype: Any) -> None:
    """Write the index of documents of one sequence each. ``lengths`` is a file of their lengths in tokens (int32).

    The bytes are those of megatron-core's writer, which keeps all entries in memory.
    """
    count = lengths.stat().st_size // 4
    code = next(code for code, kind in TOKEN_TYPES.items() if kind is dtype)
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        for sizes in _stored_lengths(lengths, count):
            stream.write(sizes.tobytes())
        position = 0
        for sizes in _stored_lengths(lengths, count):
            ends = position + np.cumsum(sizes, dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[position], ends[:-1]]).astype(np.int64).tobytes())
            position = int(ends[-1])
        for first, stop in _blocks(count + 1):
            stream.write(np.arange(first, stop, dtype=np.int64).tobytes())


def _stored_lengths(path: Path, count: int) -> Iterator[np.ndarray]:
    for first, stop in _blocks(count):
        yield np.fromfile(path, np.int32, stop - first, offset=4 * first)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _AT_ONCE):
        yield first, min(first + _AT_ONCE, count)
