"""Tensors of which each tensor rank's part is flattened, and its elements divided over data-parallel ranks.

Megatron-core before 0.16 stored the distributed optimizer's state so (fully_sharded_model_space). A tensor of shape [X, Y] whose
ranks have parts of [x, y] is stored as [X / x, Y / y, x y]. ``.metadata`` states the shape [X, Y].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from incr_ds.checkpoint.megatron_core.metadata import StoredTensor


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor: its first position and its size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def rows(self, first: int, stop: int) -> range:
        """Which of its elements, in row-major order, lie in rows [first, stop) of the tensor."""
        per_row = math.prod(self.sizes[1:])
        begin, end = self._rows(first, stop)
        return range((begin - self.offsets[0]) * per_row, (end - self.offsets[0]) * per_row)

    def place(self, first: int, stop: int) -> tuple[slice, ...]:
        """Where these elements are in rows [first, stop)."""
        begin, end = self._rows(first, stop)
        columns = zip(self.offsets[1:], self.sizes[1:], strict=True)
        return (slice(begin - first, end - first), *(slice(offset, offset + size) for offset, size in columns))

    def _rows(self, first: int, stop: int) -> tuple[int, int]:
        begin = max(first, self.offsets[0])
        return begin, max(begin, min(stop, self.offsets[0] + self.sizes[0]))


def part_of(stored: StoredTensor, number: Sequence[int], stack: tuple[int, ...]) -> Rectangle | None:
    """Part ``number`` (one number per dimension) of a flattened tensor, or of the one at ``stack`` if several are stacked.

    None if the part is another one's.
    """
    sizes = [size // count for size, count in zip(stored.shape, stored.parts or (), strict=True)]
    offsets = [size * index for size, index in zip(sizes, number, strict=True)]
    own = len(stack)
    return Rectangle(tuple(offsets[own:]), tuple(sizes[own:])) if tuple(offsets[:own]) == stack else None
