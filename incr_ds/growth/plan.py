"""The plan: a frozen value that says how every target tensor is made. It touches no file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from math import sqrt
from typing import Any, Literal

import numpy as np

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.multipliers import Multipliers, rounded_multipliers
from incr_ds.arch.tensors import READS, TensorSpec
from incr_ds.checkpoint.base import CheckpointFacts, State
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.axis import FRESH, AxisGrowth, AxisUse, Fill, Vector, identity
from incr_ds.growth.depth import LayerSource
from incr_ds.growth.experts import ExpertGrowth

Start = Literal["copy", "zero", "identity", "router"]


@dataclass(frozen=True)
class TensorPlan:
    """One target tensor: the source tensor that it is grown from, and whether it is in an inserted layer.

    ``start`` says what it holds: the source's values (``copy``), zeros, ones on the diagonal, or a new router's. On top of
    the axes' factors, values are multiplied by ``scale`` and their gradient by ``gradient``. If ``above``, the next layer's
    tensor, is given, outputs beyond the first copy of each unit come from it. ``mix``, if not empty, lists source tensors
    with weights, whose sum replaces ``source``.
    """

    target: TensorSpec
    source: str
    new_layer: bool = False
    start: Start = "copy"
    scale: float = 1.0
    gradient: float = 1.0
    above: str | None = None
    mix: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class GrowthPlan:
    """Everything that a growth does.

    ``axes`` holds the growth of each named axis, and ``layers`` the layer map. ``inexact`` lists every reason why the target
    does not compute the source's function. ``notes`` are these and other notes for the user. ``experts`` describes how the
    FFN becomes the experts of a mixture.
    """

    recipe: GrowthRecipe
    source: Architecture
    target: Architecture
    axes: Mapping[str, AxisGrowth]
    layers: tuple[LayerSource, ...]
    inexact: tuple[str, ...]
    notes: tuple[str, ...]
    experts: ExpertGrowth | None = None

    @cached_property
    def tensors(self) -> Mapping[str, TensorPlan]:
        """One entry per stored target tensor, by name."""
        return {spec.name: self._tensor(spec) for spec in self.target.stored}

    @cached_property
    def unchanged(self) -> frozenset[str]:
        """The target tensors that equal a source tensor element for element, with their moments."""
        kept = {name for name, axis in self.axes.items() if axis.keeps_tensors}
        return frozenset(name for name, plan in self.tensors.items() if self._is_unchanged(plan, kept))

    @property
    def function_preserving(self) -> bool:
        """True if the target computes the source's function."""
        return not self.inexact

    @property
    def grows(self) -> bool:
        """False if the target is the source in another layout."""
        widths = all(axis.is_identity for axis in self.axes.values())
        return not widths or [layer.layer for layer in self.layers] != list(range(self.source.num_layers))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Source tensors that no target tensor uses, from layers that the layer map leaves out."""
        used = {name for plan in self.tensors.values() for name in (plan.source, plan.above, *dict(plan.mix))}
        return tuple(spec.name for spec in self.source.stored if spec.name not in used)

    def reads(self, source: CheckpointFacts, *, with_moments: bool) -> tuple[tuple[str, State], ...]:
        """The tensors of ``source``, and their moments, that the target is made from. A reset optimizer needs no moments."""
        dropped, weights = set(self.dropped), self.recipe.optimizer == "reset" or not with_moments
        names = [spec.name for spec in self.source.stored if spec.name not in dropped]
        return tuple((name, state) for name in names for state in source.states_of(name)[: 1 if weights else None])

    def momentum(self, source: CheckpointFacts) -> frozenset[str]:
        """The target's tensors whose state is Muon's momentum, as it is in ``source``."""
        if self.recipe.optimizer == "reset":
            return frozenset()
        return frozenset(name for name, tensor in self.tensors.items() if tensor.source in source.momentum)

    def index(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """Source position of each target position along a dimension, or FRESH."""
        found, begin = [], 0
        for part in spec.dims[dimension].parts:
            axes = [self._axis(spec, name) for name in part]
            index = reduce(_spread, axes[1:], axes[0].positions)
            found.append(np.where(index == FRESH, FRESH, index + begin))
            begin += int(np.prod([axis.old for axis in axes]))
        return np.concatenate(found)

    def value(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factor of the weight along a dimension."""
        use = self._use(spec, dimension)
        return self._products(spec, dimension, lambda axis: axis.value(use))

    def gradient_factor(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factor of the gradient along a dimension."""
        use = self._use(spec, dimension)
        return self._products(spec, dimension, lambda axis: axis.gradient_factor(use))

    def copies(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """Number of copies of each position's source position along a dimension, 0 where fresh."""
        counts = self._products(spec, dimension, lambda axis: np.array(axis.copies, dtype=np.float64))
        whole: np.ndarray = counts.astype(np.int64)
        return whole

    def silent(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at the fresh positions of a dimension that must be zero to keep the function."""
        return self._fills(spec, dimension, "zero")

    def averaged(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at the fresh positions of a dimension that hold the mean of the old ones."""
        return self._fills(spec, dimension, "mean")

    def constant(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """True at the fresh positions of a dimension that hold the recipe's constant."""
        return self._fills(spec, dimension, "constant")

    def _fills(self, spec: TensorSpec, dimension: int, fill: Fill) -> np.ndarray:
        reads = spec.dims[dimension].use in READS

        def others(axis: AxisGrowth) -> Vector:
            chosen = (axis.fresh_in if reads else axis.fresh_out) == fill
            kept: Vector = 1.0 - ((axis.positions == FRESH) & chosen)
            return kept

        found: np.ndarray = self._products(spec, dimension, others) == 0.0
        return found

    def multipliers(self, name: str) -> Multipliers | None:
        """The AdamW multipliers of a tensor, or None if its positions need different ones."""
        plan = self.tensors[name]
        factors = [set(np.round(vector, 15)) for vector in (*self._values(plan), *self._gradients(plan))]
        nearest = self.nearest_multipliers(name)
        # Decay pulls the weight to zero, and not offset + weight, which is what the growth scales.
        decays_apart = plan.target.offset and nearest.lr != 1.0
        return None if any(len(found) != 1 for found in factors) or plan.new_layer or decays_apart else nearest

    def nearest_multipliers(self, name: str) -> Multipliers:
        """The AdamW multipliers of a tensor: the mean over its positions of those that each would need.

        Adam moves all entries by about the same amount. So the mean is the learning rate with which the copies' movement
        differs least, in squares, from the source's movement after growth. Fresh positions need none and do not count.
        """
        plan = self.tensors[name]
        lr = plan.scale * float(np.prod([_mean_of_copied(vector) for vector in self._values(plan)]))
        eps = plan.gradient * float(np.prod([_mean_of_copied(vector) for vector in self._gradients(plan)]))
        return rounded_multipliers(lr, eps)

    def muon_multipliers(self, name: str) -> Multipliers:
        """The multipliers of a matrix that Muon trains.

        A matrix whose rows are a times its source's, and its columns b times, has orthogonal factors that are a and b times
        the source's, each divided by the root of the summed squares over the copies of a position. So Muon's step is the
        source's if the rate is multiplied by these roots (their means over the positions), and divided by the change of the
        factor that Muon itself takes from the matrix's shape. Muon's step does not depend on the gradient's size.
        """
        plan = self.tensors[name]
        sizes = [self._copied_size(plan, dimension) for dimension in range(2)]
        shapes = (self.source.by_name[plan.source].shape, plan.target.shape)
        before, after = (sqrt(max(1.0, rows / columns)) for rows, columns in shapes)
        return rounded_multipliers(plan.scale * sizes[0] * sizes[1] * before / after, 1.0)

    def _copied_size(self, plan: TensorPlan, dimension: int) -> float:
        """The root of the summed squares of the factors of a source position's copies, averaged over the positions."""
        index, factors = self.index(plan.target, dimension), self.value(plan.target, dimension)
        copied = index != FRESH
        squares = np.bincount(index[copied], weights=factors[copied] ** 2)
        return float(np.sqrt(squares[squares > 0]).mean())

    def _values(self, plan: TensorPlan) -> list[Vector]:
        return [self.value(plan.target, dimension) for dimension in range(len(plan.target.dims))]

    def _gradients(self, plan: TensorPlan) -> list[Vector]:
        return [self.gradient_factor(plan.target, dimension) for dimension in range(len(plan.target.dims))]

    def to_json(self) -> str:
        """Format the plan as canonical JSON. Equal plans give equal text."""
        content = {
            "plan_version": 1,
            "family": self.target.family.model_type,
            "recipe": self.recipe.model_dump(mode="json"),
            "source_sizes": dict(self.source.sizes),
            "target_config": dict(self.target.config),
            "function_preserving": self.function_preserving,
            "notes": list(self.notes),
            "axes": {name: _described(axis) for name, axis in self.axes.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "experts": None if self.experts is None else asdict(self.experts),
            "tensors": [
                {
                    "name": name,
                    "shape": plan.target.shape,
                    "source": plan.source,
                    "above": plan.above,
                    "mix": list(plan.mix),
                    "start": plan.start,
                    "scale": plan.scale,
                }
                for name, plan in self.tensors.items()
            ],
            "dropped": list(self.dropped),
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def _tensor(self, spec: TensorSpec) -> TensorPlan:
        if spec.layer is None:
            scale = self._embedding_scale(spec)
            return TensorPlan(spec, spec.name, scale=scale, gradient=1.0 / scale)
        layer = self.layers[spec.layer]
        if spec.role == "router" and self.experts is not None:
            return TensorPlan(spec, "", layer.is_new, "router")
        source = self._own_expert(spec).replace(f".{spec.layer}.", f".{layer.layer}.", 1)
        new, writes = self.recipe.depth.new, spec.role == self._writing_role
        scale = 1.0 / layer.copies if new == "halved" and writes else 1.0
        if self.experts is not None and spec.expert is not None and writes:
            scale *= self.experts.shards
        start: Start = "copy"
        if layer.is_new and new == "zero-output" and writes:
            start = "zero"
        elif layer.is_new and new == "identity":
            start = "identity" if spec.is_matrix else "zero"
        mix = self._mix(spec) if start == "copy" else ()
        gradient, above = self._expert_gradient(spec), self._above(spec, start)
        return TensorPlan(spec, source, layer.is_new, start, scale, gradient, above, mix)

    def _own_expert(self, spec: TensorSpec) -> str:
        """The name of the source's tensor, in the layer of the same number, that ``spec`` is grown from."""
        if spec.expert is None or self.experts is not None:
            return spec.grown_from or spec.name
        old = self.axes["experts"].index[spec.expert]
        return f".{old}.".join(spec.name.rsplit(f".{spec.expert}.", 1))

    def _expert_gradient(self, spec: TensorSpec) -> float:
        """The share of its expert's gradient that a copy gets, equal to its share in the output."""
        if spec.expert is None or self.experts is not None:
            return 1.0
        return self.axes["experts"].gradient[spec.expert]

    def _is_unchanged(self, plan: TensorPlan, kept: set[str]) -> bool:
        spec = plan.target
        copied = plan.start == "copy" and not plan.mix and not plan.new_layer and plan.scale == plan.gradient == 1.0
        upcycled = self.experts is not None and spec.expert is not None
        return copied and not upcycled and all(kept.issuperset(dimension.named_axes) for dimension in spec.dims)

    def _mix(self, spec: TensorSpec) -> tuple[tuple[str, float], ...]:
        if self.recipe.fitted is None or not self.recipe.fitted.layers or spec.layer is None:
            return ()
        weights = self.recipe.fitted.layers[spec.layer]
        return tuple(
            (spec.name.replace(f".{spec.layer}.", f".{layer}.", 1), weights[layer]) for layer in sorted(weights)
        )

    def _above(self, spec: TensorSpec, start: Start) -> str | None:
        """The source tensor one layer up, for bert2BERT's AKI. The last layer has none and copies itself."""
        layer = self.layers[spec.layer or 0].layer + 1
        if self.recipe.width.copies_from == "own-layer" or start != "copy" or layer == self.source.num_layers:
            return None
        return (spec.grown_from or spec.name).replace(f".{spec.layer}.", f".{layer}.", 1)

    @cached_property
    def _writing_role(self) -> str:
        """The role of the last tensors before the residual stream. If they are zero, a layer writes nothing."""
        roles = {spec.role for spec in self.target.tensors}
        return "post_norm" if "post_norm" in roles else "writer"

    def _embedding_scale(self, spec: TensorSpec) -> float:
        """The factor that cancels the growth of a multiplier that depends on the hidden size; its inverse in a tied head."""
        if self.target.family.embedding_scale is None:
            return 1.0
        scale = sqrt(self.source.sizes["hidden"] / self.target.sizes["hidden"])
        return {"embedding": scale, "final_norm": 1.0 / scale if self.target.tied else 1.0}.get(spec.role, 1.0)

    def _axis(self, spec: TensorSpec, name: str) -> AxisGrowth:
        if self.experts is not None and name == "ffn" and spec.expert is not None:
            return self.experts.units(spec.layer or 0, spec.expert)
        return identity(name, int(name)) if name.isdigit() else self.axes[name]

    def _products(self, spec: TensorSpec, dimension: int, pick: Callable[[AxisGrowth], Vector]) -> Vector:
        parts = spec.dims[dimension].parts
        products: list[Vector] = [reduce(_product, [pick(self._axis(spec, name)) for name in part]) for part in parts]
        joined: Vector = np.concatenate(products)
        return joined

    def _use(self, spec: TensorSpec, dimension: int) -> AxisUse:
        use = spec.dims[dimension].use
        if spec.role == "final_norm" and self.target.tied:
            return "tied scale" if use == "scale" else "tied shift"
        return use


def _mean_of_copied(factors: Vector) -> float:
    return float(factors[factors != 0].mean())


def _described(axis: AxisGrowth) -> dict[str, Any]:
    """An axis as JSON. One that does not change is just its size (a vocabulary has hundreds of thousands of positions)."""
    if axis.is_identity:
        return {"axis": axis.axis, "method": axis.method, "old": axis.old}
    return asdict(axis)


def _product(outer: Vector, inner: Vector) -> Vector:
    return (outer[:, None] * inner[None, :]).reshape(-1)


def _spread(outer: np.ndarray, inner: AxisGrowth) -> np.ndarray:
    """Positions of a product of two axes, FRESH where either is FRESH."""
    index = inner.positions
    spread = outer[:, None] * inner.old + index[None, :]
    fresh = (outer == FRESH)[:, None] | (index == FRESH)[None, :]
    return np.where(fresh, FRESH, spread).reshape(-1)
