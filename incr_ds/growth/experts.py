"""Which neurons of a dense model's FFN each expert of a mixture has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from incr_ds.growth.axis import FRESH, AxisGrowth
from incr_ds.growth.counter import shuffled


@dataclass(frozen=True)
class ExpertGrowth:
    """``old`` neurons of the dense FFN, and ``new`` neurons of each expert. ExpertsRecipe describes the methods.

    Virtual groups: He et al., Upcycling Large Language Models into Mixture of Experts, arXiv 2410.07524. Drop: Nakamura et
    al., Drop-Upcycling, arXiv 2502.19261.
    """

    method: Literal["copy", "virtual-groups", "drop"]
    old: int
    new: int
    ratio: float
    seed: int

    @property
    def shards(self) -> int:
        """Number of experts that together are one dense FFN. The output of each is multiplied by it."""
        return self.old // self.new

    def units(self, layer: int, expert: int) -> AxisGrowth:
        """The neurons of ``expert`` in target layer ``layer``."""
        index = np.arange(self.new) + expert % self.shards * self.new
        index[self.dropped(layer, expert)] = FRESH
        kept = tuple(float(position != FRESH) for position in index)
        return AxisGrowth(
            "ffn", self.method, self.old, tuple(int(i) for i in index), kept, kept, kept, fresh_in="random"
        )

    def dropped(self, layer: int, expert: int) -> np.ndarray:
        """The neurons that are drawn again: none, or floor(ratio * old) of them."""
        if self.method != "drop":
            return np.empty(0, dtype=np.int64)
        drawn = shuffled(self.seed, f"layers.{layer}.experts.{expert}/dropped", self.old)
        found: np.ndarray = np.sort(drawn[: int(self.ratio * self.old)])
        return found
