"""The arithmetic of a plan: any slice of any grown tensor or moment, from the slices of the source that it needs.

A slice is: gather rows, gather columns, multiply by two vectors, fill the fresh part.
"""

from __future__ import annotations

import numpy as np
import torch

from incr_ds.arch.logical import LogicalCheckpoint, State
from incr_ds.arch.tensors import READS, TensorSpec
from incr_ds.growth.axis import FRESH, Vector
from incr_ds.growth.counter import normals
from incr_ds.growth.plan import GrowthPlan, TensorPlan

Bounds = tuple[tuple[int, int], ...]


class GrownTensors:
    """The target's tensors, computed on demand from ``source`` by ``plan``; nothing is kept but per-tensor means."""

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint) -> None:
        self.plan = plan
        self._source = source
        self._means: dict[str, float] = {}
        self._over_rows: dict[str, torch.Tensor] = {}

    def read(self, name: str, state: State, bounds: Bounds) -> torch.Tensor:
        """The part of a grown tensor within ``bounds`` (start, stop per dimension), in at least fp32.

        ``exp_avg`` and ``exp_avg_sq`` follow the recipe's ``optimizer``: ``exact`` scales them as the gradient scales
        (exp_avg_sq by the square), ``keep`` copies them, ``reset`` gives zeros.
        """
        tensor = self.plan.tensors[name]
        if state == "weight":
            return self._weight(tensor, bounds)
        if self.plan.recipe.optimizer == "reset":
            return torch.zeros([stop - start for start, stop in bounds])
        return self._moment(tensor, state, bounds)

    def _weight(self, tensor: TensorPlan, bounds: Bounds) -> torch.Tensor:
        spec = tensor.target
        gathered = self._gather(tensor, "weight", bounds)
        if tensor.start == "identity":
            return _diagonal(bounds, gathered.dtype)
        if tensor.start == "zero":
            return torch.full_like(gathered, -spec.offset)
        factors = [self.plan.value(spec, d)[slice(*bounds[d])] for d in range(len(bounds))]
        factors[0] = factors[0] * tensor.scale
        grown = _scaled(gathered, factors)
        if spec.offset:
            # A norm used as offset + weight; in this form a factor of 1 changes no bit.
            grown += torch.from_numpy((factors[0] - 1.0) * spec.offset).to(grown.dtype)
        shares = self._uneven_shares(spec, bounds)
        if shares is not None:
            grown *= torch.from_numpy(shares).to(grown.dtype)
        self._fill_fresh(tensor, grown, bounds)
        return grown

    def _moment(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        gathered = self._gather(tensor, state, bounds)
        if tensor.new_layer and state == "exp_avg":
            return torch.zeros_like(gathered)
        factors = [self._moment_factor(tensor, d, state) for d in range(len(bounds))]
        grown = _scaled(gathered, [factor[slice(*part)] for factor, part in zip(factors, bounds, strict=True)])
        fresh = self._fresh(tensor.target, bounds)
        if state == "exp_avg_sq" and fresh.any():
            # A zero second moment at a large step count means no bias correction and a first update of several
            # learning rates; the mean of the neighbours is a second moment that fresh entries can start from.
            typical = self._mean(tensor.source) * float(np.prod([factor[factor != 0].mean() for factor in factors]))
            grown[torch.from_numpy(fresh)] = typical
        return grown

    def _moment_factor(self, tensor: TensorPlan, dimension: int, state: State) -> Vector:
        factor = self.plan.gradient_factor(tensor.target, dimension)
        if dimension == 0:
            factor = factor * tensor.gradient
        if self.plan.recipe.optimizer == "keep":
            factor = (factor != 0).astype(np.float64)
        return factor**2 if state == "exp_avg_sq" else factor

    def _gather(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Source entries at each position of the part; position 0 stands in for fresh ones, whose factor is 0."""
        wanted = [self.plan.index(tensor.target, d)[slice(*bounds[d])] for d in range(len(bounds))]
        known = [np.where(index == FRESH, 0, index) for index in wanted]
        first, last = int(known[0].min()), int(known[0].max())
        rows = self._source.read(tensor.source, state, slice(first, last + 1))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gathered = rows[torch.from_numpy(known[0] - first)]
        return gathered[:, torch.from_numpy(known[1])] if len(known) > 1 else gathered

    def _uneven_shares(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray | None:
        """Per-element factors 1 + scale * z along the dimension that reads copies, or None."""
        breaking = self.plan.recipe.width.symmetry_breaking
        reading = [d for d, dim in enumerate(spec.dims) if dim.use in READS]
        if breaking.method == "none" or not reading:
            return None
        copies = self.plan.copies(spec, reading[0])
        if copies.max() < 2:
            return None
        # Elements are numbered with the reading dimension inside, whichever way the tensor is stored.
        (first, stop), read = bounds[1 - reading[0]], slice(*bounds[reading[0]])
        width = spec.shape[reading[0]]
        drawn = normals(breaking.seed, f"{spec.name}/share", first * width, (stop - first) * width).reshape(-1, width)
        shares = (1.0 + breaking.scale * _standardised(drawn, self.plan.index(spec, reading[0]), copies))[:, read]
        return np.ascontiguousarray(shares if reading[0] == 1 else shares.T)

    def _fill_fresh(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds) -> None:
        fresh = self._fresh(tensor.target, bounds)
        if fresh.any():
            mask = torch.from_numpy(fresh)
            grown[mask] = torch.from_numpy(self._fresh_values(tensor.target, bounds)).to(grown.dtype)[mask]
        for dimension in range(len(bounds)):
            self._fill_means(tensor, grown, bounds, dimension)

    def _fresh_values(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        shape = [stop - start for start, stop in bounds]
        if len(shape) == 1:
            return np.full(shape, 1.0 - spec.offset if spec.dims[0].use in ("scale", "post") else 0.0)
        (first, stop), columns = bounds[0], slice(*bounds[1])
        width = spec.shape[1]
        seed = self.plan.recipe.width.symmetry_breaking.seed
        drawn = normals(seed, f"{spec.name}/fresh", first * width, (stop - first) * width).reshape(-1, width)
        deviation = float(self.plan.target.config[self.plan.target.family.config.initializer])
        values: np.ndarray = drawn[:, columns] * deviation
        rows, read = (self.plan.fills(spec, d, "zero")[slice(*part)] for d, part in enumerate(bounds))
        values[rows[:, None] | read[None, :]] = 0.0
        return values

    def _fill_means(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds, dimension: int) -> None:
        """Where a fresh position of the residual stream is to be the mean of the old ones, make its writer write that."""
        spec = tensor.target
        mask = self.plan.fills(spec, dimension, "mean")[slice(*bounds[dimension])]
        if not mask.any() or spec.dims[dimension].use != "out":
            return
        means = self._mean_over(tensor, dimension, bounds) * tensor.scale * self.plan.axes["hidden"].amplitude[0]
        if dimension == 0:
            grown[torch.from_numpy(mask)] = means.to(grown.dtype)
        else:
            grown[:, torch.from_numpy(mask)] = means.to(grown.dtype)[:, None]

    def _mean_over(self, tensor: TensorPlan, dimension: int, bounds: Bounds) -> torch.Tensor:
        """Mean of the source over a whole dimension, at the part's positions of the other one, with its factors."""
        if len(bounds) == 1:
            return self._source.read(tensor.source).double().mean()
        other = 1 - dimension
        index = self.plan.index(tensor.target, other)[slice(*bounds[other])]
        known = np.where(index == FRESH, 0, index)
        if dimension == 0:
            means = self._row_means(tensor.source)[torch.from_numpy(known)]
        else:
            first = int(known.min())
            rows = self._source.read(tensor.source, "weight", slice(first, int(known.max()) + 1))
            means = rows.double().mean(dim=1)[torch.from_numpy(known - first)]
        return means * torch.from_numpy(self.plan.value(tensor.target, other)[slice(*bounds[other])])

    def _row_means(self, source_name: str) -> torch.Tensor:
        if source_name not in self._over_rows:
            self._over_rows[source_name] = self._source.read(source_name).double().mean(dim=0)
        return self._over_rows[source_name]

    def _fresh(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        masks = [self.plan.index(spec, d)[slice(*part)] == FRESH for d, part in enumerate(bounds)]
        found: np.ndarray = masks[0] if len(masks) == 1 else masks[0][:, None] | masks[1][None, :]
        return found

    def _mean(self, source_name: str) -> float:
        if source_name not in self._means:
            whole = self._source.read(source_name, "exp_avg_sq")
            self._means[source_name] = float(whole.double().mean())
        return self._means[source_name]


def _diagonal(bounds: Bounds, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = (torch.arange(*part) for part in bounds)
    return (rows[:, None] == columns[None, :]).to(dtype)


def _scaled(gathered: torch.Tensor, factors: list[Vector]) -> torch.Tensor:
    rows = torch.from_numpy(factors[0]).to(gathered.dtype)
    if len(factors) == 1:
        return gathered * rows
    return gathered * rows[:, None] * torch.from_numpy(factors[1]).to(gathered.dtype)


def _standardised(drawn: np.ndarray, index: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Per row, deviations with mean 0 over the copies of each old position and variance 1; 0 where there is one copy."""
    known = index != FRESH
    position_of = np.where(known, index, 0)
    sums = np.zeros((drawn.shape[0], int(index.max()) + 1))
    turn = _occurrence(index)
    for nth in range(int(turn.max()) + 1):
        columns = np.flatnonzero(known & (turn == nth))
        sums[:, index[columns]] += drawn[:, columns]
    counts = np.maximum(copies, 1)
    centred = drawn - sums[:, position_of] / counts
    spread = np.where(copies > 1, np.sqrt(counts / np.maximum(counts - 1, 1)), 0.0)
    deviations: np.ndarray = centred * spread
    return deviations


def _occurrence(index: np.ndarray) -> np.ndarray:
    """For each position, how many earlier positions copy the same old one: [0, 1, 0, 2] gives [0, 0, 1, 0]."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    since = np.arange(len(index)) - np.maximum.accumulate(np.where(starts, np.arange(len(index)), 0))
    turn = np.empty(len(index), dtype=np.int64)
    turn[order] = since
    return turn
