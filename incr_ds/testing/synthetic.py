"""A checkpoint of any size that takes no memory: each element is computed from its place when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import MUON_STATES, STATES, CheckpointFacts, Counters, State, rows_and_columns
from incr_ds.sharding.blocks import Bounds

_PRIME = 65521  # elements repeat with this period, so two misplaced slices differ


class SyntheticCheckpoint:
    """Element i of tensor t is ((i + 977 t + s) mod 65521) / 65521 - 1/2, a multiple that every row and state shifts;
    exp_avg_sq is that plus 1/2. Weights are scaled by 1/8."""

    def __init__(self, architecture: Architecture, step: int = 100) -> None:
        self.architecture = architecture
        self.facts = CheckpointFacts(Path("synthetic"), "synthetic", STATES, step, recorded=Counters(global_steps=step))
        self._numbers = {spec.name: number for number, spec in enumerate(architecture.stored)}
        self._period = torch.arange(_PRIME, dtype=torch.float32) / _PRIME - 0.5

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor, fp32."""
        spec = self.architecture.by_name[name]
        first, stop, inside = rows_and_columns(bounds, spec.shape)
        per_row = math.prod(spec.shape[1:])
        start = (first * per_row + 977 * self._numbers[spec.tied_to or name] + 31 * MUON_STATES.index(state)) % _PRIME
        count = (stop - first) * per_row
        repeats = math.ceil((start + count) / _PRIME)
        values = self._period.repeat(repeats)[start : start + count].view(stop - first, *spec.shape[1:])[inside]
        return values / 8 if state == "weight" else values + 0.5 if state == "exp_avg_sq" else values

    def self_check(self) -> Iterator[str]:
        """Nothing to check."""
        yield from self._numbers
