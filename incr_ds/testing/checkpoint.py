"""A logical checkpoint in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import CheckpointFacts, State
from incr_ds.sharding.blocks import Bounds


class MemoryCheckpoint:
    """Tensors by state and name as a logical checkpoint."""

    def __init__(
        self, architecture: Architecture, tensors: Mapping[State, Mapping[str, torch.Tensor]], step: int | None = None
    ) -> None:
        self.architecture = architecture
        self._tensors = tensors
        momentum = frozenset(tensors.get("momentum_buffer", ()))
        self.facts = CheckpointFacts(Path("memory"), "memory", tuple(tensors), step, momentum=momentum)

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor."""
        spec = self.architecture.by_name[name]
        return self._tensors[state][spec.tied_to or name][tuple(slice(*part) for part in bounds or ())]

    def self_check(self) -> Iterator[str]:
        """Nothing to check."""
        yield from self._tensors["weight"]


def drawn_checkpoint(architecture: Architecture, seed: int = 0) -> MemoryCheckpoint:
    """Weights drawn from ``seed``: normal with deviation 0.2, around 1 where they are vectors."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        spec.name: torch.randn(spec.shape, generator=generator) * 0.2 + (not spec.is_matrix)
        for spec in architecture.stored
    }
    return MemoryCheckpoint(architecture, {"weight": weights})
