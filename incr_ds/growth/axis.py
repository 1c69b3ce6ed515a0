"""The growth of one axis: for every new position its old position, how strongly it is written, and how it is read.

The whole of width growth is this triple (growth of a residual stream under RMSNorm: the embedding of the old stream into
the new one must have orthogonal columns of equal norm). With new position j a copy of old position i(j):

- a writer's row is multiplied by the amplitude s_j, so the stream carries s_j * x_i;
- a reader's column is multiplied by the share w_j, where the shares of all copies of i sum to 1;
- a norm's weight is multiplied by kappa / s_j, so that every copy leaves the norm as the source's value; its bias stays;
- a reader that no norm precedes (raw) has its column multiplied by w_j / s_j;
- a norm that writes (post) sees its own copies of amplitude s_j and passes them on: its weight is multiplied by kappa;
- a final norm before a tied head is multiplied by kappa * w_j / s_j^2, since the head's rows carry s_j once more; its
  bias by w_j / s_j.

kappa = sqrt(sum of s^2 over the copies of one position * old / new) is 1 wherever eps can stay; eps scales by kappa^2.
Gradients follow by the chain rule. A writer's is multiplied by w_j / s_j, a reader's by 1, a raw reader's by s_j, a norm's
by w_j s_j / kappa and its bias' by w_j, a writing norm's by w_j / kappa, the tied final norm's by s_j^2 / kappa and its
bias' by s_j. For equal w these are exact, and the rules for Adam's moments follow from them.

Under LayerNorm the mean must stay as well. Equal copies keep it, and so does padding with the mean of the old positions.
Padding with zeros keeps it if every writer's mean over the positions is 0; LayerNorm subtracts that mean anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FRESH = -1
Vector = npt.NDArray[np.float64]
AxisUse = Literal["out", "in", "raw", "scale", "tied scale", "shift", "tied shift", "post", "lookup"]
Fill = Literal["random", "zero", "mean", "constant"]


# A weight's factor for each use, from amplitudes s, shares w and kappa: arrays of numpy, or torch tensors that learn.
VALUE_RULES: Mapping[str, Callable[[Any, Any, float], Any]] = {
    "out": lambda s, w, kappa: s,
    "in": lambda s, w, kappa: w,
    "raw": lambda s, w, kappa: w / s,
    "scale": lambda s, w, kappa: kappa / s,
    "tied scale": lambda s, w, kappa: kappa * w / s**2,
    "shift": lambda s, w, kappa: s**0,
    "tied shift": lambda s, w, kappa: w / s,
    "post": lambda s, w, kappa: kappa * s**0,
    "lookup": lambda s, w, kappa: s**0,
}


@dataclass(frozen=True)
class AxisGrowth:
    """One axis. ``index`` is the old position of each new one, or FRESH for a new unit that copies none.

    ``amplitude`` and ``share`` are s and w (0 at fresh positions), ``gradient`` is the factor of a writer's gradient, and
    ``kappa`` the norm's factor. ``centred`` writers lose their mean over the old positions. ``fresh_out`` and
    ``fresh_in`` say what a fresh unit writes and how it is read.
    """

    axis: str
    method: str
    old: int
    index: tuple[int, ...]
    amplitude: tuple[float, ...]
    share: tuple[float, ...]
    gradient: tuple[float, ...]
    kappa: float = 1.0
    centred: bool = False
    fresh_out: Fill = "random"
    fresh_in: Fill = "zero"
    copies: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        counts = np.bincount([i for i in self.index if i != FRESH], minlength=self.old)
        object.__setattr__(self, "copies", tuple(int(counts[i]) if i != FRESH else 0 for i in self.index))

    @property
    def new(self) -> int:
        """Number of new positions."""
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        """True if nothing changes."""
        return self.index == tuple(range(self.old)) and set(self.amplitude) == {1.0}

    @property
    def keeps_tensors(self) -> bool:
        """True if the tensors that have this axis, and their gradients, do not change."""
        factors = {*self.share, *self.gradient, self.kappa}
        return self.is_identity and factors == {1.0} and not self.centred

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """``index`` as an array."""
        return np.array(self.index, dtype=np.int64)

    def value(self, use: AxisUse) -> Vector:
        """Factor of a weight along this axis per new position; 0 at fresh positions, which are filled separately."""
        s, w = self._amplitudes, self._shares
        fresh = self.positions == FRESH
        safe = np.where(s == 0, 1.0, s)
        return np.where(fresh, 0.0, VALUE_RULES[use](safe, w, self.kappa))

    def gradient_factor(self, use: AxisUse) -> Vector:
        """Factor of the gradient, and so of exp_avg, along this axis. exp_avg_sq takes its square."""
        s, written = self._amplitudes, self._gradients
        fresh = self.positions == FRESH
        vectors: dict[str, Vector] = {
            "out": written,
            "in": np.ones(self.new),
            "raw": s,
            "scale": written * s**2 / self.kappa,
            "tied scale": s**2 / self.kappa,
            "shift": written * s,
            "tied shift": s,
            "post": written * s / self.kappa,
            "lookup": np.ones(self.new),
        }
        return np.where(fresh, 0.0, vectors[use])

    @cached_property
    def _amplitudes(self) -> Vector:
        return np.array(self.amplitude, dtype=np.float64)

    @cached_property
    def _shares(self) -> Vector:
        return np.array(self.share, dtype=np.float64)

    @cached_property
    def _gradients(self) -> Vector:
        return np.array(self.gradient, dtype=np.float64)


def identity(axis: str, size: int) -> AxisGrowth:
    """An axis that does not change."""
    ones = (1.0,) * size
    return AxisGrowth(axis, "same", size, tuple(range(size)), ones, ones, ones)
