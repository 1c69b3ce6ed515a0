"""Writes DeepSpeed's native layout: module files per model-parallel rank or pipeline layer, ZeRO partitions per rank.

The files contain only tensors and plain containers, no class of DeepSpeed. DeepSpeed's ``load_checkpoint`` loads them into
an engine of exactly the declared layout. Format facts were read in DeepSpeed 0.19.8 (runtime/engine.py,
runtime/zero/stage_1_and_2.py, runtime/pipe/module.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import State
from incr_ds.checkpoint.deepspeed.names import layer_file, model_file, optimizer_file
from incr_ds.checkpoint.deepspeed.partition import FlatParameter, contiguous_parameters
from incr_ds.checkpoint.deepspeed.releases import TESTED
from incr_ds.checkpoint.streaming import Part, StreamedTensor, TargetFile, block_parts, parameter_tensor
from incr_ds.checkpoint.torch_file.write import ArchiveFile
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import LayoutError
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import Modules, module_parameters, num_pipeline_layers
from incr_ds.sharding.optimizer_groups import group_count, optimizer_groups
from incr_ds.sharding.partition_sizes import partition_size
from incr_ds.sharding.placement import rank_parameters, split_bounds

FORMAT_VERSION = TESTED
ADAMW_DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


@dataclass(frozen=True)
class NativeTarget:
    """What all files of one native checkpoint have in common.

    ``step`` is the optimizer's step, ``global_steps`` the trainer's. ``groups`` are the AdamW hyperparameters of the
    decaying and the non-decaying parameter group. ``modules`` are those of another training code, with the vocabulary
    padded to ``vocabulary`` rows. ``bare_states`` marks a universal checkpoint for a loader that accepts only tensors.
    ``has_moments`` is False if the optimizer starts anew: ZeRO-1 and 2 then list its groups without a state. ``momentum`` are
    the tensors that Muon trains, and ``muon`` the hyperparameters of their group.
    """

    architecture: Architecture
    layout: ParallelLayout
    dtype: torch.dtype
    tag: str
    step: int
    global_steps: int
    groups: tuple[Mapping[str, Any], ...]
    modules: Modules | None = None
    vocabulary: int = 0
    bare_states: bool = False
    has_moments: bool = True
    momentum: frozenset[str] = frozenset()
    muon: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        """The dtype of the model's weights, as file names have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def has_layer_files(self) -> bool:
        """Whether a pipeline module stores the weights, in one file per layer."""
        return self.layout.pipeline_parallel > 1 or self.modules is not None

    @property
    def embedding_layer(self) -> int:
        """The pipeline layer whose file also serves a tied head."""
        return 0 if self.modules is None else self.modules.embedding

    def optimizer_groups(self, shards: tuple[RankParameter, ...]) -> tuple[tuple[RankParameter, ...], ...]:
        """The parameter groups of a model-parallel rank with the parameters ``shards``; as many on every rank."""
        if not self.momentum:
            return optimizer_groups(shards)
        number = group_count(self.architecture, self.layout, None, apart=self.momentum)
        return optimizer_groups(shards, at_least=number, apart=self.momentum)

    def hyperparameters(self, group: tuple[RankParameter, ...]) -> Mapping[str, Any]:
        """Those of one of the parameter groups."""
        if group[0].tensor.name in self.momentum:
            return self.muon
        return self.groups[0 if group[0].tensor.is_matrix else -1]

    def shards(self, model_rank: int) -> tuple[RankParameter, ...]:
        """The parameters of model-parallel rank ``model_rank``, in the order of its module.

        Ranks are numbered with the pipeline stage outermost and the tensor rank inside.
        """
        stage, tensor_rank = divmod(model_rank, self.layout.tensor_parallel)
        if self.modules is None:
            return rank_parameters(self.architecture, self.layout, stage, tensor_rank)
        degrees = (self.layout.tensor_parallel, tensor_rank, self.vocabulary)
        return stage_parameters(self.modules, self.architecture, self.layout.pipeline_parallel, stage, degrees)


