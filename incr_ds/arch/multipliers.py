"""Learning-rate multipliers per tensor, which tensors a growth added, and the file of a checkpoint that holds both.

Suppose that a grown tensor's entries are a times its source's, and its gradient is g times. It then trains as the source
did if the learning rate is multiplied by a, eps by g, and decoupled weight decay is divided by a.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.json_file import LARGE, read_json
from incr_ds.errors import CheckpointError

FILE = "multipliers.json"
_OLD_FILE = "optimizer_groups.json"  # the name before 2026-11-25
_FACTORS = ("lr", "eps", "weight_decay")
_DIGITS = 14  # of a multiplier: differences in the last bits must not split a group in two


@dataclass(frozen=True, order=True)
class Multipliers:
    """AdamW multipliers of a tensor: for the learning rate, eps and weight decay.

    ``new`` says that the tensor is in a layer that the newest growth in depth added (optimizer.new_parameters).
    """

    lr: float
    eps: float
    weight_decay: float
    new: bool = False

    def after(self, earlier: Multipliers) -> Multipliers:
        """Combine two growths: first ``earlier``, then these. ``new`` is this one's."""
        combined = {key: _rounded(getattr(self, key) * getattr(earlier, key)) for key in _FACTORS}
        return Multipliers(**combined, new=self.new)

    def applied(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of an AdamW group after these multipliers."""
        return {**group, **{key: group[key] * getattr(self, key) for key in _FACTORS if key in group}}

    def removed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters before these multipliers; the inverse of ``applied``."""
        return {**group, **{key: group[key] / getattr(self, key) for key in _FACTORS if key in group}}

    def stated(self) -> dict[str, Any]:
        """The fields as they are written: without ``new`` unless it is true."""
        return {key: value for key, value in vars(self).items() if key != "new" or value}


UNCHANGED = Multipliers(1.0, 1.0, 1.0)
NEW = replace(UNCHANGED, new=True)
# A parameter group's key: the factor of the learning rate that new parameters have at the saved step.
NEW_RATIO = "new_parameters_ratio"


def without_multipliers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The AdamW settings of a saved parameter group as the run file states them."""
    multipliers = Multipliers(**group["multipliers"]) if "multipliers" in group else UNCHANGED
    settings = multipliers.removed(group)
    if NEW_RATIO in settings:
        settings["lr"] /= settings[NEW_RATIO]
    return {key: value for key, value in settings.items() if key not in ("multipliers", NEW_RATIO)}


def marks_only(multipliers: Mapping[str, Multipliers]) -> dict[str, Multipliers]:
    """Which tensors are new, with multipliers of 1."""
    return {name: NEW for name, own in multipliers.items() if own.new}


def without_marks(multipliers: Mapping[str, Multipliers]) -> dict[str, Multipliers]:
    """The multipliers that are not 1, without which tensors are new."""
    plain = {name: replace(own, new=False) for name, own in multipliers.items()}
    return {name: own for name, own in plain.items() if own != UNCHANGED}


class _Group(Settings):
    lr: float = Field(gt=0.0)
    eps: float = Field(gt=0.0)
    weight_decay: float = Field(gt=0.0)
    new: bool = False
    tensors: list[str] = Field(min_length=1)


class _Content(Settings):
    version: Literal[1]
    groups: list[_Group]


def read_multipliers(folder: Path) -> Mapping[str, Multipliers]:
    """The multipliers that a checkpoint folder declares, by tensor. Tensors that it does not name train unchanged.

    Returns {} without the file. Raises CheckpointError, or ConfigError that names the key, if it cannot be read.
    """
    path = folder / FILE
    if (folder / _OLD_FILE).is_file():
        raise CheckpointError(f"{folder / _OLD_FILE}: this file is {FILE} now; grow or train the checkpoint again.")
    if not path.is_file():
        return {}
    hint = "; expected the JSON that a growth wrote. Copy it from the grown folder, or remove it to train all tensors alike."
    groups = parse_settings(read_json(path, CheckpointError, hint, LARGE), _Content, str(path)).groups
    named = Counter(name for group in groups for name in group.tensors)
    if twice := next((name for name, count in named.items() if count > 1), None):
        raise CheckpointError(f"{path}: tensor {twice:.80} is named {named[twice]} times; name it in one group only.")
    return {
        name: Multipliers(group.lr, group.eps, group.weight_decay, group.new)
        for group in groups
        for name in group.tensors
    }


def multipliers_text(multipliers: Mapping[str, Multipliers]) -> str:
    """The file's content for ``multipliers``: one group per set of multipliers."""
    sets = sorted(set(multipliers.values()) - {UNCHANGED})
    groups = [{**item.stated(), "tensors": [name for name, own in multipliers.items() if own == item]} for item in sets]
    return json.dumps({"version": 1, "groups": groups}, indent=1) + "\n"


def rounded_multipliers(lr: float, eps: float) -> Multipliers:
    """Multipliers for values scaled by ``lr`` and gradients scaled by ``eps``, rounded to 14 digits."""
    return Multipliers(_rounded(lr), _rounded(eps), _rounded(1.0 / lr))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
