"""ZeRO's flat partitions: where each parameter of one model-parallel rank is, over the data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
    none. Parameters that Muon trains are in ``momentum``: every rank with a part of one has its whole momentum_buffer, in one
    piece, and none has Adam's moments of it.
    """

    parameters: Mapping[str, FlatParameter]
    flat: Mapping[State, Sequence[Sequence[torch.Tensor]]]
    frozen: frozenset[str] = frozenset()
    momentum: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of a parameter as stored on this rank."""
        parameter = self.parameters[name]
        per_row = math.prod(parameter.shape[1:])
        if name in self.frozen and state != "weight":
            return torch.zeros(stop - first, *parameter.shape[1:])
        pieces = self.momentum[name][:1] if state == "momentum_buffer" else parameter.pieces
        found = self._elements(pieces, state, first * per_row, stop * per_row)
        return found.view(stop - first, *parameter.shape[1:])

    def pieces(self, state: State) -> Iterator[tuple[str, Piece]]:
        """Where a state of each parameter is that has it, copies included."""
        if state == "momentum_buffer":
            yield from ((name, piece) for name, pieces in self.momentum.items() for piece in pieces)
            return
        without: Collection[str] = () if state == "weight" else self.frozen | self.momentum.keys()
        named = ((name, parameter) for name, parameter in self.parameters.items() if name not in without)
        yield from ((name, piece) for name, parameter in named for piece in parameter.pieces)

    def copies(self, name: str) -> list[torch.Tensor]:
        """The momentum of a parameter on every rank that has it."""
        pieces = self.momentum[name]
        return [self._elements((piece,), "momentum_buffer", 0, piece.length) for piece in pieces]

    def padding(self, state: State) -> list[torch.Tensor]:
        """The elements of every flat tensor that belong to no parameter, which are ZeRO's zero padding."""
        used: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for _, piece in self.pieces(state):
            used.setdefault((piece.rank, piece.group), []).append((piece.start, piece.start + piece.length))
        gaps = []
        for rank, groups in enumerate(self.flat[state]):
            for group, tensor in enumerate(groups):
                gaps += _gaps(sorted(used.get((rank, group), [])), tensor)
        return gaps

    def _elements(self, pieces: Sequence[Piece], state: State, first: int, stop: int) -> torch.Tensor:
        found, position = [], 0
        for piece in pieces:
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


def momentum_places(parameters: Mapping[str, FlatParameter], groups: Collection[int]) -> dict[str, tuple[Piece, ...]]:
    """Place the momentum of ZeRO-1/2 parameters in ``groups``, which Muon trains, one piece for each rank that has it.

    A rank keeps the momentum of every parameter of which its partition has a part, whole and in the order of the group.
    """
    found: dict[str, tuple[Piece, ...]] = {}
    ends: dict[tuple[int, int], int] = {}
    for name, parameter in parameters.items():
        numel = math.prod(parameter.shape)
        for piece in parameter.pieces if parameter.pieces and parameter.pieces[0].group in groups else ():
            start = ends.get((piece.rank, piece.group), 0)
            found[name] = (*found.get(name, ()), Piece(piece.rank, piece.group, start, numel))
            ends[piece.rank, piece.group] = start + numel
    return found


def check_bounds(shards: FlatShards, where: str) -> None:
    """Raise CheckpointError if any piece lies outside the flat tensor that should hold it."""
    for state, ranks in shards.flat.items():
        for name, piece in shards.pieces(state):
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
