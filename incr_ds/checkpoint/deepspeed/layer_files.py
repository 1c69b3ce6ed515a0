"""Reads layer_XX-model_TT-model_states.pt files of a pipeline checkpoint: the module's weights, including frozen ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import check_dtype
from incr_ds.checkpoint.deepspeed.names import layer_file, tag_files
from incr_ds.checkpoint.deepspeed.partition import FlatParameter, Piece
from incr_ds.checkpoint.deepspeed.rank_files import ModelRank
from incr_ds.checkpoint.naming import logical_names
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.checkpoint.torch_file.schema import tensors
from incr_ds.sharding.joined import joined_parameters


def layer_weights(folder: Path, tensor_rank: int, layers: Iterable[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights of pipeline layers as ``<layer>.<name inside>``, in the model's dtype."""
    for layer in sorted(layers):
        path = folder / layer_file(layer, tensor_rank)
        for name, tensor in tensors(load_pt(path), path).items():
            check_dtype(tensor.dtype, name, str(path))
            yield f"{layer}.{name}", tensor


def with_frozen_layers(
    folder: Path, ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int
) -> list[ModelRank]:
    """Add to ``ranks``, on the first stage, the frozen parameters, which no optimizer file holds."""
    layers = {layer for layer, _ in tag_files(path.name for path in folder.iterdir()).layers}
    if not layers:
        return list(ranks)
    return [
        _with_frozen(folder, rank, _missing(ranks, rank, architecture, tensor_parallel), architecture, layers)
        if rank.index < tensor_parallel
        else rank
        for rank in ranks
    ]


def _missing(
    ranks: Sequence[ModelRank], first: ModelRank, architecture: Architecture, tensor_parallel: int
) -> set[str]:
    """Logical tensors, and parameters that hold experts', that no stage of the tensor rank of ``first`` holds."""
    stages = [rank for rank in ranks if rank.index % tensor_parallel == first.index]
    known = {*(spec.name for spec in architecture.stored), *joined_parameters(architecture)}
    return known - {name for rank in stages for name in rank.names.values()}


def _with_frozen(
    folder: Path, rank: ModelRank, missing: set[str], architecture: Architecture, layers: set[int]
) -> ModelRank:
    if not missing:
        return rank
    saved = dict(layer_weights(folder, rank.index, layers))
    names = logical_names(saved, architecture)
    # The last stage saves a tied embedding again.
    owners = {names[name]: name for name in reversed(saved) if names[name] in missing}
    added = {name: saved[name] for name in owners.values()}
    flat = rank.shards.flat
    first_group = len(flat["weight"][0])
    held = [*flat["weight"][0], *(tensor.flatten() for tensor in added.values())]
    parameters = {
        name: FlatParameter(tuple(tensor.shape), (Piece(0, first_group + number, 0, math.prod(tensor.shape)),))
        for number, (name, tensor) in enumerate(added.items())
    }
    shards = replace(
        rank.shards,
        parameters={**rank.shards.parameters, **parameters},
        flat={**flat, "weight": [held, *flat["weight"][1:]]},
        frozen=rank.shards.frozen | set(added),
    )
    return replace(rank, shards=shards, names={**rank.names, **{name: names[name] for name in added}})
