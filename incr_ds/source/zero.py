"""DeepSpeed ZeRO checkpoints (stages 1, 2 and 3; any data, tensor and pipeline degree) as logical checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.logical import STATES, CheckpointFacts, State, check_shapes
from incr_ds.errors import CheckpointError
from incr_ds.source.flat import FlatShards, check_bounds, contiguous_parameters, scattered_parameters
from incr_ds.source.naming import logical_names
from incr_ds.source.unpickle import load_pt

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
BF16_OPTIMIZER = 1  # writes ZeRO-1's partitions, but no zero_stage
_CHECKED_ELEMENTS = 1 << 20  # compared at once
_METADATA = ("global_steps", "global_samples", "skipped_steps", "ds_version")


@dataclass(frozen=True)
class _ModelRank:
    """One model-parallel rank: its metadata file, its data-parallel files, and the parameters in them."""

    index: int
    model_file: Path
    files: tuple[Path, ...]
    model: Mapping[str, Any]
    shards: FlatShards
    stage: int
    has_stage: bool
    step: int
    names: Mapping[str, str]
    hyperparameters: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Joined:
    """A logical tensor as parts (rank, parameter name there), joined along ``dimension`` in tensor-parallel order."""

    parts: tuple[tuple[_ModelRank, str], ...]
    dimension: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [rank.shards.parameters[parameter].shape for rank, parameter in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        whole = list(self.shapes[0])
        whole[self.dimension] = sum(shape[self.dimension] for shape in self.shapes)
        return tuple(whole)

    def read(self, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of the whole."""
        found, position = [], 0
        for (rank, parameter), shape in zip(self.parts, self.shapes, strict=True):
            begin, end = first, stop
            if self.dimension == 0:
                begin, end = max(first - position, 0), min(stop - position, shape[0])
                position += shape[0]
            if begin < end:
                found.append(rank.shards.read(parameter, state, begin, end))
        return found[0] if len(found) == 1 else torch.cat(found, dim=self.dimension)


