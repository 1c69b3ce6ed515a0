"""The config.json of a grown model: its source's, with what changed and what transformers would fill in differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from incr_ds.arch.architecture import Architecture, axis_sizes, filled_config
from incr_ds.errors import ConfigError

ROTARY = "rope_parameters"


def restated(target: Architecture, source: Architecture, where: str) -> Architecture:
    """``target``, of the family of ``source``, stated by the config of ``source`` with as few changes as mean the target."""
    changed = {name for name, value in target.config.items() if source.config.get(name) != value}
    stated = _with(source.stated, target, changed & set(source.stated))
    try:
        unlike = _unlike(target, stated, where)
    except ConfigError:  # what is missing keeps it from being a config at all
        unlike = changed
    return replace(target, stated=_with(stated, target, unlike))


def _unlike(target: Architecture, stated: Mapping[str, Any], where: str) -> set[str]:
    """Fields that say something else of the model that ``stated`` describes than of the target."""
    family, filled = target.family, filled_config(stated, where)
    sizes, axes = axis_sizes(family, filled, where), set(family.axes.values())
    fields = {name for name in family.effective_fields - axes if filled.get(name) != target.config.get(name)}
    return fields | {field for axis, field in family.axes.items() if sizes[axis] != target.sizes[axis]}


def _with(stated: Mapping[str, Any], target: Architecture, changed: set[str]) -> dict[str, Any]:
    """``stated`` with ``changed`` fields of the target, without the older spellings that would contradict them."""
    family, older = target.family, set(target.family.config.older) & set(stated)
    sizes = {field for axis, field in family.axes.items() if axis not in family.derived}
    if not older or not changed & ({ROTARY} | (sizes - set(stated))):
        older = set()
    elif ROTARY in target.config:
        changed = changed | {ROTARY}
    kept = {name: value for name, value in stated.items() if name not in older}
    return kept | {name: target.config[name] for name in changed if name in target.config}
