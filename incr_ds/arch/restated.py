"""The config.json of a grown model: its source's, plus what changed and what transformers would default differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from incr_ds.arch.architecture import Architecture, axis_sizes, filled_config
from incr_ds.errors import ConfigError

ROTARY = "rope_parameters"


def restated(target: Architecture, source: Architecture, where: str) -> Architecture:
    """State ``target`` by the config of ``source``, with as few changes as possible. Both are of one family."""
    changed = {name for name, value in target.config.items() if source.config.get(name) != value}
    stated = _with(source.stated, target, changed & set(source.stated))
    try:
        unlike = _unlike(target, stated, where)
    except ConfigError:  # a field is missing, without which it is not a valid config
        unlike = changed
    return replace(target, stated=_with(stated, target, unlike))


def _unlike(target: Architecture, stated: Mapping[str, Any], where: str) -> set[str]:
    """Config fields whose values in the model that ``stated`` describes differ from the target's."""
    family, filled = target.family, filled_config(stated, where)
    sizes, axes = axis_sizes(family, filled, where), set(family.axes.values())
    fields = {name for name in family.effective_fields - axes if filled.get(name) != target.config.get(name)}
    return fields | {field for axis, field in family.axes.items() if sizes[axis] != target.sizes[axis]}


def _with(stated: Mapping[str, Any], target: Architecture, changed: set[str]) -> dict[str, Any]:
    """Set the ``changed`` fields to the target's values, and drop older names of them that would contradict."""
    family, older = target.family, set(target.family.config.older) & set(stated)
    sizes = {field for axis, field in family.axes.items() if axis not in family.derived}
    if not older or not changed & ({ROTARY} | (sizes - set(stated))):
        older = set()
    elif ROTARY in target.config:
        changed = changed | {ROTARY}
    kept = {name: value for name, value in stated.items() if name not in older}
    return kept | {name: target.config[name] for name in changed if name in target.config}
