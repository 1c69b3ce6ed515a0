"""Reads the slices of the source that a plan needs, and computes statistics of whole source tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from incr_ds.checkpoint.base import LogicalCheckpoint, State, row_portions
from incr_ds.growth.axis import FRESH
from incr_ds.growth.plan import TensorPlan
from incr_ds.growth.vectors import PlanVectors, later_copies
from incr_ds.sharding.blocks import Bounds

_MEAN_ROWS_ELEMENTS = 1 << 18  # fixed, since a sum in other portions would round differently


class SourceSlices:
    """The source, read through a plan's vectors. Statistics of whole tensors are computed once. Threads may share it."""

    def __init__(self, vectors: PlanVectors, source: LogicalCheckpoint) -> None:
        self.source = source
        self._vectors = vectors
        self._means: dict[str, float] = {}
        self._sizes: dict[str, float] = {}
        self._row_means: dict[str, torch.Tensor] = {}

    def gather(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Source entries at each position of the part. Further copies along an output may come from the layer above."""
        if tensor.mix:
            return self._mixed(tensor, state, bounds)
        own = self._gather_from(tensor.source, tensor, state, bounds)
        if tensor.above is None:
            return own
        produced = [d for d, dim in enumerate(tensor.target.dims) if dim.use == "out"]
        masks = [later_copies(self._vectors.index(tensor.target, d))[slice(*bounds[d])] for d in produced]
        if not masks or not masks[0].any():
            return own
        later = torch.from_numpy(masks[0])
        later = later[:, None] if produced[0] == 0 and len(bounds) == 2 else later
        return torch.where(later, self._gather_from(tensor.above, tensor, state, bounds), own)

    def _mixed(self, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """The weighted sum of several layers' entries. For a norm used as offset + weight, the sum includes the offset."""
        parts = [weight * self._gather_from(name, tensor, state, bounds) for name, weight in tensor.mix]
        excess = sum(weight for _, weight in tensor.mix) - 1.0
        return torch.stack(parts).sum(dim=0) + excess * tensor.target.offset

    def _gather_from(self, source: str, tensor: TensorPlan, state: State, bounds: Bounds) -> torch.Tensor:
        """Entries of ``source`` at each position of the part. Fresh positions read position 0, with a factor of 0."""
        wanted = [self._vectors.index(tensor.target, d)[slice(*bounds[d])] for d in range(len(bounds))]
        known = [np.where(index == FRESH, 0, index) for index in wanted]
        gathered = self.rows(source, state, known[0])
        return _picked(gathered, known[1], 1) if len(known) > 1 else gathered

    def rows(self, name: str, state: State, wanted: np.ndarray) -> torch.Tensor:
        """Source rows, in at least fp32. Rows that are far apart are read in halves, to skip what is between them."""
        first, last = int(wanted.min()), int(wanted.max())
        if len(wanted) > 1 and last - first >= 2 * len(wanted):
            middle = len(wanted) // 2
            return torch.cat([self.rows(name, state, wanted[:middle]), self.rows(name, state, wanted[middle:])])
        rows = self.source.read(name, state, ((first, last + 1),))
        return _picked(rows.to(torch.promote_types(rows.dtype, torch.float32)), wanted - first, 0)

    def portions(self, name: str, state: State) -> Iterator[torch.Tensor]:
        """Rows of a source tensor, in fixed portions, so that a sum over them never depends on the slice being read."""
        spec = self.source.architecture.by_name[name]
        return (self.source.read(name, state, part) for part in row_portions(spec.shape, _MEAN_ROWS_ELEMENTS))

    def means(self, tensor: TensorPlan, dimension: int, bounds: Bounds) -> torch.Tensor:
        """Mean of the source along a whole dimension, at the part's positions of the other one."""
        if len(bounds) == 1:
            return self.source.read(tensor.source).double().mean()
        other = 1 - dimension
        index = self._vectors.index(tensor.target, other)[slice(*bounds[other])]
        known = np.where(index == FRESH, 0, index)
        if dimension == 0:
            return self._over_rows(tensor.source)[torch.from_numpy(known)]
        return self.rows(tensor.source, "weight", known).double().mean(dim=1)

    def _over_rows(self, name: str) -> torch.Tensor:
        """Mean over the rows of a weight, summed in fixed portions."""
        if name not in self._row_means:
            portions = [portion.double().sum(dim=0) for portion in self.portions(name, "weight")]
            self._row_means[name] = torch.stack(portions).sum(dim=0) / self.source.architecture.by_name[name].shape[0]
        return self._row_means[name]

    def mean(self, name: str) -> float:
        """Mean of a second moment, summed in fixed portions."""
        if name not in self._means:
            total = sum(float(portion.double().numpy().sum()) for portion in self.portions(name, "exp_avg_sq"))
            self._means[name] = total / self.source.architecture.by_name[name].numel
        return self._means[name]

    def root_mean_square(self, name: str) -> float:
        """Root mean square of a weight, summed in fixed portions."""
        if name not in self._sizes:
            total = sum(float(portion.double().square().numpy().sum()) for portion in self.portions(name, "weight"))
            self._sizes[name] = math.sqrt(total / self.source.architecture.by_name[name].numel)
        return self._sizes[name]


def _picked(tensor: torch.Tensor, wanted: np.ndarray, dimension: int) -> torch.Tensor:
    """The positions ``wanted`` of a dimension: a view if they are consecutive, otherwise a copy."""
    first = int(wanted[0])
    if len(wanted) == int(wanted[-1]) - first + 1 and (np.diff(wanted) == 1).all():
        return tensor.narrow(dimension, first, len(wanted))
    return tensor.index_select(dimension, torch.from_numpy(wanted))
