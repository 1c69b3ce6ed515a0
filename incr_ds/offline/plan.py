"""Plans everything that a growth does before a byte is written: the source, the plan, the files of the target."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.multipliers import Multipliers, multipliers_text, read_multipliers, without_multipliers
from incr_ds.checkpoint.base import CheckpointFacts, LogicalCheckpoint, State
from incr_ds.checkpoint.companions import tokenizer_files
from incr_ds.checkpoint.deepspeed.releases import TESTED, needs_bare_states
from incr_ds.checkpoint.deepspeed.writer import ADAMW_DEFAULTS, NativeTarget, native_files
from incr_ds.checkpoint.deepspeed.zero3_writer import zero3_files
from incr_ds.checkpoint.huggingface.writer import (
    huggingface_files,
)
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.megatron_core.target import MegatronCoreTarget
from incr_ds.checkpoint.megatron_core.torch_writer import megatron_torch_files
from incr_ds.checkpoint.megatron_core.writer import megatron_core_files
from incr_ds.checkpoint.publish import refuse_overlap
from incr_ds.checkpoint.streaming import TargetFile, tensor_bytes
from incr_ds.checkpoint.universal.writer import universal_files
from incr_ds.config.growth import OF_MEGATRON_CORE, GrowthRecipe, TargetLayout
from incr_ds.growth.apply import BYTES_PER_ELEMENT
from incr_ds.growth.changes import load_recipe
from incr_ds.growth.multipliers import grown_multipliers
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.growth.rules import WRITING_RULES, refuse
from incr_ds.offline.memory_budget import anonymous_bytes, portion_elements
from incr_ds.sharding.megatron_modules import check_modules, modules_of, padded_vocabulary
from incr_ds.sharding.placement import check_layout

TAG = "grown"
MEMORY_BUDGET = 2 << 30


@dataclass(frozen=True)
class GrowthRequest:
    """What to grow into what: the source folder, the recipe and the output folder.

    ``workers`` threads write files. ``memory_budget`` bounds the anonymous memory of the process, in bytes.
    ``overwrite`` lets the output replace a checkpoint that was published there. ``target_deepspeed`` is the release that will
    load the target. ``allow_nonfinite`` grows a source even if it holds NaN or infinity.
    """

    source: Path
    recipe: Path
    output: Path
    tag: str | None = None
    config: Path | None = None
    workers: int = 1
    trust: bool = False
    memory_budget: int = MEMORY_BUDGET
    overwrite: bool = False
    target_deepspeed: str = TESTED
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class PlannedGrowth:
    """An opened source, its plan, every file of the target, and the learning-rate multipliers of its tensors."""

    request: GrowthRequest
    source: LogicalCheckpoint
    plan: GrowthPlan
    files: tuple[TargetFile, ...]
    dtype: torch.dtype
    multipliers: Mapping[str, Multipliers] = field(default_factory=dict)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(self.sizes.values())

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of tensor data in each file, by its path."""
        return {file.path: tensor_bytes(file) for file in self.files}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the plan and the source."""
        facts = self.source.facts
        return (*self.plan.notes, *facts.notes, *_frozen_note(facts.frozen))

    @property
    def reads(self) -> tuple[tuple[str, State], ...]:
        """The source tensors and moments that the target's files are made from."""
        return self.plan.reads(self.source.facts, with_moments=self.plan.recipe.layout.format != "huggingface")

    @property
    def portion(self) -> int:
        """Number of elements that each worker reads at once. Raises ConfigError if the memory budget is too small."""
        rows = [spec.shape[-1] for model in (self.plan.source, self.plan.target) for spec in model.stored]
        request = self.request
        return portion_elements(request.memory_budget, request.workers, max(rows), BYTES_PER_ELEMENT, anonymous_bytes())

    @property
    def key(self) -> str:
        """A hash of everything that decides the bytes of the target."""
        described = self.plan.to_json() + multipliers_text(self.multipliers) + self.request.target_deepspeed
        digest = hashlib.blake2b(described.encode(), digest_size=8)
        for path in self.source.facts.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def plan_request(request: GrowthRequest) -> PlannedGrowth:
    """Open the source and plan everything, without writing. Raises IncrError for what cannot be done."""

    def opened() -> LogicalCheckpoint:
        return open_described(request.source, request.tag, request.config, trust=request.trust)

    recipe, source = load_recipe(request.recipe, lambda: opened().architecture), opened()
    refuse_overlap(request.source, request.output)
    tokenizer_files(request.source)  # check early that the files to copy at the end are present
    return plan_files(request, source, recipe)


