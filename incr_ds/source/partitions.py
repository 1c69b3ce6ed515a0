"""The files of a ZeRO checkpoint: the grid of ranks, and what each model-parallel rank's files hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.logical import STATES, State
from incr_ds.errors import CheckpointError
from incr_ds.source.flat import FlatShards, check_bounds, contiguous_parameters, scattered_parameters
from incr_ds.source.frozen import add_frozen
from incr_ds.source.naming import logical_names
from incr_ds.source.unpartitioned import unpartitioned
from incr_ds.source.unpickle import load_pt

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
BF16_OPTIMIZER = 1  # writes ZeRO-1's partitions, but no zero_stage


@dataclass(frozen=True)
class ModelRank:
    """One model-parallel rank: its metadata file, its data-parallel files, and the parameters in them.

    ``kind`` names the format for people, ``dtype`` is the model's own, ``universal_info`` what DeepSpeed notes for conversions.
    """

    index: int
    model_file: Path
    files: tuple[Path, ...]
    model: Mapping[str, Any]
    shards: FlatShards
    stage: int
    kind: str
    dtype: str
    step: int
    names: Mapping[str, str]
    hyperparameters: tuple[Mapping[str, Any], ...]
    universal_info: Any = None


def open_ranks(folder: Path, architecture: Architecture, trust: bool) -> list[ModelRank]:
    """Every model-parallel rank of a checkpoint, its files mapped; CheckpointError for what is missing or not supported."""
    return [_open_rank(paths, architecture, trust) for paths in _rank_files(folder)]


def _rank_files(folder: Path) -> list[tuple[int, Path, tuple[Path, ...]]]:
    """(model-parallel rank, model file, optimizer files by data-parallel rank), refusing gaps in the grid."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("expp_rank_") or "_expert_" in name for name in names):
        raise CheckpointError(f"{folder}: a mixture-of-experts checkpoint; only dense models are supported.")
    optimizer: dict[int, dict[int, Path]] = {}
    for name in names:
        if match := _OPTIMIZER_FILE.fullmatch(name):
            optimizer.setdefault(int(match[2]), {})[int(match[1])] = folder / name
    models = {int(match[1]): folder / name for name in names if (match := _MODEL_FILE.fullmatch(name))}
    if not optimizer and not models:
        raise CheckpointError(
            f"{folder}: no file mp_rank_XX_model_states.pt; not the folder of a DeepSpeed checkpoint's tag."
        )
    ranks = range(max([*optimizer, *models]) + 1)
    if not optimizer:
        missing = [f"mp_rank_{rank:02d}_model_states.pt" for rank in ranks if rank not in models]
        if missing:
            raise CheckpointError(f"{folder}: missing {', '.join(missing)}. Copy the files back or use another tag.")
        return [(rank, models[rank], ()) for rank in ranks]
    num_data = max(max(files) for files in optimizer.values()) + 1
    prefix = "bf16_" if any(name.startswith("bf16_") for name in names) else ""
    missing = [
        f"{prefix}zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
        for rank in ranks
        for data in range(num_data)
        if data not in optimizer.get(rank, {})
    ]
    missing += [f"mp_rank_{rank:02d}_model_states.pt" for rank in ranks if rank not in models]
    if missing:
        raise CheckpointError(
            f"{folder}: missing {', '.join(missing)} of a grid of {len(ranks)} model-parallel x {num_data} "
            "data-parallel ranks. Copy the files back or use another tag."
        )
    return [(rank, models[rank], tuple(optimizer[rank][data] for data in range(num_data))) for rank in ranks]


def _open_rank(paths: tuple[int, Path, tuple[Path, ...]], architecture: Architecture, trust: bool) -> ModelRank:
    index, model_file, files = paths
    model = load_pt(model_file, trust=trust)
    if not files:
        return _unpartitioned_rank(index, model_file, model, architecture)
    states = [_optimizer_state(load_pt(path, trust=trust), path) for path in files]
    _check_partition_count(states, model, model_file, files)
    stage = int(states[0].get("zero_stage", BF16_OPTIMIZER))
    group_shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    if stage == 3:
        parameters = scattered_parameters(group_shapes, len(files))
        flats = [_stage3_tensors(state, path) for state, path in zip(states, files, strict=True)]
    else:
        flats = [_stage12_tensors(state, path) for state, path in zip(states, files, strict=True)]
        sizes = [moment.numel() for moment in flats[0]["exp_avg"]]
        parameters = contiguous_parameters(group_shapes, _paddings(states[0], group_shapes), sizes)
    frozen = add_frozen(parameters, flats, model_file, model, stage, trust)
    flat = {state: [tensors[state] for tensors in flats] for state in STATES}
    shards = FlatShards(parameters, flat, frozen)
    check_bounds(shards, str(model_file.parent))
    step = _common_step(states, stage, files)
    names = logical_names(parameters, architecture)
    groups = _hyperparameters(states[0], stage)
    kind = f"DeepSpeed ZeRO-{stage}" if "zero_stage" in states[0] else "DeepSpeed BF16_Optimizer"
    dtype = "bfloat16" if files[0].name.startswith("bf16_") else "float32"
    info = states[0].get("universal_checkpoint_info") or model.get("universal_checkpoint_info")
    return ModelRank(index, model_file, files, model, shards, stage, kind, dtype, step, names, groups, info)


