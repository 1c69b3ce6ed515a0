"""Suggests valid targets near a parameter budget, with what each costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from incr_ds.arch.architecture import Architecture
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.yaml_file import yaml_text
from incr_ds.errors import ConfigError, IncrError, LayoutError
from incr_ds.growth.planner import LARGEST, plan_growth, size_warnings
from incr_ds.growth.published import Shapes, shapes_near
from incr_ds.growth.width import fitting_kv_heads
from incr_ds.sharding.placement import check_layout, rank_parameters

DEPTHS = (1.0, 0.92, 1.08)  # factors on the depth that meets the budget
FFNS = (1.0, 1.25)  # factors on the source's proportion
CLOSE = 0.1  # relative distance from the budget that a suggestion may have
WIDEST, DEEPEST = 4, 8  # factors on the source's hidden size and layers
RELIABLE = 2.0  # growth in parameters in one step that is reliable in publications
TOKENS_PER_PARAMETER = 20  # of the target: growth pays up to about here in publications (arXiv 2411.07340)
KERNEL_UNIT = 128  # matrix kernels are fast for multiples of it; narrower models use their own head size
BYTES_WEIGHTS, BYTES_GRADIENTS, BYTES_OPTIMIZER = 2, 2, 12  # bf16, bf16, fp32 master and two moments


@dataclass(frozen=True)
class Suggestion:
    """One target: the recipe's ``target`` and other keys, and what it costs.

    That is its parameters, hidden size divided by layers, training FLOPs per token (6 per parameter that multiplies), bytes
    of weights, gradients and optimizer on the fullest rank (bf16, without activations), and the training tokens up to which
    growth pays in publications. ``warnings`` are notes for the user.
    """

    target: Mapping[str, int]
    recipe: Mapping[str, Any]
    parameters: int
    ratio: float
    shape: float
    flops_per_token: int
    bytes_per_rank: int
    gain_tokens: int
    warnings: tuple[str, ...]


def suggest_targets(source: Architecture, budget: int, layout: ParallelLayout, most: int = 8) -> tuple[Suggestion, ...]:
    """At most ``most`` function-preserving growths of ``source`` to about ``budget`` parameters that ``layout`` can hold.

    Hidden size divided by layers is as in published models of the budget's size, and groups of heads are as large as the
    source's, unless no target has both. Targets that add least width come first. Raises ConfigError if the
    budget is below the source's size, or if nothing within 10 % of it is valid.
    """
    if budget <= source.num_parameters:
        raise ConfigError(
            f"--suggest {budget:,}: the source has {source.num_parameters:,} parameters already; growth only adds."
        )
    shapes = shapes_near(budget)
    nearest = sorted(_candidates(source, budget, layout), key=lambda item: item.distance)
    close = [item for item in nearest if item.distance <= CLOSE]
    close.sort(key=lambda item: item.sizes["hidden"])  # the sort is stable, so the nearest stays first
    usual = [item for item in close if shapes is None or _shape(item.sizes) in shapes]
    grouped = [item for item in usual if _group(item.sizes) == _group(source.sizes)]
    pools = (
        islice((item for item in pool if _is_valid(source, item.sizes, layout)), most)
        for pool in (grouped, usual, close)
    )
    found = next(filter(None, map(list, pools)), [])
    if not found:
        further = (item.sizes for item in nearest[len(close) :])
        reached = next((sizes for sizes in further if _is_valid(source, sizes, layout)), None)
        hint = f"the nearest has {_sized(source, reached).num_parameters:,} parameters" if reached else "nor near it"
        raise ConfigError(
            f"--suggest {budget:,}: no valid target within {CLOSE:.0%} of it in this layout, up to {WIDEST} times as wide and "
            f"{DEEPEST} times as deep; {hint}. Try another budget or layout."
        )
    return tuple(_described(source, item.sizes, layout, shapes) for item in found)


def recipe_text(suggestion: Suggestion, layout: ParallelLayout, *, has_moments: bool) -> str:
    """Format a suggestion as a recipe file with ``layout``."""
    degrees = {key: value for key, value in layout.model_dump().items() if key not in ("zero_stage", "stages")}
    content = {**suggestion.recipe, "optimizer": "rescale" if has_moments else "reset", "layout": degrees}
    head = f"# {suggestion.parameters:,} parameters, {suggestion.ratio:.2f} times the source's; see docs/recipe.md\n"
    return head + "".join(f"# {warning}\n" for warning in suggestion.warnings) + yaml_text(content)


def parse_count(text: str) -> int:
    """Parse a number of parameters: 3e9, 1_300_000_000, 1.3B, 350M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    number, factor = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1.0)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--suggest {text}: expected a number of parameters, like 3e9, 1.3B or 350M.") from error