def plan_files(request: GrowthRequest, source: LogicalCheckpoint, recipe: GrowthRecipe) -> PlannedGrowth:
    """Plan the growth of an opened source, and the files of the recipe's layout."""
    plan = plan_growth(source.architecture, recipe, str(request.recipe))
    multipliers = grown_multipliers(plan, read_multipliers(request.source), source.facts.momentum)
    layout = recipe.layout
    if layout.format == "huggingface":
        dtype = _dtype(layout.dtype, "float32")
        return PlannedGrowth(request, source, plan, huggingface_files(plan.target, dtype), dtype, multipliers)
    if layout.format not in OF_MEGATRON_CORE:
        _check_layout(plan, str(request.recipe))
    refuse(WRITING_RULES, str(source.facts.path), source.facts, recipe)
    dtype = _dtype(layout.dtype, source.facts.dtype or "float32")
    if layout.format in OF_MEGATRON_CORE:
        writes = megatron_core_files if layout.format == "torch_dist" else megatron_torch_files
        files = writes(_megatron_core_target(source, plan, dtype), f"{request.recipe}: layout")
        return PlannedGrowth(request, source, plan, files, dtype, multipliers)
    bare = needs_bare_states(request.target_deepspeed, layout.format == "universal", layout.zero_stage)
    # Only this release is known to load files without a state.
    has_moments = recipe.optimizer != "reset" or request.target_deepspeed != TESTED
    target = replace(_native_target(source, plan, dtype), bare_states=bare, has_moments=has_moments)
    return PlannedGrowth(request, source, plan, _target_files(target, layout), dtype, multipliers)


def _check_layout(plan: GrowthPlan, recipe: str) -> None:
    """Raise LayoutError, with the recipe's name, if the target or its training code does not support the layout."""
    layout = plan.recipe.layout
    check_layout(plan.target, layout, f"{recipe}: layout")
    if layout.modules != "own":
        where = f"{recipe}: layout.modules: {layout.modules}"
        check_modules(modules_of(layout.modules), plan.target, layout.tensor_parallel, where)


def _target_files(target: NativeTarget, layout: TargetLayout) -> tuple[TargetFile, ...]:
    if layout.format == "universal":
        return universal_files(target)
    return zero3_files(target, layout.sub_group_size) if layout.zero_stage == 3 else native_files(target)


def _native_target(source: LogicalCheckpoint, plan: GrowthPlan, dtype: torch.dtype) -> NativeTarget:
    global_steps = source.facts.recorded.global_steps or 0
    step, groups = _step(source, plan), _groups(source)
    target = NativeTarget(plan.target, plan.recipe.layout, dtype, TAG, step, global_steps, groups)
    return _in_modules(_with_momentum(target, source.facts, plan), plan.recipe.layout)


def _with_momentum(target: NativeTarget, source: CheckpointFacts, plan: GrowthPlan) -> NativeTarget:
    """The target with the momentum of the tensors that Muon trains in the source, unless the optimizer starts anew."""
    momentum = plan.momentum(source)
    if not momentum:
        return target
    muon = next(without_multipliers(group) for group in source.optimizer_groups if group.get("use_muon"))
    return replace(target, momentum=momentum, muon=muon)


def _megatron_core_target(source: LogicalCheckpoint, plan: GrowthPlan, dtype: torch.dtype) -> MegatronCoreTarget:
    layout, recorded, step = plan.recipe.layout, source.facts.recorded, _step(source, plan)
    return MegatronCoreTarget(
        plan.target,
        layout,
        dtype,
        step,
        iteration=step if recorded.global_steps is None else recorded.global_steps,
        samples=recorded.global_samples or 0,
        groups=_groups(source),
        vocabulary=padded_vocabulary(plan.target.sizes["vocab"], layout.vocabulary_multiple, layout.tensor_parallel),
        has_moments=plan.recipe.optimizer != "reset",
    )


def _step(source: LogicalCheckpoint, plan: GrowthPlan) -> int:
    return 0 if plan.recipe.optimizer == "reset" else source.facts.step or 0


def _groups(source: LogicalCheckpoint) -> tuple[Mapping[str, Any], ...]:
    """AdamW's hyperparameters, those of decaying parameters first."""
    saved = [without_multipliers(group) for group in source.facts.optimizer_groups if not group.get("use_muon")]
    return tuple(sorted(saved, key=lambda group: -float(group["weight_decay"]))) or (
        ADAMW_DEFAULTS,
        {**ADAMW_DEFAULTS, "weight_decay": 0.0},
    )


def _in_modules(target: NativeTarget, layout: TargetLayout) -> NativeTarget:
    """The target for another training code, if the layout names one."""
    if layout.modules == "own":
        return target
    modules = modules_of(layout.modules)
    vocab = target.architecture.sizes["vocab"]
    vocabulary = padded_vocabulary(vocab, layout.vocabulary_multiple, layout.tensor_parallel)
    return replace(target, modules=modules, vocabulary=vocabulary)


def _frozen_note(frozen: Sequence[str]) -> tuple[str, ...]:
    if not frozen:
        return ()
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return (f"frozen in the source, so without moments (zero in the target): {', '.join(frozen[:3])}{more}",)


def _dtype(asked: str, otherwise: str) -> torch.dtype:
    name = otherwise if asked == "auto" else asked
    found: torch.dtype = getattr(torch, name)
    return found
