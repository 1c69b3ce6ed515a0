"""Where the time between two logged steps goes, by a clock that the test moves."""

import os
from itertools import islice

import numpy as np
import pytest
import torch
from one_number import LENGTH, SKIPPED, curve, make_world, settings, stop_at, stoppable

from incr_ds.train import loop, stopwatch
from incr_ds.train.metrics import read_metrics
from incr_ds.train.pretraining import pretrain
from incr_ds.train.stopwatch import Lap, Stopwatch, memory_bytes


@pytest.fixture
def clock(monkeypatch):
    """A clock of which every tick is written down: clock(3) lets three seconds pass."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


def test_a_lap_counts_steps_waiting_and_saving_apart(clock):
    def slow():
        for number in range(3):
            clock(0.5)
            yield number

    watch = Stopwatch(1000)
    feed = watch.waiting(slow())
    assert list(islice(feed, 2)) == [0, 1]
    clock(3.0)
    assert watch.lap(1800) == Lap(seconds=4.0, tokens_per_second=200.0, data_seconds=1.0, save_seconds=0.0)
    with watch.saving():
        clock(7.0)
    watch.restart(1800)
    assert next(feed) == 2
    clock(1.5)
    assert watch.lap(2000) == Lap(seconds=2.0, tokens_per_second=100.0, data_seconds=0.5, save_seconds=7.0)
    clock(1.0)
    assert watch.lap(2100) == Lap(seconds=1.0, tokens_per_second=100.0, data_seconds=0.0, save_seconds=0.0)
    assert list(feed) == []


def test_a_failed_save_is_counted_too(clock):
    watch = Stopwatch(0)
    with pytest.raises(ValueError, match="full"), watch.saving():
        clock(2.0)
        raise ValueError("full")
    clock(1.0)
    assert watch.lap(1).save_seconds == 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured instead")
def test_memory_is_what_the_process_holds_and_its_peak():
    before, _ = memory_bytes()
    held = np.ones(64 << 20, np.uint8)
    with_it, peak = memory_bytes()
    assert with_it - before > 0.9 * held.nbytes and peak >= with_it
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert with_it == pytest.approx(resident, rel=0.05)
    del held
    assert memory_bytes()[1] > 0.99 * peak  # the kernel counts single pages late


def rows_of(run, kind="train"):
    return [item for item in read_metrics(loop.Path(run.output) / "metrics.jsonl") if item["kind"] == kind]


def test_the_row_after_a_save_has_the_seconds_of_the_save(world, monkeypatch):
    begin = loop.begin_save

    def slow_save(*given):
        stopwatch.time.sleep(0.2)
        return begin(*given)

    monkeypatch.setattr(loop, "begin_save", slow_save)
    run = settings(world, "run")  # saves after steps 3 and 6
    pretrain(run)
    stalls = {item["step"]: item["save_seconds"] for item in rows_of(run)}
    assert [step for step, stall in stalls.items() if stall > 0.2] == [4] and max(
        stalls[step] for step in (1, 2, 3, 5, 6)
    ) < 0.1
    assert all(item["seconds"] < 0.2 and 0.0 < item["data_seconds"] < item["seconds"] for item in rows_of(run))


def test_speed_is_of_one_process_and_mfu_its_share_of_the_peak(world):
    run = settings(world, "run", peak_flops=2e9)
    pretrain(run)
    flops = rows_of(run)[0]["flops"] / (4 * LENGTH)  # of one token
    for item in rows_of(run):
        assert item["tflops_per_rank"] == pytest.approx(item["tokens_per_second"] * flops / 1e12)
        assert item["mfu"] == pytest.approx(item["tflops_per_rank"] * 1e12 / 2e9)
        assert 0 < item["memory_bytes"] <= item["peak_memory_bytes"]
        assert item["divergence"] is None and item["alpha"] == 0.0  # there is no teacher


def test_skipped_steps_are_counted_also_over_a_stop(world):
    def on_step(step, number):
        return SKIPPED if step in (2, 3, 5) else number

    world["on_step"] = on_step
    whole = settings(world, "whole", log_interval=4)
    pretrain(whole)
    assert [(item["step"], item["skipped_steps"]) for item in rows_of(whole)] == [
        (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3),  # every skipped step is logged
    ]  # fmt: skip
    assert rows_of(whole, "evaluation")[-1]["skipped_steps"] == 3
    parts, stops = settings(world, "parts", log_interval=4), stop_at(3)
    world["on_step"] = lambda step, number: stops(step, on_step(step, number))
    assert stoppable(parts).stopped
    world["on_step"] = lambda step, number: on_step(step + 3, number)
    pretrain(parts)
    assert curve(parts) == curve(whole)
