"""Writes the token files of a corpus piece by piece, so that a killed run can go on from the last record of its place.

The folder holds NAME_SPLIT_text_document.bin, and until the end also SPLIT.lengths (int32 per document), digests (16 bytes per
document) and progress.json: the place in the input, and the size that each file had there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from pydantic import TypeAdapter, ValidationError

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.config.json_file import LARGE, file_blocks, read_json
from incr_ds.data.documents import InputPlace
from incr_ds.data.encoding import EncodedBatch
from incr_ds.data.index_file import write_index
from incr_ds.data.selection import SPLITS
from incr_ds.errors import ConfigError

PROGRESS = "progress.json"
SECONDS_BETWEEN_RECORDS = 5.0  # of the place: the most work that a killed run loses


@dataclass(frozen=True)
class Counts:
    """Counts of one split. ``tokens`` includes end-of-text tokens, ``longest`` is the largest number of a document."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    longest: int = 0


@dataclass(frozen=True)
class CorpusProgress:
    """How far a corpus is written: the place in the input, the bytes of each file, and what was counted until there.

    ``read`` is in bytes of the input. ``not_text`` lists files that were skipped.
    """

    place: InputPlace
    read: int
    sizes: Mapping[str, int]
    counts: Mapping[str, Counts]
    not_text: tuple[str, ...]


_PROGRESS = TypeAdapter(CorpusProgress)


class TokenFiles:
    """The files of a corpus in ``folder`` while they are written. ``progress`` says how far."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._streams: dict[str, BinaryIO] = {}
        self._recorded = time.monotonic()
        self.progress = _recorded(folder, self._file_names())

    def _file_names(self) -> list[str]:
        return [*map(self.bin_name, SPLITS), *map(_lengths_name, SPLITS), "digests"]

    def bin_name(self, split: str) -> str:
        """Name of the file with the tokens of a split."""
        return f"{self._name}_{split}_text_document.bin"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the files for ``append`` in this block, cut to what ``progress`` says."""
        with ExitStack() as stack:
            for name, size in self.progress.sizes.items():
                stream = stack.enter_context(open(self._folder / name, "ab"))
                stream.truncate(size)
                self._streams[name] = stream
            yield
            self._record()

    def append(self, batch: EncodedBatch) -> None:
        """Write a batch, and from time to time record the place."""
        for split, tokens in batch.splits.items():
            self._streams[self.bin_name(split)].write(tokens.tokens)
            self._streams[_lengths_name(split)].write(tokens.lengths.tobytes())
        self._streams["digests"].write(batch.digests)
        self.progress = replace(
            self.progress,
            place=batch.after,
            read=batch.read,
            counts={split: _added(self.progress.counts[split], tokens) for split, tokens in batch.splits.items()},
            not_text=(*self.progress.not_text, *(str(item.path) for item in batch.not_text)),
        )
        if time.monotonic() - self._recorded >= SECONDS_BETWEEN_RECORDS:
            self._record()

    def _record(self) -> None:
        """Flush the files to disk, and then note how far they are."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self.progress = replace(self.progress, sizes={name: s.tell() for name, s in self._streams.items()})
        write_atomically(self._folder / PROGRESS, json.dumps(asdict(self.progress)) + "\n")
        self._recorded = time.monotonic()

    def write_indices(self, dtype: Any) -> None:
        """Write the index of each split."""
        for split in SPLITS:
            path = self._folder / self.bin_name(split)
            write_index(path.with_suffix(".idx"), self._folder / _lengths_name(split), dtype)

    def fingerprint(self) -> str:
        """Checksum of all documents in order, by their checksums."""
        digest = xxhash.xxh3_128()
        for block in file_blocks(self._folder / "digests"):
            digest.update(block)
        return digest.hexdigest()


def _recorded(folder: Path, names: list[str]) -> CorpusProgress:
    """The last recorded progress, or the beginning if there is none or the files do not have what it says."""
    path = folder / PROGRESS
    if path.is_file():
        try:
            found = _PROGRESS.validate_python(read_json(path, ConfigError, most=LARGE))
        except (ConfigError, ValidationError):
            return _beginning(names)
        present = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
        if set(found.sizes) == set(names) and all(present.get(name, -1) >= size for name, size in found.sizes.items()):
            return found
    return _beginning(names)


def _beginning(names: list[str]) -> CorpusProgress:
    return CorpusProgress(InputPlace(), 0, dict.fromkeys(names, 0), {split: Counts() for split in SPLITS}, ())


def _added(counts: Counts, tokens: Any) -> Counts:
    lengths = tokens.lengths
    return Counts(
        counts.documents + len(lengths),
        counts.tokens + int(lengths.sum()),
        counts.bytes + tokens.num_bytes,
        max(counts.longest, int(lengths.max(initial=0))),
    )


def _lengths_name(split: str) -> str:
    return f"{split}.lengths"
