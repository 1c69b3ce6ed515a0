"""Streams a .pt file in bounded memory: the zip archive that ``torch.save`` writes, with its tensors block by block.

The pickle needs no tensor data, so it comes first. Each tensor is one stored (uncompressed) record, aligned so that
``torch.load(mmap=True)`` works. Sizes and checksums of records follow their data (in a zip data descriptor), as with torch's
own writer, which keeps the file one sequential write. Format: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import io
import pickle
import struct
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import torch
from isal.isal_zlib import crc32
from torch._utils import _rebuild_tensor_v2

from incr_ds.checkpoint.sink import Label, Sink, data_of
from incr_ds.checkpoint.streaming import Slices, StreamedTensor

ALIGNMENT = 64
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.int64: torch.LongStorage,
}
_BYTE_ORDER, _VERSION = b"little", b"3\n"
_WIDE = 0xFFFFFFFF  # in a 32-bit field: the value is in the 64-bit one
_HAS_DESCRIPTOR = 0x0808  # flags: sizes follow the data; names are UTF-8


class LossScaler:
    """A constant loss scale of 1, pickled as DeepSpeed's own class of that name, which its ZeRO-3 loader expects."""

    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


# In protocol 2 a class is stored as its module and name in two lines of text, so another name can replace them.
_STANDS_FOR = {
    f"c{LossScaler.__module__}\n{LossScaler.__name__}\n".encode(): b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n"
}


class ArchiveFile(ABC):
    """A .pt file of a target. Its ``content`` has streamed tensors in place of those that come from a reader."""

    @property
    @abstractmethod
    def path(self) -> str:
        """Path inside the target folder."""

    @abstractmethod
    def content(self) -> Any:
        """The file's content."""

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """The tensors that come from a reader."""
        return archive_of(self.content()).streamed

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the file."""
        archive_of(self.content()).write(sink, PurePosixPath(self.path).stem, slices)


@dataclass(frozen=True)
class Archive:
    """The content of one .pt file: its pickle, and the tensors that the pickle refers to, in order."""

    pickled: bytes
    tensors: tuple[StreamedTensor | torch.Tensor, ...]

    @property
    def streamed(self) -> tuple[StreamedTensor, ...]:
        """The tensors that come from a reader. The others are small constants."""
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, StreamedTensor))

    def write(self, sink: Sink, name: str, slices: Slices) -> None:
        """Append the archive to a file. ``name`` is its inner folder, the file's stem."""
        records = _Records(sink, name, sink.position)
        records.add("data.pkl", [(memoryview(self.pickled), None)])
        records.add("byteorder", [(memoryview(_BYTE_ORDER), None)])
        for number, tensor in enumerate(self.tensors):
            records.add(f"data/{number}", _data(tensor, slices))
        records.add("version", [(memoryview(_VERSION), None)])
        records.finish()

    def num_bytes(self, name: str) -> int:
        """Size of the archive that ``write`` appends, without reading a tensor."""
        count = _Count()
        records = _Records(count, name, 0)
        data = [tensor.num_bytes if isinstance(tensor, StreamedTensor) else tensor.nbytes for tensor in self.tensors]
        sizes = {"data.pkl": len(self.pickled), "byteorder": len(_BYTE_ORDER)}
        sizes |= {f"data/{number}": size for number, size in enumerate(data)}
        for record, size in (sizes | {"version": len(_VERSION)}).items():
            records.begin(record)
            count.position += size
            records.end(size, 0)
        records.finish()
        return count.position


