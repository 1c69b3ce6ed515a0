"""Reads a whole data set once, for a fingerprint of its content and its smallest and largest token.

The .bin is read in chunks, so that any number of processes can share the work and get the same result. The result is
recorded, and is valid until a file changes: later starts compare size, times and inode of the two files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from incr_ds.config.json_file import file_blocks
from incr_ds.data.index_file import DataIndex, open_index
from incr_ds.errors import ConfigError

CHUNK_BYTES = 1 << 26


class _FingerprintFile(TypedDict):
    fingerprint: str
    tokens: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class _Entry:
    """What a record holds about one data set."""

    identity: dict[str, list[int]]
    content: _FingerprintFile


@dataclass(frozen=True)
class _Record:
    """Entries by path, and their checksum."""

    sets: dict[str, _Entry]
    checksum: str


_RECORD = TypeAdapter(_Record)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set with known content. ``fingerprint`` does not depend on where the files are.

    ``smallest`` and ``largest`` are token ids, ``tokens`` is the number of tokens. Without tokens both ids are 0.
    """

    prefix: str
    fingerprint: str
    tokens: int
    smallest: int
    largest: int

    def check_tokens(self, vocabulary_size: int) -> None:
        """Raise ConfigError if the data contains a token id without an embedding in the model."""
        if self.smallest < 0:
            raise ConfigError(
                f"{self.prefix}.bin: token id {self.smallest} is negative, which is not a valid id. Prepare the data again."
            )
        if self.largest >= vocabulary_size:
            raise ConfigError(
                f"{self.prefix}.bin: token id {self.largest} exceeds the model's vocab_size {vocabulary_size}; prepare the "
                "data with the model's tokenizer, or use a model with a larger vocabulary."
            )


@dataclass(frozen=True)
class TokenChunk:
    """One chunk of a .bin: xxh3 of its bytes, its smallest and its largest token."""

    digest: str
    smallest: int
    largest: int


def num_chunks(index: DataIndex) -> int:
    """Number of chunks of the .bin."""
    return math.ceil(index.num_tokens * index.dtype.itemsize / CHUNK_BYTES)


def scan_chunk(index: DataIndex, number: int) -> TokenChunk:
    """Read one chunk. Raises ConfigError if the file has become shorter."""
    path, per_chunk = Path(index.prefix + ".bin"), CHUNK_BYTES // index.dtype.itemsize
    count = min(per_chunk, index.num_tokens - number * per_chunk)
    tokens = np.fromfile(path, index.dtype, count, offset=number * CHUNK_BYTES)
    if len(tokens) != count:
        raise ConfigError(f"{path}: became shorter while it was being read; prepare the data again.")
    return TokenChunk(xxhash.xxh3_128_hexdigest(tokens.data), int(tokens.min()), int(tokens.max()))


def combine(index: DataIndex, chunks: Sequence[TokenChunk]) -> DataSet:
    """Build the data set from its index and all chunks of its .bin, in order. Raises ConfigError for a wrong index."""
    index.check()
    digest = xxhash.xxh3_128()
    for block in file_blocks(index.path):
        digest.update(block)
    for chunk in chunks:
        digest.update(chunk.digest.encode())
    return DataSet(
        prefix=index.prefix,
        fingerprint=digest.hexdigest(),
        tokens=index.num_tokens,
        smallest=min((chunk.smallest for chunk in chunks), default=0),
        largest=max((chunk.largest for chunk in chunks), default=0),
    )


def describe(prefix: str) -> DataSet:
    """Describe the data set PREFIX.bin and .idx in this process alone. Raises ConfigError if it is missing or damaged."""
    index = open_index(prefix)
    return combine(index, [scan_chunk(index, number) for number in range(num_chunks(index))])


def identity(prefix: str) -> dict[str, list[int]]:
    """Values that change if a file of the data set is written, replaced or moved: size, times in ns, inode."""
    states = {ending: os.stat(prefix + ending) for ending in (".bin", ".idx")}
    return {
        ending: [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for ending, state in states.items()
    }


def recorded(record: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, DataSet]:
    """The data sets in a record whose files have not changed since, by prefix. A damaged record gives none."""
    try:
        known = _RECORD.validate_python(record)
    except ValidationError:
        return {}
    if known.checksum != _checksum(record["sets"]):
        return {}
    found = {}
    for prefix in prefixes:
        entry = known.sets.get(os.path.abspath(prefix))
        if entry is not None and entry.identity == identity(prefix):
            found[prefix] = DataSet(prefix=prefix, **entry.content)
    return found


def record_of(sets: Iterable[DataSet]) -> dict[str, Any]:
    """A record of data sets, as JSON content."""
    entries = {
        os.path.abspath(found.prefix): {
            "identity": identity(found.prefix),
            "content": {key: value for key, value in asdict(found).items() if key != "prefix"},
        }
        for found in sets
    }
    return {"sets": entries, "checksum": _checksum(entries)}


def _checksum(sets: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(sets, sort_keys=True).encode())
