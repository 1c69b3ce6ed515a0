"""Says whether a request may grow. A rule is a function that returns why it refuses, or None; each list has its facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from incr_ds.arch.architecture import Architecture, max_axis_size
from incr_ds.arch.family import Family, families, mixtures
from incr_ds.arch.rotary import STEADY, rotary_frequencies, rotary_kinds
from incr_ds.checkpoint.base import CheckpointFacts
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import GrowthError
from incr_ds.growth.experts import ExpertGrowth


def refuse(rules: Sequence[Callable[..., str | None]], where: str, *facts: Any) -> None:
    """Raise GrowthError with the message of the first rule that refuses ``facts``."""
    for rule in rules:
        if reason := rule(*facts):
            raise GrowthError(f"{where}: {reason}")


def becomes_mixture(source: Architecture, recipe: GrowthRecipe) -> bool:
    """Whether the target is of another model_type: a mixture of experts into which ``source`` is upcycled."""
    own = source.family.model_type
    return bool(recipe.target.get("model_type", own) != own)


def wrong_size(field: str, axis: str, value: Any) -> str | None:
    """Why ``value`` is not a number of positions, layers or experts that a plan can hold; None if it is."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return f"target.{field}: expected a positive whole number, found {value!r}."
    if value > max_axis_size(axis):
        return f"target.{field}: {value:,} is more than the {max_axis_size(axis):,} that a plan can hold."
    return None


def _mixture_stays(source: Architecture, recipe: GrowthRecipe) -> str | None:
    if source.family.upcycles and becomes_mixture(source, recipe):
        return f"target.model_type: a {source.family.model_type} cannot become another family; leave it out."
    return None


def _mixture_has_dense_operators_only(source: Architecture, recipe: GrowthRecipe) -> str | None:
    if source.family.upcycles and (recipe.width.copies_from != "own-layer" or recipe.fitted is not None):
        return "width.copies_from: next-layer and fitted operators are for dense models."
    return None


def _experts_need_a_mixture(source: Architecture, recipe: GrowthRecipe) -> str | None:
    if "experts" in recipe.model_fields_set and not becomes_mixture(source, recipe):
        return "experts: how a dense model becomes a mixture; set target.model_type, or leave the section out."
    return None


def _can_become(source: Architecture, recipe: GrowthRecipe) -> str | None:
    own = source.family.model_type
    possible = [name for name, family in mixtures().items() if own in family.upcycles]
    asked = recipe.target.get("model_type", own)
    if asked in (own, *possible):
        return None
    return f"target.model_type: {own} cannot become {asked}; it can become {', '.join(possible) or 'nothing'}."


def _mixture_is_weights_alone(source: Architecture, recipe: GrowthRecipe) -> str | None:
    alone = recipe.layout.format == "huggingface" and recipe.optimizer == "reset"
    if alone or not becomes_mixture(source, recipe):
        return None
    return (
        f"a {recipe.target['model_type']} target is written as a Hugging Face folder of weights: set layout.format: "
        "huggingface and optimizer: reset."
    )


def _mixture_has_fields(source: Architecture, recipe: GrowthRecipe) -> str | None:
    if not becomes_mixture(source, recipe):
        return None
    asked, own = recipe.target["model_type"], source.family
    family = mixtures()[asked]
    field = family.axes["experts"]
    if field in recipe.target and (wrong := wrong_size(field, "experts", recipe.target[field])):
        return wrong
    unknown = sorted(set(recipe.target) - family.known_fields - own.known_fields)
    return f"target.{unknown[0]}: not a config field of {own.model_type} or {asked}." if unknown else None


# Facts: the source's architecture and the recipe. Later rules rely on earlier ones.
REQUEST_RULES = (
    _mixture_stays,
    _mixture_has_dense_operators_only,
    _experts_need_a_mixture,
    _can_become,
    _mixture_is_weights_alone,
    _mixture_has_fields,
)


