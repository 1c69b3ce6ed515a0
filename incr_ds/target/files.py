"""What a target is made of: one frozen value per file, planned first, then written from a reader of tensor slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from incr_ds.arch.logical import State

Bounds = tuple[tuple[int, int], ...]
Read = Callable[[str, State, Bounds], torch.Tensor]


class TargetFile(Protocol):
    """One file of the target. Writing needs no other file, so any number of workers may share the work."""

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        ...

    def write(self, folder: Path, read: Read) -> None:
        """Write the file below ``folder``; ``read`` gives any slice of any tensor or moment."""
        ...


def whole(shape: tuple[int, ...]) -> Bounds:
    """The bounds of a whole tensor."""
    return tuple((0, size) for size in shape)
