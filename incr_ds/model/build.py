"""Builds this rank's module and teacher from an architecture and a layout."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import nn

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.training import check_shared_samples, check_trainable, check_vocabularies
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import ModelSettings
from incr_ds.errors import LayoutError
from incr_ds.losses.distillation import DistillationLoss, distillation_loss
from incr_ds.losses.head import Loss
from incr_ds.model.attention import check_attention, check_capped_scores
from incr_ds.model.layers import LayerFactory
from incr_ds.model.liger import use_liger
from incr_ds.model.partitioning import Partitioning
from incr_ds.model.pipeline import StagedLanguageModel
from incr_ds.model.plain import LanguageModel
from incr_ds.model.sequence_parallel import SequenceRanks, sequence_ranks
from incr_ds.model.teacher import Teacher
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import CheckpointWeights, Weights
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.placement import check_layout, rank_parameters


@dataclass(frozen=True)
class RankModel:
    """What one rank trains. ``shards`` are its parameters in order, and ``grid`` and ``shared`` hold the process groups."""

    module: LanguageModel | StagedLanguageModel
    teacher: Teacher | None
    shards: tuple[RankParameter, ...]
    grid: PipelineParallelGrid
    shared: SequenceRanks


@dataclass(frozen=True)
class ModelRequest:
    """What to build: the student, its initial weights, an optional teacher, their layout and how they compute.

    ``dtype`` is the dtype of parameters and activations. The teacher is put on ``device``; the engine moves the student.
    ``document_end`` and ``router_loss`` are LayerFactory's. ``sequence_parallel`` ranks share each sample. ``zero3`` is the
    engine's config if its ZeRO-3 shall cut the student as it is built.
    """

    architecture: Architecture
    weights: Weights
    teacher: LogicalCheckpoint | None
    layout: ParallelLayout
    settings: ModelSettings
    dtype: torch.dtype
    device: torch.device
    loss: Loss = distillation_loss
    document_end: int | None = None
    router_loss: float = 0.0
    sequence_parallel: int = 1
    zero3: Mapping[str, Any] | None = None


def build_rank_model(request: ModelRequest, observe: Callable[[DistillationLoss], None]) -> RankModel:
    """Build this rank's part. torch.distributed must be initialized with layout.world_size processes.

    Raises LayoutError if the model cannot be cut this way or the module differs from the declared placement, and
    ConfigError if the teacher's vocabulary differs. A pipeline calls ``observe`` with the loss of each micro-batch.
    """
    check_layout(request.architecture, request.layout)
    check_trainable(request.architecture)
    check_shared_samples(request.architecture, request.sequence_parallel)
    _choose_kernels(request)
    topology = _topology(request.layout)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the topology
        grid = PipelineParallelGrid(topology=topology)
    ranks, shared = _tensor_ranks(grid, request.layout), sequence_ranks(request.sequence_parallel)
    stage = grid.get_stage_id()
    teacher = _build_teacher(request, ranks, shared, stage)
    factory = _factory(request, request.architecture, request.weights, ranks, shared, torch.device("cpu"))
    if request.zero3 is not None:
        partitioning = Partitioning(request.zero3, request.dtype, request.device, grid)
        factory = replace(factory, partition=partitioning.cut)
    if request.layout.pipeline_parallel == 1:
        module = LanguageModel(factory, range(request.architecture.num_layers + 3))
    else:
        module = StagedLanguageModel(factory, topology, request.layout, teacher, observe)
        grid = module.mpu()
    shards = rank_parameters(request.architecture, request.layout, stage, ranks.rank)
    check_parameters(module, shards)
    return RankModel(module, teacher, shards, grid, shared)


def check_parameters(module: nn.Module, shards: tuple[RankParameter, ...]) -> None:
    """Raise LayoutError unless ``module`` has exactly the parameters of ``shards``: names, shapes and order."""
    # ZeRO-3 keeps the shape of what it has cut.
    found = [(name, tuple(getattr(one, "ds_shape", one.shape))) for name, one in module.named_parameters()]
    expected = [(shard.parameter, shard.shape) for shard in shards]
    if found == expected:
        return
    unlike = [f"  expected {want}, found {have}" for want, have in zip(expected, found, strict=False) if want != have]
    raise LayoutError(
        "\n".join(
            [
                f"the module's parameters differ from the declared placement ({len(expected)} declared, "
                f"{len(found)} found); is this transformers version supported?",
                *unlike[:5],
            ]
        )
    )


def _choose_kernels(request: ModelRequest) -> None:
    """Check that attention and layers can run as requested, before the first layer is built."""
    check_attention(request.settings.attention, request.device)
    for architecture in [request.architecture, *([] if request.teacher is None else [request.teacher.architecture])]:
        check_capped_scores(request.settings.attention, architecture)
    if request.settings.layer_kernels == "liger":
        taught = [] if request.teacher is None else [request.teacher.architecture]
        for model_type in {one.family.model_type for one in (request.architecture, *taught)}:
            use_liger(model_type, request.device)


def _topology(layout: ParallelLayout) -> PipeModelDataParallelTopology:
    return PipeModelDataParallelTopology(
        num_pp=layout.pipeline_parallel, num_mp=layout.tensor_parallel, num_dp=layout.data_parallel
    )


def _tensor_ranks(grid: PipelineParallelGrid, layout: ParallelLayout) -> TensorRanks:
    group = grid.get_slice_parallel_group() if layout.tensor_parallel > 1 else None
    return TensorRanks(group, grid.get_slice_parallel_rank(), layout.tensor_parallel)


def _build_teacher(request: ModelRequest, ranks: TensorRanks, shared: SequenceRanks, stage: int) -> Teacher | None:
    if request.teacher is None:
        return None
    architecture = request.teacher.architecture
    check_vocabularies(request.architecture, architecture)
    check_layout(architecture, request.layout.of_teacher)
    check_trainable(architecture)
    check_shared_samples(architecture, request.sequence_parallel)
    weights = CheckpointWeights(request.teacher)
    return Teacher(_factory(request, architecture, weights, ranks, shared, request.device), request.layout, stage)


def _factory(
    request: ModelRequest,
    architecture: Architecture,
    weights: Weights,
    ranks: TensorRanks,
    shared: SequenceRanks,
    device: torch.device,
) -> LayerFactory:
    settings = request.settings
    taught = None if request.teacher is None else request.teacher.architecture.logit_softcap
    loss = partial(request.loss, softcap=architecture.logit_softcap, teacher_softcap=taught)
    return LayerFactory(
        architecture,
        ranks,
        weights,
        request.dtype,
        device,
        settings.attention,
        settings.activation_checkpointing,
        loss,
        request.document_end,
        request.router_loss,
        shared,
        settings.experts if architecture is request.architecture or settings.experts == "eager" else "auto",
    )