def parse_layout(text: str) -> ParallelLayout:
    """Parse tensor x pipeline x data, like 2x2x4."""
    parts = text.split("x")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise ConfigError(f"--layout {text}: expected three degrees, tensor x pipeline x data, like 2x2x4.")
    tensor, pipeline, data = map(int, parts)
    return ParallelLayout(tensor_parallel=tensor, pipeline_parallel=pipeline, data_parallel=data)


@dataclass(frozen=True)
class _Candidate:
    """Sizes by axis, and their distance from the budget."""

    sizes: Mapping[str, int]
    distance: float


def _candidates(source: Architecture, budget: int, layout: ParallelLayout) -> Iterator[_Candidate]:
    """For every hidden size, with heads and FFN near the source's proportions, the depths nearest to the budget."""
    old, step = source.sizes, layout.pipeline_parallel
    fewest, most = math.ceil(old["layers"] / step) * step, DEEPEST * old["layers"] // step * step
    seen = set()
    for hidden in _hidden_sizes(source):
        for width in _widths(source, hidden, layout):
            sizes = {**old, **width}
            one, two = (_sized(source, {**sizes, "layers": count}).num_parameters for count in (1, 2))
            exact = (budget - one + (two - one)) / (two - one) / step
            for near in DEPTHS:
                found = {**sizes, "layers": min(max(round(exact * near) * step, fewest), most)}
                if (key := tuple(found.items())) not in seen:
                    seen.add(key)
                    yield _Candidate(found, abs((one + (found["layers"] - 1) * (two - one)) / budget - 1.0))


def _hidden_sizes(source: Architecture) -> range:
    old = source.sizes
    unit = old["head_dim"] if "head_dim" not in source.family.axes or old["hidden"] < 8 * KERNEL_UNIT else KERNEL_UNIT
    return range(old["hidden"], WIDEST * old["hidden"] + 1, unit)


def _widths(source: Architecture, hidden: int, layout: ParallelLayout) -> Iterator[dict[str, int]]:
    """Hidden size, FFN, query and key-value heads in the source's proportions, as far as units and counts allow."""
    if hidden == source.sizes["hidden"]:
        yield {}
        return
    old, factor = source.sizes["ffn"], hidden / source.sizes["hidden"]
    unit = (KERNEL_UNIT if old >= 8 * KERNEL_UNIT else 8) * layout.tensor_parallel
    for heads, kv_heads in _head_counts(source, hidden, layout):
        for more in FFNS:
            ffn = math.ceil(old * factor * more / unit) * unit
            yield {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}


