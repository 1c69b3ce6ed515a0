"""A slow rank is compared with the ranks of its own stage, and named if it delays the step."""

import time

import pytest
import torch
from torch import nn

from incr_ds.config.layout import ParallelLayout
from incr_ds.train.skew import ForwardClock, OwnWork, has_own_work, skew


def work(*seconds, stage=0, first=0):
    return [OwnWork(first + rank, f"host{first + rank}", stage, value) for rank, value in enumerate(seconds)]


def test_the_rank_that_takes_longest_is_named_with_its_host():
    found = skew(work(0.3, 0.31, 0.9, 0.29), step_seconds=1.5, ratio=1.5)
    assert found.counts and found.slowest.rank == 2 and found.ratio == pytest.approx(3.0)
    assert str(found) == (
        "rank 2 on host2 is slow: 0.9 s a step for data and forward passes, 3.0 times the median of the ranks with the same "
        "layers (0.3 s)"
    )


def test_of_two_ranks_the_slower_one_is_compared_with_the_faster():
    assert skew(work(0.2, 0.5), 1.0, 1.5).slowest.rank == 1
    assert skew(work(0.5, 0.2), 1.0, 1.5).ratio == pytest.approx(2.5)


def test_stages_with_more_layers_are_not_slow():
    both = work(0.1, 0.1) + work(0.4, 0.42, stage=1, first=2)
    found = skew(both, 1.0, 1.5)
    assert not found.counts and found.ratio == pytest.approx(1.05)
    both[3] = OwnWork(3, "host3", 1, 0.9)
    assert skew(both, 1.0, 1.5).slowest.rank == 3


def test_what_does_not_delay_the_step_is_not_named():
    assert not skew(work(0.001, 0.004), step_seconds=1.0, ratio=1.5).counts
    assert not skew(work(0.5, 0.7), step_seconds=1.0, ratio=1.5).counts
    assert not skew(work(0.0, 0.0), step_seconds=0.0, ratio=1.5).counts


def test_only_layouts_whose_forward_passes_wait_for_nobody_are_judged():
    judged = [has_own_work(ParallelLayout(data_parallel=2, **changes)) for changes in ({}, {"pipeline_parallel": 2})]
    assert judged == [True, True] and has_own_work(ParallelLayout(data_parallel=2, zero_stage=2))
    for changes in ({"zero_stage": 3}, {"tensor_parallel": 2}):
        assert not has_own_work(ParallelLayout(data_parallel=2, **changes))
    assert not has_own_work(ParallelLayout(pipeline_parallel=2))


def test_a_clock_counts_forward_passes_of_training():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, seconds):
            time.sleep(seconds)
            return self.weight

    module = Slow()
    clock = ForwardClock(module)
    module(0.02)
    module(0.06)
    module.eval()
    module(0.5)
    module.train()
    assert 0.04 <= clock.take() < 0.2
    assert clock.take() == 0.0
