"""Ratios of costs against curves whose answers are known."""

import math
from collections.abc import Sequence

import pytest

from incr_ds.study.savings import Band, Branch, Ratio, band, ratios, reached

FLOOR = 1.0  # of the curves: loss = FLOOR + (cost / scale) ** -0.1


def loss_at(cost: float, scale: float) -> float:
    return FLOOR + (cost / scale) ** -0.1


def cost_at(loss: float, scale: float) -> float:
    return scale * (loss - FLOOR) ** -10.0


def branches(arm: str, costs: Sequence[float], scale: float, source: float = 0.0, budget: int = 10) -> list[Branch]:
    return [
        Branch(arm, 0, 1e-3, budget, round(cost), loss_at(cost, scale), cost, source, 2 * cost, 2 * source)
        for cost in costs
    ]


def test_a_loss_between_two_branches_is_interpolated_in_the_logarithm_of_the_cost():
    # Halfway in the loss is halfway in log cost: the geometric mean of 100 and 400.
    assert reached([100.0, 400.0], [3.0, 2.0], 2.5) == Ratio(pytest.approx(200.0))
    assert reached([100.0, 400.0], [3.0, 2.0], 2.0) == Ratio(pytest.approx(400.0))
    assert reached([100.0, 400.0], [3.0, 2.0], 3.0) == Ratio(100.0)


def test_nothing_is_extrapolated():
    assert reached([100.0, 400.0], [3.0, 2.0], 1.9) == Ratio(400.0, "above")
    assert reached([100.0, 400.0], [3.0, 2.0], 3.1) == Ratio(100.0, "below")
    assert reached([], [], 3.0) is None


def test_the_first_crossing_counts_if_a_later_branch_is_worse():
    assert reached([1.0, 2.0, 4.0, 8.0], [4.0, 2.0, 3.0, 1.0], 2.5).value == pytest.approx(2.0**0.75)


def test_ratios_of_power_laws_are_those_of_their_scales():
    """An arm that needs 0.7 of the cost at any loss has R_target 0.7; its source was 0.2 of scratch's cost."""
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [500.0, 690.0, 710.0, 900.0], scale=0.7, source=200.0)
    small = branches("small", [300.0, 795.0, 805.0, 1200.0], scale=0.8, budget=40)
    found = ratios(arm, scratch, {"scratch": [scratch], "small": small})
    assert found["r_target"].value == pytest.approx(0.7, abs=1e-4) and found["r_target"].bound is None
    assert found["r_sunk"].value == pytest.approx(0.5, abs=1e-4)
    assert found["r_frontier"].value == pytest.approx(0.7 / 0.8, abs=1e-4)  # the smaller model needs 0.8
    assert cost_at(scratch.loss, 0.7) == pytest.approx(700.0)


def test_a_frontier_that_starts_below_the_loss_gives_a_bound():
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [690.0, 710.0], scale=0.7)
    small = branches("small", [600.0, 900.0], scale=0.5)  # it needs 500, but its first branch ends at 600
    found = ratios(arm, scratch, {"small": small})["r_frontier"]
    assert found.value == pytest.approx(700 / 600, abs=1e-4) and found.bound == "above"
    assert ratios(arm, scratch, {"small": small})["r_target"].bound is None


def test_a_frontier_that_ends_just_above_the_loss_gives_a_bound_and_a_hopeless_arm_does_not():
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [690.0, 710.0], scale=0.7)
    ending = branches("small", [600.0, 750.0], scale=0.8)  # it needs 800, less than scratch's 1000, and stopped at 750
    found = ratios(arm, scratch, {"small": ending})["r_frontier"]
    assert found.value == pytest.approx(0.7, abs=1e-4) and found.bound == "above"
    hopeless = branches("tiny", [400.0, 900.0], scale=3.0)
    found = ratios(arm, scratch, {"small": hopeless})["r_frontier"]
    assert found.value == pytest.approx(0.7, abs=1e-4) and found.bound is None
    once = ratios(arm, scratch, {"small": ending[:1]})["r_frontier"]
    assert once.bound == "above"


def test_seconds_are_compared_like_flops():
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [690.0, 710.0], scale=0.7, source=200.0)
    found = ratios(arm, scratch, {"scratch": [scratch]}, "seconds")
    assert found["r_target"].value == pytest.approx(0.7, abs=1e-4)
    assert found["r_sunk"].value == pytest.approx(0.5, abs=1e-4)


def test_interpolation_errs_by_less_than_what_is_claimed():
    """Branches at 0.75, 0.9 and 1.0 of the tokens: log cost is nearly linear in the loss there, to 0.2 %."""
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [600.0, 800.0, 900.0], scale=0.7, source=200.0)
    assert ratios(arm, scratch, {})["r_target"].value == pytest.approx(0.7, rel=2e-3)


def test_a_bound_stays_a_bound():
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    found = ratios(branches("slow", [800.0, 900.0], scale=1.2), scratch, {})
    assert found["r_target"] == Ratio(0.9, "above") and found["r_sunk"].bound == "above"
    assert band([found["r_target"], Ratio(0.8)]).bound == "above"


def test_a_band_is_the_mean_with_the_lowest_and_the_highest_seed():
    assert band([Ratio(0.8), Ratio(0.7), Ratio(0.9)]) == Band(pytest.approx(0.8), 0.7, 0.9, 3)
    assert band([]) is None


def test_costs_are_told_in_any_order():
    scratch = branches("scratch", [1000.0], scale=1.0)[0]
    arm = branches("stack", [710.0, 690.0], scale=0.7)
    assert ratios(arm, scratch, {})["r_target"].value == pytest.approx(0.7, abs=1e-4)
    assert math.isclose(ratios(arm, scratch, {})["r_frontier"].value, ratios(arm, scratch, {})["r_target"].value)
