"""The chunks in which a target's tensors are stored: one for each layer, tensor rank and state, as Megatron-core's ranks save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import State
from incr_ds.checkpoint.megatron_core.keys import (
    MODEL_PREFIX,
    MOMENT_PREFIXES,
    OF_DISTRIBUTED_OPTIMIZER,
    OF_OPTIMIZER,
    written_names,
)
from incr_ds.checkpoint.streaming import Part, StreamedTensor, block_parts
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, module_parameters, modules_of


@dataclass(frozen=True)
class StoredState:
    """A state, its dtype, and the prefixes of the keys under which it is found. All of them name the same bytes."""

    state: State
    dtype: torch.dtype
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class NewChunk:
    """A rectangle of the tensors ``keys``, which have the shape ``whole``, at ``offsets``.

    The first ``stacked`` dimensions are those of layers and experts.
    """

    keys: tuple[str, ...]
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StreamedTensor
    stacked: int


def stored_states(dtype: torch.dtype, has_moments: bool) -> tuple[StoredState, ...]:
    """What is stored of each parameter: weights in ``dtype``, and masters and moments in fp32.

    The masters have the key of the distributed optimizer and that of the others. In fp32 the weights are the masters.
    """
    if not has_moments:
        return (StoredState("weight", dtype, (MODEL_PREFIX,)),)
    moments = [StoredState(state, torch.float32, (prefix,)) for state, prefix in MOMENT_PREFIXES.items()]
    if dtype == torch.float32:
        return (StoredState("weight", dtype, (MODEL_PREFIX, OF_DISTRIBUTED_OPTIMIZER)), *moments)
    masters = StoredState("weight", torch.float32, (OF_DISTRIBUTED_OPTIMIZER, OF_OPTIMIZER))
    return (StoredState("weight", dtype, (MODEL_PREFIX,)), masters, *moments)


def chunks_by_layer(
    architecture: Architecture, tensor_parallel: int, vocabulary: int, states: tuple[StoredState, ...]
) -> Mapping[int, tuple[NewChunk, ...]]:
    """All chunks of a model, with those of each layer together: the embedding, the decoder's, the last norm, the head.

    ``vocabulary`` is the number of rows of embedding and head, padding included.
    """
    modules = modules_of(MEGATRON_CORE)
    found: dict[int, list[NewChunk]] = {}
    for rank in range(tensor_parallel):
        held = module_parameters(modules, architecture, tensor_parallel, rank, vocabulary)
        for layer, parameters in held.items():
            own = [item for item in parameters if item.cut is not None or rank == 0]
            places = [_Place(item, rank, tensor_parallel, architecture) for item in own]
            found.setdefault(layer, []).extend(chunk for place in places for chunk in place.chunks(states))
    return {layer: tuple(chunks) for layer, chunks in found.items()}


@dataclass(frozen=True)
class _Place:
    """A parameter of one tensor rank in the tensors of all ranks and layers."""

    parameter: RankParameter
    rank: int
    ranks: int
    architecture: Architecture

    def chunks(self, states: tuple[StoredState, ...]) -> Iterator[NewChunk]:
        """Its parts in each state. Gate and up are two parts, since every rank has some rows of both."""
        parameter, stack = self.parameter, self._stack
        counts, own = tuple(count for _, count in stack), tuple(number for number, _ in stack)
        rows, *columns = parameter.shape
        shape = (rows // parameter.sub_parameters, *columns)
        for state in states:
            for part in range(parameter.sub_parameters):
                parts = self._parts(shape, part, state.state)
                yield NewChunk(
                    tuple(prefix + name for prefix in state.prefixes for name in self._names),
                    counts + self._whole,
                    own + self._offsets(shape, part),
                    StreamedTensor((1,) * len(stack) + shape, state.dtype, parts),
                    len(stack),
                )

    @property
    def _stack(self) -> tuple[tuple[int, int], ...]:
        """Its layer and its expert, where it has one, each with how many there are."""
        tensor, sizes = self.parameter.tensor, self.architecture.sizes
        layer = () if tensor.layer is None else ((tensor.layer, self.architecture.num_layers),)
        return layer if tensor.expert is None else (*layer, (tensor.expert, sizes["experts"]))

    @property
    def _names(self) -> tuple[str, ...]:
        within = "" if self.parameter.tensor.layer is None else "decoder.layers."
        return tuple(within + name for name in written_names(self.parameter, self.architecture))

    @property
    def _whole(self) -> tuple[int, ...]:
        cut = self.parameter.cut
        return tuple(size * (self.ranks if d == cut else 1) for d, size in enumerate(self.parameter.shape))

    def _offsets(self, shape: tuple[int, ...], part: int) -> tuple[int, ...]:
        first = part * self._whole[0] // self.parameter.sub_parameters
        own = [self.rank * size if d == self.parameter.cut else 0 for d, size in enumerate(shape)]
        return (first + own[0], *own[1:])

    def _parts(self, shape: tuple[int, ...], part: int, state: State) -> tuple[Part, ...]:
        size = math.prod(shape)
        return block_parts(self.parameter.blocks, self.parameter.shape, state, part * size, (part + 1) * size)
