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
from incr_ds.sharding.joined import JoinedParameter, JoinedPart, joined_parameters
from incr_ds.sharding.placement import split_bounds

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
    experts: dict[str, list[HeldBlock]] = {}
    for item in _held_joined(folder, ranks, joined, tensor_parallel):
        experts.setdefault(item.block.name, []).append(item)
    held |= experts
    shapes |= {name: _reach(declared[name].shape, items) for name, items in experts.items()}
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


def _held_joined(
    folder: Path, ranks: Sequence[ModelRank], known: Mapping[str, JoinedParameter], tensor_parallel: int
) -> Iterator[HeldBlock]:
    """The tensors of experts, each a block of a joined parameter. Raises CheckpointError for a wrong shape."""
    for rank in ranks:
        local = rank.shards.parameters
        joined = {
            name: _part_of(known[logical], local[name].shape, rank.index % tensor_parallel, tensor_parallel)
            for name, logical in rank.names.items()
            if logical in known
        }
        for name, part in joined.items():
            check_joined(rank.names[name], part, local[name].shape, str(folder))
        matrices = {name: replace(local[name], shape=part.rows_shape) for name, part in joined.items()}
        as_matrices = replace(rank, shards=replace(rank.shards, parameters={**local, **matrices}))
        yield from (HeldBlock(as_matrices, name, block) for name, part in joined.items() for block in part.blocks)


def _part_of(parameter: JoinedParameter, shape: tuple[int, ...], tensor_rank: int, tensor_parallel: int) -> JoinedPart:
    """What a tensor rank holds: all of the parameter if it has the whole shape, otherwise its share of every expert."""
    if tuple(shape) == parameter.whole.shape:
        return parameter.whole
    return parameter.part(*split_bounds(parameter.size, tensor_parallel)[tensor_rank])


def check_joined(name: str, part: JoinedPart, shape: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless a joined parameter has the shape that follows from the config."""
    if tuple(shape) != part.shape:
        raise CheckpointError(
            f"{where}: {name}: expected shape {list(part.shape)} (experts, rows, columns), found {list(shape)}; is config.json "
            "this checkpoint's? Whole experts that are spread over ranks cannot be read."
        )


def _reach(whole: tuple[int, ...], held: Sequence[HeldBlock]) -> tuple[int, ...]:
    """The shape that the blocks span: how far they reach in each dimension."""
    return tuple(max(item.block.bounds[dimension][1] for item in held) for dimension in range(len(whole)))
