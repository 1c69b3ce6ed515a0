"""Values for positions that copy nothing: drawn, zero, or constant."""

from __future__ import annotations

import math

import numpy as np
import torch

from incr_ds.arch.tensors import TensorSpec
from incr_ds.growth.counter import normals, normals_at
from incr_ds.growth.gathering import SourceSlices
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.vectors import PlanVectors, fresh_entries
from incr_ds.sharding.blocks import Bounds


class FreshValues:
    """Fresh values of a plan's tensors. A value depends only on its tensor and its position, so all slices agree."""

    def __init__(self, plan: GrowthPlan, vectors: PlanVectors, slices: SourceSlices) -> None:
        self.plan = plan
        self._vectors, self._slices = vectors, slices

    def router(self, spec: TensorSpec, bounds: Bounds) -> torch.Tensor:
        """Normal numbers of the config's deviation. All experts that make up one dense FFN share a row."""
        assert self.plan.experts is not None
        shards, width, columns = self.plan.experts.shards, spec.shape[1], slice(*bounds[1])
        groups = [expert // shards for expert in range(*bounds[0])]
        seed, name = self.plan.recipe.width.symmetry_breaking.seed, f"{spec.name}/fresh"
        rows = {group: normals(seed, name, group * width, width)[columns] for group in set(groups)}
        return torch.from_numpy(np.stack([rows[group] for group in groups]) * self.deviation).float()

    @property
    def deviation(self) -> float:
        """The standard deviation of fresh weights."""
        target = self.plan.target
        return self.plan.recipe.width.std or float(target.config[target.family.config.initializer])

    def fill(self, spec: TensorSpec, grown: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Fill ``grown`` with fresh values where nothing is copied."""
        fresh = fresh_entries(self._vectors, spec, bounds)
        if fresh is None:
            return grown
        values = torch.from_numpy(self._fresh_values(spec, bounds, fresh)).to(grown.dtype)
        return torch.where(torch.from_numpy(fresh), values, grown)

    def _fresh_values(self, spec: TensorSpec, bounds: Bounds, fresh: np.ndarray) -> np.ndarray:
        """Values for the positions ``fresh`` of the slice. The others are arbitrary."""
        if len(bounds) == 1:
            return self._fresh_vector(spec, bounds[0])
        first, columns = bounds[0][0], slice(*bounds[1])
        recipe = self.plan.recipe.width
        wanted = np.zeros((len(fresh), spec.shape[1]), dtype=bool)
        wanted[:, columns] = fresh
        drawn = normals_at(recipe.symmetry_breaking.seed, f"{spec.name}/fresh", first, wanted)
        values: np.ndarray = drawn[:, columns] * self.deviation
        if spec.expert is not None and self.plan.experts is not None:  # parts of a dense FFN that are dropped
            mean, deviation = self._replaced(spec)
            values = mean + drawn[:, columns] * deviation
        for mask, filled in ((self._vectors.constant, recipe.constant), (self._vectors.silent, 0.0)):
            rows, read = (mask(spec, d)[slice(*part)].astype(bool) for d, part in enumerate(bounds))
            values[rows[:, None] | read[None, :]] = filled
        return values

    def _replaced(self, spec: TensorSpec) -> tuple[float, float]:
        """Mean and deviation of the source's entries that an expert's fresh ones replace."""
        experts, source = self.plan.experts, self.plan.tensors[spec.name].source
        assert experts is not None and spec.expert is not None
        dropped = experts.dropped(spec.layer or 0, spec.expert)
        along, first, total, squares, count = int(spec.dims[1].outer_axis == "ffn"), 0, 0.0, 0.0, 0
        for portion in self._slices.portions(source, "weight"):
            inside = dropped[(dropped >= first) & (dropped < first + len(portion))] - first if along == 0 else dropped
            found = portion.double().index_select(along, torch.from_numpy(inside)).numpy()
            total, squares, count = total + float(found.sum()), squares + float((found**2).sum()), count + found.size
            first += len(portion)
        mean = total / count
        return mean, math.sqrt(max(0.0, squares / count - mean**2))

    def _fresh_vector(self, spec: TensorSpec, part: tuple[int, int]) -> np.ndarray:
        """Fresh entries of a vector: norms start as one, biases as zero, unless they write the recipe's constant."""
        if spec.dims[0].use in ("scale", "post"):
            return np.full(part[1] - part[0], 1.0 - spec.offset)
        return self._vectors.constant(spec, 0)[slice(*part)] * self.plan.recipe.width.constant
