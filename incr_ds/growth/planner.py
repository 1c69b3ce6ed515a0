"""Plans a growth: checks a request against a source, suggests sizes that work, and lists what is not function-preserving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.restated import restated
from incr_ds.config.growth import GrowthRecipe, methods
from incr_ds.errors import ConfigError, GrowthError, IncrError
from incr_ds.growth.axis import FRESH, AxisGrowth, identity
from incr_ds.growth.changes import ROTARY, checked_changes, growing_fields
from incr_ds.growth.depth import LayerSource, keeps_order, map_layers
from incr_ds.growth.fitted import fitted_axes
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.rules import HEAD_RULES, REQUEST_RULES, becomes_mixture, refuse, refuse_inexact
from incr_ds.growth.upcycling import chosen_experts, dense_part, upcycled
from incr_ds.growth.width import (
    PADDING,
    fitting_kv_heads,
    grow_entries,
    grow_experts,
    grow_head_size,
    grow_heads,
    grow_hidden,
    grow_units,
    under_norm,
)

SILENT = ("zero-output", "identity")
TABLES = ("vocab", "positions")
UNITS = ("ffn", "heads")
LARGEST = 4.0  # largest published growth in parameters in one step
WIDTH_AXES = ("hidden", "ffn", "heads", "kv_heads")


def plan_growth(source: Architecture, recipe: GrowthRecipe, where: str = "recipe") -> GrowthPlan:
    """Plan the growth of ``source`` by ``recipe``. Raises GrowthError for what is impossible, before anything is written.

    A target of another model_type is a mixture of experts into which ``source`` is upcycled. A mixture stays a mixture.
    """
    refuse(REQUEST_RULES, where, source, recipe)
    if not becomes_mixture(source, recipe):
        return _plan_dense(source, recipe, where)
    return upcycled(_plan_dense(source, dense_part(source, recipe), where), recipe, where)


def _plan_dense(source: Architecture, recipe: GrowthRecipe, where: str) -> GrowthPlan:
    changes = checked_changes(source, recipe, where)
    sizes = {
        **source.sizes,
        **{axis: changes[field] for axis, field in growing_fields(source).items() if field in changes},
    }
    depth = recipe.depth
    if depth.map is not None and source.family.axes["layers"] not in changes:
        sizes["layers"] = len(depth.map)
    if "kv_heads" not in source.family.axes:
        sizes["kv_heads"] = sizes["heads"]
    refuse(HEAD_RULES, where, source, sizes)
    if sizes["head_dim"] != source.sizes["head_dim"]:
        sizes["query_dim"] = sizes["head_dim"]
    try:
        layers = map_layers(depth.method, source.num_layers, sizes["layers"], depth.map)
        axes = _grow_axes(source, sizes, recipe)
    except GrowthError as error:
        raise GrowthError(f"{where}: {error}") from error
    if recipe.fitted is not None:
        axes = fitted_axes(source, recipe, axes, layers, where)
    target = _target_architecture(source, sizes, changes, layers, axes["hidden"], where)
    inexact = _inexact(source, target, recipe, axes, layers)
    refuse_inexact(recipe, inexact, where)
    notes = (
        *_method_notes(recipe, axes, layers),
        *inexact,
        *_notes(recipe, axes),
        *size_warnings(target.num_parameters / source.num_parameters),
        *source.notes,
    )
    return GrowthPlan(recipe, source, target, axes, layers, inexact, notes)


def _grow_axes(source: Architecture, sizes: Mapping[str, int], recipe: GrowthRecipe) -> dict[str, AxisGrowth]:
    old, width, family = source.sizes, recipe.width, source.family
    seed, order = width.symmetry_breaking.seed, width.order
    hidden = grow_hidden(width.hidden, old["hidden"], sizes["hidden"], family.norm, seed, order)
    ffn = grow_units("ffn", family.axes["ffn"], old["ffn"], sizes["ffn"], width.ffn.new, order, seed)
    pairs = [(old["heads"], old["kv_heads"]), (sizes["heads"], sizes["kv_heads"])]
    heads, kv_heads = grow_heads(pairs[0], pairs[1], width.heads.new, order, seed)
    tables = {axis: grow_entries(axis, family.axes[axis], old[axis], sizes[axis]) for axis in TABLES if axis in old}
    if "heads" in family.under_norm:
        heads = under_norm(heads)
    tables |= (
        {"experts": grow_experts(family.axes["experts"], old["experts"], sizes["experts"])} if "experts" in old else {}
    )
    grown = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, **tables}
    if sizes["head_dim"] != old["head_dim"]:
        grown["head_dim"], grown["query_dim"] = grow_head_size(
            old["head_dim"], sizes["head_dim"], scaled_by_size=family.scores_scale is None
        )
    return {**{axis: identity(axis, size) for axis, size in old.items()}, **grown}


def _target_architecture(
    source: Architecture,
    sizes: Mapping[str, int],
    changes: Mapping[str, Any],
    layers: tuple[LayerSource, ...],
    hidden: AxisGrowth,
    where: str,
) -> Architecture:
    family = source.family
    stated = {field: sizes[axis] for axis, field in family.axes.items()}
    followed = {field: sizes[axis] for field, axis in family.config.follows.items()}
    config = {**source.config, **changes, **stated, **followed}
    for field in family.config.per_layer:
        if source.config.get(field) is not None:
            config[field] = [source.config[field][layer.layer] for layer in layers]
    if hidden.kappa != 1.0:
        eps = _scalable_eps(source, hidden.method, where)
        config[eps] = source.config[eps] * hidden.kappa**2
    if config == source.config:
        return source
    try:
        return restated(architecture_from_config(config, f"{where}: target"), source, f"{where}: target")
    except ConfigError as error:
        raise GrowthError(f"{error}{_nearest(config, changes, source)}") from error


def _scalable_eps(source: Architecture, method: str, where: str) -> str:
    """The config field of an eps that only the residual stream's norms use."""
    family, eps = source.family, source.family.config.eps
    remedy = (
        "use width.hidden: zero, which leaves eps unchanged" if family.norm == "rms" else "use width.hidden: integer"
    )
    if eps is None:
        raise GrowthError(
            f"{where}: width.hidden: {method} changes the norms' eps, which is not in {family.model_type}'s config; {remedy}."
        )
    if any(spec.role == "inner_norm" for spec in source.tensors):
        raise GrowthError(
            f"{where}: width.hidden: {method} changes {eps}, which {family.model_type} also "
            f"uses for its query and key norms; {remedy}."
        )
    return eps


