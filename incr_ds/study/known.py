"""Branches that an earlier run of a study measured, read from its summary.json: a study may take several machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from incr_ds.config.fields import parse_settings
from incr_ds.config.json_file import LARGE, read_json
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.study.savings import Branch

# Of a branch: its arm, seed, learning rate, budget, and last position.
Key = tuple[str, int, float, int, int]
FIRST_SEED = ("after_growth", "measures")  # parts of an arm's record that belong to the last branch of its first seed


class _Summary(BaseModel):
    """The parts of summary.json that are read again."""

    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    branches: list[Branch]


def read_known(files: Iterable[str], settings: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """The results in ``files`` by branch. ``settings`` are what this study's results depend on.

    Raises CheckpointError or ConfigError if a file cannot be read, and ConfigError if it belongs to another study.
    """
    found: dict[Key, dict[str, Any]] = {}
    for file in files:
        hint = "; the study file names it in known. Expected the summary.json that a study wrote."
        content = parse_settings(read_json(Path(file), CheckpointError, hint, LARGE), _Summary, file)
        _refuse_another(content.settings, settings, file)
        for branch in content.branches:
            found[key_of(branch)] = {**vars(branch), **_of_the_arm(content, branch)}
    return found


def key_of(branch: Branch) -> Key:
    """What identifies a branch in a study."""
    return branch.arm, branch.seed, branch.rate, branch.budget, branch.position


def _of_the_arm(content: _Summary, branch: Branch) -> dict[str, Any]:
    """What the summary says of the last branch of the arm's first seed."""
    own = [one for one in content.branches if one.arm == branch.arm]
    last = max((one for one in own if one.seed == own[0].seed), key=lambda one: (one.budget, one.position))
    record = content.arms.get(branch.arm, {})
    return {name: record[name] for name in FIRST_SEED if name in record} if branch == last else {}


def _refuse_another(found: Mapping[str, Any], expected: Mapping[str, Any], file: str) -> None:
    """Raise ConfigError if results were measured with settings that this study does not have."""
    for name, value in expected.items():
        other = found.get(name)
        if name == "arms" and isinstance(other, dict):  # either may have further arms
            common = value.keys() & other.keys()
            other, value = ({arm: own for arm, own in arms.items() if arm in common} for arms in (other, value))
        if other != value:
            raise ConfigError(
                f"known: {file}: it belongs to another study: {name} is {other!s:.200}, expected {value!s:.200}. Remove the "
                "file from known, or restore the setting."
            )
