"""Which ranks hold which rectangle of which logical tensor, in each kind of DeepSpeed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.assembly import Assembled, HeldBlock, assemble, cut_blocks
from incr_ds.checkpoint.base import check_shapes
from incr_ds.checkpoint.deepspeed.autotp import AffineMaps
from incr_ds.checkpoint.deepspeed.rank_files import ModelRank
from incr_ds.errors import CheckpointError
from incr_ds.sharding.joined import JoinedParameter, joined_parameters

_IF_MISSING = (
    "is config.json this checkpoint's? If these were frozen, it was saved with exclude_frozen_parameters=True: save it again "
    "without that, or merge the frozen weights in and grow a Hugging Face folder."
)

Part = tuple[ModelRank, str]  # a rank and the name of one of its parameters


def assembled_tensors(
    folder: Path, ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int
) -> Mapping[str, Assembled]:
    """Assemble every logical tensor of a checkpoint whose parameters are logical tensors (whole or cut) or joined ones.

    A parameter that is smaller than its tensor in one dimension is cut along it, in the order of the tensor ranks. If
    DeepSpeed's AutoTP left its own description, that decides. Raises CheckpointError that lists every tensor that is
    missing, unknown or of another shape.
    """
    found: dict[str, dict[int, list[Part]]] = {}
    joined = joined_parameters(architecture)
    for rank in ranks:
        for parameter, logical in rank.names.items():
            if logical in joined:
                continue
            found.setdefault(logical, {}).setdefault(rank.index // tensor_parallel, []).append((rank, parameter))
    declared = architecture.by_name
    maps = AffineMaps(ranks[0].universal_info, ranks[0].model_file)
    held: dict[str, list[HeldBlock]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for logical, stages in found.items():
        parts = next(iter(stages.values()))
        local = parts[0][0].shards.parameters[parts[0][1]].shape
        whole = declared[logical].shape if logical in declared else local
        held[logical] = [
            item for parts in stages.values() for item in _held(maps, logical, whole, parts, tensor_parallel)
        ]
        shapes[logical] = _reach(whole, held[logical]) if held[logical] else local
    for item in _held_joined(folder, ranks, joined):
        held.setdefault(item.block.name, []).append(item)
        shapes[item.block.name] = item.block.shape
    check_shapes(architecture, shapes, str(folder), _IF_MISSING)
    return {logical: assemble(declared[logical].shape, items, str(folder)) for logical, items in held.items()}


def _held(
    maps: AffineMaps, logical: str, whole: tuple[int, ...], parts: Sequence[Part], tensor_parallel: int
) -> list[HeldBlock]:
    described = [(part, maps.blocks(part[1], logical, part[0].index % tensor_parallel)) for part in parts]
    if all(blocks is not None for _, blocks in described):
        return [HeldBlock(*part, block) for part, blocks in described for block in blocks or ()]
    shapes = [rank.shards.parameters[parameter].shape for rank, parameter in parts]
    blocks = cut_blocks(logical, whole, shapes)
    return [HeldBlock(*part, block) for part, block in zip(parts, blocks, strict=False)]


def _held_joined(folder: Path, ranks: Sequence[ModelRank], known: Mapping[str, JoinedParameter]) -> Iterator[HeldBlock]:
    """The tensors of experts, each a block of a joined parameter. Raises CheckpointError for a wrong shape."""
    for rank in ranks:
        joined = {name: known[logical] for name, logical in rank.names.items() if logical in known}
        for name, parameter in joined.items():
            check_joined(parameter, rank.shards.parameters[name].shape, str(folder))
        matrices = {
            name: replace(rank.shards.parameters[name], shape=parameter.rows_shape)
            for name, parameter in joined.items()
        }
        as_matrices = replace(rank, shards=replace(rank.shards, parameters={**rank.shards.parameters, **matrices}))
        yield from (
            HeldBlock(as_matrices, name, block) for name, parameter in joined.items() for block in parameter.blocks
        )


def check_joined(parameter: JoinedParameter, shape: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless a joined parameter has the shape that follows from the config."""
    if tuple(shape) != parameter.shape:
        raise CheckpointError(
            f"{where}: {parameter.parameter}: expected shape {list(parameter.shape)} (experts, rows, columns), found "
            f"{list(shape)}; is config.json this checkpoint's? Experts that are cut over ranks cannot be read."
        )


def _reach(whole: tuple[int, ...], held: Sequence[HeldBlock]) -> tuple[int, ...]:
    """The shape that the blocks span: how far they reach in each dimension."""
    return tuple(max(item.block.bounds[dimension][1] for item in held) for dimension in range(len(whole)))
