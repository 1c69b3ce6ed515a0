"""The tensors of a .pt file as extents of its bytes, read by rows. Nothing in the file is run, whatever it names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.torch_file.checksums import record_extent
from incr_ds.checkpoint.torch_file.validate import damaged, is_archive, named_damage, opened_archive, walk_archive
from incr_ds.checkpoint.torch_file.walk import REBUILDS, StandIn
from incr_ds.config.json_file import refuse_pointer
from incr_ds.errors import CheckpointError

STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
_REBUILD = REBUILDS[0].rpartition(".")[2]
_OF_A_PARAMETER = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "_rebuild_from_type_v2"


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose numbers lie one after the other in a file, from byte ``start`` on."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def part(self, first: int, shape: tuple[int, ...]) -> FileTensor:
        """A tensor of ``shape`` in this one's elements, from ``first`` on."""
        assert first + math.prod(shape) <= self.numel
        return FileTensor(self.path, self.start + first * self.dtype.itemsize, self.dtype, shape)

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop)."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        found = self._read(first * row, (stop - first) * row)
        return found.view(stop - first, *self.shape[1:])

    def number(self) -> float:
        """The number in a tensor of one element."""
        return float(self._read(0, self.dtype.itemsize).item())

    def _read(self, begin: int, size: int) -> torch.Tensor:
        if size == 0:
            return torch.empty(0, dtype=self.dtype)
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        with open(self.path, "rb", buffering=0) as stream:
            while done < size:
                read = os.preadv(stream.fileno(), [view[done:]], self.start + begin + done)
                if not read:
                    raise CheckpointError(damaged(self.path, ValueError("it ends inside a tensor")))
                done += read
        return torch.frombuffer(buffer, dtype=self.dtype)


def content_with_extents(path: Path) -> Any:
    """The content of a .pt file: containers and numbers, and a FileTensor for each tensor of floating-point numbers.

    Tuples become lists. Whatever else the file names stays a stand-in. Raises CheckpointError if the file is missing or
    damaged, or if a tensor does not lie in its record one row after the other.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete. Copy the file back or use another one.")
    refuse_pointer(path)
    with named_damage(path):
        if not is_archive(path):
            raise ValueError("not an archive of torch.save")
        with opened_archive(path) as archive, open(path, "rb") as stream:
            content, _ = walk_archive(path, archive)
            extents = {
                record.filename.partition("/data/")[2]: record_extent(path, stream, record)
                for record in archive.infolist()
                if "/data/" in record.filename
            }
        return _Placed(path, {name: (found.start, found.stop) for name, found in extents.items()}).of(content)


def numbers(values: Iterator[Any]) -> Iterator[float]:
    """Those of ``values`` that are numbers, or tensors of one."""
    for value in values:
        if isinstance(value, FileTensor) and value.numel == 1:
            yield value.number()
        elif isinstance(value, int | float):
            yield value


@dataclass(frozen=True)
class _Placed:
    """Puts extents in place of tensors. ``records`` are the first and last byte of each storage, half open."""

    path: Path
    records: Mapping[str, tuple[int, int]]

    def of(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item) for item in value]
        if isinstance(value, StandIn) and value.name in _OF_A_PARAMETER:
            return self.of(value.arguments[0])
        if isinstance(value, StandIn) and value.name == _WITH_ATTRIBUTES:
            function, _, inner, _ = value.arguments
            return (self._tensor(inner) or value) if getattr(function, "name", "") == _REBUILD else value
        if isinstance(value, StandIn) and value.name == _REBUILD:
            return self._tensor(value.arguments) or value
        if isinstance(value, StandIn) and value.name == "OrderedDict":
            items = value.held[1:]  # after the arguments: keys and values, and at the end its attributes, if it has any
            return {key: self.of(item) for key, item in zip(items[::2], items[1::2], strict=False)}
        return value

    def _tensor(self, arguments: tuple[Any, ...]) -> FileTensor | None:
        """The extent of a tensor; None if its numbers are not floating-point ones."""
        storage, offset, size, strides, *_ = arguments
        _, kind, record, _, _ = storage.arguments[0]
        dtype = STORAGES.get(kind.name)
        if dtype is None:
            return None
        start, stop = self.records[record]
        shape = tuple(int(length) for length in size)
        first = start + int(offset) * dtype.itemsize
        if not are_rows(shape, strides) or not start <= first <= stop - math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(shape)} with strides {list(strides)} does not lie in record {record} one "
                "row after the other. Save the checkpoint with contiguous tensors."
            )
        return FileTensor(self.path, first, dtype, shape)


def are_rows(size: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor's elements lie one row after the other, without gaps."""
    expected = 1
    for length, stride in zip(reversed(size), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
