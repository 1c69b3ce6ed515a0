"""Computes any slice of any grown tensor or moment from the slices of the source that it needs, following a plan.

A slice is computed in four steps: gather rows, gather columns, multiply by two vectors, fill the fresh part.
"""

from __future__ import annotations

import torch

from incr_ds.checkpoint.base import LogicalCheckpoint, State
from incr_ds.growth.gathering import SourceSlices
from incr_ds.growth.moments import GrownMoments
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.vectors import PlanVectors
from incr_ds.growth.weights import GrownWeights
from incr_ds.sharding.blocks import Bounds

BYTES_PER_ELEMENT = 128  # peak memory of reading, per element of the source's and target's rows


class GrownTensors:
    """The target's tensors, computed on demand from ``source`` by ``plan``.

    Only vectors of the axes and per-tensor means are cached. A read takes about BYTES_PER_ELEMENT per element of the rows
    that it reads. Any number of threads may read. The result of ``read`` may be the source's own memory, so do not write to it.
    """

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint) -> None:
        self.plan = plan
        self._source = source
        vectors = PlanVectors(plan)
        slices = SourceSlices(vectors, source)
        self._weights, self._moments = GrownWeights(plan, vectors, slices), GrownMoments(plan, vectors, slices)

    def read(self, name: str, state: State, bounds: Bounds) -> torch.Tensor:
        """Read the part of a grown tensor within ``bounds`` (start, stop per dimension), in at least fp32.

        Moments follow the recipe's ``optimizer``. ``rescale`` scales them as the gradient scales (exp_avg_sq by the square;
        exp_avg and Muon's momentum_buffer are sums of gradients). ``reset-new`` does so for the first copy of everything and
        resets the rest. ``copy`` copies them. ``reset`` gives zeros.
        """
        tensor = self.plan.tensors[name]
        reset = state != "weight" and self.plan.recipe.optimizer == "reset"
        if name in self.plan.unchanged and not reset:
            return self._unchanged(tensor.source, state, bounds)
        if state == "weight":
            return self._weights.read(tensor, bounds)
        if reset:
            return torch.zeros([stop - start for start, stop in bounds])
        return self._moments.read(tensor, state, bounds)

    def _unchanged(self, source: str, state: State, bounds: Bounds) -> torch.Tensor:
        """Read a part of a source tensor as it is, which equals the result of all arithmetic if nothing grows."""
        found = self._source.read(source, state, bounds)
        return found.to(torch.promote_types(found.dtype, torch.float32))