def archive_of(content: Any) -> Archive:
    """Build the archive of ``content``: plain containers with StreamedTensors or small real tensors."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    pickled = buffer.getvalue()
    for ours, theirs in _STANDS_FOR.items():
        pickled = pickled.replace(ours, theirs)
    return Archive(pickled, tuple(pickler.tensors))


@dataclass(frozen=True)
class _Storage:
    key: int
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch does: a rebuild call on a storage that is referred to, not contained."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)
        self.tensors: list[StreamedTensor | torch.Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        """The reference to a storage: its class, the record that holds it, device and size."""
        if isinstance(value, _Storage):
            return ("storage", _STORAGES[value.dtype], str(value.key), "cpu", value.numel)
        return None

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is rebuilt; NotImplemented for everything else."""
        if not isinstance(value, StreamedTensor | torch.Tensor):
            return NotImplemented
        shape = tuple(value.shape)
        numel = value.numel if isinstance(value, StreamedTensor) else value.numel()
        storage = _Storage(len(self.tensors), value.dtype, numel)
        self.tensors.append(value)
        return _rebuild_tensor_v2, (storage, 0, shape, _strides(shape), False, OrderedDict())


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _data(tensor: StreamedTensor | torch.Tensor, slices: Slices) -> Iterator[tuple[memoryview, Label | None]]:
    if isinstance(tensor, StreamedTensor):
        return slices.data(tensor)
    return iter([(data_of(tensor.contiguous().reshape(-1)), None)])


class _Appended(Protocol):
    """What an archive is appended to."""

    position: int

    def write(self, data: bytes | memoryview, label: Label | None = None) -> None: ...


@dataclass
class _Count:
    """Counts bytes instead of writing them."""

    position: int = 0

    def write(self, data: bytes | memoryview, label: Label | None = None) -> None:
        self.position += len(data)


@dataclass
class _Records:
    """Appends a zip archive, which begins at ``start``, and keeps its records for the directory at the end."""

    sink: _Appended
    folder: str
    start: int
    directory: list[bytes] = field(default_factory=list)
    record: tuple[bytes, int] = (b"", 0)

    @property
    def position(self) -> int:
        """Bytes of the archive so far."""
        return self.sink.position - self.start

    def add(self, name: str, blocks: Iterable[tuple[memoryview, Label | None]]) -> None:
        """Write one stored record."""
        self.begin(name)
        first, checksum = self.position, 0
        for block, label in blocks:
            checksum = crc32(block, checksum)
            self.sink.write(block, label)
        self.end(self.position - first, checksum)

    def begin(self, name: str) -> None:
        """Write what stands before a record's data."""
        encoded, offset = f"{self.folder}/{name}".encode(), self.position
        padding = -(offset + 30 + len(encoded) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (0x04034B50, 45, _HAS_DESCRIPTOR, 0, 0, 0, 0, 0, 0, len(encoded), len(extra))
        self.sink.write(struct.pack("<IHHHHHIIIHH", *fields) + encoded + extra)
        self.record = encoded, offset

    def end(self, size: int, checksum: int) -> None:
        """Write what stands behind a record's data. ``size`` is the number of its bytes."""
        form = "<IIQQ" if size >= _WIDE else "<IIII"
        self.sink.write(struct.pack(form, 0x08074B50, checksum, size, size))
        encoded, offset = self.record
        self.directory.append(_directory_entry(encoded, checksum, size, offset))

    def finish(self) -> None:
        """Write the central directory in its 64-bit form, which is valid for any size."""
        start, count = self.position, len(self.directory)
        for entry in self.directory:
            self.sink.write(entry)
        end = self.position
        wide = (0x06064B50, 44, 45, 45, 0, 0, count, count, end - start, start)
        self.sink.write(struct.pack("<IQHHIIQQQQ", *wide) + struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        few = min(count, 0xFFFF)
        self.sink.write(
            struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, min(end - start, _WIDE), min(start, _WIDE), 0)
        )


def _directory_entry(name: bytes, checksum: int, size: int, offset: int) -> bytes:
    wide = [value for value in (size, size, offset) if value >= _WIDE]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    narrow = min(size, _WIDE)
    fields = (0x02014B50, 45, 45, _HAS_DESCRIPTOR, 0, 0, 0, checksum, narrow, narrow, len(name), len(extra))
    return struct.pack("<IHHHHHHIIIHH", *fields) + struct.pack("<HHHII", 0, 0, 0, 0, min(offset, _WIDE)) + name + extra