class ZeroCheckpoint:
    """A DeepSpeed checkpoint folder and tag; nothing but metadata is read before ``read``."""

    def __init__(self, folder: Path, tag: str, architecture: Architecture, *, trust: bool = False) -> None:
        self._folder = folder / tag
        self._architecture = architecture
        self._ranks = [_open_rank(paths, architecture, trust) for paths in _rank_files(self._folder)]
        self._tensor_parallel, self._pipeline_parallel = _model_degrees(self._folder, self._ranks)
        self._joined = self._assemble()
        check_shapes(architecture, {name: joined.shape for name, joined in self._joined.items()}, str(self._folder))
        self._facts = self._collect_facts()

    @property
    def facts(self) -> CheckpointFacts:
        """What is known without reading a tensor."""
        return self._facts

    @property
    def architecture(self) -> Architecture:
        """The model that the checkpoint holds."""
        return self._architecture

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows of one tensor (fp32 masters and moments), joined over tensor-parallel ranks."""
        spec = self._architecture.by_name[name]
        first, stop, _ = (rows or slice(None)).indices(spec.shape[0])
        return self._joined[spec.tied_to or name].read(state, first, stop)

    def self_check(self) -> Iterator[str]:
        """Prove that the shards belong together, yielding the name of each parameter checked.

        Stages 1 and 2: the fp32 master cast to the model's dtype equals the saved module weight bit for bit. Stage 3
        saves no module weights: there the zero padding must be zero and no two ranks may hold the same bytes. Raises
        CheckpointError naming the first tensor that does not fit.
        """
        for rank in self._ranks:
            _check_padding(rank)
            _check_duplicates(rank)
            modules = _module_weights(self._folder, rank)
            for parameter, logical in rank.names.items():
                if parameter in modules:
                    _check_master(rank, parameter, modules[parameter])
                yield logical

    def _assemble(self) -> dict[str, _Joined]:
        parts: dict[str, list[tuple[_ModelRank, str]]] = {}
        stages: dict[str, int] = {}
        for rank in self._ranks:
            stage = rank.index // self._tensor_parallel
            for parameter, logical in rank.names.items():
                if stages.setdefault(logical, stage) == stage:
                    parts.setdefault(logical, []).append((rank, parameter))
        return {logical: self._join(logical, found) for logical, found in parts.items()}

    def _join(self, logical: str, parts: list[tuple[_ModelRank, str]]) -> _Joined:
        rank, parameter = parts[0]
        local = rank.shards.parameters[parameter].shape
        whole = self._architecture.by_name[logical].shape if logical in self._architecture.by_name else local
        if local == whole or len(local) != len(whole):
            return _Joined((parts[0],), 0)
        cut = [dimension for dimension, size in enumerate(local) if size != whole[dimension]]
        return _Joined(tuple(parts), cut[0])

    def _collect_facts(self) -> CheckpointFacts:
        first = self._ranks[0]
        for rank in self._ranks[1:]:
            if (rank.step, rank.stage) != (first.step, first.stage):
                raise CheckpointError(
                    f"{rank.files[0]}: step {rank.step}, ZeRO stage {rank.stage}; {first.files[0]} says step "
                    f"{first.step}, stage {first.stage}. The files come from different checkpoints."
                )
        layout = {
            "tensor_parallel": self._tensor_parallel,
            "pipeline_parallel": self._pipeline_parallel,
            "data_parallel": len(first.files),
            "zero_stage": first.stage,
        }
        files = tuple(sorted(path for path in self._folder.iterdir() if path.suffix == ".pt"))
        metadata = {key: first.model[key] for key in _METADATA if key in first.model}
        metadata["dtype"] = "bfloat16" if first.files[0].name.startswith("bf16_") else "float32"
        metadata["optimizer_groups"] = first.hyperparameters
        kind = f"DeepSpeed ZeRO-{first.stage}" if first.has_stage else "DeepSpeed BF16_Optimizer"
        return CheckpointFacts(self._folder, kind, STATES, first.step, layout, metadata, files)


def _rank_files(folder: Path) -> list[tuple[int, Path, tuple[Path, ...]]]:
    """(model-parallel rank, model file, optimizer files by data-parallel rank), refusing gaps in the grid."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("expp_rank_") or "_expert_" in name for name in names):
        raise CheckpointError(f"{folder}: a mixture-of-experts checkpoint; only dense models are supported.")
    optimizer: dict[int, dict[int, Path]] = {}
    for name in names:
        if match := _OPTIMIZER_FILE.fullmatch(name):
            optimizer.setdefault(int(match[2]), {})[int(match[1])] = folder / name
    if not optimizer:
        raise CheckpointError(
            f"{folder}: no ZeRO optimizer file (zero_pp_rank_*_optim_states.pt); a ZeRO stage 1, 2 or 3 checkpoint has "
            "one per rank. ZeRO-0 checkpoints are not supported; export the model to Hugging Face format instead."
        )
    models = {int(match[1]): folder / name for name in names if (match := _MODEL_FILE.fullmatch(name))}
    ranks = range(max([*optimizer, *models]) + 1)
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


def _open_rank(paths: tuple[int, Path, tuple[Path, ...]], architecture: Architecture, trust: bool) -> _ModelRank:
    index, model_file, files = paths
    model = load_pt(model_file, trust=trust)
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
    flat = {state: [tensors[state] for tensors in flats] for state in STATES}
    shards = FlatShards(parameters, flat)
    check_bounds(shards, str(model_file.parent))
    step = _common_step(states, stage, files)
    names = logical_names(parameters, architecture)
    groups = _hyperparameters(states[0], stage)
    has_stage = "zero_stage" in states[0]
    return _ModelRank(index, model_file, files, model, shards, stage, has_stage, step, names, groups)


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
    if model.get("frozen_param_shapes"):
        frozen = ", ".join(list(model["frozen_param_shapes"])[:3])
        raise CheckpointError(f"{model_file}: holds frozen parameters ({frozen}, ...), which are not supported.")
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


