"""Grown moments of Adam, and Muon's momentum: scaled as the gradient scales, and reset where nothing is copied."""

from __future__ import annotations

import numpy as np
import torch

from incr_ds.arch.tensors import TensorSpec
from incr_ds.checkpoint.base import State
from incr_ds.growth.axis import Vector
from incr_ds.growth.gathering import SourceSlices
from incr_ds.growth.plan import GrowthPlan, TensorPlan
from incr_ds.growth.vectors import PlanVectors, either, fresh_entries, later_copies, scaled
from incr_ds.sharding.blocks import Bounds


class GrownMoments:
    """The moments of a plan's target, for every mode of the recipe's ``optimizer`` except ``reset``."""

    def __init__(self, plan: GrowthPlan, vectors: PlanVectors, slices: SourceSlices) -> None:
        self.plan = plan
        self._vectors, self._slices = vectors, slices

    def read(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Read the part of a grown moment within ``bounds``, in at least fp32."""
        if tensor.new_layer and state != "exp_avg_sq":
            return torch.zeros([stop - start for start, stop in bounds])
        gathered = self._slices.gather(tensor, state, bounds)
        factors = [self._moment_factor(tensor, d, state) for d in range(len(bounds))]
        grown = scaled(gathered, [factor[slice(*part)] for factor, part in zip(factors, bounds, strict=True)])
        starting = self._starting(tensor.target, bounds)
        if starting is None:
            return grown
        # With a zero second moment at a large step, there is no bias correction, and the first update would be several
        # learning rates. The mean of the neighbours is a second moment that such entries can start from.
        typical = 0.0
        if state == "exp_avg_sq":
            typical = self._slices.mean(tensor.source) * float(
                np.prod([factor[factor != 0].mean() for factor in factors])
            )
        return grown.masked_fill(torch.from_numpy(starting), typical)

    def _starting(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray | None:
        """True where moments are reset: at fresh entries, and for ``reset-new`` at all copies except the first."""
        if self.plan.recipe.optimizer != "reset-new":
            return fresh_entries(self._vectors, spec, bounds)
        return either([later_copies(self._vectors.index(spec, d))[slice(*part)] for d, part in enumerate(bounds)])

    def _moment_factor(self, tensor: TensorPlan, dimension: int, state: State) -> Vector:
        factor = self._vectors.gradient_factor(tensor.target, dimension)
        if dimension == 0:
            factor = factor * tensor.gradient
        if self.plan.recipe.optimizer == "copy":
            factor = (factor != 0).astype(np.float64)
        return factor**2 if state == "exp_avg_sq" else factor
