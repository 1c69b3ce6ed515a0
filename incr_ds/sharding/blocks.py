"""How a parameter of a training module is made of logical tensors: rectangles, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from incr_ds.arch.tensors import TensorSpec

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


@dataclass(frozen=True)
class RankParameter:
    """A parameter of one model-parallel rank's module.

    ``tensor`` is the first tensor in it, ``blocks`` are all parts of tensors that it holds; rows that no block covers are
    padding (``padded``). ``local_name`` is its name inside pipeline layer ``pipeline_layer``. ``cut`` is the dimension that
    tensor parallelism cuts (None: every tensor rank holds it whole), ``sub_parameters`` how many parts it cuts separately.
    """

    parameter: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    tensor: TensorSpec
    pipeline_layer: int
    local_name: str
    cut: int | None
    padded: bool = False
    sub_parameters: int = 1

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return math.prod(self.shape)

    @property
    def bounds(self) -> Bounds:
        """Of a parameter that is one slice of one tensor: the slice."""
        (block,) = self.blocks
        return block.bounds