def _unpartitioned_rank(
    index: int, model_file: Path, model: Mapping[str, Any], architecture: Architecture
) -> ModelRank:
    """A rank of ZeRO-0: one file holds the module and its optimizer."""
    found = unpartitioned(model_file, model, architecture)
    info = model.get("universal_checkpoint_info")
    names = {name: name for name in found.shards.parameters}
    files = (model_file,)
    kind, dtype = "DeepSpeed ZeRO-0", str(found.dtype).removeprefix("torch.")
    return ModelRank(
        index, model_file, files, model, found.shards, 0, kind, dtype, found.step, names, found.hyperparameters, info
    )


def _optimizer_state(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: no key optimizer_state_dict; not a DeepSpeed optimizer file.")
    if isinstance(state.get("base_optimizer_state"), list):
        raise CheckpointError(
            f"{path}: an elastic checkpoint, which is not supported; save with elastic_checkpoint false."
        )
    return state


def _check_partition_count(
    states: Sequence[Mapping[str, Any]], model: Mapping[str, Any], model_file: Path, files: Sequence[Path]
) -> None:
    expected = model.get("dp_world_size")
    if expected != len(files):
        raise CheckpointError(
            f"{model_file}: written with {expected} data-parallel ranks, found {len(files)} optimizer file(s) beside it. "
            "Copy the missing files back, or remove those of another checkpoint."
        )
    for state, path in zip(states, files, strict=True):
        count = state["partition_count"]
        count = count[0] if isinstance(count, list | tuple) else count
        if count != expected:
            raise CheckpointError(
                f"{path}: one of {count} partitions, expected one of {expected}: from another checkpoint."
            )


def _stage12_tensors(state: Mapping[str, Any], path: Path) -> dict[State, list[torch.Tensor]]:
    adam = state["base_optimizer_state"]["state"]
    masters = list(state["single_partition_of_fp32_groups"])
    groups = [_adam_group(adam, index, path) for index in range(len(masters))]
    return {
        "weight": [tensor.flatten() for tensor in masters],
        "exp_avg": [group["exp_avg"].flatten() for group in groups],
        "exp_avg_sq": [group["exp_avg_sq"].flatten() for group in groups],
    }


def _stage3_tensors(state: Mapping[str, Any], path: Path) -> dict[State, list[torch.Tensor]]:
    masters = list(state["fp32_flat_groups"])
    adam = state["optimizer_state_dict"]["state"]
    groups = [_adam_group(adam, index, path) for index in range(len(masters))]
    return {
        "weight": [tensor.flatten() for tensor in masters],
        "exp_avg": [group["exp_avg"].flatten() for group in groups],
        "exp_avg_sq": [group["exp_avg_sq"].flatten() for group in groups],
    }


def _adam_group(adam: Mapping[int, Any], index: int, path: Path) -> Mapping[str, Any]:
    group: Mapping[str, Any] = adam.get(index, {})
    missing = [key for key in ("exp_avg", "exp_avg_sq", "step") if key not in group]
    if missing:
        found = ", ".join(map(str, group)) or "nothing"
        raise CheckpointError(
            f"{path}: optimizer group {index} has no {', '.join(missing)} (found {found}). Only Adam's moments can be "
            "grown; for another optimizer, or before the first step, export the weights to Hugging Face format."
        )
    return group


def _paddings(state: Mapping[str, Any], group_shapes: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    saved = state.get("param_alignment_paddings")
    if saved is None:
        return [[0] * len(shapes) for shapes in group_shapes]
    return [
        list(paddings) if paddings else [0] * len(shapes) for paddings, shapes in zip(saved, group_shapes, strict=True)
    ]


def _common_step(states: Sequence[Mapping[str, Any]], stage: int, files: Sequence[Path]) -> int:
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    steps = {}
    for state, path in zip(states, files, strict=True):
        for index, group in state[key]["state"].items():
            steps[int(group["step"])] = f"{path.name} group {index}"
    if len(steps) != 1:
        found = "; ".join(f"step {step} in {where}" for step, where in steps.items())
        raise CheckpointError(f"{files[0].parent}: the optimizer files disagree on the step: {found}.")
    return next(iter(steps))


def _hyperparameters(state: Mapping[str, Any], stage: int) -> tuple[Mapping[str, Any], ...]:
    groups = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["param_groups"]
    return tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
