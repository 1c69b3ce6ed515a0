"""Learning-rate multipliers of a grown model: its plan's, combined with those that its source was trained with."""

from __future__ import annotations

from collections.abc import Mapping

from incr_ds.arch.multipliers import UNCHANGED, Multipliers
from incr_ds.growth.plan import GrowthPlan


def grown_multipliers(plan: GrowthPlan, earlier: Mapping[str, Multipliers]) -> dict[str, Multipliers]:
    """The AdamW multipliers of the target's tensors, unless they are 1. ``earlier`` are the source's own.

    ``optimizer: rescale`` multiplies them by the plan's, ``copy`` and ``reset-new`` keep them, ``reset`` drops them.
    """
    mode = plan.recipe.optimizer
    if mode == "reset":
        return {}
    found = {}
    for name, tensor in plan.tensors.items():
        before = earlier.get(tensor.source, UNCHANGED)
        grows = mode == "rescale" and name not in plan.unchanged
        found[name] = plan.nearest_multipliers(name).after(before) if grows else before
    return {name: own for name, own in found.items() if own != UNCHANGED}
