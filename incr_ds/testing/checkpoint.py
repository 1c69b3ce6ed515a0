"""A logical checkpoint in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import CheckpointFacts, State
from incr_ds.sharding.blocks import Bounds


class MemoryCheckpoint:
    """Weights by name as a LogicalCheckpoint; without ``tensors``, normal(0, 0.2) values drawn from ``seed``."""

    def __init__(
        self, architecture: Architecture, tensors: Mapping[str, torch.Tensor] | None = None, *, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.architecture = architecture
        self.facts = CheckpointFacts(Path("memory"), "memory", ("weight",), None)
        self._tensors = tensors or {
            spec.name: torch.randn(spec.shape, generator=generator) * 0.2 + (not spec.is_matrix)
            for spec in architecture.stored
        }

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor."""
        if state != "weight":
            raise KeyError(f"memory checkpoint has no {state}")
        return self._tensors[name][tuple(slice(*part) for part in bounds or ())]
