"""Which larger models are worth asking for: valid targets near a parameter budget, with what each costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from incr_ds.arch.architecture import Architecture
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, IncrError, LayoutError
from incr_ds.growth.planner import LARGEST, plan_growth, size_warnings
from incr_ds.target.placement import check_layout, rank_parameters

CLOSE = 0.1  # how far from the budget a suggestion may be
WIDEST, DEEPEST = 4, 8  # times the source's hidden size and layers
RELIABLE = 2.0  # growth in parameters at once, in what is published
TOKENS_PER_PARAMETER = 20  # of the target: up to about here growth pays in what is published (arXiv 2411.07340)
KERNEL_UNIT = 128  # sizes that matrix kernels like; narrower models use their own head size
BYTES_WEIGHTS, BYTES_GRADIENTS, BYTES_OPTIMIZER = 2, 2, 12  # bf16, bf16, fp32 master and two moments


@dataclass(frozen=True)
class Suggestion:
    """One target: the recipe's ``target``, its parameters, training FLOPs per token (6 per parameter that multiplies),
    bytes of weights, gradients and optimizer on the fullest rank (bf16, activations not counted), the training tokens up to
    which growth pays in what is published, and what to know."""

    target: Mapping[str, int]
    parameters: int
    ratio: float
    flops_per_token: int
    bytes_per_rank: int
    gain_tokens: int
    warnings: tuple[str, ...]


def suggest_targets(source: Architecture, budget: int, layout: ParallelLayout, most: int = 5) -> tuple[Suggestion, ...]:
    """At most ``most`` exact growths of ``source`` to about ``budget`` parameters that ``layout`` can hold.

    The ones that grow width and depth most evenly come first. Raises ConfigError if the budget is below the source's
    size, or if nothing within 10 % of it is valid.
    """
    if budget <= source.num_parameters:
        raise ConfigError(
            f"--suggest {budget:,}: the source has {source.num_parameters:,} parameters already; growth only adds."
        )
    nearest = sorted(_candidates(source, budget, layout), key=lambda sizes: _distance(source, sizes, budget))
    close = [sizes for sizes in nearest if _distance(source, sizes, budget) <= CLOSE]
    found = [sizes for sizes in close if _is_valid(source, sizes, layout)]
    if not found:
        reached = next((sizes for sizes in nearest[len(close) :] if _is_valid(source, sizes, layout)), None)
        hint = f"the nearest has {_sized(source, reached).num_parameters:,} parameters" if reached else "nor near it"
        raise ConfigError(
            f"--suggest {budget:,}: no valid target within {CLOSE:.0%} of it in this layout, up to {WIDEST} times as wide and "
            f"{DEEPEST} times as deep; {hint}. Try another budget or layout."
        )
    found.sort(key=lambda sizes: _unevenness(source, sizes))  # of equals, the nearest stays first
    return tuple(_described(source, sizes, layout) for sizes in found[:most])


def parse_count(text: str) -> int:
    """A number of parameters: 3e9, 1_300_000_000, 1.3B, 350M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    number, factor = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1.0)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--suggest {text}: expected a number of parameters, like 3e9, 1.3B or 350M.") from error


def parse_layout(text: str) -> ParallelLayout:
    """Tensor x pipeline x data, like 2x2x4."""
    parts = text.split("x")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise ConfigError(f"--layout {text}: expected three degrees, tensor x pipeline x data, like 2x2x4.")
    tensor, pipeline, data = map(int, parts)
    return ParallelLayout(tensor_parallel=tensor, pipeline_parallel=pipeline, data_parallel=data)


