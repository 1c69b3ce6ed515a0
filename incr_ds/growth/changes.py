"""Checks which fields of the source's config a recipe's ``target`` may change, and by how much."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.family import mixtures
from incr_ds.arch.rotary import BASIC, ROPE_TYPES, STEADY, rotary_kinds
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.yaml_file import read_yaml
from incr_ds.errors import ConfigError, GrowthError, IncrError
from incr_ds.growth.rules import wrong_size

GROWING = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab", "positions", "experts")
CHOSEN = "num_experts_per_tok"
ROTARY = "rope_parameters"


def growing_fields(source: Architecture) -> dict[str, str]:
    """The config field of each axis that can grow and has one."""
    return {axis: source.family.axes[axis] for axis in GROWING if axis in source.family.axes}


def load_recipe(path: Path, source: Callable[[], Architecture]) -> GrowthRecipe:
    """Load the recipe in a file. Raises ConfigError that lists every mistake in it.

    That includes fields of ``target`` that ``source`` does not have. It is opened only if the recipe is wrong anyway.
    """
    try:
        return load_settings(path, GrowthRecipe)
    except ConfigError as error:
        more = _unknown_in(path, source)
        raise ConfigError("\n".join([str(error), *more])) from error


def _unknown_in(path: Path, source: Callable[[], Architecture]) -> list[str]:
    try:
        target, architecture = read_yaml(path).get("target"), source()
    except IncrError:  # the recipe's own mistakes come first; this one is reported at the next attempt
        return []
    return [f"  {line}" for line in _unknown_fields(architecture, target if isinstance(target, dict) else {})]


def _unknown_fields(source: Architecture, target: Mapping[str, Any]) -> list[str]:
    known = source.family.known_fields | {"model_type"}
    other = mixtures().get(str(target.get("model_type")))
    known |= frozenset() if other is None else other.known_fields
    can_grow = growing_fields(source).values()
    lines = []
    for field in target:
        if field not in known:
            near = difflib.get_close_matches(str(field), [*can_grow, *sorted(known)], n=1)
            hint = f"did you mean {near[0]}?" if near else f"can grow: {_listed(can_grow)}"
            lines.append(f"target.{field}: not a config field of {source.family.model_type}; {hint}")
    return lines


def checked_changes(source: Architecture, recipe: GrowthRecipe, where: str) -> dict[str, Any]:
    """The recipe's ``target``. Raises GrowthError that lists every field that is unknown, cannot grow, or is not a size."""
    problems = [f"{where}: {line}." for line in _unknown_fields(source, recipe.target)]
    for field, value in recipe.target.items():
        if field in source.family.known_fields:
            try:
                _check_change(source, field, value, recipe, where)
            except GrowthError as error:
                problems.append(str(error))
    if problems:
        raise GrowthError("\n".join(problems))
    changes = dict(recipe.target)
    if ROTARY in changes:
        changes[ROTARY] = _rotations(source.config[ROTARY], changes[ROTARY], f"{where}: target.{ROTARY}")
    return changes


def _check_change(source: Architecture, field: str, value: Any, recipe: GrowthRecipe, where: str) -> None:
    axes = {field: axis for axis, field in growing_fields(source).items()}
    if field in axes:
        if wrong := wrong_size(field, axes[field], value):
            raise GrowthError(f"{where}: {wrong}")
    elif axis := source.family.config.follows.get(field):
        _check_follows(field, value, source.family.axes[axis], recipe, source.sizes[axis], where)
    elif not _is_free(source, field, value) and value != source.config.get(field):
        raise GrowthError(
            f"{where}: target.{field}: {value!r} differs from the source's {source.config.get(field)!r}, and no operator "
            f"grows it; fields that can grow: {_listed(axes)}."
        )


def _rotations(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fill ``new`` rope_parameters, for each kind of layer, with the base and the rotary share of a head from ``old``."""
    if "rope_type" not in old:
        unknown = sorted(set(new) - set(old))
        if unknown:
            raise GrowthError(f"{where}: {unknown[0]} is not a valid kind of layer; the kinds are {_listed(old)}.")
        return {kind: _rotations(old[kind], new.get(kind, old[kind]), f"{where}.{kind}") for kind in old}
    if new.get("rope_type") not in ROPE_TYPES:
        raise GrowthError(
            f"{where}: rope_type {new.get('rope_type')!r} is not one of {', '.join(ROPE_TYPES)}; state it."
        )
    return {key: old[key] for key in BASIC if key in old} | dict(new)


def _listed(fields: Iterable[str]) -> str:
    return ", ".join(sorted(fields))


def _check_follows(field: str, value: Any, followed: str, recipe: GrowthRecipe, old: int, where: str) -> None:
    size = recipe.target.get(followed, old)
    if value != size:
        raise GrowthError(
            f"{where}: target.{field}: {value!r}, but it follows {followed}, which is {size}; leave it out."
        )


def _is_free(source: Architecture, field: str, value: Any) -> bool:
    """Whether no operator has to compensate a change, or it is known to change the function (rotary speeds)."""
    if field == CHOSEN:
        return isinstance(value, int) and not isinstance(value, bool) and value >= source.config[CHOSEN]
    if field == ROTARY:
        return isinstance(value, dict) and bool(rotary_kinds(source.config))
    return field in source.family.without_effect or _is_longer_rotary_context(source, field, value)


def _is_longer_rotary_context(source: Architecture, field: str, value: Any) -> bool:
    """Whether the context gets longer under rotary pairs of constant speed, which leaves the old context unchanged."""
    if field != "max_position_embeddings" or "positions" in source.sizes:
        return False
    kinds = rotary_kinds(source.config)
    steady = bool(kinds) and all(kind.get("rope_type") in STEADY for kind in kinds)
    return steady and isinstance(value, int) and value > source.config[field]
