"""Reads parts of tensors from .distcp files. A file holds one archive of torch.save after the other."""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from incr_ds.checkpoint.megatron_core.flattened import Rectangle, part_of
from incr_ds.checkpoint.megatron_core.metadata import Chunk, Place, StoredTensor
from incr_ds.checkpoint.torch_file.extents import STORAGES, are_rows
from incr_ds.checkpoint.torch_file.plain import plain_content
from incr_ds.checkpoint.torch_file.validate import named_damage, walk_archive
from incr_ds.config.json_file import refuse_pointer
from incr_ds.errors import CheckpointError

_HEADER = struct.Struct("<26xHH")  # of a record: length of the name, length of the extra field
_BLOCK = 8 << 20


class _View(io.RawIOBase):
    """The bytes of one place, as a file that can be searched."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self._descriptor, self._place, self._position = descriptor, place, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._place.length)[whence]
        if self._position < 0:
            raise ValueError("a position before its start")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._place.length - self._position))
        found = os.pread(self._descriptor, wanted, self._place.offset + self._position)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


class Shards:
    """The .distcp files of a folder. Any number of threads may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._starts: dict[tuple[Place, str], int] = {}
        self._lock = threading.Lock()

    def rows(self, stored: StoredTensor, first: int, stop: int, stack: tuple[int, ...] = ()) -> torch.Tensor:
        """Rows [first, stop) of a tensor, or of the one at ``stack`` if several are stacked in it."""
        found = torch.empty((stop - first, *stored.shape[len(stack) + 1 :]), dtype=stored.type)
        if stored.parts is not None:
            self._fill_from_parts(found, stored, first, stack)
            return found
        for chunk in stored.at(stack):
            rectangle, start = _of_stack(chunk, stack)
            if rectangle is None or not (wanted := rectangle.rows(first, stop)):
                continue
            place = rectangle.place(first, stop)
            elements = self._elements(stored, chunk, start + wanted.start, len(wanted))
            found[place] = elements.view(found[place].shape)
        return found

    def _fill_from_parts(self, found: torch.Tensor, stored: StoredTensor, first: int, stack: tuple[int, ...]) -> None:
        """Fill rows from ``first`` on of a tensor, or of the one at ``stack``, whose parts are flattened."""
        stop, parts = first + len(found), dict[Rectangle, torch.Tensor]()
        for chunk in stored.at(stack):
            *number, offset = chunk.offsets
            part = part_of(stored, number, stack)
            if part is None:
                continue
            wanted = part.rows(first, stop)
            begin, end = max(offset, wanted.start), min(offset + chunk.sizes[-1], wanted.stop)
            if begin < end:
                elements = parts.setdefault(part, torch.empty(len(wanted), dtype=stored.type))
                elements[begin - wanted.start : end - wanted.start] = self._elements(
                    stored, chunk, begin - offset, end - begin
                )
        for part, elements in parts.items():
            place = part.place(first, stop)
            found[place] = elements.view(found[place].shape)

    def content(self, place: Place) -> Any:
        """A serialized object as plain data. Nothing in it is run."""
        with self._named_failures(place):
            return plain_content(self._folder / place.file, self._archive(place))

    def check(self, stored: StoredTensor) -> None:
        """Check every chunk's extent and checksum."""
        for chunk in stored.chunks:
            self._start(stored, chunk)
            self._check_sum(chunk.place)

    def _elements(self, stored: StoredTensor, chunk: Chunk, first: int, count: int) -> torch.Tensor:
        dtype, place = stored.type, chunk.place
        position = place.offset + self._start(stored, chunk) + first * dtype.itemsize
        buffer = bytearray(count * dtype.itemsize)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            read = os.preadv(self._descriptor(place), [view[done:]], position + done)
            if not read:
                raise CheckpointError(self._cut_off(place))
            done += read
        return torch.frombuffer(buffer, dtype=dtype)

    def _start(self, stored: StoredTensor, chunk: Chunk) -> int:
        """Where the numbers of a chunk begin in its archive, after a check that they are there and are what is stated."""
        key = (chunk.place, stored.dtype)
        if key not in self._starts:
            archive, tensors = self._opened(chunk.place)
            path = self._folder / chunk.place.file
            problem = _difference(stored, chunk, tensors)
            if problem:
                raise CheckpointError(
                    f"{path}: at byte {chunk.place.offset}: {problem}. The file is another's, or is damaged."
                )
            (_, _, record, _, _), offset, *_ = tensors[0]
            inside = next(item for item in archive.infolist() if item.filename.endswith(f"/data/{record}"))
            self._starts[key] = self._data(chunk.place, inside) + offset * stored.type.itemsize
        return self._starts[key]

    def _opened(self, place: Place) -> tuple[zipfile.ZipFile, list[tuple[Any, ...]]]:
        with self._named_failures(place):
            archive = self._archive(place)
            return archive, walk_archive(self._folder / place.file, archive)[1]

    def _named_failures(self, place: Place) -> AbstractContextManager[None]:
        return named_damage(self._folder / place.file, f"at byte {place.offset}: ")

    def _archive(self, place: Place) -> zipfile.ZipFile:
        descriptor = self._descriptor(place)
        if place.offset + place.length > os.fstat(descriptor).st_size:
            raise CheckpointError(self._cut_off(place))
        return zipfile.ZipFile(io.BufferedReader(_View(descriptor, place)))

    def _data(self, place: Place, record: zipfile.ZipInfo) -> int:
        """Where a record's data begins in its archive."""
        header = os.pread(self._descriptor(place), _HEADER.size, place.offset + record.header_offset)
        name, extra = _HEADER.unpack(header)
        start = record.header_offset + _HEADER.size + int(name) + int(extra)
        if record.header_offset < 0 or start + record.file_size > place.length:
            raise CheckpointError(self._cut_off(place))
        return start

    def _check_sum(self, place: Place) -> None:
        for record in self._archive(place).infolist():
            found = 0
            for block in self._blocks(place, self._data(place, record), record.file_size):
                found = crc32(block, found)
            if record.CRC and found != record.CRC:
                raise CheckpointError(
                    f"{self._folder / place.file}: at byte {place.offset}: record {record.filename} is damaged (its CRC-32 is "
                    f"{found:08x}, but torch.save stored {record.CRC:08x}). Copy the file again, or use another iteration."
                )

    def _blocks(self, place: Place, start: int, size: int) -> Iterator[bytes]:
        for begin in range(0, size, _BLOCK):
            yield os.pread(self._descriptor(place), min(_BLOCK, size - begin), place.offset + start + begin)

    def _descriptor(self, place: Place) -> int:
        with self._lock:
            if place.file not in self._files:
                path = self._folder / place.file
                if not path.is_file():
                    raise CheckpointError(
                        f"{path}: missing; the checkpoint is incomplete. Copy the file back or use another iteration."
                    )
                refuse_pointer(path)
                self._files[place.file] = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._files[place.file])
            return self._files[place.file]

    def _cut_off(self, place: Place) -> str:
        path = self._folder / place.file
        return (
            f"{path}: damaged or truncated ({path.stat().st_size} bytes): bytes {place.offset} to "
            f"{place.offset + place.length} do not hold what .metadata states. Copy the file again, or use another iteration."
        )


def _of_stack(chunk: Chunk, stack: tuple[int, ...]) -> tuple[Rectangle | None, int]:
    """What a chunk holds of the tensor at ``stack``, if anything, and the number of its elements that stand before it."""
    offsets, sizes, start = chunk.offsets, chunk.sizes, 0
    for number in stack:
        if not offsets[0] <= number < offsets[0] + sizes[0]:
            return None, 0
        start += (number - offsets[0]) * math.prod(sizes[1:])
        offsets, sizes = offsets[1:], sizes[1:]
    return Rectangle(offsets, sizes), start


def _difference(stored: StoredTensor, chunk: Chunk, tensors: list[tuple[Any, ...]]) -> str:
    """What an archive's tensor has in another way than its chunk; "" if nothing."""
    if len(tensors) != 1:
        return f"expected one tensor, found {len(tensors)}"
    (_, storage, *_), _, size, strides, *_ = tensors[0]
    if tuple(size) != chunk.sizes:
        return f"expected shape {list(chunk.sizes)}, found {list(size)}"
    if STORAGES.get(storage.name) != stored.type:
        return f"expected {stored.dtype}, found a {storage.name}"
    return "" if are_rows(size, strides) else f"the strides {list(strides)} are not those of rows one after the other"
