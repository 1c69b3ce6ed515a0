"""Fitted operators: factors on the amplitudes and shares of a recipe's own operators, and sums of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from incr_ds.arch.architecture import Architecture
from incr_ds.config.growth import FittedAxis, FittedOperators, GrowthRecipe
from incr_ds.errors import GrowthError
from incr_ds.growth.axis import AxisGrowth
from incr_ds.growth.depth import LayerSource

FITTED_AXES = ("hidden", "ffn", "heads", "kv_heads")


def fitted_axes(
    source: Architecture,
    recipe: GrowthRecipe,
    axes: Mapping[str, AxisGrowth],
    layers: Sequence[LayerSource],
    where: str,
) -> dict[str, AxisGrowth]:
    """Apply the recipe's fitted factors to ``axes``. Raises GrowthError if they do not belong to this growth."""
    fitted = recipe.fitted or FittedOperators()
    check_fittable(source, recipe, where)
    problems = [
        f"  fitted.axes.{name}.{part}: {len(values)} factors, but the axis has {axes[name].new} positions"
        for name, factors in fitted.axes.items()
        if name in axes
        for part, values in (("amplitude", factors.amplitude), ("share", factors.share))
        if len(values) != axes[name].new
    ]
    problems += [
        f"  fitted.axes.{name}: not an axis that can be fitted; these can: {', '.join(FITTED_AXES)}"
        for name in fitted.axes
        if name not in FITTED_AXES
    ]
    if fitted.layers and len(fitted.layers) != len(layers):
        problems.append(f"  fitted.layers: {len(fitted.layers)} entries, but the target has {len(layers)} layers")
    outside = {layer for weights in fitted.layers for layer in weights if not 0 <= layer < source.num_layers}
    problems += [f"  fitted.layers: {layer} is not a layer of the source" for layer in sorted(outside)]
    if problems:
        lines = [f"{where}: the fitted operators belong to another growth; fit again (tools/fit_growth.py)", *problems]
        raise GrowthError("\n".join(lines))
    return {name: _times(axis, fitted.axes[name]) if name in fitted.axes else axis for name, axis in axes.items()}


def check_fittable(source: Architecture, recipe: GrowthRecipe, where: str) -> None:
    """Raise GrowthError for moments, LayerNorm, and operators that are not factors and sums, which cannot be fitted."""
    width = recipe.width
    checks = [
        (
            recipe.optimizer != "reset",
            f"optimizer: {recipe.optimizer}; moments do not follow fitted operators, set reset",
        ),
        (
            source.family.norm != "rms",
            f"{source.family.model_type} has LayerNorm; only families with RMSNorm can be fitted",
        ),
        (width.symmetry_breaking.method == "noise", "symmetry_breaking: noise; set per-element, diagonal or none"),
        (width.copies_from != "own-layer", f"copies_from: {width.copies_from}; set own-layer"),
    ]
    wrong = [text for applies, text in checks if applies]
    if wrong:
        raise GrowthError(f"{where}: fitted operators do not support {'; '.join(wrong)}.")


def _times(axis: AxisGrowth, factors: FittedAxis) -> AxisGrowth:
    amplitude = tuple(s * factor for s, factor in zip(axis.amplitude, factors.amplitude, strict=True))
    share = tuple(w * factor for w, factor in zip(axis.share, factors.share, strict=True))
    return replace(axis, amplitude=amplitude, share=share)
