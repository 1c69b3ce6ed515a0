"""Which ranks hold which rectangle of which logical tensor, in each kind of DeepSpeed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.logical import check_shapes
from incr_ds.source.affine import AffineMaps
from incr_ds.source.assembly import Assembled, Held, assemble, cut_blocks
from incr_ds.source.partitions import ModelRank

_IF_MISSING = (
    "is config.json this checkpoint's? If these were frozen, it was saved with exclude_frozen_parameters=True: save it again "
    "without that, or merge the frozen weights in and grow a Hugging Face folder."
)

Part = tuple[ModelRank, str]  # a rank and the name of one of its parameters


def assembled_tensors(
    folder: Path, ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int
) -> Mapping[str, Assembled]:
    """Every logical tensor of a checkpoint whose parameters are logical tensors, cut or not.

    A parameter that is smaller than its tensor in one dimension is cut along it, in the order of the tensor ranks;
    where DeepSpeed's AutoTP left its own description, that counts. CheckpointError names every tensor that is missing,
    unknown or of another shape.
    """
    found: dict[str, dict[int, list[Part]]] = {}
    for rank in ranks:
        for parameter, logical in rank.names.items():
            found.setdefault(logical, {}).setdefault(rank.index // tensor_parallel, []).append((rank, parameter))
    declared = architecture.by_name
    maps = AffineMaps(ranks[0].universal_info, ranks[0].model_file)
    held: dict[str, list[Held]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for logical, stages in found.items():
        parts = next(iter(stages.values()))
        local = parts[0][0].shards.parameters[parts[0][1]].shape
        whole = declared[logical].shape if logical in declared else local
        held[logical] = [
            item for parts in stages.values() for item in _held(maps, logical, whole, parts, tensor_parallel)
        ]
        shapes[logical] = _joined(whole, held[logical]) if held[logical] else local
    check_shapes(architecture, shapes, str(folder), _IF_MISSING)
    return {logical: assemble(declared[logical].shape, items, str(folder)) for logical, items in held.items()}


def _held(
    maps: AffineMaps, logical: str, whole: tuple[int, ...], parts: Sequence[Part], tensor_parallel: int
) -> list[Held]:
    described = [(part, maps.blocks(part[1], logical, part[0].index % tensor_parallel)) for part in parts]
    if all(blocks is not None for _, blocks in described):
        return [Held(*part, block) for part, blocks in described for block in blocks or ()]
    shapes = [rank.shards.parameters[parameter].shape for rank, parameter in parts]
    blocks = cut_blocks(logical, whole, shapes)
    return [Held(*part, block) for part, block in zip(parts, blocks, strict=False)]


def _joined(whole: tuple[int, ...], held: Sequence[Held]) -> tuple[int, ...]:
    """How far the blocks reach in each dimension: the shape of what they make up."""
    return tuple(max(item.block.bounds[dimension][1] for item in held) for dimension in range(len(whole)))
