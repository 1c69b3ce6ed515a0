"""The config.json of a grown model: its source's, with what changed and what transformers would fill in differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from incr_ds.arch.architecture import Architecture, filled_config

ROTARY = "rope_parameters"


def restated(target: Architecture, source: Architecture, where: str) -> Architecture:
    """``target``, of the family of ``source``, stated by the config of ``source`` with as few changes as mean the target."""
    changed = {name for name, value in target.config.items() if source.config.get(name) != value}
    stated = _with(dict(source.stated), target, changed)
    filled = filled_config(stated, where)
    unlike = {name for name in target.family.effective_fields if filled.get(name) != target.config.get(name)}
    return replace(target, stated=_with(stated, target, unlike))


def _with(stated: Mapping[str, Any], target: Architecture, changed: set[str]) -> dict[str, Any]:
    """``stated`` with ``changed`` fields of the target, which the older spellings of rotary positions would contradict."""
    kept = {
        name: value for name, value in stated.items() if ROTARY not in changed or name not in target.family.config.older
    }
    return kept | {name: target.config[name] for name in changed if name in target.config}
