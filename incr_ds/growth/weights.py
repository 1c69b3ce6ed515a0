"""Grown weights: gathered, scaled, made different where copies need it, and filled where nothing is copied."""

from __future__ import annotations

import math

import numpy as np
import torch

from incr_ds.arch.tensors import READS, TensorSpec
from incr_ds.growth.axis import FRESH
from incr_ds.growth.counter import normals_at
from incr_ds.growth.fresh import FreshValues
from incr_ds.growth.gathering import SourceSlices
from incr_ds.growth.plan import GrowthPlan, TensorPlan
from incr_ds.growth.vectors import PlanVectors, occurrence, scaled
from incr_ds.sharding.blocks import Bounds


class GrownWeights:
    """The weights of a plan's target."""

    def __init__(self, plan: GrowthPlan, vectors: PlanVectors, slices: SourceSlices) -> None:
        self.plan = plan
        self._vectors, self._slices = vectors, slices
        self._fresh = FreshValues(plan, vectors, slices)

    def read(self, tensor: TensorPlan, bounds: Bounds) -> torch.Tensor:
        """Read the part of a grown weight within ``bounds``, in at least fp32."""
        spec = tensor.target
        if tensor.start == "router":
            return self._fresh.router(spec, bounds)
        if tensor.start == "identity":
            return diagonal(bounds)
        if tensor.start == "zero":
            return torch.full([stop - start for start, stop in bounds], -spec.offset)
        gathered = self._centred(tensor, self._slices.gather(tensor, "weight", bounds), bounds)
        factors = [self._vectors.value(spec, d)[slice(*bounds[d])] for d in range(len(bounds))]
        factors[0] = factors[0] * tensor.scale
        grown = scaled(gathered, factors)
        if spec.offset:
            # A norm used as offset + weight. In this form a factor of 1 changes no bit.
            grown = grown + torch.from_numpy((factors[0] - 1.0) * spec.offset).to(grown.dtype)
        grown = self._unlike_copies(tensor, grown, bounds)
        return self._fill_means(tensor, self._fresh.fill(spec, grown, bounds), bounds)

    def _centred(self, tensor: TensorPlan, gathered: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Subtract from ``gathered`` its mean over the old residual stream, if the growth centres the stream's writers."""
        for d, dim in enumerate(tensor.target.dims):
            if dim.use == "out" and any(self.plan.axes[axis].centred for axis in dim.named_axes):
                means = self._slices.means(tensor, d, bounds).to(gathered.dtype)
                return gathered - (means[:, None] if d == 1 else means)
        return gathered

    def _unlike_copies(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Make copies in ``grown`` differ along the dimension that reads them. Sums over copies stay the same."""
        spec, breaking = tensor.target, self.plan.recipe.width.symmetry_breaking
        reading = [d for d, dim in enumerate(spec.dims) if dim.use in READS]
        if breaking.method == "none" or not reading or self._vectors.copies(spec, reading[0]).max() < 2:
            return grown
        if breaking.method == "diagonal":
            return grown * torch.from_numpy(self._own_copies(spec, bounds)).to(grown.dtype)
        deviations = torch.from_numpy(self._deviations(spec, reading[0], bounds)).to(grown.dtype)
        if breaking.method == "per-element":
            return grown * (1.0 + breaking.scale * deviations)
        factors = [self._vectors.value(spec, d)[slice(*bounds[d])] for d in range(len(bounds))]
        size = tensor.scale * self._slices.root_mean_square(tensor.source) * math.pow(10.0, -breaking.snr_db / 20.0)
        return grown + size * scaled(deviations, factors)

    def _deviations(self, spec: TensorSpec, reading: int, bounds: Bounds) -> np.ndarray:
        """Per element, a draw with mean 0 over the copies of each position read, and variance 1."""
        # Elements are numbered with the reading dimension innermost, for any order in which the tensor is stored.
        (first, stop), read = bounds[1 - reading], slice(*bounds[reading])
        width, seed = spec.shape[reading], self.plan.recipe.width.symmetry_breaking.seed
        copies = self._vectors.copies(spec, reading)
        wanted = np.broadcast_to(copies > 1, (stop - first, width))
        drawn = normals_at(seed, f"{spec.name}/share", first, wanted)
        deviations = _standardised(drawn, self._vectors.index(spec, reading), copies)[:, read]
        return np.ascontiguousarray(deviations if reading == 1 else deviations.T)

    def _own_copies(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        """Factors of the diagonal method, per element.

        c where copy j of the output reads copy j of the input, of c copies each; 0 for the other copies; 1 elsewhere.
        """
        turns, counts = [], []
        for d, part in enumerate(bounds):
            upright = (-1, 1) if d == 0 else (1, -1)
            turns.append(occurrence(self._vectors.index(spec, d))[slice(*part)].reshape(upright))
            counts.append(self._vectors.copies(spec, d)[slice(*part)].reshape(upright))
        own = np.where(turns[0] == turns[1], counts[0], 0)
        return np.where(counts[0] == counts[1], own, 1).astype(np.float64)

    def _fill_means(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Make writers write the mean of the old positions to fresh positions of the residual stream that hold it."""
        spec = tensor.target
        for d, dim in enumerate(spec.dims):
            mask = self._vectors.averaged(spec, d)[slice(*bounds[d])]
            if dim.use in ("out", "lookup") and mask.any():
                amplitude = max(self.plan.axes[name].amplitude[0] for name in dim.named_axes)
                means = self._means_along(tensor, d, bounds) * tensor.scale * amplitude
                column = means.to(grown.dtype)[:, None] if d == 1 else means.to(grown.dtype)
                chosen = torch.from_numpy(mask)
                chosen = chosen[:, None] if d == 0 and len(bounds) == 2 else chosen
                grown = torch.where(chosen, column, grown)
        return grown

    def _means_along(self, tensor: TensorPlan, dimension: int, bounds: Bounds) -> torch.Tensor:
        """Mean of the source along a whole dimension, at the part's positions of the other one and with its factors."""
        means = self._slices.means(tensor, dimension, bounds)
        if len(bounds) == 1:
            return means
        factors = self._vectors.value(tensor.target, 1 - dimension)[slice(*bounds[1 - dimension])]
        return means * torch.from_numpy(factors)


def diagonal(bounds: Bounds) -> torch.Tensor:
    """Ones where row and column are the same."""
    rows, columns = (torch.arange(*part) for part in bounds)
    return (rows[:, None] == columns[None, :]).float()


def _standardised(drawn: np.ndarray, index: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Standardize each row: mean 0 over the copies of each old position and variance 1; 0 where there is only one copy."""
    known = index != FRESH
    position_of = np.where(known, index, 0)
    sums = np.zeros((drawn.shape[0], int(index.max()) + 1))
    turn = occurrence(index)
    for nth in range(int(turn.max()) + 1):
        columns = np.flatnonzero(known & (turn == nth))
        sums[:, index[columns]] += drawn[:, columns]
    counts = np.maximum(copies, 1)
    centred = drawn - sums[:, position_of] / counts
    spread = np.where(copies > 1, np.sqrt(counts / np.maximum(counts - 1, 1)), 0.0)
    deviations: np.ndarray = centred * spread
    return deviations
