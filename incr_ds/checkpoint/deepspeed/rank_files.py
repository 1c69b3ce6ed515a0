"""The files of a ZeRO checkpoint: the grid of ranks, and what each model-parallel rank's files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import MUON_STATES, STATES, State, check_dtype
from incr_ds.checkpoint.deepspeed.frozen import Flats, add_frozen
from incr_ds.checkpoint.deepspeed.names import (
    ANY_MODEL_FILE,
    OPTIMIZER_PREFIXES,
    model_file,
    optimizer_file,
    tag_files,
)
from incr_ds.checkpoint.deepspeed.partition import (
    FlatParameter,
    FlatShards,
    check_bounds,
    contiguous_parameters,
    momentum_places,
    scattered_parameters,
)
from incr_ds.checkpoint.deepspeed.schema import (
    AdamState,
    ModelStates,
    MomentsError,
    model_content,
    moments,
    momentum,
    partitions,
    stage3_partitions,
    zero_stage,
)
from incr_ds.checkpoint.deepspeed.zero0 import unpartitioned
from incr_ds.checkpoint.naming import logical_names, plain_names, refuse_adapters
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.errors import CheckpointError

BF16_OPTIMIZER = 1  # it writes ZeRO-1's partitions, but no zero_stage
_NOTHING = torch.empty(0)  # a state that a group does not have


@dataclass(frozen=True)
class ModelRank:
    """One model-parallel rank: its metadata file, its data-parallel files, and the parameters in them.

    ``kind`` is the format's readable name, ``dtype`` the model's own, ``universal_info`` DeepSpeed's notes for conversions.
    ``no_moments`` is the reason why the optimizer's states cannot be used, if so; ``step`` is then 0. It is None if no
    optimizer on this rank counts steps, which Muon does not.
    """

    index: int
    model_file: Path
    files: tuple[Path, ...]
    model: ModelStates
    shards: FlatShards
    stage: int
    kind: str
    dtype: str
    step: int | None
    names: Mapping[str, str]
    hyperparameters: tuple[Mapping[str, Any], ...]
    universal_info: Any = None
    no_moments: str | None = None


def open_ranks(folder: Path, architecture: Architecture, trust: bool) -> list[ModelRank]:
    """Open every model-parallel rank with its files mapped. Raises CheckpointError for missing or unsupported files."""
    ranks = [_open_rank(paths, architecture, trust) for paths in _rank_files(folder)]
    without = next((rank for rank in ranks if rank.no_moments), None)
    if without is None or without.stage:
        return ranks
    # ZeRO-0 matches moments with names on each rank separately. Without those of one rank, all give their modules'
    # weights: another rank's masters would not equal them in what both hold.
    why = without.no_moments
    return [_unpartitioned_rank(rank.index, rank.model_file, rank.model, architecture, why) for rank in ranks]


def _rank_files(folder: Path) -> list[tuple[int, Path, tuple[Path, ...]]]:
    """(model-parallel rank, model file, optimizer files by data-parallel rank). Refuses gaps in the grid."""
    names = sorted(path.name for path in folder.iterdir())
    if experts := [name for name in names if name.startswith("expp_rank_") or "_expert_" in name]:
        raise CheckpointError(
            f"{folder / experts[0]}: a file of DeepSpeed's own mixture-of-experts layers (deepspeed.moe), which cannot be "
            "read. Load the checkpoint with the program that wrote it, and save the model as a Hugging Face folder."
        )
    found = tag_files(names)
    # ZeRO-3 has a model file for each data-parallel rank, and the first one has all that is needed.
    models = {rank: name for (rank, data), name in found.zero_3_models.items() if data == 0} | dict(found.models)
    if not found.optimizers and not models:
        raise CheckpointError(
            f"{folder}: no file {ANY_MODEL_FILE}; this is not a tag's folder of a DeepSpeed checkpoint."
        )
    ranks = range(max(*(rank for rank, _ in found.optimizers), *models, -1) + 1)
    num_data = max((data for _, data in found.optimizers), default=-1) + 1
    dtype = "bfloat16" if any(name.startswith(OPTIMIZER_PREFIXES["bfloat16"]) for name in names) else "float32"
    missing = [
        optimizer_file(rank, data, dtype)
        for rank in ranks
        for data in range(num_data)
        if (rank, data) not in found.optimizers
    ]
    missing += [model_file(rank) for rank in ranks if rank not in models]
    if missing:
        grid = f" of a grid of {len(ranks)} model-parallel x {num_data} data-parallel ranks" if num_data else ""
        raise CheckpointError(f"{folder}: missing {', '.join(missing)}{grid}. Copy the files back or use another tag.")
    return [
        (rank, folder / models[rank], tuple(folder / found.optimizers[rank, data] for data in range(num_data)))
        for rank in ranks
    ]


@dataclass(frozen=True)
class _RankOptimizer:
    """One data-parallel rank's optimizer file, with one interface for ZeRO-1/2 and ZeRO-3."""

    path: Path
    stage: int
    says_stage: bool
    partition_count: int
    adam: AdamState
    masters: list[torch.Tensor]
    paddings: Sequence[Sequence[int] | None] | None
    universal_info: Any

    def flat(self, with_moments: bool) -> dict[State, list[torch.Tensor]]:
        """Masters, and moments if requested, as one-dimensional tensors by group."""
        found: dict[State, list[torch.Tensor]] = {"weight": [tensor.flatten() for tensor in self.masters]}
        if with_moments:
            groups = self.states()
            for state in MUON_STATES[1:] if self.muon_groups else STATES[1:]:
                found[state] = [group.get(state, _NOTHING).flatten() for group in groups]
        for state, tensors in found.items():
            for index, tensor in enumerate(tensors):
                check_dtype(tensor.dtype, f"{state} of optimizer group {index}", str(self.path))
        return found

    @property
    def muon_groups(self) -> frozenset[int]:
        """The groups that Muon trains. ZeRO-3's momentum is laid out otherwise, and counts as unknown."""
        groups = self.adam["param_groups"] if self.stage != 3 else ()
        return frozenset(index for index, group in enumerate(groups) if group.get("use_muon") is True)

    def states(self) -> list[dict[str, Any]]:
        """The optimizer's states by group. Raises MomentsError unless they are exactly Adam's moments, or Muon's momentum."""
        return [self._state(index, f"optimizer group {index}") for index in range(len(self.masters))]

    def _state(self, index: int, at: str) -> dict[str, Any]:
        saved = self.adam["state"].get(index, {})
        if index not in self.muon_groups:
            return dict(moments(saved, self.path, at))
        if not saved and not self.masters[index].numel():  # no part of the group is on this rank
            return {}
        return {"momentum_buffer": momentum(saved, self.path, at)}


