"""The logical view of a checkpoint: names mapped to lazy tensors, for any layout on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds

State = Literal["weight", "exp_avg", "exp_avg_sq", "momentum_buffer"]
STATES: tuple[State, ...] = ("weight", "exp_avg", "exp_avg_sq")  # where Adam trains everything
MUON_STATES: tuple[State, ...] = (*STATES, "momentum_buffer")  # where Muon trains some tensors


@dataclass(frozen=True)
class Counters:
    """How far a run got, as it recorded it; None for what it did not record. ``tokens`` are those seen in training."""

    global_steps: int | None = None
    global_samples: int | None = None
    skipped_steps: int | None = None
    tokens: int | None = None
    ds_version: str | None = None

    @property
    def known(self) -> dict[str, int | str]:
        """The counters that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known about a checkpoint without reading a tensor.

    ``kind`` is the format's name, ``layout`` its parallel degrees, ``step`` the optimizer's step (None without moments), and
    ``files`` its files. ``no_moments`` is the reason why an existing optimizer state cannot be used, if so. ``dtype`` is
    that of the run's weights (None: the format does not state it). ``optimizer_groups`` are the optimizer's hyperparameters
    group by group, ``frozen`` the tensors that were not trained, and ``recorded`` the counters of the run. ``stages`` are the
    decoder layers of each pipeline stage (empty without a pipeline, or if the files do not show them). ``momentum`` are the
    tensors that Muon trains: they have a momentum_buffer, and all others Adam's moments.
    """

    path: Path
    kind: str
    states: tuple[State, ...]
    step: int | None
    files: tuple[Path, ...] = ()
    layout: Mapping[str, int] = field(default_factory=dict)
    no_moments: str | None = None
    dtype: str | None = None
    optimizer_groups: tuple[Mapping[str, Any], ...] = ()
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recorded: Counters = Counters()
    stages: tuple[int, ...] = ()
    momentum: frozenset[str] = frozenset()

    def states_of(self, name: str) -> tuple[State, ...]:
        """Those of ``states`` that one tensor has."""
        others = ("exp_avg", "exp_avg_sq") if name in self.momentum else ("momentum_buffer",)
        return tuple(state for state in self.states if state not in others)


class LogicalCheckpoint(Protocol):
    """Any supported checkpoint. Tied aliases have no entry of their own; nothing is loaded before ``read``."""

    @property
    def facts(self) -> CheckpointFacts:
        """What is known without reading a tensor."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The model that the checkpoint holds."""
        ...

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Read the part of one tensor within ``bounds``, in its stored dtype.

        ``bounds`` is (start, stop) for each dimension, from the first on. Dimensions without bounds are read whole.
        """
        ...

    def self_check(self) -> Iterator[str]:
        """Check all that the format allows to check, and yield each tensor's name. Raises CheckpointError for a mismatch."""
        ...


def check_state(facts: CheckpointFacts, name: str, state: State) -> None:
    """Raise CheckpointError if the ``state`` of a tensor cannot be read."""
    if state not in facts.states:
        raise CheckpointError(f"{facts.path}: no {state}: {facts.no_moments}; use optimizer: reset.")
    if state not in facts.states_of(name):
        trained = "Muon" if name in facts.momentum else "Adam"
        raise CheckpointError(f"{facts.path}: {name} has no {state}: {trained} trains it.")


def rows_and_columns(bounds: Bounds | None, shape: tuple[int, ...]) -> tuple[int, int, tuple[slice, ...]]:
    """First and last row (half open) of the part of a tensor of ``shape``, and the slices to take from those rows."""
    (first, stop), *columns = bounds or ((0, shape[0]),)
    return first, stop, (slice(None), *(slice(*part) for part in columns))


def row_portions(shape: tuple[int, ...], elements: int) -> Iterator[Bounds]:
    """Bounds of portions of a tensor's rows. Each has about ``elements`` elements, and at least one row."""
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    return (((first, min(first + rows, shape[0])),) for first in range(0, shape[0], rows))


FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtype(dtype: torch.dtype | str, name: str, where: str) -> None:
    """Raise CheckpointError unless ``dtype`` is a plain floating-point type of 16 bits or more."""
    found = str(dtype).removeprefix("torch.")
    if found not in {str(known).removeprefix("torch.") for known in FLOATING}:
        raise CheckpointError(
            f"{where}: {name}: dtype {found}; tensors of float64, float32, float16 and bfloat16 can be grown. If the model is "
            "quantized, use its unquantized release; otherwise save it again in one of these."
        )


def same_numbers(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, with NaN in the same places."""
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def rounds_to(masters: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether ``masters``, cast, are the saved weights.

    torch compares 16-bit numbers one by one. numpy compares their bits, many at a time, which is five times as fast. Equal
    bits are equal numbers unless they are NaN, and a sum shows whether any is.
    """
    rounded = masters.to(saved.dtype)
    if saved.dtype.itemsize == 2 and not masters.sum().isnan():
        if np.array_equal(rounded.view(torch.int16).numpy(), saved.view(torch.int16).numpy()):
            return True
    return same_numbers(rounded, saved)


def check_shapes(
    architecture: Architecture, found: Mapping[str, tuple[int, ...]], where: str, if_missing: str = ""
) -> None:
    """Compare the shapes found in a checkpoint with the declared ones. Raises CheckpointError that lists all differences.

    ``found`` may include tied aliases. ``if_missing`` is the hint in the message if the only problem is missing tensors.
    """
    declared = architecture.by_name
    problems = [
        f"  {name}: not a tensor of this {architecture.family.model_type}" for name in found if name not in declared
    ]
    missing = [
        f"  {spec.name}: missing, expected shape {list(spec.shape)}"
        for spec in architecture.stored
        if spec.name not in found
    ]
    problems += missing
    for name, shape in found.items():
        if name in declared and tuple(shape) != declared[name].shape:
            problems.append(f"  {name}: expected shape {list(declared[name].shape)}, found {list(shape)}")
    if problems:
        shown = problems[:10] + ([f"  and {len(problems) - 10} more"] if len(problems) > 10 else [])
        why = if_missing if if_missing and problems == missing else "is config.json this checkpoint's?"
        lines = [f"{where}: {len(problems)} tensor(s) do not match the config; {why}", *shown]
        raise CheckpointError("\n".join(lines))
