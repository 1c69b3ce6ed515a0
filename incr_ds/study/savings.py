"""The three ratios of a study: what it costs an arm to reach the loss of training from scratch.

For a budget tau (tokens per parameter of the target), L(tau) is the decayed loss of scratch and C(tau) what it cost.

- R_target = cost of the arm at loss L(tau), its source counted, / C(tau).
- R_sunk = the same without the source's cost.
- R_frontier = cost of the arm at L(tau) / the lowest cost at L(tau) among models of several sizes trained from scratch.

All is computed within a seed, by decayed losses only. Between two branches the logarithm of the cost is interpolated linearly in
the loss. Nothing is extrapolated: where the branches do not enclose L(tau), the ratio has a bound instead of a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Currency = Literal["flops", "seconds"]


@dataclass(frozen=True)
class Branch:
    """One decayed run: the arm and the budget that it belongs to, its loss, and its cost with and of its source.

    ``repetition_gain`` is as in Measures; None in results of older versions.
    """

    arm: str
    seed: int
    rate: float
    budget: int
    position: int
    loss: float
    flops: float
    source_flops: float
    seconds: float
    source_seconds: float
    repetition_gain: float | None = None

    def cost(self, currency: Currency) -> float:
        """What it cost, its source counted."""
        return self.flops if currency == "flops" else self.seconds

    def source_cost(self, currency: Currency) -> float:
        """What its source cost."""
        return self.source_flops if currency == "flops" else self.source_seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio of costs. If ``bound`` is set, the true one is above (or below) ``value``."""

    value: float
    bound: Literal["above", "below"] | None = None


@dataclass(frozen=True)
class Band:
    """A ratio over seeds: the mean, the lowest and the highest. ``bound`` as in Ratio, if any seed has one."""

    value: float
    low: float
    high: float
    seeds: int
    bound: Literal["above", "below"] | None = None


def reached(costs: Sequence[float], losses: Sequence[float], loss: float) -> Ratio | None:
    """The cost at which a curve of decayed losses reaches ``loss``. ``costs`` ascend. None for an empty curve.

    The value is a bound if all losses are above ``loss`` (the last cost) or the first is already below (the first cost).
    """
    if not costs:
        return None
    if losses[0] <= loss:
        return Ratio(costs[0], None if losses[0] == loss else "below")
    for (cost, high), (later, low) in pairwise(zip(costs, losses, strict=True)):
        if low <= loss < high:
            share = (high - loss) / (high - low)
            return Ratio(math.exp(math.log(cost) + share * (math.log(later) - math.log(cost))))
    return Ratio(costs[-1], "above")


def ratios(
    arm: Sequence[Branch], scratch: Branch, frontier: Mapping[str, Sequence[Branch]], currency: Currency = "flops"
) -> dict[str, Ratio]:
    """R_target, R_sunk and R_frontier of one seed: ``arm``'s branches against scratch's branch at the same budget.

    ``frontier`` holds the branches of every arm whose cheapest is the frontier, at all budgets.
    """
    at = reached(*_curve(arm, currency), scratch.loss)
    if at is None:
        return {}
    source = arm[0].source_cost(currency)
    whole = scratch.cost(currency)
    curves = [_curve(branches, currency) for branches in frontier.values() if branches]
    others = [cost for curve in curves if (cost := reached(*curve, scratch.loss)) and cost.bound != "above"]
    cheapest = min([Ratio(whole), *others], key=lambda cost: cost.value)
    # The frontier may be cheaper than what was measured: an arm may reach the loss before its first branch or after its last.
    # The ratio is then above what the measured cost gives.
    cheaper = cheapest.bound or any(_may_reach(*curve, scratch.loss, cheapest.value) for curve in curves)
    bound = at.bound or ("above" if cheaper else None)
    return {
        "r_target": Ratio(at.value / whole, at.bound),
        "r_sunk": Ratio((at.value - source) / whole, at.bound),
        "r_frontier": Ratio(at.value / cheapest.value, bound),
    }


def band(found: Iterable[Ratio]) -> Band | None:
    """Summarize a ratio over seeds; None without any."""
    over = list(found)
    if not over:
        return None
    values = [ratio.value for ratio in over]
    bound = next((ratio.bound for ratio in over if ratio.bound), None)
    return Band(sum(values) / len(values), min(values), max(values), len(values), bound)


def _curve(branches: Sequence[Branch], currency: Currency) -> tuple[list[float], list[float]]:
    """Costs in ascending order, and the losses that they reach."""
    ordered = sorted(branches, key=lambda branch: branch.cost(currency))
    return [branch.cost(currency) for branch in ordered], [branch.loss for branch in ordered]


def _may_reach(costs: Sequence[float], losses: Sequence[float], loss: float, cost: float) -> bool:
    """Whether a curve that ends above ``loss`` may reach it for less than ``cost``.

    Losses over the logarithm of the cost flatten, so a line through the last two branches is below the curve.
    """
    if min(losses) <= loss or costs[-1] >= cost:
        return False
    if len(costs) < 2 or losses[-1] >= losses[-2]:
        return len(costs) < 2
    slope = (losses[-1] - losses[-2]) / math.log(costs[-1] / costs[-2])
    return losses[-1] + slope * math.log(cost / costs[-1]) <= loss
