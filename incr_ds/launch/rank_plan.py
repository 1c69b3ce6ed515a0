"""What each rank of a layout holds: parameters, and memory by kind. Pure arithmetic, for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import RunSettings
from incr_ds.launch.activations import Shape, loss_workspace, shape_of, stage_activations, teacher_bytes
from incr_ds.launch.balance import stage_flops
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.launch.model_states import StateMemory, model_states, zero_settings
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.optimizer_groups import group_count, optimizer_groups, set_apart, trained_shards
from incr_ds.sharding.placement import rank_parameters, stage_layers


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank by kind.

    ``activations`` are those of the run's setting, which is one of ``activations_kept`` and ``activations_recomputed``
    (with activation checkpointing). ``on_host`` names the kinds that are offloaded to the host's memory.
    """

    states: StateMemory
    activations_kept: int
    activations_recomputed: int
    recomputes: bool
    loss: int
    teacher: int
    on_host: tuple[str, ...] = ()

    @property
    def activations(self) -> int:
        """Bytes of activations by the run's setting."""
        return self.activations_recomputed if self.recomputes else self.activations_kept

    @property
    def kinds(self) -> dict[str, int]:
        """Every kind that the total consists of, in bytes. ``update`` counts only as far as it exceeds what it replaces."""
        states = self.states
        passing = {"buffers": states.buffers, "activations": self.activations, "loss": self.loss}
        kept = {name: getattr(states, name) for name in ("weights", "masters", "moments", "gradients")}
        # On the host it takes the place of nothing.
        replaced = 0 if "update" in self.on_host else sum(passing.values())
        return {**kept, **passing, "teacher": self.teacher, "update": max(0, states.update - replaced)}

    @property
    def total(self) -> int:
        """Bytes on the device at the peak of a step."""
        return sum(size for kind, size in self.kinds.items() if kind not in self.on_host)

    @property
    def host_total(self) -> int:
        """Bytes in the host's memory that are offloaded."""
        return sum(size for kind, size in self.kinds.items() if kind in self.on_host)


@dataclass(frozen=True)
class PipelineStage:
    """One pipeline stage. ``layers`` are its decoder layers (first, stop), ``flops`` its operations for a token.

    ``parameters`` are those of the stage, tied tensors included, and ``rank_parameters`` what each of its tensor ranks
    holds before ZeRO. ``memory`` is that of a rank that holds the most.
    """

    number: int
    layers: tuple[int, int]
    flops: int
    parameters: int
    rank_parameters: tuple[int, ...]
    memory: RankMemory


@dataclass(frozen=True)
class RankHoldings:
    """What one model-parallel rank holds: the optimizer's parameter groups, and frozen parameters."""

    groups: tuple[tuple[RankParameter, ...], ...]
    frozen: tuple[RankParameter, ...]

    @property
    def parameters(self) -> tuple[RankParameter, ...]:
        """All parameters."""
        return (*(parameter for group in self.groups for parameter in group), *self.frozen)

    @property
    def numel(self) -> int:
        """Number of elements before ZeRO."""
        return sum(parameter.numel for parameter in self.parameters)


Holdings = tuple[tuple[RankHoldings, ...], ...]


def holdings(run: RunSettings, architecture: Architecture) -> Holdings:
    """What every model-parallel rank holds, by pipeline stage and tensor rank, without learning-rate multipliers."""
    frozen = frozen_tensors(architecture, run.model.freeze)
    apart = set_apart(run.optimizer.name, architecture)
    count = group_count(architecture, run.layout, None, frozen, apart)

    def held(stage: int, tensor_rank: int) -> RankHoldings:
        shards = rank_parameters(architecture, run.layout, stage, tensor_rank)
        groups = optimizer_groups(trained_shards(shards, frozen), None, count, apart)
        return RankHoldings(groups, tuple(shard for shard in shards if shard.tensor.name in frozen))

    layout = run.layout
    return tuple(
        tuple(held(stage, rank) for rank in range(layout.tensor_parallel)) for stage in range(layout.pipeline_parallel)
    )


def states_of(run: RunSettings, held: RankHoldings) -> StateMemory:
    """The model states of a rank."""
    layout, settings = run.layout, zero_settings(deepspeed_config(run))
    return model_states(
        held.groups,
        held.frozen,
        zero_stage=layout.zero_stage,
        data_parallel=layout.data_parallel,
        element=shape_of(run).element,
        settings=settings,
        optimizer=run.optimizer.name,
    )


def plan_ranks(
    run: RunSettings, architecture: Architecture, teacher: Architecture | None, held: Holdings
) -> tuple[PipelineStage, ...]:
    """Plan every pipeline stage of ``run``, which must have passed the checks of the layout. ``held`` are its holdings."""
    whole = run.layout.model_copy(update={"tensor_parallel": 1})
    return tuple(
        PipelineStage(
            number=number,
            layers=_decoder_layers(architecture, run.layout, number),
            flops=stage_flops(run, architecture)[number],
            parameters=sum(shard.numel for shard in rank_parameters(architecture, whole, number, 0)),
            rank_parameters=tuple(rank.numel for rank in ranks),
            memory=_memory(run, architecture, teacher, number, ranks[0]),
        )
        for number, ranks in enumerate(held)
    )


def _memory(
    run: RunSettings, architecture: Architecture, teacher: Architecture | None, stage: int, held: RankHoldings
) -> RankMemory:
    """The memory of tensor rank 0, which has the larger part of every tensor that does not divide."""
    shape = shape_of(run)
    layers = _decoder_layers(architecture, run.layout, stage)
    is_last = stage == run.layout.pipeline_parallel - 1
    settings = zero_settings(deepspeed_config(run))
    optimizer = ("masters", "moments", "update") if settings.optimizer_on_host else ()
    return RankMemory(
        states=states_of(run, held),
        activations_kept=_activations(run, architecture, shape, stage, layers, recompute=False),
        activations_recomputed=_activations(run, architecture, shape, stage, layers, recompute=True),
        recomputes=run.model.activation_checkpointing,
        loss=loss_workspace(architecture, run, shape, teacher) if is_last else 0,
        teacher=0 if teacher is None else teacher_bytes(teacher, run.layout, shape, stage, 0),
        on_host=(*optimizer, *(("weights",) if settings.parameters_on_host else ())),
    )


def _activations(
    run: RunSettings, architecture: Architecture, shape: Shape, stage: int, layers: Sequence[int], *, recompute: bool
) -> int:
    depth = run.layout.pipeline_parallel
    return stage_activations(
        architecture,
        shape,
        layers=layers[1] - layers[0],
        in_flight=min(depth - stage, max(run.accumulations)),
        recompute=recompute,
        is_last=stage == depth - 1,
    )


def _decoder_layers(architecture: Architecture, layout: ParallelLayout, stage: int) -> tuple[int, int]:
    numbers = stage_layers(architecture.num_layers, layout)[stage]
    inside = [number - 1 for number in numbers if 1 <= number <= architecture.num_layers]
    return inside[0], inside[-1] + 1
