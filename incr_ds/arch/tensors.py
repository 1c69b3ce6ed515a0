"""One declaration per tensor: name, named axes, how each dimension uses its axis, role, and what it is tied to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Use = Literal["out", "in", "scale", "lookup"]
Role = Literal["embedding", "reader", "writer", "norm", "final_norm", "inner", "inner_norm"]


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor.

    ``use`` is what the tensor does with the axis: ``out`` produces it, ``in`` consumes it, ``scale`` multiplies along
    it, ``lookup`` is indexed by it. ``axes`` are the named axes whose sizes multiply to the dimension, outermost first.
    """

    use: Use
    axes: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a concrete model.

    ``name`` is the Hugging Face name, ``local_name`` the name inside its own layer, ``layer`` the decoder layer it
    belongs to (None outside the decoder), ``tied_to`` the name of the tensor that it shares its storage with.
    """

    name: str
    local_name: str
    layer: int | None
    dims: tuple[Dimension, ...]
    role: Role
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(dim.size for dim in self.dims)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """True for weights that decay; norms and biases do not."""
        return len(self.dims) > 1
