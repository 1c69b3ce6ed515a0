"""Predictions: the law against published numbers and a search, the saving against lines with known answers."""

import math

import pytest

from incr_ds.study.forecast import Evidence, MeasuredRatio, best_size, evidence, law_loss, predict_saving

LINE = Evidence(
    layers_factor=2,
    source_share=0.5,
    tokens_per_parameter=[5, 20],
    points=[MeasuredRatio(flops=10.0**place, ratio=1.0 - 0.05 * place, of=f"1e{place}") for place in (2, 3, 5)],
)


def test_the_law_is_the_published_one():
    # Chinchilla: 70e9 parameters, 1.4e12 tokens. 482.01 / 70e9^.3478 + 2085.43 / 1.4e12^.3658 + 1.8172
    by_hand = 1.8172 + 482.01 / math.exp(0.3478 * math.log(70e9)) + 2085.43 / math.exp(0.3658 * math.log(1.4e12))
    assert law_loss(70e9, 1.4e12) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("flops", [1e15, 1e19, 5.76e23])
def test_the_best_size_is_where_a_search_finds_it(flops):
    sizes = [best_size(flops) * 1.002**step for step in range(-2000, 2001)]
    found = min(sizes, key=lambda size: law_loss(size, flops / 6 / size))
    assert found == pytest.approx(best_size(flops), rel=0.003)


def test_a_saving_is_interpolated_in_the_logarithm_of_flops():
    for place in (2.0, 2.5, 3.0, 4.2, 5.0):
        saving = predict_saving(10**place, LINE)
        assert saving.ratio == pytest.approx(1.0 - 0.05 * place)
        assert (saving.ratio - saving.low, saving.high - saving.ratio) == pytest.approx((0.04, 0.04))
    assert predict_saving(10**4.2, LINE).basis == "interpolated between 1e3 and 1e5"


@pytest.mark.parametrize(("place", "decades", "nearest"), [(7.0, 2.0, "1e5"), (0.5, 1.5, "1e2")])
def test_outside_of_the_measured_range_it_says_so_and_the_band_grows(place, decades, nearest):
    saving = predict_saving(10**place, LINE)
    assert saving.ratio == pytest.approx(1.0 - 0.05 * place)
    assert saving.high - saving.ratio == pytest.approx(0.04 + 0.02 * decades)
    assert saving.basis == f"extrapolated by {decades:.1f} decades of FLOPs from {nearest}"


def test_a_point_far_away_does_not_change_the_slope():
    far = MeasuredRatio(flops=1e-9, ratio=0.2, of="far")
    more = LINE.model_copy(update={"points": [far, *LINE.points]})
    assert predict_saving(1e7, more).ratio == pytest.approx(1.0 - 0.05 * 7)
    assert predict_saving(1e-11, more).ratio == pytest.approx(0.2)  # a point alone has no slope


def test_the_evidence_is_in_order_and_names_its_origin():
    found = evidence()
    assert [point.flops for point in found.points] == sorted(point.flops for point in found.points)
    assert all(point.of for point in found.points)
