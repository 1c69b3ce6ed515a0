"""The arithmetic of a plan: any slice of any grown tensor or moment, from the slices of the source that it needs.

A slice is: gather rows, gather columns, multiply by two vectors, fill the fresh part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from incr_ds.arch.tensors import READS, TensorSpec
from incr_ds.checkpoint.base import LogicalCheckpoint, State, row_portions
from incr_ds.growth.axis import FRESH, Vector
from incr_ds.growth.counter import normals, normals_at
from incr_ds.growth.plan import GrowthPlan, TensorPlan
from incr_ds.sharding.blocks import Bounds

BYTES_PER_ELEMENT = 128  # of memory that reading takes at its height, per element of the source's and target's rows
_MEAN_ROWS_ELEMENTS = 1 << 18  # fixed: a sum in other portions would round differently


class GrownTensors:
    """The target's tensors, computed on demand from ``source`` by ``plan``. Kept are vectors of the axes and per-tensor
    means; a read takes about BYTES_PER_ELEMENT per element of the rows it asks for. Any number of threads may read.

    What ``read`` returns may be the source's own memory: it must not be written to.
    """

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint) -> None:
        self.plan = plan
        self._source = source
        self._means: dict[str, float] = {}
        self._sizes: dict[str, float] = {}
        self._row_means: dict[str, torch.Tensor] = {}
        self._vectors: dict[tuple[object, ...], Vector] = {}

    def read(self, name: str, state: State, bounds: Bounds) -> torch.Tensor:
        """The part of a grown tensor within ``bounds`` (start, stop per dimension), in at least fp32.

        ``exp_avg`` and ``exp_avg_sq`` follow the recipe's ``optimizer``: ``rescale`` scales them as the gradient scales
        (exp_avg_sq by the square), ``reset-new`` does so for the first copy of everything and starts the rest anew, ``copy``
        copies them, ``reset`` gives zeros.
        """
        tensor = self.plan.tensors[name]
        reset = state != "weight" and self.plan.recipe.optimizer == "reset"
        if name in self.plan.unchanged and not reset:
            return self._unchanged(tensor.source, state, bounds)
        if state == "weight":
            return self._weight(tensor, bounds)
        if reset:
            return torch.zeros([stop - start for start, stop in bounds])
        return self._moment(tensor, state, bounds)

    def _unchanged(self, source: str, state: State, bounds: Bounds) -> torch.Tensor:
        """The part of a source tensor itself: what all the arithmetic below comes to where nothing grows."""
        found = self._source.read(source, state, bounds)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _weight(self, tensor: TensorPlan, bounds: Bounds) -> torch.Tensor:
        spec = tensor.target
        if tensor.start == "router":
            return self._router(spec, bounds)
        if tensor.start == "identity":
            return _diagonal(bounds)
        if tensor.start == "zero":
            return torch.full([stop - start for start, stop in bounds], -spec.offset)
        gathered = self._centred(tensor, self._gather(tensor, "weight", bounds), bounds)
        factors = [self._vector("value", spec, d)[slice(*bounds[d])] for d in range(len(bounds))]
        factors[0] = factors[0] * tensor.scale
        grown = _scaled(gathered, factors)
        if spec.offset:
            # A norm used as offset + weight; in this form a factor of 1 changes no bit.
            grown = grown + torch.from_numpy((factors[0] - 1.0) * spec.offset).to(grown.dtype)
        grown = self._unlike_copies(tensor, grown, bounds)
        return self._fill_means(tensor, self._fill_fresh(spec, grown, bounds), bounds)

    def _router(self, spec: TensorSpec, bounds: Bounds) -> torch.Tensor:
        """Normal numbers of the config's deviation; the same row for all experts that make up one dense FFN."""
        assert self.plan.experts is not None
        shards, width, columns = self.plan.experts.shards, spec.shape[1], slice(*bounds[1])
        groups = [expert // shards for expert in range(*bounds[0])]
        seed, name = self.plan.recipe.width.symmetry_breaking.seed, f"{spec.name}/fresh"
        rows = {group: normals(seed, name, group * width, width)[columns] for group in set(groups)}
        return torch.from_numpy(np.stack([rows[group] for group in groups]) * self._deviation).float()

    @property
    def _deviation(self) -> float:
        """Of fresh weights."""
        target = self.plan.target
        return self.plan.recipe.width.std or float(target.config[target.family.config.initializer])

    def _centred(self, tensor: TensorPlan, gathered: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """``gathered`` less its mean over the old residual stream, where the growth centres what writes to it."""
        for d, dim in enumerate(tensor.target.dims):
            if dim.use == "out" and any(self.plan.axes[axis].centred for axis in dim.named_axes):
                means = self._source_means(tensor, d, bounds).to(gathered.dtype)
                return gathered - (means[:, None] if d == 1 else means)
        return gathered

    def _moment(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        if tensor.new_layer and state == "exp_avg":
            return torch.zeros([stop - start for start, stop in bounds])
        gathered = self._gather(tensor, state, bounds)
        factors = [self._moment_factor(tensor, d, state) for d in range(len(bounds))]
        grown = _scaled(gathered, [factor[slice(*part)] for factor, part in zip(factors, bounds, strict=True)])
        starting = self._starting(tensor.target, bounds)
        if starting is None:
            return grown
        # A zero second moment at a large step count means no bias correction and a first update of several
        # learning rates; the mean of the neighbours is a second moment that such entries can start from.
        typical = 0.0
        if state == "exp_avg_sq":
            typical = self._mean(tensor.source) * float(np.prod([factor[factor != 0].mean() for factor in factors]))
        return grown.masked_fill(torch.from_numpy(starting), typical)

    def _starting(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray | None:
        """True where moments start anew: at fresh entries, and for ``reset-new`` at all copies but the first."""
        if self.plan.recipe.optimizer != "reset-new":
            return self._fresh(spec, bounds)
        return _either([_later_copies(self._vector("index", spec, d))[slice(*part)] for d, part in enumerate(bounds)])

    def _vector(self, kind: str, spec: TensorSpec, dimension: int) -> Vector:
        """A method of the plan, like ``index`` or ``value``, computed once per kind of dimension."""
        if spec.expert is not None and spec.dims[dimension].outer_axis == "ffn":
            # Another one for each expert: kept, they would take as much memory as a large tensor.
            return np.asarray(getattr(self.plan, kind)(spec, dimension))
        key = (kind, spec.dims[dimension], spec.role == "final_norm")
        if key not in self._vectors:
            self._vectors[key] = getattr(self.plan, kind)(spec, dimension)
        return self._vectors[key]

    def _moment_factor(self, tensor: TensorPlan, dimension: int, state: State) -> Vector:
        factor = self._vector("gradient_factor", tensor.target, dimension)
        if dimension == 0:
            factor = factor * tensor.gradient
        if self.plan.recipe.optimizer == "copy":
            factor = (factor != 0).astype(np.float64)
        return factor**2 if state == "exp_avg_sq" else factor

    def _gather(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Source entries at each position of the part; further copies of what the tensor produces may come from above."""
        if tensor.mix:
            return self._mixed(tensor, state, bounds)
        own = self._gather_from(tensor.source, tensor, state, bounds)
        if tensor.above is None:
            return own
        produced = [d for d, dim in enumerate(tensor.target.dims) if dim.use == "out"]
        masks = [_later_copies(self._vector("index", tensor.target, d))[slice(*bounds[d])] for d in produced]
        if not masks or not masks[0].any():
            return own
        later = torch.from_numpy(masks[0])
        later = later[:, None] if produced[0] == 0 and len(bounds) == 2 else later
        return torch.where(later, self._gather_from(tensor.above, tensor, state, bounds), own)

    def _mixed(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """The weighted sum of several layers' entries; of a norm used as offset + weight, of what it is used as."""
        parts = [weight * self._gather_from(name, tensor, state, bounds) for name, weight in tensor.mix]
        excess = sum(weight for _, weight in tensor.mix) - 1.0
        return torch.stack(parts).sum(dim=0) + excess * tensor.target.offset

    def _gather_from(self, source: str, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Entries of ``source`` at each position of the part; position 0 stands in for fresh ones, whose factor is 0."""
        wanted = [self._vector("index", tensor.target, d)[slice(*bounds[d])] for d in range(len(bounds))]
        known = [np.where(index == FRESH, 0, index) for index in wanted]
        gathered = self._rows(source, state, known[0])
        return _picked(gathered, known[1], 1) if len(known) > 1 else gathered

    def _rows(self, name: str, state: State, wanted: np.ndarray) -> torch.Tensor:
        """Source rows, at least fp32. Rows far apart are read in halves: what lies between them is not wanted."""
        first, last = int(wanted.min()), int(wanted.max())
        if len(wanted) > 1 and last - first >= 2 * len(wanted):
            middle = len(wanted) // 2
            return torch.cat([self._rows(name, state, wanted[:middle]), self._rows(name, state, wanted[middle:])])
        rows = self._source.read(name, state, ((first, last + 1),))
        return _picked(rows.to(torch.promote_types(rows.dtype, torch.float32)), wanted - first, 0)

    def _unlike_copies(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """``grown`` with what makes copies differ along the dimension that reads them; sums over copies stay."""
        spec, breaking = tensor.target, self.plan.recipe.width.symmetry_breaking
        reading = [d for d, dim in enumerate(spec.dims) if dim.use in READS]
        if breaking.method == "none" or not reading or self._vector("copies", spec, reading[0]).max() < 2:
            return grown
        if breaking.method == "diagonal":
            return grown * torch.from_numpy(self._own_copies(spec, bounds)).to(grown.dtype)
        deviations = torch.from_numpy(self._deviations(spec, reading[0], bounds)).to(grown.dtype)
        if breaking.method == "per-element":
            return grown * (1.0 + breaking.scale * deviations)
        factors = [self._vector("value", spec, d)[slice(*bounds[d])] for d in range(len(bounds))]
        size = tensor.scale * self._root_mean_square(tensor.source) * math.pow(10.0, -breaking.snr_db / 20.0)
        return grown + size * _scaled(deviations, factors)

    def _deviations(self, spec: TensorSpec, reading: int, bounds: Bounds) -> np.ndarray:
        """Per element, a draw of mean 0 over the copies of each position read, and variance 1."""
        # Elements are numbered with the reading dimension inside, whichever way the tensor is stored.
        (first, stop), read = bounds[1 - reading], slice(*bounds[reading])
        width, seed = spec.shape[reading], self.plan.recipe.width.symmetry_breaking.seed
        copies = self._vector("copies", spec, reading)
        wanted = np.broadcast_to(copies > 1, (stop - first, width))
        drawn = normals_at(seed, f"{spec.name}/share", first, wanted)
        deviations = _standardised(drawn, self._vector("index", spec, reading), copies)[:, read]
        return np.ascontiguousarray(deviations if reading == 1 else deviations.T)

    def _own_copies(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        """c where copy j of the output reads copy j of the input of c each, 0 for the other copies, 1 for other outputs."""
        turns, counts = [], []
        for d, part in enumerate(bounds):
            upright = (-1, 1) if d == 0 else (1, -1)
            turns.append(_occurrence(self._vector("index", spec, d))[slice(*part)].reshape(upright))
            counts.append(self._vector("copies", spec, d)[slice(*part)].reshape(upright))
        own = np.where(turns[0] == turns[1], counts[0], 0)
        return np.where(counts[0] == counts[1], own, 1).astype(np.float64)

    def _fill_fresh(self, spec: TensorSpec, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        fresh = self._fresh(spec, bounds)
        if fresh is None:
            return grown
        values = torch.from_numpy(self._fresh_values(spec, bounds, fresh)).to(grown.dtype)
        return torch.where(torch.from_numpy(fresh), values, grown)

    def _fresh_values(self, spec: TensorSpec, bounds: Bounds, fresh: np.ndarray) -> np.ndarray:
        """Values for the positions ``fresh`` of the slice; of the others, whatever."""
        if len(bounds) == 1:
            return self._fresh_vector(spec, bounds[0])
        first, columns = bounds[0][0], slice(*bounds[1])
        recipe = self.plan.recipe.width
        wanted = np.zeros((len(fresh), spec.shape[1]), dtype=bool)
        wanted[:, columns] = fresh
        drawn = normals_at(recipe.symmetry_breaking.seed, f"{spec.name}/fresh", first, wanted)
        values: np.ndarray = drawn[:, columns] * self._deviation
        if spec.expert is not None and self.plan.experts is not None:  # parts of a dense FFN that are dropped
            mean, deviation = self._replaced(spec)
            values = mean + drawn[:, columns] * deviation
        for kind, filled in (("constant", recipe.constant), ("silent", 0.0)):
            rows, read = (self._vector(kind, spec, d)[slice(*part)].astype(bool) for d, part in enumerate(bounds))
            values[rows[:, None] | read[None, :]] = filled
        return values

    def _replaced(self, spec: TensorSpec) -> tuple[float, float]:
        """Mean and deviation of the source's entries in whose place an expert's fresh ones stand."""
        experts, source = self.plan.experts, self.plan.tensors[spec.name].source
        assert experts is not None and spec.expert is not None
        dropped = experts.dropped(spec.layer or 0, spec.expert)
        along, first, total, squares, count = int(spec.dims[1].outer_axis == "ffn"), 0, 0.0, 0.0, 0
        for portion in self._portions(source, "weight"):
            inside = dropped[(dropped >= first) & (dropped < first + len(portion))] - first if along == 0 else dropped
            found = portion.double().index_select(along, torch.from_numpy(inside)).numpy()
            total, squares, count = total + float(found.sum()), squares + float((found**2).sum()), count + found.size
            first += len(portion)
        mean = total / count
        return mean, math.sqrt(max(0.0, squares / count - mean**2))

    def _fresh_vector(self, spec: TensorSpec, part: tuple[int, int]) -> np.ndarray:
        """Norms start as one, biases as zero, unless they write the recipe's constant."""
        if spec.dims[0].use in ("scale", "post"):
            return np.full(part[1] - part[0], 1.0 - spec.offset)
        return self._vector("constant", spec, 0)[slice(*part)] * self.plan.recipe.width.constant

    def _fill_means(self, tensor: TensorPlan, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Where a fresh position of the residual stream is to be the mean of the old ones, make its writer write that."""
        spec = tensor.target
        for d, dim in enumerate(spec.dims):
            mask = self._vector("averaged", spec, d)[slice(*bounds[d])]
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
        means = self._source_means(tensor, dimension, bounds)
        if len(bounds) == 1:
            return means
        factors = self._vector("value", tensor.target, 1 - dimension)[slice(*bounds[1 - dimension])]
        return means * torch.from_numpy(factors)

    def _source_means(self, tensor: TensorPlan, dimension: int, bounds: Bounds) -> torch.Tensor:
        """Mean of the source along a whole dimension, at the part's positions of the other one."""
        if len(bounds) == 1:
            return self._source.read(tensor.source).double().mean()
        other = 1 - dimension
        index = self._vector("index", tensor.target, other)[slice(*bounds[other])]
        known = np.where(index == FRESH, 0, index)
        if dimension == 0:
            return self._over_rows(tensor.source)[torch.from_numpy(known)]
        return self._rows(tensor.source, "weight", known).double().mean(dim=1)

    def _over_rows(self, name: str) -> torch.Tensor:
        """Mean over the rows of a weight, summed in fixed portions."""
        if name not in self._row_means:
            portions = [portion.double().sum(dim=0) for portion in self._portions(name, "weight")]
            self._row_means[name] = torch.stack(portions).sum(dim=0) / self._source.architecture.by_name[name].shape[0]
        return self._row_means[name]

    def _fresh(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray | None:
        """True where nothing of the source is copied; None if that is nowhere."""
        return _either([self._vector("index", spec, d)[slice(*part)] == FRESH for d, part in enumerate(bounds)])

    def _mean(self, name: str) -> float:
        """Mean of a second moment, summed in fixed portions."""
        if name not in self._means:
            total = sum(float(portion.double().numpy().sum()) for portion in self._portions(name, "exp_avg_sq"))
            self._means[name] = total / self._source.architecture.by_name[name].numel
        return self._means[name]

    def _root_mean_square(self, name: str) -> float:
        """Of a weight, summed in fixed portions."""
        if name not in self._sizes:
            total = sum(float(portion.double().square().numpy().sum()) for portion in self._portions(name, "weight"))
            self._sizes[name] = math.sqrt(total / self._source.architecture.by_name[name].numel)
        return self._sizes[name]

    def _portions(self, name: str, state: State) -> Iterator[torch.Tensor]:
        """The rows of a source tensor, so many at a time that a sum over them does not depend on who asks for what."""
        spec = self._source.architecture.by_name[name]
        return (self._source.read(name, state, part) for part in row_portions(spec.shape, _MEAN_ROWS_ELEMENTS))


def _either(masks: list[np.ndarray]) -> np.ndarray | None:
    """Per element, whether its row or its column is masked; None if none is."""
    if not any(mask.any() for mask in masks):
        return None
    found: np.ndarray = masks[0] if len(masks) == 1 else masks[0][:, None] | masks[1][None, :]
    return found


def _later_copies(index: np.ndarray) -> np.ndarray:
    later: np.ndarray = (index == FRESH) | (_occurrence(index) > 0)
    return later


def _diagonal(bounds: Bounds) -> torch.Tensor:
    rows, columns = (torch.arange(*part) for part in bounds)
    return (rows[:, None] == columns[None, :]).float()


def _picked(tensor: torch.Tensor, wanted: np.ndarray, dimension: int) -> torch.Tensor:
    """The positions ``wanted`` of a dimension: a view where they are consecutive, else a copy."""
    first = int(wanted[0])
    if len(wanted) == int(wanted[-1]) - first + 1 and (np.diff(wanted) == 1).all():
        return tensor.narrow(dimension, first, len(wanted))
    return tensor.index_select(dimension, torch.from_numpy(wanted))


def _scaled(gathered: torch.Tensor, factors: list[Vector]) -> torch.Tensor:
    scaled = gathered
    for dimension, factor in enumerate(factors):
        if (factor != 1.0).any():
            column = torch.from_numpy(factor).to(gathered.dtype)
            scaled = scaled * (column[:, None] if dimension == 0 and len(factors) > 1 else column)
    return scaled


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