@dataclass(frozen=True)
class ModelFile(ArchiveFile):
    """mp_rank_XX_model_states.pt: metadata, and the module's weights unless the pipeline stores them by layer."""

    target: NativeTarget
    model_rank: int

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{model_file(self.model_rank)}"

    def content(self) -> dict[str, Any]:
        """The metadata, the shapes of the parameters by optimizer group, and the weights if they are here."""
        target = self.target
        content = self.metadata()
        shards = target.shards(self.model_rank)
        groups = target.optimizer_groups(shards)
        content["param_shapes"] = [{shard.parameter: torch.Size(shard.shape) for shard in group} for group in groups]
        if not target.has_layer_files:
            module = {shard.parameter: _weight(shard, target.dtype) for shard in shards}
            content["module"] = module | {alias: module[owner] for alias, owner in content["shared_params"].items()}
        return content

    def metadata(self) -> dict[str, Any]:
        """The content of every model file, in which ``module`` and ``param_shapes`` are still empty."""
        target, layout = self.target, self.target.layout
        aliases = {spec.name: spec.tied_to for spec in target.architecture.tensors if spec.tied_to}
        return {
            "module": None,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [],
            "frozen_param_shapes": None,
            "shared_params": {} if target.has_layer_files else aliases,
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": target.global_steps,
            "global_samples": 0,
            "dp_world_size": layout.data_parallel,
            "mp_world_size": layout.tensor_parallel * layout.pipeline_parallel,
            "checkpoint_parallel_dimensions": {
                "pp_degree": layout.pipeline_parallel,
                "tp_degree": layout.tensor_parallel,
            },
            # Nothing else tells fp16 from fp32 where a pipeline stores the weights.
            "ds_config": {"fp16": {"enabled": True}} if target.dtype == torch.float16 else {},
            "ds_version": FORMAT_VERSION,
        }


@dataclass(frozen=True)
class LayerFile(ArchiveFile):
    """layer_LL-model_TT-model_states.pt: one pipeline layer's weights on one tensor-parallel rank."""

    target: NativeTarget
    layer: int
    tensor_rank: int
    model_rank: int

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{layer_file(self.layer, self.tensor_rank)}"

    def content(self) -> dict[str, StreamedTensor]:
        """The weights by their names in the layer."""
        held = [shard for shard in self.target.shards(self.model_rank) if shard.pipeline_layer == self.layer]
        return {shard.local_name: _weight(shard, self.target.dtype) for shard in held}


@dataclass(frozen=True)
class OptimizerFile(ArchiveFile):
    """zero_pp_rank_D_mp_rank_XX_optim_states.pt: one rank's partition of fp32 masters and Adam moments."""

    target: NativeTarget
    model_rank: int
    data_rank: int

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{optimizer_file(self.model_rank, self.data_rank, self.target.dtype_name)}"

    def content(self) -> dict[str, Any]:
        """The file's content."""
        num_data = self.target.layout.data_parallel
        groups = self.target.optimizer_groups(self.target.shards(self.model_rank))
        sizes = [partition_size(sum(shard.numel for shard in group), num_data) for group in groups]
        paddings = [self._padding(group, size) for group, size in zip(groups, sizes, strict=True)]
        masters: list[StreamedTensor] = []
        moments: dict[int, dict[str, Any]] = {}
        for index, (group, size, padding) in enumerate(zip(groups, sizes, paddings, strict=True)):
            masters.append(self._partition(group, size, "weight", size - padding))
            if self.target.has_moments and (state := self._state(group, size)):
                moments[index] = state
        hyperparameters = [
            {**self.target.hyperparameters(group), "params": [index]} for index, group in enumerate(groups)
        ]
        content = {
            # No clip_grad: DeepSpeed's loader would override the threshold of the engine that loads the file.
            "overflow": False,
            "base_optimizer_state": {"state": moments, "param_groups": hyperparameters},
            "single_partition_of_fp32_groups": masters,
            "zero_stage": self.target.layout.zero_stage,
            "group_paddings": paddings,
            "partition_count": [num_data] * len(groups),
            "ds_version": FORMAT_VERSION,
        }
        return {"optimizer_state_dict": content, "ds_config": {}, "ds_version": FORMAT_VERSION}

    def _state(self, group: tuple[RankParameter, ...], size: int) -> dict[str, Any]:
        """The optimizer's state of this rank's partition of a group; {} if Muon trains it and no part of it is here."""
        if group[0].tensor.name in self.target.momentum:
            return self._momentum(group, size)
        return {
            "step": torch.tensor(float(self.target.step)),
            "exp_avg": self._partition(group, size, "exp_avg", size),
            "exp_avg_sq": self._partition(group, size, "exp_avg_sq", size),
        }

    def _momentum(self, group: tuple[RankParameter, ...], size: int) -> dict[str, Any]:
        """The momentum of every parameter of which this rank's partition has a part, whole."""
        placed = _placed(group, size)
        held = [
            shard for shard in group if any(piece.rank == self.data_rank for piece in placed[shard.parameter].pieces)
        ]
        parts = [
            part for shard in held for part in block_parts(shard.blocks, shard.shape, "momentum_buffer", 0, shard.numel)
        ]
        length = sum(shard.numel for shard in held)
        return {"momentum_buffer": StreamedTensor((length,), torch.float32, tuple(parts))} if held else {}

    def _padding(self, group: tuple[RankParameter, ...], size: int) -> int:
        """Number of zero elements at the end of this rank's partition."""
        total: int = sum(shard.numel for shard in group)
        return min(size, max(0, (self.data_rank + 1) * size - total))

    def _partition(self, group: tuple[RankParameter, ...], size: int, state: State, length: int) -> StreamedTensor:
        """The first ``length`` elements of this rank's partition of ``size`` elements."""
        placed = _placed(group, size)
        parts = [part for shard in group for part in held_parts(shard, placed[shard.parameter], self.data_rank, state)]
        return StreamedTensor((length,), torch.float32, tuple(parts))


