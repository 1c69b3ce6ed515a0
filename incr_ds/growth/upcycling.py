"""Turns the growth of a dense model into a mixture of experts made from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.family import Family, mixtures
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import ConfigError, GrowthError
from incr_ds.growth.experts import ExpertGrowth
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.rules import EXPERT_RULES, MIXTURE_RULES, refuse, refuse_inexact


def chosen_experts(source: Architecture, target: Architecture) -> tuple[bool, str]:
    """Whether, and why, the target's router sends tokens elsewhere than the source's.

    Copies of an expert have the same score. If the number of chosen experts grows by the number of copies, all copies of a
    chosen expert are chosen. Their shares, which are normalized to sum to 1, then add up to the source's.
    """
    if "experts" not in source.sizes:
        return False, ""
    copies = target.sizes["experts"] // source.sizes["experts"]
    wanted = copies * int(source.config["num_experts_per_tok"])
    found = int(target.config["num_experts_per_tok"])
    reason = (
        f"target.num_experts_per_tok: {found} of {copies} copies of each expert does not keep the source's function, since they "
        f"compete for the places: {wanted} keeps it"
    )
    return found != wanted, reason


def dense_part(source: Architecture, recipe: GrowthRecipe) -> GrowthRecipe:
    """The recipe for everything except the FFN, which stays unchanged until it is divided among the experts."""
    ffn = source.family.axes["ffn"]
    names = source.family.known_fields - {"model_type", ffn}
    return recipe.model_copy(update={"target": {key: recipe.target[key] for key in recipe.target if key in names}})


def upcycled(dense: GrowthPlan, recipe: GrowthRecipe, where: str) -> GrowthPlan:
    """Replace the FFN of ``dense`` by experts. Raises GrowthError for sizes that do not work, with those that do."""
    mixture = mixtures()[recipe.target["model_type"]]
    refuse(MIXTURE_RULES, where, dense.target, mixture)
    target = _target(dense.target, recipe, mixture, where)
    sizes = dense.source.sizes["ffn"], target.sizes["ffn"]
    experts = ExpertGrowth(recipe.experts.new, *sizes, recipe.experts.ratio, recipe.width.symmetry_breaking.seed)
    refuse(EXPERT_RULES, where, target, experts)
    inexact = dense.inexact
    if experts.method == "drop":
        inexact = (*inexact, "experts.new: drop does not keep the source's function: part of every expert starts anew")
    refuse_inexact(recipe, inexact, where)
    notes = (*dense.notes, *inexact[len(dense.inexact) :], *_notes(experts))
    return replace(dense, recipe=recipe, target=target, inexact=inexact, notes=notes, experts=experts)


def _target(dense: Architecture, recipe: GrowthRecipe, mixture: Family, where: str) -> Architecture:
    own = {field: value for field, value in recipe.target.items() if field in mixture.known_fields}
    config: dict[str, Any] = {
        field: value
        for field, value in dense.config.items()
        if field in mixture.effective_fields or (field in dense.stated and field.endswith("_token_id"))
    }
    config |= {mixture.config.initializer: dense.config[dense.family.config.initializer]}
    config |= {field: value for field, value in mixture.config.only.items() if field not in own}
    config |= {mixture.axes["ffn"]: dense.sizes["ffn"], **own}
    try:
        return architecture_from_config(config, f"{where}: target")
    except ConfigError as error:
        raise GrowthError(str(error)) from error


def _notes(experts: ExpertGrowth) -> tuple[str, ...]:
    if experts.method == "drop":
        return ()
    equal = "experts" if experts.method == "copy" else "experts that hold the same part of the FFN"
    return (f"{equal} start equal and differ as the router sends them different tokens; its weights are drawn anew",)
