"""Turns the growth of a dense model into a mixture of experts made from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.family import Family, mixtures
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import ConfigError, GrowthError
from incr_ds.growth.changes import check_size
from incr_ds.growth.experts import ExpertGrowth
from incr_ds.growth.plan import GrowthPlan


def check_upcycling(source: Architecture, recipe: GrowthRecipe, where: str) -> Family:
    """The mixture's family. Raises GrowthError if ``source`` cannot become one of it."""
    asked, own = recipe.target["model_type"], source.family.model_type
    possible = [name for name, family in mixtures().items() if own in family.upcycles]
    if asked not in possible:
        shown = ", ".join(possible) or "nothing"
        raise GrowthError(f"{where}: target.model_type: {own} cannot become {asked}; it can become {shown}.")
    if recipe.layout.format != "huggingface" or recipe.optimizer != "reset":
        raise GrowthError(
            f"{where}: a {asked} target is written as a Hugging Face folder of weights: set layout.format: huggingface and "
            "optimizer: reset. Mixtures are not trained here."
        )
    family = mixtures()[asked]
    if (field := family.axes["experts"]) in recipe.target:
        check_size(field, "experts", recipe.target[field], where)
    unknown = sorted(set(recipe.target) - family.known_fields - source.family.known_fields)
    if unknown:
        raise GrowthError(f"{where}: target.{unknown[0]}: not a config field of {own} or {asked}.")
    return family


def check_mixture(source: Architecture, recipe: GrowthRecipe, where: str) -> None:
    """Raise GrowthError for what a growth from a mixture does not support."""
    own = source.family.model_type
    if recipe.target.get("model_type", own) != own:
        raise GrowthError(f"{where}: target.model_type: a {own} cannot become another family; leave it out.")
    if recipe.width.copies_from != "own-layer" or recipe.fitted is not None:
        raise GrowthError(f"{where}: width.copies_from: next-layer and fitted operators are for dense models.")


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
    kept = {field: value for field, value in recipe.target.items() if field in source.family.known_fields}
    return recipe.model_copy(update={"target": {**_without(kept, ("model_type", ffn))}})


def upcycled(dense: GrowthPlan, recipe: GrowthRecipe, mixture: Family, where: str) -> GrowthPlan:
    """Replace the FFN of ``dense`` by experts. Raises GrowthError for sizes that do not work, with those that do."""
    target = _target(dense.target, recipe, mixture, where)
    experts = _experts(dense, target, recipe, where)
    inexact = dense.inexact
    if experts.method == "drop":
        inexact = (*inexact, "experts.new: drop does not keep the source's function: part of every expert starts anew")
    if recipe.function_preserving == "required" and inexact:
        raise GrowthError(
            f"{where}: function_preserving: required, but {'; '.join(inexact)}. Change it, or set function_preserving: preferred."
        )
    trained = f"a {mixture.model_type} cannot be trained by this package: use a package that trains Hugging Face folders of it"
    notes = (*dense.notes, *inexact[len(dense.inexact) :], *_notes(experts), trained)
    return replace(dense, recipe=recipe, target=target, inexact=inexact, notes=notes, experts=experts)


def _target(dense: Architecture, recipe: GrowthRecipe, mixture: Family, where: str) -> Architecture:
    own = {field: value for field, value in recipe.target.items() if field in mixture.known_fields}
    config: dict[str, Any] = {
        field: value
        for field, value in dense.config.items()
        if field in mixture.effective_fields or (field in dense.stated and field.endswith("_token_id"))
    }
    config |= {mixture.config.initializer: dense.config[dense.family.config.initializer]}
    for field, value in mixture.upcycles[dense.family.model_type].only.items():
        if dense.config[field] != value:
            raise GrowthError(
                f"{where}: the source's {field} is {dense.config[field]!r}; it becomes a {mixture.model_type} "
                f"with {value!r} only."
            )
    config |= {field: value for field, value in mixture.config.only.items() if field not in own}
    config |= {mixture.axes["ffn"]: dense.sizes["ffn"], **own}
    try:
        return architecture_from_config(config, f"{where}: target")
    except ConfigError as error:
        raise GrowthError(str(error)) from error


def _experts(dense: GrowthPlan, target: Architecture, recipe: GrowthRecipe, where: str) -> ExpertGrowth:
    old, new = dense.source.sizes["ffn"], target.sizes["ffn"]
    field, method = target.family.axes["ffn"], recipe.experts.new
    if method != "virtual-groups" and new != old:
        raise GrowthError(
            f"{where}: target.{field}: {new}, but experts.new: {method} makes experts of the source's {old} neurons; set {old}, "
            "or experts.new: virtual-groups for smaller ones."
        )
    if old % new:
        near = sorted((size for size in range(1, old + 1) if old % size == 0), key=lambda size: abs(size - new))
        fitting = ", ".join(str(size) for size in sorted(near[:2]))
        raise GrowthError(
            f"{where}: target.{field}: {new} does not divide the source's {old} neurons; nearest sizes that work: {fitting}."
        )
    experts = ExpertGrowth(method, old, new, recipe.experts.ratio, recipe.width.symmetry_breaking.seed)
    _check_counts(experts, target, where)
    return experts


def _check_counts(experts: ExpertGrowth, target: Architecture, where: str) -> None:
    """Check that the router picks only whole groups, and that there are more experts than it picks."""
    count, chosen = target.sizes["experts"], int(target.config["num_experts_per_tok"])
    field = target.family.axes["experts"]
    check_size("num_experts_per_tok", "experts", chosen, where)
    for name, value in ((field, count), ("num_experts_per_tok", chosen)):
        if value % experts.shards:
            lower = value // experts.shards * experts.shards
            nearest = " or ".join(str(size) for size in (lower, lower + experts.shards) if size)
            raise GrowthError(
                f"{where}: target.{name}: {value} is not a multiple of the {experts.shards} experts that make up one dense FFN; "
                f"nearest: {nearest}."
            )
    if chosen > count:
        raise GrowthError(f"{where}: target.num_experts_per_tok: {chosen} exceeds {field} {count}.")


def _notes(experts: ExpertGrowth) -> tuple[str, ...]:
    if experts.method == "drop":
        return ()
    equal = "experts" if experts.method == "copy" else "experts that hold the same part of the FFN"
    return (f"{equal} start equal and differ as the router sends them different tokens; its weights are drawn anew",)


def _without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if field not in names}