def _model_degrees(folder: Path, ranks: Sequence[_ModelRank]) -> tuple[int, int]:
    degrees = ranks[0].model.get("checkpoint_parallel_dimensions") or {}
    has_layers = any(folder.glob("layer_*-model_*-model_states.pt"))
    first_layer = len(list(folder.glob("layer_00-model_*-model_states.pt")))
    tensor = degrees.get("tp_degree") or (first_layer if has_layers else len(ranks))
    if not tensor or len(ranks) % tensor:
        raise CheckpointError(
            f"{folder}: {len(ranks)} model-parallel ranks do not divide into tensor_parallel {tensor}."
        )
    return tensor, len(ranks) // tensor


def _check_padding(rank: _ModelRank) -> None:
    for state in STATES:
        for padding in rank.shards.padding(state):
            if padding.count_nonzero():
                raise CheckpointError(
                    f"{rank.model_file.parent}: {state} of model-parallel rank {rank.index}: ZeRO's padding is not zero. "
                    "Shards were swapped, or belong to another checkpoint."
                )


def _check_duplicates(rank: _ModelRank) -> None:
    ranks = rank.shards.flat["weight"]
    for group in range(len(ranks[0])):
        for later in range(1, len(ranks)):
            first, second = ranks[later - 1][group], ranks[later][group]
            if first.numel() > 1 and torch.equal(first, second) and first.any():
                raise CheckpointError(
                    f"{rank.files[later]}: holds the same weights as {rank.files[later - 1].name}; one of them is a "
                    "copy of the other. Copy the right file back."
                )


def _module_weights(folder: Path, rank: _ModelRank) -> Mapping[str, torch.Tensor]:
    """The weights in the model's dtype that DeepSpeed saved beside the masters, by parameter name; {} for ZeRO-3."""
    module = rank.model.get("module")
    if rank.stage == 3:
        return {}
    if module is not None:
        return {name: tensor for name, tensor in module.items() if name in rank.names}
    return {name: tensor for name, tensor in _layer_weights(folder, rank) if name in rank.names}


def _layer_weights(folder: Path, rank: _ModelRank) -> Iterator[tuple[str, torch.Tensor]]:
    layers = {name.split(".")[0] for name in rank.names if name[0].isdigit()}
    tensor_rank = rank.index % max(1, len(list(folder.glob("layer_01-model_*-model_states.pt"))))
    for layer in sorted(layers, key=int):
        path = folder / f"layer_{int(layer):02d}-model_{tensor_rank:02d}-model_states.pt"
        for name, tensor in load_pt(path).items():
            yield f"{layer}.{name}", tensor


def _check_master(rank: _ModelRank, parameter: str, saved: torch.Tensor) -> None:
    flat = rank.shards.parameters[parameter]
    if tuple(saved.shape) != flat.shape:
        raise CheckpointError(
            f"{rank.model_file}: {parameter}: module weight has shape {list(saved.shape)}, its master {list(flat.shape)}."
        )
    rows = max(1, _CHECKED_ELEMENTS // math.prod(flat.shape[1:]))
    wrong = 0
    for first in range(0, flat.shape[0], rows):
        stop = min(first + rows, flat.shape[0])
        master = rank.shards.read(parameter, "weight", first, stop).to(saved.dtype)
        if not torch.equal(master, saved[first:stop]):
            wrong += int((master != saved[first:stop]).sum())
    if wrong:
        holders = ", ".join(sorted({rank.files[piece.rank].name for piece in flat.pieces}))
        raise CheckpointError(
            f"{rank.model_file.parent}: {parameter}: {wrong} of {saved.numel()} elements of the fp32 master (in {holders}) "
            f"differ from the saved {saved.dtype} weight. Shards were swapped, damaged, or mixed from two checkpoints."
        )
