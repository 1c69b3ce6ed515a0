"""The logical view of a checkpoint: names to lazy tensors, whatever the layout on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import CheckpointError

State = Literal["weight", "exp_avg", "exp_avg_sq"]
STATES: tuple[State, ...] = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint without reading a tensor.

    ``kind`` names the format for people, ``layout`` its parallel degrees, ``step`` the optimizer's step (None without
    moments), ``metadata`` what else the trainer recorded (global_steps, consumed_samples, ...), ``files`` the files
    that make it up. ``no_moments`` says why there are none to use, where an optimizer's state is there.
    """

    path: Path
    kind: str
    states: tuple[State, ...]
    step: int | None
    layout: Mapping[str, int]
    metadata: Mapping[str, Any]
    files: tuple[Path, ...]
    no_moments: str | None = None


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

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows (dimension 0) of one tensor, in its stored dtype, in its logical shape."""
        ...

    def self_check(self) -> Iterator[str]:
        """Prove what the format allows to prove, yielding each tensor's name; CheckpointError for what does not fit."""
        ...


FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtype(dtype: torch.dtype | str, name: str, where: str) -> None:
    """CheckpointError unless ``dtype`` holds plain floating-point numbers of 16 bits or more."""
    found = str(dtype).removeprefix("torch.")
    if found not in {str(known).removeprefix("torch.") for known in FLOATING}:
        raise CheckpointError(
            f"{where}: {name}: dtype {found}; tensors of float64, float32, float16 and bfloat16 can be grown. If the model is "
            "quantized, use its unquantized release; else save it again in one of these."
        )


def same_numbers(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN in the same places."""
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def check_shapes(
    architecture: Architecture, found: Mapping[str, tuple[int, ...]], where: str, if_missing: str = ""
) -> None:
    """Compare the shapes found in a checkpoint with the declared ones; CheckpointError names every difference.

    ``found`` may list tied aliases or not. ``if_missing`` is said where nothing is wrong but that tensors are missing.
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
        lines = [f"{where}: {len(problems)} tensor(s) do not fit the config; {why}", *shown]
        raise CheckpointError("\n".join(lines))