def _keeps_derived_head_size(source: Architecture, sizes: Mapping[str, int]) -> str | None:
    """A head's size that is hidden / heads cannot grow, so the two must grow together."""
    axes, head_dim = source.family.axes, source.sizes["head_dim"]
    if "head_dim" in axes or sizes["hidden"] == head_dim * sizes["heads"]:
        return None
    heads = sizes["hidden"] // head_dim
    nearest = [
        f"{axes['heads']}: {n} with {axes['hidden']}: {n * head_dim}"
        for n in (heads, heads + 1)
        if n >= source.sizes["heads"]
    ]
    return (
        f"target: {axes['hidden']} {sizes['hidden']} with {axes['heads']} {sizes['heads']} does not keep the head "
        f"size of {head_dim}, which {source.family.model_type} takes from the two; nearest sizes that work: "
        f"{'; '.join(nearest)}."
    )


def _heads_do_not_shrink(source: Architecture, sizes: Mapping[str, int]) -> str | None:
    old, new = source.sizes["head_dim"], sizes["head_dim"]
    return f"target.head_dim: {new} is smaller than the source's {old}; growth only adds." if new < old else None


def _heads_pass_through_rotation_only(source: Architecture, sizes: Mapping[str, int]) -> str | None:
    if sizes["head_dim"] == source.sizes["head_dim"] or "query_dim" in source.sizes:
        return None
    able = ", ".join(name for name, family in families().items() if "query_dim" in family.derived)
    return (
        f"target.head_dim: {source.family.model_type}'s queries and keys pass through more than the rotary "
        f"positions, and no operator grows them; head_dim grows in {able}."
    )


def _pairs_keep_their_speed(source: Architecture, sizes: Mapping[str, int]) -> str | None:
    """Pair i of the source must rotate as fast as the pair of the larger head that it moves to; see grow_head_size."""
    old_size, size = source.sizes["head_dim"], sizes["head_dim"]
    if size == old_size:
        return None
    (rope,) = rotary_kinds(source.config)
    kind = rope["rope_type"]
    if kind not in STEADY:
        return (
            f"target.head_dim: under rope_type {kind} how fast a pair turns depends on more than the config, and no "
            f"operator moves it; head_dim grows under {', '.join(STEADY)}."
        )
    if size % old_size:
        return None  # grow_head_size lists the sizes that work
    factor = size // old_size
    old, strength = rotary_frequencies(source.config)
    new, new_strength = rotary_frequencies({**source.config, source.family.axes["head_dim"]: size})
    unlike = np.flatnonzero(~np.isclose(new[::factor], old, rtol=1e-6, atol=0.0))
    if not len(unlike) and strength == new_strength:
        return None
    pair = int(unlike[0]) if len(unlike) else 0
    return (
        f"target.head_dim: {size}: pair {pair} of a head turns {old[pair]:.6g} radians per position, but the "
        f"pair {factor * pair} that it moves to {new[factor * pair]:.6g}, under rope_type {kind}. YaRN rounds the ends of "
        "its ramp to whole pairs unless rope_parameters has truncate: false; such a source cannot grow its heads."
    )


# Facts: the source's architecture, and the size of every axis of the target.
HEAD_RULES = (
    _keeps_derived_head_size,
    _heads_do_not_shrink,
    _heads_pass_through_rotation_only,
    _pairs_keep_their_speed,
)


def _config_suits(dense: Architecture, mixture: Family) -> str | None:
    for field, value in mixture.upcycles[dense.family.model_type].only.items():
        if dense.config[field] != value:
            found = dense.config[field]
            return f"the source's {field} is {found!r}; it becomes a {mixture.model_type} with {value!r} only."
    return None


# Facts: the dense model, grown except for its FFN, and the mixture's family.
MIXTURE_RULES = (_config_suits,)


