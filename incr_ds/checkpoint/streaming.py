"""Files of a target as frozen values: planned first, then streamed from a reader of tensor slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from incr_ds.checkpoint.base import State
from incr_ds.checkpoint.sink import Label, Sink, data_of
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Block, Bounds

Read = Callable[[str, State, Bounds], torch.Tensor]
BLOCK_ELEMENTS = 1 << 20  # large enough to hide a block's fixed costs, small enough for the cache


@dataclass(frozen=True)
class Part:
    """Elements [first, stop), in row-major order, of the slice ``bounds`` of a tensor or moment; zeros if the name is "".

    If ``transposed``, the order is that of the transposed slice.
    """

    name: str
    state: State
    bounds: Bounds
    first: int
    stop: int
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class StreamedTensor:
    """A tensor of a target file that never exists whole: ``parts`` one after the other, then zeros up to its size."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Slices:
    """Reads what files are written from. ``read`` returns any slice of any tensor or moment.

    A call asks for about ``block_elements`` elements at most, and for one row at least.
    """

    read: Read
    block_elements: int = BLOCK_ELEMENTS

    def blocks(self, tensor: StreamedTensor) -> Iterator[torch.Tensor]:
        """The elements of ``tensor`` in order, as one-dimensional tensors of its dtype."""
        return (block for _, block in self._labelled(tensor))

    def data(self, tensor: StreamedTensor) -> Iterator[tuple[memoryview, Label | None]]:
        """Yield the bytes of ``tensor`` in order, with the tensor that they belong to (None for padding)."""
        return ((data_of(block), label) for label, block in self._labelled(tensor))

    def _labelled(self, tensor: StreamedTensor) -> Iterator[tuple[Label | None, torch.Tensor]]:
        written = 0
        for part in tensor.parts:
            for block in self._part_blocks(part):
                written += block.numel()
                yield (part.name, part.state) if part.name else None, _stored(block, tensor.dtype, part)
        yield from ((None, block.to(tensor.dtype)) for block in self._zeros(tensor.numel - written))

    def _zeros(self, left: int) -> Iterator[torch.Tensor]:
        while left > 0:
            zeros = min(self.block_elements, left)
            left -= zeros
            yield torch.zeros(zeros)

    def _part_blocks(self, part: Part) -> Iterator[torch.Tensor]:
        """Read whole rows. What lies outside [first, stop) in the first and the last row is cut off."""
        if not part.name:
            yield from self._zeros(part.stop - part.first)
            return
        (row, _), *columns = part.bounds[::-1] if part.transposed else part.bounds
        per_row = math.prod(stop - start for start, stop in columns)
        rows = max(1, self.block_elements // per_row)
        first_row, stop_row = part.first // per_row, math.ceil(part.stop / per_row)
        for begin in range(first_row, stop_row, rows):
            end = min(begin + rows, stop_row)
            bounds = ((row + begin, row + end), *columns)
            if part.transposed:
                block = self.read(part.name, part.state, bounds[::-1]).T.reshape(-1)
            else:
                block = self.read(part.name, part.state, bounds).reshape(-1)
            offset = begin * per_row
            yield block[max(0, part.first - offset) : part.stop - offset]


def _stored(block: torch.Tensor, dtype: torch.dtype, part: Part) -> torch.Tensor:
    """Convert ``block`` to ``dtype``. Raises CheckpointError if finite numbers in it are too large for that."""
    stored = block.to(torch.float32).to(dtype)
    largest = torch.finfo(dtype).max
    if block.numel() == 0 or torch.finfo(block.dtype).max <= largest:
        return stored
    # Finding the extremes is thirty times as fast as looking at each number, and it finds NaN, too.
    if not all(abs(extreme.item()) <= largest for extreme in torch.aminmax(stored)):
        lost = int((stored.isinf() & block.isfinite()).sum())
        if lost:
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{part.name} ({part.state}): at least {lost:,} numbers are larger than {largest:g}, the largest of {name}; "
                "choose a dtype with a larger range."
            )
    return stored


class TargetFile(Protocol):
    """One file of the target. Files are independent of each other, so any number of workers can share the work."""

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        ...

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """The tensors whose data the file holds."""
        ...

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the file's bytes from first to last."""
        ...


def write_file(file: TargetFile, folder: Path, slices: Slices) -> dict[str, Any]:
    """Write one file below ``folder``. Returns its size and checksum."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with Sink(path) as sink:
        file.write(sink, slices)
        return sink.digest


def tensor_bytes(file: TargetFile) -> int:
    """Bytes of tensor data in a file."""
    return sum(tensor.num_bytes for tensor in file.tensors)


def slice_of(name: str, state: State, bounds: Bounds, dtype: torch.dtype) -> StreamedTensor:
    """One slice of one tensor, as a tensor of a file."""
    shape = tuple(stop - start for start, stop in bounds)
    return StreamedTensor(shape, dtype, (Part(name, state, bounds, 0, math.prod(shape)),))


def block_parts(
    blocks: tuple[Block, ...], shape: tuple[int, ...], state: State, first: int, stop: int
) -> tuple[Part, ...]:
    """Elements [first, stop) of a parameter of ``shape``, which holds ``blocks`` of its width, stacked by rows.

    Rows below the last block are zeros.
    """
    per_row = math.prod(shape[1:])
    parts, position = [], 0
    for block in blocks:
        size = math.prod(block.shape)
        begin, end = max(first, position), min(stop, position + size)
        if begin < end:
            parts.append(Part(block.name, state, block.bounds, begin - position, end - position, block.transposed))
        position += size
    begin = max(first, position)
    if begin < stop:
        parts.append(Part("", state, ((0, shape[0]), (0, per_row)), 0, stop - begin))
    return tuple(parts)


def parameter_tensor(
    blocks: tuple[Block, ...], shape: tuple[int, ...], state: State, dtype: torch.dtype
) -> StreamedTensor:
    """A whole parameter, as a tensor of a file."""
    return StreamedTensor(shape, dtype, block_parts(blocks, shape, state, 0, math.prod(shape)))


def whole(shape: tuple[int, ...]) -> Bounds:
    """The bounds of a whole tensor."""
    return tuple((0, size) for size in shape)
