"""DeepSpeed checkpoints (ZeRO-0 to 3; any data, tensor and pipeline degree) as logical checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.assembly import check_copies, read_assembled
from incr_ds.checkpoint.base import MUON_STATES, STATES, CheckpointFacts, State
from incr_ds.checkpoint.deepspeed.checks import (
    check_aliases,
    check_duplicates,
    check_exported,
    check_master,
    check_momentum,
    check_padding,
    exported_weights,
    module_weights,
)
from incr_ds.checkpoint.deepspeed.holders import assembled_tensors
from incr_ds.checkpoint.deepspeed.layer_files import with_frozen_layers
from incr_ds.checkpoint.deepspeed.megatron import is_megatron, megatron_tensors, vocabulary_notes
from incr_ds.checkpoint.deepspeed.names import tag_files
from incr_ds.checkpoint.deepspeed.rank_files import ModelRank, open_ranks
from incr_ds.checkpoint.progress import counters
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds
from incr_ds.sharding.joined import joined_parameters
from incr_ds.sharding.optimizer_groups import is_apart


class ZeroCheckpoint:
    """A DeepSpeed checkpoint folder and tag. Only metadata is read before ``read``."""

    def __init__(self, folder: Path, tag: str, architecture: Architecture, *, trust: bool = False) -> None:
        self._folder = folder / tag
        self.architecture = architecture
        self._ranks = open_ranks(self._folder, architecture, trust)
        self._tensor_parallel, self._pipeline_parallel = _model_degrees(self._folder, self._ranks)
        self._is_megatron = is_megatron(name for rank in self._ranks for name in rank.shards.parameters)
        if not self._is_megatron:
            self._ranks = with_frozen_layers(self._folder, self._ranks, architecture, self._tensor_parallel)
        where = (self._folder, self._ranks, architecture, self._tensor_parallel)
        self._tensors = megatron_tensors(*where) if self._is_megatron else assembled_tensors(*where)
        self.facts = self._collect_facts()

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor (fp32 masters and moments), joined over tensor ranks. Frozen tensors have zero moments."""
        return read_assembled(self, self._tensors, name, state, bounds)

    def self_check(self) -> Iterator[str]:
        """Check that the shards belong together, and yield the name of each parameter checked.

        Stages 0 to 2: the fp32 master, cast to the model's dtype, equals the saved module weight bit for bit. Stage 3 saves
        no module weights, so its padding must be zero and no two ranks may hold the same bytes. Muon's momentum of a tensor
        is the same on all data-parallel ranks that share it. Weights that transformers'
        Trainer exported beside the tag must equal the masters. Tied and replicated copies must be equal in every state.
        Raises CheckpointError that names the first tensor that does not match.
        """
        exported = exported_weights(self._folder.parent, self.architecture)
        for rank in self._ranks:
            check_padding(rank)
            check_duplicates(rank)
            check_momentum(rank)
            modules = module_weights(self._folder, rank)
            check_aliases(rank, modules, self.architecture)
            for parameter, logical in rank.names.items():
                if parameter in modules:
                    check_master(rank, parameter, modules[parameter])
                yield logical
        for name, tensor in self._tensors.items():
            for _ in check_copies(tensor, self.facts.states_of(name)):
                pass
            if exported is not None:
                check_exported(self, exported, name)

    def _collect_facts(self) -> CheckpointFacts:
        no_moments = self._why_no_moments()  # before steps are compared: a rank without moments has none
        counting = [rank for rank in self._ranks if rank.step is not None]
        first = counting[0] if counting else self._ranks[0]
        for rank in self._ranks:
            if (first.step if rank.step is None else rank.step, rank.stage) != (first.step, first.stage):
                raise CheckpointError(
                    f"{rank.files[0]}: step {rank.step}, ZeRO stage {rank.stage}; {first.files[0]} has step "
                    f"{first.step}, stage {first.stage}. The files come from different checkpoints."
                )
        layout = {
            "tensor_parallel": self._tensor_parallel,
            "pipeline_parallel": self._pipeline_parallel,
            "data_parallel": int(first.model.get("dp_world_size") or len(first.files)),
            "zero_stage": first.stage,
        }
        files = tuple(sorted(path for path in self._folder.iterdir() if path.suffix == ".pt"))
        where = (self._ranks, self.architecture, self._tensor_parallel)
        recorded, frozen = counters(first.model, self._folder.parent), self._frozen()
        momentum = frozenset() if no_moments else self._momentum(frozen)
        # Muon alone counts no steps: those that the run took are what Adam would have counted.
        step = first.step if counting else (recorded.global_steps or 0) - (recorded.skipped_steps or 0)
        return CheckpointFacts(
            self._folder,
            f"{first.kind}, Megatron-DeepSpeed" if self._is_megatron else first.kind,
            ("weight",) if no_moments else MUON_STATES if momentum else STATES,
            None if no_moments else step,
            files,
            layout,
            no_moments,
            dtype=first.dtype,
            optimizer_groups=() if no_moments else first.hyperparameters,
            frozen=frozen,
            notes=vocabulary_notes(*where) if self._is_megatron else (),
            recorded=recorded,
            stages=self._stages(),
            momentum=momentum,
        )

    def _stages(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage, if every layer has a tensor that is trained."""
        if self._pipeline_parallel == 1:
            return ()
        by_name, counts = self.architecture.by_name, list[int]()
        for rank in self._ranks[:: self._tensor_parallel]:
            trained = (rank.names[name] for name in rank.shards.parameters if name not in rank.shards.frozen)
            counts.append(len({by_name[name].layer for name in trained if name in by_name} - {None}))
        return tuple(counts) if sum(counts) == self.architecture.num_layers else ()

    def _frozen(self) -> tuple[str, ...]:
        """The tensors that were not trained."""
        joined = joined_parameters(self.architecture)
        parameters = {rank.names[parameter] for rank in self._ranks for parameter in rank.shards.frozen}
        members = (spec.name for name in parameters & joined.keys() for spec in joined[name].members)
        return tuple(sorted({*(parameters - joined.keys()), *members}))

    def _momentum(self, frozen: Collection[str]) -> frozenset[str]:
        """The tensors that Muon trains, and frozen ones that it would train: their momentum is zero."""
        found = {rank.names[parameter] for rank in self._ranks for parameter in rank.shards.momentum}
        by_name = self.architecture.by_name
        return frozenset(found.union(name for name in frozen if found and is_apart("muon", by_name[name])))

    def _why_no_moments(self) -> str | None:
        """The reason why there are no usable moments, or None. All ranks have moments or none has."""
        if self._is_megatron and any(rank.shards.momentum for rank in self._ranks):
            return "Muon's momentum is that of Megatron's fused matrices, which is not the momentum of their tensors"
        without = [rank for rank in self._ranks if rank.no_moments]
        complete = [rank for rank in self._ranks if not rank.no_moments]
        if without and complete:
            raise CheckpointError(
                f"{self._folder}: {without[0].no_moments}. {complete[0].files[0].name} has them. Copy the files of "
                f"model-parallel rank {without[0].index} again, or use another tag."
            )
        return without[0].no_moments if without else None


def _model_degrees(folder: Path, ranks: Sequence[ModelRank]) -> tuple[int, int]:
    degrees = ranks[0].model.get("checkpoint_parallel_dimensions") or {}
    found = tag_files(path.name for path in folder.iterdir())
    tensor = degrees.get("tp_degree") or (found.tensor_ranks if found.layers else len(ranks))
    if not tensor or len(ranks) % tensor:
        raise CheckpointError(
            f"{folder}: {len(ranks)} model-parallel ranks cannot be divided by tensor_parallel {tensor}."
        )
    return tensor, len(ranks) // tensor
