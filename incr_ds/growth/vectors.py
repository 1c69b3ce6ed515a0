"""A plan's vectors along the dimensions of tensors, each computed once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from incr_ds.arch.tensors import TensorSpec
from incr_ds.growth.axis import FRESH, Vector
from incr_ds.growth.plan import GrowthPlan
from incr_ds.sharding.blocks import Bounds

Rule = Callable[[GrowthPlan, TensorSpec, int], np.ndarray]


class PlanVectors:
    """What ``GrowthPlan`` states for each position along a dimension. Tensors with equal dimensions share a vector."""

    def __init__(self, plan: GrowthPlan) -> None:
        self._plan = plan
        self._kept: dict[tuple[object, ...], np.ndarray] = {}

    def index(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """Source positions, or FRESH."""
        return self._vector(GrowthPlan.index, spec, dimension)

    def value(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factors of the weight."""
        return self._vector(GrowthPlan.value, spec, dimension)

    def gradient_factor(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factors of the gradient."""
        return self._vector(GrowthPlan.gradient_factor, spec, dimension)

    def copies(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """How many copies each source position has, 0 where fresh."""
        return self._vector(GrowthPlan.copies, spec, dimension)

    def silent(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at fresh positions that must be zero."""
        return self._vector(GrowthPlan.silent, spec, dimension)

    def averaged(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at fresh positions that hold the mean of the old ones."""
        return self._vector(GrowthPlan.averaged, spec, dimension)

    def constant(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at fresh positions that hold the recipe's constant."""
        return self._vector(GrowthPlan.constant, spec, dimension)

    def _vector(self, rule: Rule, spec: TensorSpec, dimension: int) -> np.ndarray:
        if spec.expert is not None and spec.dims[dimension].outer_axis == "ffn":
            # Every expert has another one. In the cache, they would take as much memory as a large tensor.
            return rule(self._plan, spec, dimension)
        key = (rule, spec.dims[dimension], spec.role == "final_norm")
        if key not in self._kept:
            self._kept[key] = rule(self._plan, spec, dimension)
        return self._kept[key]


def fresh_entries(vectors: PlanVectors, spec: TensorSpec, bounds: Bounds) -> np.ndarray | None:
    """True where nothing of the source is copied; None if everything is copied."""
    return either([vectors.index(spec, d)[slice(*part)] == FRESH for d, part in enumerate(bounds)])


def either(masks: list[np.ndarray]) -> np.ndarray | None:
    """Per element, whether its row or its column is masked; None if none is."""
    if not any(mask.any() for mask in masks):
        return None
    found: np.ndarray = masks[0] if len(masks) == 1 else masks[0][:, None] | masks[1][None, :]
    return found


def later_copies(index: np.ndarray) -> np.ndarray:
    """True at fresh positions and at all copies except the first."""
    later: np.ndarray = (index == FRESH) | (occurrence(index) > 0)
    return later


def occurrence(index: np.ndarray) -> np.ndarray:
    """For each position, how many earlier positions copy the same old one: [0, 1, 0, 2] gives [0, 0, 1, 0]."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    since = np.arange(len(index)) - np.maximum.accumulate(np.where(starts, np.arange(len(index)), 0))
    turn = np.empty(len(index), dtype=np.int64)
    turn[order] = since
    return turn


def scaled(gathered: torch.Tensor, factors: list[Vector]) -> torch.Tensor:
    """``gathered`` times a factor for each row and one for each column."""
    product = gathered
    for dimension, factor in enumerate(factors):
        if (factor != 1.0).any():
            column = torch.from_numpy(factor).to(gathered.dtype)
            product = product * (column[:, None] if dimension == 0 and len(factors) > 1 else column)
    return product
