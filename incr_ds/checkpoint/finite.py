"""A checkpoint whose numbers are looked at as they are read: NaN and infinity come from a model that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import CheckpointFacts, LogicalCheckpoint, State, row_portions
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds

_PORTION = 1 << 20  # elements counted at once


class FiniteCheckpoint:
    """``source``, which refuses to give numbers that are not finite, or with ``allowed`` counts them.

    ``found`` says how many there are in each tensor that had any, by "name (state)". ``otherwise`` is what a user can do who
    means to take them. Any number of threads may read.
    """

    def __init__(self, source: LogicalCheckpoint, *, otherwise: str, allowed: bool = False) -> None:
        self._source, self._otherwise, self._allowed = source, otherwise, allowed
        self.found: dict[str, int] = {}

    @property
    def facts(self) -> CheckpointFacts:
        """The source's."""
        return self._source.facts

    @property
    def architecture(self) -> Architecture:
        """The source's."""
        return self._source.architecture

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor. CheckpointError names the tensor, and counts what is not finite in all of it."""
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
        """Read the whole of ``tensors``, in portions: ``found`` then covers them. CheckpointError as from ``read``."""
        for name, state in tensors:
            for bounds in self._portions(name):
                self.read(name, state, bounds)

    def self_check(self) -> Iterator[str]:
        """The source's."""
        return self._source.self_check()

    def _count(self, name: str, state: State) -> int:
        parts = (self._source.read(name, state, bounds) for bounds in self._portions(name))
        return sum(int((~torch.isfinite(part)).sum()) for part in parts)

    def _portions(self, name: str) -> Iterator[Bounds]:
        return row_portions(self.architecture.by_name[name].shape, _PORTION)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite. A sum is thirty times as fast as looking at each, and shows all that is not."""
    if tensor.numel() == 0:
        return True
    tensor = tensor.detach()  # torch.save keeps which ones were trained
    # Half precision overflows in a sum of ones.
    probes = torch.aminmax(tensor) if tensor.dtype == torch.float16 else (tensor.sum(),)
    return all(math.isfinite(probe) for probe in probes) or bool(torch.isfinite(tensor).all())


def nonfinite_notes(found: Mapping[str, int]) -> tuple[str, ...]:
    """What was taken although it is not finite: one note, or none."""
    if not found:
        return ()
    shown = ", ".join(f"{count:,} in {label}" for label, count in sorted(found.items())[:5])
    more = f" and in {len(found) - 5} more tensors" if len(found) > 5 else ""
    return (f"numbers of the source that are not finite (NaN or infinity): {shown}{more}",)