def _nearest(config: Mapping[str, Any], changes: Mapping[str, Any], source: Architecture) -> str:
    """A hint for a refused target: the head counts for a new hidden size.

    If there are none, the nearest values of each changed size that transformers would accept.
    """
    if (heads := _matching_heads(config, source)) is not None:
        axes = source.family.axes
        counts = " and ".join(f"{axes[axis]}: {count}" for axis, count in heads.items())
        return f" With {axes['hidden']}: {config[axes['hidden']]}, set {counts}."
    hints = []
    for field, value in changes.items():
        if field in growing_fields(source).values():
            below = _first_valid(config, field, range(value - 1, max(0, value - 257), -1))
            above = _first_valid(config, field, range(value + 1, value + 257))
            found = [str(size) for size in (below, above) if size is not None]
            if found:
                hints.append(f"{field}: {' or '.join(found)}")
    return f" Nearest sizes that work: {'; '.join(hints)}." if hints else ""


def _matching_heads(config: Mapping[str, Any], source: Architecture) -> dict[str, int] | None:
    """Numbers of query and kv heads of the source's size that make up the hidden size of ``config``.

    Groups are as large as before if that is possible. None if there are no such numbers, or ``config`` has them already.
    """
    axes, old = source.family.axes, source.sizes
    hidden = config[axes["hidden"]]
    if hidden % old["head_dim"] or hidden == old["hidden"] or "kv_heads" not in axes:
        return None
    heads, group = hidden // old["head_dim"], old["heads"] // old["kv_heads"]
    fitting = fitting_kv_heads((old["heads"], old["kv_heads"]), heads)
    for kv_heads in sorted(fitting, key=lambda count: (heads // count != group, count)):
        found = {"heads": heads, "kv_heads": kv_heads}
        if _is_valid({**config, **{axes[axis]: count for axis, count in found.items()}}):
            return found
    return None


def _first_valid(config: Mapping[str, Any], field: str, candidates: range) -> int | None:
    return next((size for size in candidates if _is_valid({**config, field: size})), None)


def _is_valid(config: Mapping[str, Any]) -> bool:
    try:
        architecture_from_config(config, "candidate")
    except IncrError:
        return False
    return True


def _inexact(
    source: Architecture,
    target: Architecture,
    recipe: GrowthRecipe,
    axes: Mapping[str, AxisGrowth],
    layers: tuple[LayerSource, ...],
) -> tuple[str, ...]:
    """The reasons why the target does not compute the source's function; empty if it does."""
    family = source.family
    uneven = [axis for axis in family.equal_copies if len(set(axes[axis].copies)) > 1]
    checks = [
        (
            any(layer.is_new for layer in layers) and recipe.depth.new not in SILENT,
            f"depth.new: {recipe.depth.new} does not keep the source's function; expect a higher loss at the first step",
        ),
        (
            not keeps_order(layers, source.num_layers),
            "depth.map leaves layers out or changes their order, which does not keep the source's function",
        ),
        (
            not axes["vocab"].is_identity,
            f"target.{family.axes['vocab']}: new entries take probability from the old ones, whose logits stay",
        ),
        (
            recipe.width.copies_from == "next-layer" and any(max(axes[axis].copies) > 1 for axis in WIDTH_AXES),
            "width.copies_from: next-layer does not keep the source's function: further copies are another layer's units",
        ),
        (
            target.config.get(ROTARY) != source.config.get(ROTARY),
            f"target.{ROTARY}: the rotary pairs turn at other speeds, which does not keep the source's function",
        ),
        *_inexact_widths(source, axes),
        chosen_experts(source, target),
        (recipe.fitted is not None, "fitted operators lower the loss and do not keep the source's function"),
        (
            bool(uneven),
            f"{family.model_type} has a norm over all heads at once, so that {' and '.join(uneven)} keep the source's function "
            "only with new: copy and a multiple of the old count",
        ),
    ]
    return tuple(text for applies, text in checks if applies)


def _inexact_widths(source: Architecture, axes: Mapping[str, AxisGrowth]) -> tuple[tuple[bool, str], ...]:
    """What the operators of width axes change: whether each reason applies, and the reason."""
    family, hidden = source.family, axes["hidden"]
    padded = [f"{axis}.new: {axes[axis].method}" for axis in UNITS if _is_padded(axes[axis])]
    return (
        (
            hidden.method in ("random", "constant"),
            f"width.hidden: {hidden.method} does not keep the source's function: the norms see what the new positions hold",
        ),
        (
            bool(padded),
            f"width.{' and width.'.join(padded)} does not keep the source's function: new units write at once",
        ),
        (
            hidden.method == "fpi" and len(set(hidden.copies)) > 1,
            "width.hidden: fpi with positions copied unequally often does not keep the source's function: the norms' mean "
            "square changes",
        ),
        (
            family.norm == "layer"
            and hidden.method in ("isometric", "zero", "zero-scaled-eps")
            and len(set(hidden.copies)) > 1,
            f"width.hidden: {hidden.method} does not keep the source's function under LayerNorm, whose mean changes",
        ),
        (
            hidden.centred and source.tied,
            "width.hidden: centred does not keep the source's function with tied embeddings, since the head's rows lose their "
            "mean too; width.hidden: mean does",
        ),
    )


def _is_padded(axis: AxisGrowth) -> bool:
    return axis.method in PADDING and FRESH in axis.index


def _method_notes(
    recipe: GrowthRecipe, axes: Mapping[str, AxisGrowth], layers: tuple[LayerSource, ...]
) -> tuple[str, ...]:
    if recipe.recipe is None:
        return ()
    method = methods()[recipe.recipe]
    grown = {
        "width": any(not axes[axis].is_identity for axis in WIDTH_AXES if axis in axes),
        "depth": any(layer.is_new for layer in layers),
    }
    beyond = [
        f"{recipe.recipe} is published for {method.grows[0]} alone; the growth in {part} is this recipe's own"
        for part, grows in grown.items()
        if grows and part not in method.grows
    ]
    return (f"{recipe.recipe}: {method.published}. {method.known}", *beyond)


def size_warnings(ratio: float) -> tuple[str, ...]:
    """Warnings from the literature about a growth to ``ratio`` times the parameters."""
    if ratio <= LARGEST:
        return ()
    return (f"grows {ratio:.1f} times; published gains are for 2 to 4 times in one step",)


def _is_uneven(axis: AxisGrowth) -> bool:
    """Whether positions of the axis need different learning rates, or new ones have no source to follow."""
    return not axis.is_identity and len({*zip(axis.amplitude, axis.share, axis.gradient, strict=True)}) > 1


def _notes(recipe: GrowthRecipe, axes: Mapping[str, AxisGrowth]) -> tuple[str, ...]:
    breaking, hidden = recipe.width.symmetry_breaking.method, axes["hidden"]
    checks = [
        (
            breaking == "none" and any(max(axis.copies) > 1 for axis in axes.values()),
            "symmetry_breaking: none leaves copies equal, and training never makes them differ",
        ),
        (
            breaking != "none" and recipe.optimizer == "rescale" and max(hidden.copies) > 1,
            "moments follow the rules of even shares; with per-element shares they are the nearest rule",
        ),
        (
            recipe.optimizer == "rescale" and any(_is_uneven(axis) for axis in axes.values()),
            "the optimizer's multipliers are means over positions that would each need their own (docs/exactness.md)",
        ),
    ]
    return tuple(text for applies, text in checks if applies)
