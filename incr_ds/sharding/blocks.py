"""How a parameter of a training module is composed of rectangular slices of logical tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from incr_ds.arch.tensors import TensorSpec

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """A rectangle of the logical tensor ``name``, and where it lies in a parameter: from ``row`` and ``column`` on.

    ``bounds`` is one (start, stop) per dimension of the logical tensor. The parameter stores the tensor times ``scale``. If
    ``transposed``, the rectangle's columns are rows of the parameter.
    """

    name: str
    bounds: Bounds
    row: int = 0
    column: int = 0
    scale: float = 1.0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension of the rectangle."""
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Size of each dimension in the parameter."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class RankParameter:
    """A parameter of one model-parallel rank's module.

    ``tensor`` is the first tensor in it, and ``blocks`` are all slices of tensors that it holds. Rows that no block covers
    are padding (``padded``). ``local_name`` is its name inside pipeline layer ``pipeline_layer``. ``cut`` is the dimension
    that tensor parallelism cuts (None: every tensor rank holds it whole), in ``sub_parameters`` separate parts.
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
        """The slice of the tensor, for a parameter that is one slice of one tensor."""
        (block,) = self.blocks
        return block.bounds