def _open_rank(paths: tuple[int, Path, tuple[Path, ...]], architecture: Architecture, trust: bool) -> ModelRank:
    index, model_path, files = paths
    model = model_content(load_pt(model_path, trust=trust), model_path)
    if not files:
        return _unpartitioned_rank(index, model_path, model, architecture)
    states = [_rank_optimizer(load_pt(path, trust=trust), path) for path in files]
    _check_partition_count(states, model, model_path)
    first = states[0]
    no_moments = _why_no_moments(states)
    flats = [state.flat(with_moments=no_moments is None) for state in states]
    parameters = _parameters(model_path, model.get("param_shapes") or [], first, flats)
    frozen = add_frozen(parameters, flats, model_path, model, first.stage, trust)
    flat = {state: [tensors[state] for tensors in flats] for state in MUON_STATES if state in flats[0]}
    places = momentum_places(parameters, first.muon_groups if "momentum_buffer" in flat else ())
    shards = FlatShards(parameters, flat, frozen, places)
    check_bounds(shards, str(model_path.parent))
    step = 0 if no_moments else _common_step(states)
    refuse_adapters(parameters, str(model_path))
    names = logical_names(parameters, architecture)
    kind = f"DeepSpeed ZeRO-{first.stage}" if first.says_stage else "DeepSpeed BF16_Optimizer"
    dtype = _weights_dtype(files[0], model)
    info = first.universal_info or model.get("universal_checkpoint_info")
    groups = _hyperparameters(first)
    found = (shards, first.stage, kind, dtype, step, names, groups, info, no_moments)
    return ModelRank(index, model_path, files, model, *found)


def _weights_dtype(optimizer: Path, model: ModelStates) -> str:
    """The dtype of the run's weights: bf16 has files of other names, and fp16 is in the run's config and in its module."""
    if optimizer.name.startswith(OPTIMIZER_PREFIXES["bfloat16"]):
        return "bfloat16"
    config: Any = model.get("ds_config")
    section = config.get("fp16") if isinstance(config, dict) else None
    stated = isinstance(section, dict) and section.get("enabled") is True
    saved = any(tensor.dtype == torch.float16 for tensor in (model.get("module") or {}).values())
    return "float16" if stated or saved else "float32"


