"""How single tensors train beside the run's AdamW settings: multipliers, and the file of a checkpoint that holds them.

A grown tensor whose entries are a times the source's, and whose gradient is g times, trains as the source's did with the
learning rate times a, eps times g and decoupled weight decay divided by a.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.json_file import LARGE, read_json
from incr_ds.errors import CheckpointError

FILE = "multipliers.json"
_OLD_FILE = "optimizer_groups.json"  # of the versions before 2026-11-25
_DIGITS = 14  # of a multiplier: rounding in its last bits must not make two groups of one


@dataclass(frozen=True, order=True)
class Multipliers:
    """AdamW multipliers of a tensor: of the learning rate, of eps, and of the weight decay."""

    lr: float
    eps: float
    weight_decay: float

    def after(self, earlier: Multipliers) -> Multipliers:
        """Both in a row, as when a grown model is grown again."""
        return Multipliers(*(_rounded(a * b) for a, b in zip(astuple(self), astuple(earlier), strict=True)))

    def applied(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of an AdamW group under these multipliers."""
        return {**group, **{key: group[key] * factor for key, factor in vars(self).items() if key in group}}

    def removed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters that ``applied`` was given."""
        return {**group, **{key: group[key] / factor for key, factor in vars(self).items() if key in group}}


UNCHANGED = Multipliers(1.0, 1.0, 1.0)


def without_multipliers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The AdamW settings of a saved parameter group as the run file had them."""
    multipliers = Multipliers(**group["multipliers"]) if "multipliers" in group else UNCHANGED
    return {key: value for key, value in multipliers.removed(group).items() if key != "multipliers"}


class _Group(Settings):
    lr: float = Field(gt=0.0)
    eps: float = Field(gt=0.0)
    weight_decay: float = Field(gt=0.0)
    tensors: list[str] = Field(min_length=1)


class _Content(Settings):
    version: Literal[1]
    groups: list[_Group]


def read_multipliers(folder: Path) -> Mapping[str, Multipliers]:
    """The multipliers that a checkpoint folder declares, by tensor; tensors it does not name train unchanged.

    {} without the file; CheckpointError, or ConfigError naming the key, for one that cannot be read.
    """
    path = folder / FILE
    if (folder / _OLD_FILE).is_file():
        raise CheckpointError(f"{folder / _OLD_FILE}: this file is {FILE} now; grow or train the checkpoint again.")
    if not path.is_file():
        return {}
    hint = "; expected the JSON that a growth wrote. Copy it from there, or remove it to train every tensor alike."
    groups = parse_settings(read_json(path, CheckpointError, hint, LARGE), _Content, str(path)).groups
    return {name: Multipliers(group.lr, group.eps, group.weight_decay) for group in groups for name in group.tensors}


def multipliers_text(multipliers: Mapping[str, Multipliers]) -> str:
    """The file's content for ``multipliers``: one group per set of multipliers."""
    sets = sorted(set(multipliers.values()) - {UNCHANGED})
    groups = [{**vars(item), "tensors": [name for name, own in multipliers.items() if own == item]} for item in sets]
    return json.dumps({"version": 1, "groups": groups}, indent=1) + "\n"


def rounded_multipliers(lr: float, eps: float) -> Multipliers:
    """Multipliers for values grown by ``lr`` and gradients by ``eps``, rounded to 14 digits."""
    return Multipliers(_rounded(lr), _rounded(eps), _rounded(1.0 / lr))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
