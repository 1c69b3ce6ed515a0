"""Growth on load: a source and a recipe, presented as the checkpoint that they would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.multipliers import Multipliers, read_multipliers
from incr_ds.checkpoint.base import STATES, LogicalCheckpoint, State
from incr_ds.checkpoint.finite import FiniteCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.changes import load_recipe
from incr_ds.growth.multipliers import grown_multipliers
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.growth.rules import MOMENT_RULES, refuse
from incr_ds.sharding.blocks import Bounds


class GrownCheckpoint:
    """A growth as a logical checkpoint. Each read computes the slice that it needs, and nothing is written.

    ``multipliers`` are the learning-rate multipliers of its tensors.
    """

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint, multipliers: Mapping[str, Multipliers]) -> None:
        self.plan, self.multipliers = plan, multipliers
        self._source, self._grown = source, GrownTensors(plan, source)
        self.architecture = plan.target
        kind, facts = f"{source.facts.kind}, grown on load", source.facts
        states, step = (STATES[:1], 0) if plan.recipe.optimizer == "reset" else (facts.states, facts.step)
        frozen = tuple(name for name, tensor in plan.tensors.items() if tensor.source in facts.frozen)
        own: dict[str, Any] = {"momentum": plan.momentum(facts), "frozen": frozen, "layout": {}, "no_moments": None}
        self.facts = replace(facts, kind=kind, states=states, step=step, **own)

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one grown tensor, at least fp32."""
        spec = self.architecture.by_name[name]
        stated = bounds or ()
        rest = tuple((0, size) for size in spec.shape[len(stated) :])
        return self._grown.read(spec.tied_to or name, state, (*stated, *rest))

    def check_finite(self, *, with_moments: bool, share: int = 0, shares: int = 1) -> None:
        """Raise CheckpointError, with the tensor's name, if grown weights or moments of the source hold NaN or infinity.

        Checks every ``shares``-th tensor, from number ``share`` on, so that ranks can divide the work.
        """
        otherwise = "tools/grow_checkpoint.py --allow-nonfinite grows this one as it is, into a folder to start from"
        watched = FiniteCheckpoint(self._source, otherwise=otherwise)
        watched.look_at(self.plan.reads(self._source.facts, with_moments=with_moments)[share::shares])

    def self_check(self) -> Iterator[str]:
        """Run the source's own check."""
        return self._source.self_check()


def open_grown(source: Path, recipe: Path, tag: str | None = None) -> tuple[GrownCheckpoint, GrowthRecipe]:
    """Open ``source`` as it would be after growth by ``recipe``. Raises IncrError for what cannot be done."""
    settings = load_recipe(recipe, lambda: open_described(source, tag).architecture)
    opened = open_described(source, tag)
    refuse(MOMENT_RULES, str(opened.facts.path), opened.facts, settings)
    plan = plan_growth(opened.architecture, settings, str(recipe))
    multipliers = grown_multipliers(plan, read_multipliers(source), opened.facts.momentum)
    return GrownCheckpoint(plan, opened, multipliers), settings
