"""Checks a checkpoint's numbers as they are read. NaN and infinity come from a model that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from incr_ds.checkpoint.base import LogicalCheckpoint, State, row_portions
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds

_PORTION = 1 << 20  # elements counted at once


class FiniteCheckpoint:
    """``source``, but reading numbers that are not finite is an error; with ``allowed`` they are only counted.

    ``found`` counts them for each tensor that has any, by "name (state)". ``otherwise`` tells a user who wants to keep them
    what to do. Any number of threads may read.
    """

    def __init__(self, source: LogicalCheckpoint, *, otherwise: str, allowed: bool = False) -> None:
        self.facts, self.architecture = source.facts, source.architecture
        self._source, self._otherwise, self._allowed = source, otherwise, allowed
        self.found: dict[str, int] = {}

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor. Raises CheckpointError with the tensor's name and the number of bad elements in it."""
        tensor = self._source.read(name, state, bounds)
        label = f"{name} ({state})"
        if not is_finite(tensor) and label not in self.found:
            count, numel = self._count(name, state), self.architecture.by_name[name].numel
            if not self._allowed:
                raise CheckpointError(
                    f"{self.facts.path}: {label}: {count:,} of {numel:,} numbers are not finite (NaN or infinity): the model "
                    f"diverged before it was saved, or the file is damaged. Use an earlier checkpoint; {self._otherwise}."
                )
            self.found[label] = count
        return tensor

    def look_at(self, tensors: Iterable[tuple[str, State]]) -> None:
        """Read ``tensors`` whole, in portions, so that ``found`` covers them. Raises CheckpointError like ``read``."""
        for name, state in tensors:
            for bounds in self._portions(name):
                self.read(name, state, bounds)

    def self_check(self) -> Iterator[str]:
        """Run the source's own check."""
        return self._source.self_check()

    def _count(self, name: str, state: State) -> int:
        parts = (self._source.read(name, state, bounds) for bounds in self._portions(name))
        return sum(int((~torch.isfinite(part)).sum()) for part in parts)

    def _portions(self, name: str) -> Iterator[Bounds]:
        return row_portions(self.architecture.by_name[name].shape, _PORTION)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite. A sum shows it thirty times as fast as looking at each number."""
    if tensor.numel() == 0:
        return True
    tensor = tensor.detach()  # torch.save stores which tensors were trained
    # In half precision, a sum of ones can overflow.
    probes = torch.aminmax(tensor) if tensor.dtype == torch.float16 else (tensor.sum(),)
    return all(math.isfinite(probe) for probe in probes) or bool(torch.isfinite(tensor).all())


def nonfinite_notes(found: Mapping[str, int]) -> tuple[str, ...]:
    """A note on numbers that were copied although they are not finite: one or none."""
    if not found:
        return ()
    shown = ", ".join(f"{count:,} in {label}" for label, count in sorted(found.items())[:5])
    more = f" and in {len(found) - 5} more tensors" if len(found) > 5 else ""
    return (f"numbers of the source that are not finite (NaN or infinity): {shown}{more}",)
