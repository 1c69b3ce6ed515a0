"""Computes how a growth changes the norm of all gradients, and so the threshold for clipping them."""

from __future__ import annotations

import math

import numpy as np
import torch

from incr_ds.checkpoint.base import LogicalCheckpoint, row_portions
from incr_ds.growth.axis import FRESH, Vector
from incr_ds.growth.plan import GrowthPlan, TensorPlan

_PORTION = 1 << 18  # elements read at once; fixed, since a sum in other portions would round differently


def gradient_norm_ratio(plan: GrowthPlan, source: LogicalCheckpoint) -> float | None:
    """The norm of the target's gradient divided by the source's, on the same batch, right after the growth.

    The plan gives the factors of a gradient's entries, and Adam their size in the source: exp_avg_sq is the mean of their
    squares. In a new layer that writes nothing, only entries that start at zero have a gradient, which is counted as in the
    layer that it copies. Entries that copy nothing are not counted. None if nothing grows, if the target does not compute
    the source's function or has a new router, and if the source has taken no step or Muon trains some of its tensors. Reads
    every exp_avg_sq once for each tensor that copies it.
    """
    known = plan.grows and plan.function_preserving and plan.experts is None and not source.facts.momentum
    if not known or not source.facts.step or "exp_avg_sq" not in source.facts.states:
        return None
    before = sum(
        _weighted_sum(source, spec.name, [np.ones(size) for size in spec.shape]) for spec in plan.source.stored
    )
    after = sum(_grown_sum(plan, tensor, source) for tensor in plan.tensors.values())
    # A source with numbers that are not finite, which a user may allow, gives no ratio either.
    return math.sqrt(after / before) if 0.0 < before < math.inf and after < math.inf else None


def _grown_sum(plan: GrowthPlan, tensor: TensorPlan, source: LogicalCheckpoint) -> float:
    """Sum of the squares of a grown tensor's gradient."""
    if tensor.new_layer and tensor.start != "zero":
        return 0.0
    factors = [_per_source_position(plan, tensor, dimension) for dimension in range(len(tensor.target.dims))]
    return tensor.gradient**2 * _weighted_sum(source, tensor.source, factors)


def _per_source_position(plan: GrowthPlan, tensor: TensorPlan, dimension: int) -> Vector:
    """For each position of the source, the sum of the squared gradient factors of its copies."""
    index = plan.index(tensor.target, dimension)
    squares = plan.gradient_factor(tensor.target, dimension) ** 2
    size = plan.source.by_name[tensor.source].shape[dimension]
    copied = index != FRESH
    summed: Vector = np.bincount(index[copied], weights=squares[copied], minlength=size).astype(np.float64)
    return summed


def _weighted_sum(source: LogicalCheckpoint, name: str, factors: list[Vector]) -> float:
    """Sum of exp_avg_sq, its rows and columns multiplied by ``factors``."""
    shape = source.architecture.by_name[name].shape
    total = 0.0
    for part in row_portions(shape, _PORTION):
        values = source.read(name, "exp_avg_sq", part).double()
        for factor in reversed(factors[1:]):
            values = values @ torch.from_numpy(factor)
        total += float(values @ torch.from_numpy(factors[0][slice(*part[0])]))
    return total
