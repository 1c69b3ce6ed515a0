"""How a parameter of a training module is made of logical tensors: rectangles, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """A rectangle of the logical tensor ``name``, which a parameter holds from its row ``row`` and column ``column`` on.

    ``bounds`` is one (start, stop) per dimension of the logical tensor. What is stored is the tensor times ``scale``.
    """

    name: str
    bounds: Bounds
    row: int = 0
    column: int = 0
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the rectangle."""
        return tuple(stop - start for start, stop in self.bounds)