def _parameters(
    model_path: Path, group_shapes: Sequence[Mapping[str, tuple[int, ...]]], first: _RankOptimizer, flats: Flats
) -> dict[str, FlatParameter]:
    """Find each trained parameter in the flat tensors of the ranks."""
    if any(len(tensors["weight"]) != len(group_shapes) for tensors in flats):
        counts = ", ".join(str(len(tensors["weight"])) for tensors in flats)
        raise CheckpointError(
            f"{model_path}: param_shapes has {len(group_shapes)} groups, the optimizer files beside it {counts}: they are from "
            "different checkpoints."
        )
    if first.stage == 3:
        return scattered_parameters(group_shapes, len(flats))
    sizes = [master.numel() for master in first.masters]
    return contiguous_parameters(group_shapes, _paddings(first, group_shapes), sizes)


def _unpartitioned_rank(
    index: int, model_path: Path, model: ModelStates, architecture: Architecture, no_moments: str | None = None
) -> ModelRank:
    """Open a rank of ZeRO-0, where one file holds the module and its optimizer."""
    found = unpartitioned(model_path, model, architecture, no_moments)
    info = model.get("universal_checkpoint_info")
    names = plain_names(found.shards.parameters, architecture)
    files = (model_path,)
    kind, dtype = "DeepSpeed ZeRO-0", str(found.dtype).removeprefix("torch.")
    more = (kind, dtype, found.step, names, found.hyperparameters, info, found.no_moments)
    return ModelRank(index, model_path, files, model, found.shards, 0, *more)


def _rank_optimizer(content: Any, path: Path) -> _RankOptimizer:
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: no key optimizer_state_dict; not a DeepSpeed optimizer file.")
    if isinstance(state.get("base_optimizer_state"), list):
        raise CheckpointError(
            f"{path}: an elastic checkpoint, which is not supported; save with elastic_checkpoint false."
        )
    stage = zero_stage(state.get("zero_stage", BF16_OPTIMIZER), path)
    info, says_stage = state.get("universal_checkpoint_info"), "zero_stage" in state
    if stage == 3:
        third = stage3_partitions(state, path)
        adam, masters, paddings = third["optimizer_state_dict"], third["fp32_flat_groups"], None
        return _RankOptimizer(path, stage, says_stage, third["partition_count"], adam, masters, paddings, info)
    found = partitions(state, path)
    adam, masters = found["base_optimizer_state"], found["single_partition_of_fp32_groups"]
    paddings = found.get("param_alignment_paddings")
    return _RankOptimizer(path, stage, says_stage, found["partition_count"], adam, masters, paddings, info)


def _check_partition_count(states: Sequence[_RankOptimizer], model: ModelStates, model_path: Path) -> None:
    expected = model.get("dp_world_size")
    if expected != len(states):
        raise CheckpointError(
            f"{model_path}: written with {expected} data-parallel ranks, found {len(states)} optimizer file(s) beside it. "
            "Copy the missing files back, or remove those of another checkpoint."
        )
    for state in states:
        if state.partition_count != expected:
            raise CheckpointError(
                f"{state.path}: one of {state.partition_count} partitions, expected one of {expected}: from another checkpoint."
            )


def _paddings(first: _RankOptimizer, group_shapes: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    saved = first.paddings or [None] * len(group_shapes)
    lengths = [len(shapes) for shapes in group_shapes]
    if [len(paddings or range(length)) for paddings, length in zip(saved, lengths, strict=False)] != lengths:
        raise CheckpointError(
            f"{first.path}: param_alignment_paddings does not have one entry for each parameter of param_shapes: they are from "
            "different checkpoints."
        )
    return [list(paddings or [0] * length) for paddings, length in zip(saved, lengths, strict=True)]


def _why_no_moments(states: Sequence[_RankOptimizer]) -> str | None:
    """The first file's reason if no file has Adam's moments. Raises CheckpointError if only some files lack them."""
    reasons = {}
    for state in states:
        try:
            state.states()
        except MomentsError as error:
            reasons[state.path] = str(error)
    if reasons and len(reasons) < len(states):
        path, reason = next(iter(reasons.items()))
        complete = next(state.path.name for state in states if state.path not in reasons)
        raise CheckpointError(
            f"{path.parent}: {reason}. {complete} has them. Copy {path.name} again, or use another tag."
        )
    return next(iter(reasons.values()), None)


def _common_step(states: Sequence[_RankOptimizer]) -> int | None:
    steps = {
        group["step"]: f"{state.path.name} group {index}"
        for state in states
        for index, group in enumerate(state.states())
        if "step" in group
    }
    if len(steps) > 1:
        found = "; ".join(f"step {step} in {where}" for step, where in steps.items())
        raise CheckpointError(f"{states[0].path.parent}: the optimizer files disagree on the step: {found}.")
    return next(iter(steps), None)


def _hyperparameters(first: _RankOptimizer) -> tuple[Mapping[str, Any], ...]:
    groups = first.adam["param_groups"]
    return tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