def _neurons_divide(target: Architecture, experts: ExpertGrowth) -> str | None:
    field, old, new = target.family.axes["ffn"], experts.old, experts.new
    if experts.method != "virtual-groups" and new != old:
        return (
            f"target.{field}: {new}, but experts.new: {experts.method} makes experts of the source's {old} neurons; "
            f"set {old}, or experts.new: virtual-groups for smaller ones."
        )
    if old % new:
        near = sorted((size for size in range(1, old + 1) if old % size == 0), key=lambda size: abs(size - new))
        fitting = ", ".join(str(size) for size in sorted(near[:2]))
        return f"target.{field}: {new} does not divide the source's {old} neurons; nearest sizes that work: {fitting}."
    return None


def _router_picks_whole_groups(target: Architecture, experts: ExpertGrowth) -> str | None:
    field, chosen = target.family.axes["experts"], target.config["num_experts_per_tok"]
    if wrong := wrong_size("num_experts_per_tok", "experts", chosen):
        return wrong
    for name, value in ((field, target.sizes["experts"]), ("num_experts_per_tok", chosen)):
        if value % experts.shards:
            lower = value // experts.shards * experts.shards
            nearest = " or ".join(str(size) for size in (lower, lower + experts.shards) if size)
            return (
                f"target.{name}: {value} is not a multiple of the {experts.shards} experts that make up one dense FFN; "
                f"nearest: {nearest}."
            )
    return None


def _router_has_enough_experts(target: Architecture, experts: ExpertGrowth) -> str | None:
    count, chosen = target.sizes["experts"], target.config["num_experts_per_tok"]
    field = target.family.axes["experts"]
    return f"target.num_experts_per_tok: {chosen} exceeds {field} {count}." if chosen > count else None


# Facts: the mixture, and how its experts are made from the dense FFN.
EXPERT_RULES = (_neurons_divide, _router_picks_whole_groups, _router_has_enough_experts)


def _has_moments(facts: CheckpointFacts, recipe: GrowthRecipe) -> str | None:
    if recipe.optimizer == "reset" or "exp_avg" in facts.states:
        return None
    why = f" to use ({facts.no_moments})" if facts.no_moments else ""
    return (
        f"a {facts.kind} source has no Adam moments{why}, but optimizer: {recipe.optimizer} needs them; set optimizer: "
        "reset in the recipe."
    )


# Facts: those of the source's checkpoint, and the recipe.
MOMENT_RULES = (_has_moments,)


def _momentum_has_a_place(facts: CheckpointFacts, recipe: GrowthRecipe) -> str | None:
    if recipe.optimizer == "reset" or not facts.momentum:
        return None
    layout = recipe.layout
    fits = {
        "format": ("deepspeed",),
        "modules": ("own",),
        "zero_stage": (1, 2),
        "tensor_parallel": (1,),
    }
    wrong = [
        f"layout.{key}: {getattr(layout, key)}" for key, values in fits.items() if getattr(layout, key) not in values
    ]
    if not wrong:
        return None
    return (
        f"{wrong[0]}: the source's momentum_buffer, of {len(facts.momentum)} tensors that Muon trains, can be written in "
        "DeepSpeed's own format with ZeRO-1 and 2 and whole tensors; set optimizer: reset, which leaves it out, or format: "
        "deepspeed, modules: own, zero_stage: 1 and tensor_parallel: 1."
    )


# Facts: as above. A growth that is written to files needs a format that has a place for all moments.
WRITING_RULES = (*MOMENT_RULES, _momentum_has_a_place)


def refuse_inexact(recipe: GrowthRecipe, inexact: Sequence[str], where: str) -> None:
    """Raise GrowthError if the recipe requires the source's function and there are reasons why it is not kept."""
    if recipe.function_preserving == "required" and inexact:
        raise GrowthError(
            f"{where}: function_preserving: required, but {'; '.join(inexact)}. Change it, or set function_preserving: preferred."
        )
