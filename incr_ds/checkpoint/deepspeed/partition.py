"""ZeRO's flat partitions: where each parameter of one model-parallel rank is, over the data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from incr_ds.checkpoint.base import State
from incr_ds.errors import CheckpointError
from incr_ds.sharding.partition_sizes import share_bounds, share_size


@dataclass(frozen=True)
class Piece:
    """``length`` elements of a parameter, at ``start`` in the flat tensor of ``group`` of data-parallel ``rank``."""

    rank: int
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class FlatParameter:
    """A parameter of one model-parallel rank: its shape there, and its pieces in element order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FlatShards:
    """All data-parallel files of one model-parallel rank. ``flat[state][rank][group]`` are one-dimensional tensors.

    ``frozen`` parameters were not trained; they have weights, and moments of zero. If ``flat`` has no moments, there are
    none.
    """

    parameters: Mapping[str, FlatParameter]
    flat: Mapping[State, Sequence[Sequence[torch.Tensor]]]
    frozen: frozenset[str] = frozenset()

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of a parameter as stored on this rank."""
        parameter = self.parameters[name]
        per_row = math.prod(parameter.shape[1:])
        if name in self.frozen and state != "weight":
            return torch.zeros(stop - first, *parameter.shape[1:])
        found = self._elements(parameter, state, first * per_row, stop * per_row)
        return found.view(stop - first, *parameter.shape[1:])

    def padding(self, state: State) -> list[torch.Tensor]:
        """The elements of every flat tensor that belong to no parameter, which are ZeRO's zero padding."""
        used: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for parameter in self.parameters.values():
            for piece in parameter.pieces:
                used.setdefault((piece.rank, piece.group), []).append((piece.start, piece.start + piece.length))
        gaps = []
        for rank, groups in enumerate(self.flat[state]):
            for group, tensor in enumerate(groups):
                gaps += _gaps(sorted(used.get((rank, group), [])), tensor)
        return gaps

    def _elements(self, parameter: FlatParameter, state: State, first: int, stop: int) -> torch.Tensor:
        found, position = [], 0
        for piece in parameter.pieces:
            begin, end = max(first, position), min(stop, position + piece.length)
            if begin < end:
                offset = piece.start - position
                found.append(self.flat[state][piece.rank][piece.group][offset + begin : offset + end])
            position += piece.length
        return found[0] if len(found) == 1 else torch.cat(found)


def contiguous_parameters(
    group_shapes: Sequence[Mapping[str, tuple[int, ...]]],
    group_paddings: Sequence[Sequence[int]],
    partition_sizes: Sequence[int],
) -> dict[str, FlatParameter]:
    """Place ZeRO-1/2 parameters: concatenated in each group, and the whole cut into equal partitions, one per rank.

    ``group_paddings`` is the alignment padding after each parameter. ``partition_sizes`` is the padded length of a
    partition in each group.
    """
    parameters = {}
    for group, (shapes, paddings, size) in enumerate(zip(group_shapes, group_paddings, partition_sizes, strict=True)):
        position = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            parameters[name] = FlatParameter(tuple(shape), _cut(group, position, math.prod(shape), size))
            position += math.prod(shape) + padding
    return parameters


def scattered_parameters(
    group_shapes: Sequence[Mapping[str, tuple[int, ...]]], num_ranks: int
) -> dict[str, FlatParameter]:
    """Place ZeRO-3 parameters: each one cut into ceil(numel / ranks) elements, with zero padding at the end."""
    parameters = {}
    for group, shapes in enumerate(group_shapes):
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            bounds = [share_bounds(numel, num_ranks, rank) for rank in range(num_ranks)]
            pieces = (
                Piece(rank, group, start, stop - first) for rank, (first, stop) in enumerate(bounds) if first < stop
            )
            parameters[name] = FlatParameter(tuple(shape), tuple(pieces))
            start += share_size(numel, num_ranks)
    return parameters


def check_bounds(shards: FlatShards, where: str) -> None:
    """Raise CheckpointError if any piece lies outside the flat tensor that should hold it."""
    for state, ranks in shards.flat.items():
        for name, parameter in shards.parameters.items():
            for piece in parameter.pieces if state == "weight" or name not in shards.frozen else ():
                # Masters that are too short leave pieces for ranks that do not exist.
                groups = ranks[piece.rank] if piece.rank < len(ranks) else ()
                length = groups[piece.group].numel() if piece.group < len(groups) else 0
                if piece.start + piece.length > length:
                    raise CheckpointError(
                        f"{where}: data-parallel rank {piece.rank}, group {piece.group}, {state}: expected at least "
                        f"{piece.start + piece.length} elements for {name}, found {length}. The file belongs to another "
                        "checkpoint, or another run wrote it."
                    )


def _cut(group: int, position: int, numel: int, partition: int) -> tuple[Piece, ...]:
    pieces = []
    while numel:
        rank, start = divmod(position, partition)
        length = min(numel, partition - start)
        pieces.append(Piece(rank, group, start, length))
        position, numel = position + length, numel - length
    return tuple(pieces)


def _gaps(used: list[tuple[int, int]], tensor: torch.Tensor) -> list[torch.Tensor]:
    gaps, position = [], 0
    for start, stop in [*used, (tensor.numel(), tensor.numel())]:
        if start > position:
            gaps.append(tensor[position:start])
        position = max(position, stop)
    return gaps
