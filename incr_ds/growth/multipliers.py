"""Learning-rate multipliers of a grown model: its plan's, combined with those that its source was trained with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from incr_ds.arch.multipliers import UNCHANGED, Multipliers
from incr_ds.growth.plan import GrowthPlan


def grown_multipliers(
    plan: GrowthPlan, earlier: Mapping[str, Multipliers], momentum: Collection[str] = ()
) -> dict[str, Multipliers]:
    """The multipliers of the target's tensors, unless they are 1, and which of them are new.

    ``earlier`` are the source's own, and ``momentum`` its tensors that Muon trains; AdamW trains the others. ``optimizer:
    rescale`` multiplies them by the plan's, ``copy`` and ``reset-new`` keep them, ``reset`` drops them. New are the layers
    that the growth adds. If it adds none, those that were new stay so.
    """
    mode, adds = plan.recipe.optimizer, any(layer.is_new for layer in plan.layers)
    found = {}
    for name, tensor in plan.tensors.items():
        before = earlier.get(tensor.source, UNCHANGED)
        kept = UNCHANGED if mode == "reset" else before
        grows = mode == "rescale" and name not in plan.unchanged
        rule = plan.muon_multipliers if tensor.source in momentum else plan.nearest_multipliers
        own = rule(name).after(kept) if grows else kept
        found[name] = replace(own, new=tensor.new_layer if adds else before.new)
    return {name: own for name, own in found.items() if own != UNCHANGED}