def _head_counts(source: Architecture, hidden: int, layout: ParallelLayout) -> dict[tuple[int, int], None]:
    """Query and key-value heads for a hidden size: groups as large as the source's, and enough queries to fill it."""
    old = source.sizes
    group, filling = old["heads"] // old["kv_heads"], hidden // old["head_dim"]
    if "head_dim" not in source.family.axes:
        return {(filling, filling // group): None}
    per_rank = math.lcm(old["kv_heads"] if source.family.equal_copies else 1, layout.tensor_parallel)
    kv_heads = math.ceil(old["kv_heads"] * hidden / old["hidden"] / per_rank) * per_rank
    found = {(group * kv_heads, kv_heads): None}
    for fitting in fitting_kv_heads((old["heads"], old["kv_heads"]), filling)[:1]:
        found[filling, fitting] = None
    return found


def _sized(source: Architecture, sizes: Mapping[str, int]) -> Architecture:
    return replace(source, sizes=dict(sizes))


def _is_valid(source: Architecture, sizes: Mapping[str, int], layout: ParallelLayout) -> bool:
    try:
        plan = plan_growth(source, parse_settings(_recipe(source, sizes), GrowthRecipe, "suggestion"))
        check_layout(plan.target, layout)
    except (IncrError, LayoutError):
        return False
    return plan.function_preserving


def _recipe(source: Architecture, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The keys of the recipe."""
    content: dict[str, Any] = {"target": _target(source, sizes)}
    if source.family.equal_copies:
        content["width"] = {"heads": {"new": "copy"}}
    return content


def _target(source: Architecture, sizes: Mapping[str, int]) -> dict[str, int]:
    fields = source.family.axes
    return {fields[axis]: size for axis, size in sizes.items() if axis in fields and size != source.sizes[axis]}


def _group(sizes: Mapping[str, int]) -> float:
    return sizes["heads"] / sizes["kv_heads"]


def _shape(sizes: Mapping[str, int]) -> float:
    return sizes["hidden"] / sizes["layers"]


def _described(
    source: Architecture, sizes: Mapping[str, int], layout: ParallelLayout, shapes: Shapes | None
) -> Suggestion:
    target = _sized(source, sizes)
    parameters = target.num_parameters
    multiplied = sum(
        spec.numel for spec in target.tensors if spec.is_matrix and spec.role not in ("embedding", "positions")
    )
    ratio = parameters / source.num_parameters
    return Suggestion(
        _target(source, sizes),
        _recipe(source, sizes),
        parameters,
        ratio,
        _shape(sizes),
        6 * multiplied,
        _bytes(target, layout),
        TOKENS_PER_PARAMETER * parameters,
        (*_warnings(source, sizes, ratio), *_shape_warnings(_shape(sizes), shapes)),
    )


def _bytes(target: Architecture, layout: ParallelLayout) -> int:
    """Bytes of weights, gradients and optimizer on the fullest rank.

    From ZeRO-1 on the optimizer is cut over data-parallel ranks, then the gradients, then the weights.
    """
    stages, tensors = range(layout.pipeline_parallel), range(layout.tensor_parallel)
    held = max(
        sum(shard.numel for shard in rank_parameters(target, layout, stage, rank))
        for stage in stages
        for rank in tensors
    )
    parts = [BYTES_OPTIMIZER, BYTES_GRADIENTS, BYTES_WEIGHTS]
    cut = sum(parts[: layout.zero_stage])
    return held * (sum(parts) - cut) + held * cut // layout.data_parallel


def _warnings(source: Architecture, sizes: Mapping[str, int], ratio: float) -> tuple[str, ...]:
    checks = [
        (RELIABLE < ratio <= LARGEST, f"grows {ratio:.1f} times; 2 times is most reliable (arXiv 2411.07340)"),
        (
            sizes["layers"] == source.sizes["layers"],
            "width alone: in G_stack's comparison (arXiv 2405.15319) it did not pay when the source's own cost is counted",
        ),
    ]
    return (*size_warnings(ratio), *(text for applies, text in checks if applies))


def _shape_warnings(shape: float, shapes: Shapes | None) -> tuple[str, ...]:
    if shapes is None or shape in shapes:
        return ()
    which = "deeper" if shape < shapes.deepest else "wider"
    return (f"{which} than published models near its size, {shapes} hidden size per layer",)
