"""The plan: a frozen value that says, for every target tensor, what it is made of. It touches no file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.family import WITHOUT_EFFECT
from incr_ds.arch.tensors import TensorSpec
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import ConfigError, GrowthError, IncrError
from incr_ds.growth.axis import FRESH, AxisGrowth, AxisUse, Vector, identity
from incr_ds.growth.depth import LayerSource, map_layers
from incr_ds.growth.width import grow_heads, grow_hidden, grow_units

GROWING = ("hidden", "ffn", "heads", "kv_heads", "layers")


@dataclass(frozen=True)
class TensorPlan:
    """One target tensor: the source tensor it is grown from; ``new_layer`` in an inserted layer, ``silent`` if it is a
    writer there that starts at zero so that the layer changes nothing."""

    target: TensorSpec
    source: str
    new_layer: bool
    silent: bool


@dataclass(frozen=True)
class Dynamics:
    """AdamW multipliers under which a grown tensor trains as its source did (growth of the value by a, of the gradient
    by g: lr * a, eps * g, decoupled weight decay / a)."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class GrowthPlan:
    """Everything that a growth does. ``axes`` holds the growth of each named axis, ``layers`` the layer map."""

    recipe: GrowthRecipe
    source: Architecture
    target: Architecture
    axes: Mapping[str, AxisGrowth]
    layers: tuple[LayerSource, ...]
    notes: tuple[str, ...]

    @cached_property
    def tensors(self) -> Mapping[str, TensorPlan]:
        """One entry per stored target tensor, by name."""
        return {spec.name: self._tensor(spec) for spec in self.target.stored}

    @property
    def exact(self) -> bool:
        """True when the target computes the source's function."""
        return not any(layer.is_new for layer in self.layers) or self.recipe.depth.new == "zero-output"

    def index(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """Source position of each target position along a dimension, FRESH where there is none."""
        outer, inner = self._blocks(spec, dimension)
        index = np.array(outer.index)
        spread = index[:, None] * inner + np.arange(inner)
        return np.where(np.repeat(index == FRESH, inner), FRESH, spread.reshape(-1))

    def value(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factor of the weight along a dimension."""
        outer, inner = self._blocks(spec, dimension)
        return np.repeat(outer.value(self._use(spec, dimension)), inner)

    def gradient_factor(self, spec: TensorSpec, dimension: int) -> Vector:
        """Factor of the gradient along a dimension."""
        outer, inner = self._blocks(spec, dimension)
        return np.repeat(outer.gradient_factor(self._use(spec, dimension)), inner)

    def copies(self, spec: TensorSpec, dimension: int) -> np.ndarray:
        """Number of copies of each position's source position along a dimension, 0 where fresh."""
        outer, inner = self._blocks(spec, dimension)
        return np.repeat(np.array(outer.copies), inner)

    def axis(self, spec: TensorSpec, dimension: int) -> AxisGrowth:
        """Growth of a dimension's (outermost) axis."""
        return self._blocks(spec, dimension)[0]

    def dynamics(self, name: str) -> Dynamics | None:
        """The AdamW multipliers of a tensor, or None when its positions would need different ones."""
        spec = self.target.by_name[name]
        value = [set(np.round(self.value(spec, dimension), 15)) for dimension in range(len(spec.dims))]
        gradient = [set(np.round(self.gradient_factor(spec, dimension), 15)) for dimension in range(len(spec.dims))]
        if any(len(factors) != 1 for factors in [*value, *gradient]) or self.tensors[name].new_layer:
            return None
        lr = float(np.prod([factors.pop() for factors in value]))
        eps = float(np.prod([factors.pop() for factors in gradient]))
        return Dynamics(lr, eps, 1.0 / lr) if lr else None

    def to_json(self) -> str:
        """The plan as canonical JSON; equal plans give equal text."""
        content = {
            "plan_version": 1,
            "family": self.target.family.model_type,
            "recipe": self.recipe.model_dump(mode="json"),
            "source_sizes": dict(self.source.sizes),
            "target_config": dict(self.target.config),
            "exact": self.exact,
            "notes": list(self.notes),
            "axes": {name: _described(axis) for name, axis in self.axes.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "tensors": [
                {"name": name, "shape": plan.target.shape, "source": plan.source, "silent": plan.silent}
                for name, plan in self.tensors.items()
            ],
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def _tensor(self, spec: TensorSpec) -> TensorPlan:
        if spec.layer is None:
            return TensorPlan(spec, spec.name, False, False)
        layer = self.layers[spec.layer]
        source = spec.name.replace(f".{spec.layer}.", f".{layer.layer}.", 1)
        silent = layer.is_new and spec.role == "writer" and self.recipe.depth.new == "zero-output"
        return TensorPlan(spec, source, layer.is_new, silent)

    def _blocks(self, spec: TensorSpec, dimension: int) -> tuple[AxisGrowth, int]:
        dim = spec.dims[dimension]
        outer = self.axes[dim.axes[0]]
        return outer, dim.size // outer.new

    def _use(self, spec: TensorSpec, dimension: int) -> AxisUse:
        if spec.role == "final_norm" and self.target.tied:
            return "tied scale"
        return spec.dims[dimension].use


def _described(axis: AxisGrowth) -> dict[str, Any]:
    """An axis as JSON; one that stays is its size (a vocabulary has hundreds of thousands of positions)."""
    if axis.is_identity:
        return {"axis": axis.axis, "method": axis.method, "old": axis.old}
    return asdict(axis)


def plan_growth(source: Architecture, recipe: GrowthRecipe, where: str = "recipe") -> GrowthPlan:
    """Plan the growth of ``source`` by ``recipe``; GrowthError for whatever is impossible, before anything is written."""
    changes = _checked_changes(source, recipe, where)
    sizes = {**source.sizes, **{axis: changes[field] for axis, field in _fields(source).items() if field in changes}}
    layers = map_layers(recipe.depth.method, source.num_layers, sizes["layers"])
    axes = _grow_axes(source, sizes, recipe)
    target = _target_architecture(source, changes, layers, axes["hidden"], where)
    notes = _notes(recipe, axes, layers)
    plan = GrowthPlan(recipe, source, target, axes, layers, notes)
    if recipe.exact == "required" and not plan.exact:
        raise GrowthError(
            f"{where}: exact: required, but depth.new: copy does not keep the function; use depth.new: zero-output."
        )
    return plan


def _grow_axes(source: Architecture, sizes: Mapping[str, int], recipe: GrowthRecipe) -> dict[str, AxisGrowth]:
    old, width = source.sizes, recipe.width
    hidden = grow_hidden(width.hidden, old["hidden"], sizes["hidden"])
    ffn = grow_units("ffn", source.family.axes["ffn"], old["ffn"], sizes["ffn"], width.ffn.new)
    pairs = [(old["heads"], old["kv_heads"]), (sizes["heads"], sizes["kv_heads"])]
    heads, kv_heads = grow_heads(pairs[0], pairs[1], width.heads.new)
    kept = {axis: identity(axis, old[axis]) for axis in ("vocab", "head_dim")}
    return {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, **kept}


def _fields(source: Architecture) -> dict[str, str]:
    return {axis: source.family.axes[axis] for axis in GROWING}


def _checked_changes(source: Architecture, recipe: GrowthRecipe, where: str) -> dict[str, Any]:
    fields = set(_fields(source).values())
    for field, value in recipe.target.items():
        if field not in source.family.known_fields:
            known = ", ".join(sorted(fields))
            raise GrowthError(
                f"{where}: target.{field}: not a config field of {source.family.model_type}; can grow: {known}."
            )
        if field not in fields and field not in WITHOUT_EFFECT and value != source.config.get(field):
            raise GrowthError(
                f"{where}: target.{field}: {value!r} differs from the source's {source.config.get(field)!r}, and no operator "
                f"grows it; fields that can grow: {', '.join(sorted(fields))}."
            )
        if field in fields and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise GrowthError(f"{where}: target.{field}: expected a positive whole number, found {value!r}.")
    return dict(recipe.target)


def _target_architecture(
    source: Architecture, changes: Mapping[str, Any], layers: tuple[LayerSource, ...], hidden: AxisGrowth, where: str
) -> Architecture:
    eps = source.family.config.eps
    config = {**source.config, "head_dim": source.sizes["head_dim"], **changes}
    for field in source.family.config.per_layer:
        if source.config.get(field) is not None:
            config[field] = [source.config[field][layer.layer] for layer in layers]
    if hidden.kappa != 1.0:
        _refuse_shared_eps(source, where)
        config[eps] = source.config[eps] * hidden.kappa**2
    try:
        return architecture_from_config(config, f"{where}: target")
    except ConfigError as error:
        raise GrowthError(f"{error}{_nearest(config, changes, source)}") from error


def _refuse_shared_eps(source: Architecture, where: str) -> None:
    if any(spec.role == "inner_norm" for spec in source.tensors):
        raise GrowthError(
            f"{where}: width.hidden: zero-scaled-eps changes {source.family.config.eps}, which {source.family.model_type} also "
            "uses for its query and key norms; use width.hidden: zero, which leaves eps as it is."
        )


def _nearest(config: Mapping[str, Any], changes: Mapping[str, Any], source: Architecture) -> str:
    """For a refused target, the nearest values of each changed size that transformers would take."""
    hints = []
    for field, value in changes.items():
        if field in _fields(source).values():
            below = _first_valid(config, field, range(value - 1, max(0, value - 257), -1))
            above = _first_valid(config, field, range(value + 1, value + 257))
            found = [str(size) for size in (below, above) if size is not None]
            if found:
                hints.append(f"{field}: {' or '.join(found)}")
    return f" Nearest sizes that work: {'; '.join(hints)}." if hints else ""


def _first_valid(config: Mapping[str, Any], field: str, candidates: range) -> int | None:
    return next((size for size in candidates if _is_valid({**config, field: size})), None)


def _is_valid(config: Mapping[str, Any]) -> bool:
    try:
        architecture_from_config(config, "candidate")
    except IncrError:
        return False
    return True


def _notes(recipe: GrowthRecipe, axes: Mapping[str, AxisGrowth], layers: tuple[LayerSource, ...]) -> tuple[str, ...]:
    checks: list[tuple[bool, Callable[[], str]]] = [
        (
            any(layer.is_new for layer in layers) and recipe.depth.new == "copy",
            lambda: "depth.new: copy does not keep the source's function; expect a higher loss at the first step",
        ),
        (
            recipe.width.symmetry_breaking.method == "none" and any(max(axis.copies) > 1 for axis in axes.values()),
            lambda: "symmetry_breaking: none leaves copies equal, and training never makes them differ",
        ),
        (
            recipe.width.symmetry_breaking.method != "none"
            and recipe.optimizer == "exact"
            and max(axes["hidden"].copies) > 1,
            lambda: "moments follow the rules of even shares; with per-element shares they are the nearest rule",
        ),
    ]
    return tuple(text() for applies, text in checks if applies)
