"""Assembles a logical tensor from the blocks that ranks hold. If one rank holds all that is read, nothing is copied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import (
    LogicalCheckpoint,
    State,
    check_state,
    row_portions,
    rows_and_columns,
    same_numbers,
)
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Block, Bounds, RankParameter

# Scaling a parameter by s scales its gradient by 1 / s (deepspeed/checkpoint/affine.py, SCALE_POWER_BY_STATE).
SCALE_POWERS: Mapping[State, int] = {"weight": 1, "exp_avg": -1, "exp_avg_sq": -2, "momentum_buffer": -1}
_COMPARED_ELEMENTS = 1 << 18
_TRANSPOSED_ELEMENTS = 1 << 20  # read at once
_SHOWN = 10


class ParameterRows(Protocol):
    """A set of parameters that can be read by rows."""

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of a parameter."""
        ...


class Holder(Protocol):
    """A holder of parameters: a model-parallel rank, or the files of a universal checkpoint."""

    @property
    def index(self) -> int:
        """The model-parallel rank."""
        ...

    @property
    def model_file(self) -> Path:
        """A file beside the parameters, named in messages."""
        ...

    @property
    def shards(self) -> ParameterRows:
        """The parameters."""
        ...


@dataclass(frozen=True)
class HeldBlock:
    """A block of a logical tensor that is stored in a parameter of one model-parallel rank."""

    rank: Holder
    parameter: str
    block: Block

    @property
    def rows(self) -> tuple[int, int]:
        """First and last row of the logical tensor, half open."""
        return self.block.bounds[0]

    def read(self, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of the logical tensor, restricted to the block's columns."""
        block = self.block
        if block.transposed:
            return self._read_transposed(state, first - block.bounds[0][0], stop - block.bounds[0][0])
        offset = block.row - block.bounds[0][0]
        found = self.rank.shards.read(self.parameter, state, first + offset, stop + offset)
        if len(block.bounds) > 1:
            begin, end = block.bounds[1]
            found = found[:, block.column : block.column + end - begin]
        return found if block.scale == 1.0 else found / block.scale ** SCALE_POWERS[state]

    def _read_transposed(self, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of the block. Every row of the parameter has a number of each, so all of them are read."""
        block, found = self.block, list[torch.Tensor]()
        for ((begin, end),) in row_portions(block.stored_shape, _TRANSPOSED_ELEMENTS):
            rows = self.rank.shards.read(self.parameter, state, block.row + begin, block.row + end)
            found.append(rows[:, block.column + first : block.column + stop].T.contiguous())
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Assembled:
    """A logical tensor: blocks that cover it exactly once, and copies of them on other ranks."""

    shape: tuple[int, ...]
    held: tuple[HeldBlock, ...]
    copies: tuple[tuple[HeldBlock, HeldBlock], ...]

    def read(self, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop)."""
        wanted = [
            (held, max(first, held.rows[0]), min(stop, held.rows[1]))
            for held in self.held
            if held.rows[0] < stop and first < held.rows[1]
        ]
        if len(wanted) == 1 and wanted[0][1:] == (first, stop):
            return wanted[0][0].read(state, first, stop)
        whole: torch.Tensor | None = None
        for held, begin, end in wanted:
            part = held.read(state, begin, end)
            if whole is None:
                whole = torch.empty((stop - first, *self.shape[1:]), dtype=part.dtype)
            columns = (slice(*bounds) for bounds in held.block.bounds[1:])
            whole[(slice(begin - first, end - first), *columns)] = part
        return torch.empty(0, *self.shape[1:]) if whole is None else whole


def read_assembled(
    checkpoint: LogicalCheckpoint,
    tensors: Mapping[str, Assembled],
    name: str,
    state: State,
    bounds: Bounds | None,
) -> torch.Tensor:
    """What ``LogicalCheckpoint.read`` returns, from assembled tensors. A tied alias is read from its owner."""
    check_state(checkpoint.facts, name, state)
    spec = checkpoint.architecture.by_name[name]
    first, stop, inside = rows_and_columns(bounds, spec.shape)
    return tensors[spec.tied_to or name].read(state, first, stop)[inside]


def assemble(shape: tuple[int, ...], found: Sequence[HeldBlock], where: str) -> Assembled:
    """Join blocks to a tensor of ``shape``. Raises CheckpointError if they leave a gap or overlap without being equal."""
    held: dict[tuple[tuple[int, int], ...], HeldBlock] = {}
    copies = []
    for item in found:
        first = held.setdefault(item.block.bounds, item)
        if first is not item:
            copies.append((first, item))
    kept = sorted(held.values(), key=lambda item: item.block.bounds)
    covered = sum(math.prod(item.block.shape) for item in kept)
    if covered != math.prod(shape) or _overlap(kept):
        raise CheckpointError(
            f"{where}: {kept[0].block.name}: its shards hold {covered} elements, expected the {math.prod(shape)} of shape "
            f"{list(shape)} once each. A file is missing, or belongs to another layout."
        )
    return Assembled(shape, tuple(kept), tuple(copies))


def assemble_parameters(
    folder: Path,
    holders: Sequence[tuple[Holder, Mapping[str, tuple[int, ...]], Mapping[str, RankParameter]]],
    architecture: Architecture,
) -> Mapping[str, Assembled]:
    """Assemble every logical tensor from holders, each with the shapes of its parameters and what they are declared to hold.

    Raises CheckpointError that lists every parameter that is missing, unknown or of another shape.
    """
    held: dict[str, list[HeldBlock]] = {}
    problems: list[str] = []
    for holder, shapes, declared in holders:
        for parameter, shape in shapes.items():
            expected = declared.get(parameter)
            if expected is None:
                problems.append(f"  {parameter}: not a parameter of this {architecture.family.model_type}")
            elif expected.shape != shape:
                problems.append(f"  {parameter}: expected shape {list(expected.shape)}, found {list(shape)}")
            else:
                for block in expected.blocks:
                    held.setdefault(block.name, []).append(HeldBlock(holder, parameter, block))
    problems += [f"  {spec.name}: in no parameter" for spec in architecture.stored if spec.name not in held]
    if problems:
        shown = problems[:_SHOWN] + ([f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        lines = [
            f"{folder}: {len(problems)} parameter(s) do not match the config; is config.json this checkpoint's?",
            *shown,
        ]
        raise CheckpointError("\n".join(lines))
    return {spec.name: assemble(spec.shape, held[spec.name], str(folder)) for spec in architecture.stored}


def _overlap(held: Sequence[HeldBlock]) -> bool:
    """Whether two of the blocks (sorted by their bounds) share an element."""
    for number, one in enumerate(held):
        for other in held[number + 1 :]:
            if other.rows[0] >= one.rows[1]:
                break
            pairs = zip(one.block.bounds, other.block.bounds, strict=True)
            if all(a[0] < b[1] and b[0] < a[1] for a, b in pairs):
                return True
    return False


def cut_blocks(name: str, whole: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> list[Block]:
    """The blocks of shards, in rank order, that are cut along the one dimension in which they are smaller than the whole.

    Shards as large as the whole are copies of it. Returns [] if the shapes match no cut.
    """
    local = shapes[0]
    if len(local) != len(whole):
        return []
    cut = [dimension for dimension, size in enumerate(local) if size != whole[dimension]]
    if len(cut) > 1:
        return []
    if not cut:
        return [Block(name, tuple((0, size) for size in whole)) for _ in shapes]
    blocks, start = [], 0
    for shape in shapes:
        bounds = [(0, size) for size in whole]
        bounds[cut[0]] = (start, start + shape[cut[0]])
        start += shape[cut[0]]
        blocks.append(Block(name, tuple(bounds)))
    return blocks


def check_copies(tensor: Assembled, states: Sequence[State]) -> Iterator[str]:
    """Check in each of ``states`` that copies of a block equal it. Raises CheckpointError that names two different ranks."""
    for first, second in tensor.copies:
        block = first.block
        begin = block.bounds[0][0]
        for state in states:
            for ((row, stop),) in row_portions(block.shape, _COMPARED_ELEMENTS):
                rows = (begin + row, begin + stop)
                if not same_numbers(first.read(state, *rows), second.read(state, *rows)):
                    raise CheckpointError(
                        f"{first.rank.model_file.parent}: {block.name}: {state} of {first.parameter} on model-parallel rank "
                        f"{first.rank.index} and of {second.parameter} on rank {second.rank.index} differ; they are "
                        "copies of one tensor. A file is damaged, or belongs to another checkpoint."
                    )
        yield block.name
