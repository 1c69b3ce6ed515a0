"""Predicts what growth saves, and which loss a number of FLOPs buys, from what was measured. Every number is a prediction.

The saving is interpolated between the studies of evidence.yaml. The loss follows a published scaling law, which was fitted on
other data and another tokenizer: it ranks options, and says nothing about the loss of a certain run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from pydantic import Field

from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.yaml_file import read_yaml

# L(N, D) = E + A / N^ALPHA + B / D^BETA in nats per token: Hoffmann et al., arXiv 2203.15556, approach 3, as corrected by
# Besiroglu et al., arXiv 2404.10102.
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
LAW = "the scaling law of arXiv 2203.15556 as corrected by 2404.10102"
FLOPS_PER_PARAMETER = 6  # of one training token
REACH = 3.0  # decades of FLOPs from the nearest point, within which points decide the slope of an extrapolation
SPREAD, SPREAD_PER_DECADE = (
    0.04,
    0.02,
)  # of the ratio: where something was measured, and more per factor 10 outside of it


class MeasuredRatio(Settings):
    """One measured ratio: cost of growth, source included, divided by the cost of scratch at the same loss."""

    flops: float = Field(gt=0.0)
    ratio: float = Field(gt=0.0)
    of: str


class Evidence(Settings):
    """The points of evidence.yaml, the growth that they measured, and the lowest and highest tokens per parameter."""

    layers_factor: int
    tokens_per_parameter: list[float] = Field(min_length=2, max_length=2)
    source_share: float = Field(gt=0.0, lt=1.0)
    points: list[MeasuredRatio] = Field(min_length=2)


@dataclass(frozen=True)
class PredictedSaving:
    """A predicted R_target, its band, and its basis. ``decades`` is how far outside of the measured FLOPs it lies, as log10."""

    ratio: float
    low: float
    high: float
    decades: float
    basis: str


def law_loss(parameters: float, tokens: float) -> float:
    """Loss in nats per token of a model of ``parameters`` after ``tokens``, by the published law."""
    return float(E + A / parameters**ALPHA + B / tokens**BETA)


def best_size(flops: float) -> float:
    """The parameters with the lowest ``law_loss`` for ``flops``, at 6 FLOPs per parameter and token."""
    balance = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return float(balance * (flops / FLOPS_PER_PARAMETER) ** (BETA / (ALPHA + BETA)))


@cache
def evidence() -> Evidence:
    """What was measured, in order of FLOPs."""
    path = Path(__file__).with_name("evidence.yaml")
    found = parse_settings(read_yaml(path), Evidence, str(path))
    return found.model_copy(update={"points": sorted(found.points, key=lambda point: point.flops)})


def predict_saving(flops: float, measured: Evidence | None = None) -> PredictedSaving:
    """R_target where training from scratch costs ``flops``.

    Between two measured points it is interpolated in log(flops). Outside, it follows the slope of the least-squares line
    through the points near the nearest one, from that one on, and the band grows.
    """
    points = (measured or evidence()).points
    place = math.log10(flops)
    first, last = points[0], points[-1]
    decades = max(0.0, math.log10(first.flops) - place, place - math.log10(last.flops))
    if decades:
        nearest = first if flops < first.flops else last
        near = [point for point in points if abs(math.log10(point.flops / nearest.flops)) <= REACH]
        ratio = nearest.ratio + _slope(near) * (place - math.log10(nearest.flops))
        basis = f"extrapolated by {decades:.1f} decades of FLOPs from {nearest.of}"
    else:
        ratio, basis = _between(points, place)
    spread = SPREAD + SPREAD_PER_DECADE * decades
    return PredictedSaving(ratio, ratio - spread, ratio + spread, decades, basis)


def _between(points: list[MeasuredRatio], place: float) -> tuple[float, str]:
    for one, other in pairwise(points):
        left, right = math.log10(one.flops), math.log10(other.flops)
        if left <= place <= right:
            share = (place - left) / (right - left)
            which = one.of if one.of == other.of else f"{one.of} and {other.of}"
            return one.ratio + share * (other.ratio - one.ratio), f"interpolated between {which}"
    raise AssertionError("no two points enclose it")


def _slope(points: list[MeasuredRatio]) -> float:
    """Change of the ratio per factor 10 in FLOPs; none for a single point."""
    if len(points) < 2:
        return 0.0
    places = [math.log10(point.flops) for point in points]
    middle, mean = sum(places) / len(places), sum(point.ratio for point in points) / len(points)
    over = sum((place - middle) * (point.ratio - mean) for place, point in zip(places, points, strict=True))
    return over / sum((place - middle) ** 2 for place in places)
