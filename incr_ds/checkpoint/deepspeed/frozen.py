"""Reads parameters that were not trained. No optimizer file holds them; ZeRO saves their weights elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from incr_ds.checkpoint.base import State, check_dtype
from incr_ds.checkpoint.deepspeed.partition import FlatParameter, Piece, scattered_parameters
from incr_ds.checkpoint.deepspeed.schema import ModelStates, model_content
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.errors import CheckpointError

Flats = Sequence[dict[State, list[torch.Tensor]]]


def add_frozen(
    parameters: dict[str, FlatParameter],
    flats: Flats,
    model_file: Path,
    model: ModelStates,
    stage: int,
    trust: bool,
) -> frozenset[str]:
    """Add the frozen parameters of a model-parallel rank to its trained ones, as more groups of ``flats``.

    Returns their names. ZeRO-2 saves them whole, ZeRO-3 saves a share in each rank's model file, and ZeRO-1 (and
    BF16_Optimizer) only among the module's weights. Raises CheckpointError if they are missing.
    """
    shapes = model.get("frozen_param_shapes") or {}
    if stage == 3:
        return _add_shares(parameters, flats, model_file, shapes, trust) if shapes else frozenset()
    module = model.get("module") or {}
    aliases = set(model.get("shared_params") or {}) | _aliases(module)
    buffers = set(model.get("buffer_names") or ())
    if not shapes:
        untrained = set(module) - set(parameters) - aliases - buffers
        shapes = {name: tuple(module[name].shape) for name in module if name in untrained}
    fragments = model.get("frozen_param_fragments") or module
    for name, shape in shapes.items():
        if name not in fragments or tuple(fragments[name].shape) != shape:
            raise CheckpointError(
                f"{model_file}: {name}: a frozen parameter of shape {list(shape)} that was not saved."
            )
        check_dtype(fragments[name].dtype, name, str(model_file))
        group = len(flats[0]["weight"])
        flats[0]["weight"].append(fragments[name].flatten())
        parameters[name] = FlatParameter(shape, (Piece(0, group, 0, math.prod(shape)),))
    return frozenset(shapes)


def _aliases(module: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of weights that share the storage of an earlier one. Only global rank 0 records shared_params."""
    seen: set[int] = set()
    aliases = set()
    for name, tensor in module.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            aliases.add(name)
        seen.add(tensor.data_ptr())
    return aliases


def _add_shares(
    parameters: dict[str, FlatParameter],
    flats: Flats,
    model_file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    trust: bool,
) -> frozenset[str]:
    files = [
        model_file.with_name(model_file.name.replace("pp_rank_0_", f"pp_rank_{rank}_")) for rank in range(len(flats))
    ]
    first_group = len(flats[0]["weight"])
    for flat, path in zip(flats, files, strict=True):
        fragments = model_content(load_pt(path, trust=trust), path).get("frozen_param_fragments") or {}
        missing = [name for name in shapes if name not in fragments]
        if missing:
            raise CheckpointError(
                f"{path}: no share of the frozen parameter {missing[0]}; the file belongs to another checkpoint."
            )
        for name in shapes:
            check_dtype(fragments[name].dtype, name, str(path))
        flat["weight"] += [fragments[name].flatten() for name in shapes]
    for number, (name, shape) in enumerate(shapes.items()):
        found = scattered_parameters([{name: shape}], len(flats))[name]
        pieces = tuple(Piece(piece.rank, first_group + number, piece.start, piece.length) for piece in found.pieces)
        parameters[name] = FlatParameter(shape, pieces)
    return frozenset(shapes)