def _placed(group: tuple[RankParameter, ...], size: int) -> dict[str, FlatParameter]:
    """Where the parameters of a group are, in partitions of ``size`` elements."""
    shapes = {shard.parameter: shard.shape for shard in group}
    return contiguous_parameters([shapes], [[0] * len(group)], [size])


def held_parts(shard: RankParameter, placed: FlatParameter, data_rank: int, state: State) -> tuple[Part, ...]:
    """What ``data_rank`` holds of a parameter."""
    found: list[Part] = []
    position = 0
    for piece in placed.pieces:
        if piece.rank == data_rank:
            found += block_parts(shard.blocks, shard.shape, state, position, position + piece.length)
        position += piece.length
    return tuple(found)


def native_files(target: NativeTarget) -> tuple[TargetFile, ...]:
    """Every file of a native checkpoint. Raises LayoutError for a layout without a native form here."""
    layout = target.layout
    if layout.zero_stage not in (1, 2):
        raise LayoutError(
            f"layout.zero_stage: {layout.zero_stage} has no optimizer files; use the engine's stage 1, 2 or 3, or format: "
            "huggingface for the weights alone."
        )
    model_ranks = range(layout.tensor_parallel * layout.pipeline_parallel)
    files: list[TargetFile] = [ModelFile(target, rank) for rank in model_ranks]
    if target.has_layer_files:
        for rank in model_ranks:
            files += _layer_files(target, rank)
    files += [OptimizerFile(target, rank, data) for rank in model_ranks for data in range(layout.data_parallel)]
    return tuple(files)


def _layer_files(target: NativeTarget, model_rank: int) -> list[TargetFile]:
    """One file per layer of the stage. A tied head has none, since its embedding's file serves both."""
    tensor_rank = model_rank % target.layout.tensor_parallel
    layers = sorted({shard.pipeline_layer for shard in target.shards(model_rank)})
    is_first_stage = model_rank < target.layout.tensor_parallel
    held = [layer for layer in layers if layer != target.embedding_layer or is_first_stage]
    return [LayerFile(target, layer, tensor_rank, model_rank) for layer in held]


def stage_parameters(
    modules: Modules, architecture: Architecture, num_stages: int, stage: int, degrees: tuple[int, int, int]
) -> tuple[RankParameter, ...]:
    """The parameters of a stage of another training code's pipeline on one tensor rank.

    Tied parameters come first, as DeepSpeed's pipeline module registers them. Decoder layers are spread nearly evenly,
    larger parts first, as by its partition_method type:transformer. ``degrees`` are the tensor-parallel degree, the tensor
    rank, and the rows of the vocabulary.
    """
    by_layer = module_parameters(modules, architecture, *degrees)
    starts = [modules.first_decoder + start for start, _ in split_bounds(architecture.num_layers, num_stages)]
    starts[0] = 0
    stops = [*starts[1:], num_pipeline_layers(modules, architecture)]
    own = [item for layer, items in by_layer.items() if starts[stage] <= layer < stops[stage] for item in items]
    if not architecture.tied or stage not in (0, num_stages - 1):
        return tuple(own)
    tied = by_layer[modules.embedding]
    return (*tied, *(item for item in own if item not in tied))


def _weight(shard: RankParameter, dtype: torch.dtype) -> StreamedTensor:
    return parameter_tensor(shard.blocks, shard.shape, "weight", dtype)