def _candidates(source: Architecture, budget: int, layout: ParallelLayout) -> Iterator[dict[str, int]]:
    """For every hidden size the depth that comes nearest to the budget, as sizes by axis."""
    old, step = source.sizes, layout.pipeline_parallel
    fewest, most = math.ceil(old["layers"] / step) * step, DEEPEST * old["layers"] // step * step
    for hidden in _hidden_sizes(source):
        sizes = {**old, **_width(source, hidden, layout)}
        one, two = (_sized(source, {**sizes, "layers": count}).num_parameters for count in (1, 2))
        layers = round((budget - one + (two - one)) / (two - one) / step) * step
        yield {**sizes, "layers": min(max(layers, fewest), most)}


def _distance(source: Architecture, sizes: Mapping[str, int], budget: int) -> float:
    return abs(_sized(source, sizes).num_parameters / budget - 1.0)


def _hidden_sizes(source: Architecture) -> range:
    old = source.sizes
    unit = old["head_dim"] if "head_dim" not in source.family.axes or old["hidden"] < 8 * KERNEL_UNIT else KERNEL_UNIT
    return range(old["hidden"], WIDEST * old["hidden"] + 1, unit)


def _width(source: Architecture, hidden: int, layout: ParallelLayout) -> dict[str, int]:
    """Heads, key-value heads and FFN in the source's proportions, rounded up to what groups and tensor ranks need."""
    old, factor = source.sizes, hidden / source.sizes["hidden"]
    group = old["heads"] // old["kv_heads"]
    if hidden == old["hidden"]:
        return {}
    if "head_dim" in source.family.axes:
        per_rank = math.lcm(old["kv_heads"] if source.family.equal_copies else 1, layout.tensor_parallel)
        kv_heads = math.ceil(old["kv_heads"] * factor / per_rank) * per_rank
        heads = group * kv_heads
    else:
        heads = hidden // old["head_dim"]
        kv_heads = heads // group
    unit = (KERNEL_UNIT if old["ffn"] >= 8 * KERNEL_UNIT else 8) * layout.tensor_parallel
    return {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": math.ceil(old["ffn"] * factor / unit) * unit}


def _sized(source: Architecture, sizes: Mapping[str, int]) -> Architecture:
    return replace(source, sizes=dict(sizes))


def _is_valid(source: Architecture, sizes: Mapping[str, int], layout: ParallelLayout) -> bool:
    try:
        plan = plan_growth(source, _recipe(source, sizes))
        check_layout(plan.target, layout)
    except (IncrError, LayoutError):
        return False
    return plan.exact


def _recipe(source: Architecture, sizes: Mapping[str, int]) -> GrowthRecipe:
    content: dict[str, Any] = {"target": _target(source, sizes)}
    if source.family.equal_copies:
        content["width"] = {"heads": {"new": "copy"}}
    return parse_settings(content, GrowthRecipe, "suggestion")


def _target(source: Architecture, sizes: Mapping[str, int]) -> dict[str, int]:
    fields = source.family.axes
    return {fields[axis]: size for axis, size in sizes.items() if axis in fields and size != source.sizes[axis]}


def _unevenness(source: Architecture, sizes: Mapping[str, int]) -> float:
    width, depth = (math.log(sizes[axis] / source.sizes[axis]) for axis in ("hidden", "layers"))
    return abs(width - depth)


def _described(source: Architecture, sizes: Mapping[str, int], layout: ParallelLayout) -> Suggestion:
    target = _sized(source, sizes)
    parameters = target.num_parameters
    multiplied = sum(
        spec.numel for spec in target.tensors if spec.is_matrix and spec.role not in ("embedding", "positions")
    )
    ratio = parameters / source.num_parameters
    return Suggestion(
        _target(source, sizes),
        parameters,
        ratio,
        6 * multiplied,
        _bytes(target, layout),
        TOKENS_PER_PARAMETER * parameters,
        _warnings(source, sizes, ratio),
    )


def _bytes(target: Architecture, layout: ParallelLayout) -> int:
    """Weights, gradients and optimizer on the fullest rank; from ZeRO-1 on the optimizer is cut over data ranks, then the
    gradients, then the weights."""
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
