"""One declaration per tensor: its name, its role, how each dimension uses its axes, and what it is tied to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Use = Literal["out", "in", "raw", "scale", "shift", "post", "lookup"]
Role = Literal[
    "embedding", "positions", "reader", "writer", "norm", "post_norm", "final_norm", "inner", "inner_norm", "router"
]
READS = ("in", "raw")


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor.

    ``use`` is what the tensor does with the axis. ``out`` produces it. ``in`` consumes it after a norm, and ``raw``
    without one. ``scale`` multiplies and ``shift`` adds along it inside a norm. ``post`` multiplies inside a norm that
    itself writes to the residual stream. ``lookup`` is indexed by it. ``parts`` are concatenated; each is a product of
    named axes (or of a number), outermost first.
    """

    use: Use
    parts: tuple[tuple[str, ...], ...]
    size: int

    @property
    def named_axes(self) -> tuple[str, ...]:
        """Every axis that the dimension consists of."""
        return tuple(axis for part in self.parts for axis in part if not axis.isdigit())

    @property
    def outer_axis(self) -> str:
        """The outermost axis if the dimension is a single product, otherwise ""."""
        return self.parts[0][0] if len(self.parts) == 1 else ""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a concrete model.

    ``name`` is the Hugging Face name, ``local_name`` the name inside its layer, ``layer`` its decoder layer (None outside
    the decoder), and ``tied_to`` the name of the tensor whose storage it shares. A norm's weight is used as ``offset`` +
    weight. ``saved_as`` is the name in a Hugging Face folder if it differs from ``name``. ``expert`` is its expert in a
    mixture, and ``grown_from`` the dense model's tensor that it is made from.
    """

    name: str
    local_name: str
    layer: int | None
    dims: tuple[Dimension, ...]
    role: Role
    tied_to: str | None = None
    offset: float = 0.0
    saved_as: str | None = None
    expert: int | None = None
    grown_from: str | None = None

    @property
    def saved_name(self) -> str:
        """The name in a Hugging Face folder."""
        return self.saved_as or self.name

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
