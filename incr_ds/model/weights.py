"""Initial values of a model's tensors: fresh ones that are the same for every layout, or a checkpoint's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.sharding.blocks import Block, RankParameter


class Weights(Protocol):
    """A source of a rank's initial values."""

    def read(self, shard: RankParameter) -> Tensor:
        """The values of ``shard``, in its shape and in any floating-point dtype."""
        ...


class FreshWeights:
    """transformers' initialization: matrices of normal(0, the config's deviation), norms of one, biases of zero.

    Each tensor is drawn whole from a generator seeded by (seed, name) and then sliced, so every layout starts from
    the same model.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        family, config = architecture.family, architecture.config
        self._deviation = float(config.get(family.config.initializer) or 0.02)
        self._writers = 1.0 / math.sqrt(2 * architecture.num_layers) if family.fresh_writers == "scaled" else 1.0
        self._padding_row = config.get("pad_token_id")
        self._seed, self._tensors = seed, architecture.by_name

    def read(self, shard: RankParameter) -> Tensor:
        """The values of ``shard``, fp32."""
        return _stacked(shard, lambda block: self._whole(block.name)[tuple(slice(*part) for part in block.bounds)])

    def _whole(self, name: str) -> Tensor:
        spec = self._tensors[name]
        if not spec.is_matrix:
            return torch.full(spec.shape, 0.0 if spec.name.endswith(".bias") else 1.0 - spec.offset)
        digest = hashlib.blake2b(f"{self._seed}:{spec.name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        deviation = self._deviation * (self._writers if spec.role == "writer" else 1.0)
        values = torch.empty(spec.shape).normal_(0.0, deviation, generator=generator)
        if spec.role == "embedding" and self._padding_row is not None:
            values[self._padding_row] = 0.0
        return values


class CheckpointWeights:
    """The weights of a logical checkpoint. Only a rank's own rows are read."""

    def __init__(self, checkpoint: LogicalCheckpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, shard: RankParameter) -> Tensor:
        """The values of ``shard``, in the checkpoint's dtype."""
        return _stacked(shard, lambda block: self._checkpoint.read(block.name, "weight", block.bounds))


def _stacked(shard: RankParameter, read: Callable[[Block], Tensor]) -> Tensor:
    """A parameter whose blocks are stacked by rows."""
    parts = [read(block) for block in shard.blocks]
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts).view(shard.shape)
