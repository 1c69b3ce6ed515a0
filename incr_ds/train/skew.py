"""Names a rank that is slower than the others with the same layers, before it costs days.

All ranks finish a step together, since they wait for each other. What tells a slow one apart is the time of its own work:
waiting for data, and forward passes. They contain no waiting for other ranks, except under tensor parallelism and ZeRO-3,
where nothing is judged.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch import nn

from incr_ds.config.layout import ParallelLayout

# A slower rank is named if it costs at least this part of the step.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class OwnWork:
    """The seconds of one rank's own work in a step. ``stage`` is its pipeline stage."""

    rank: int
    host: str
    stage: int
    seconds: float


@dataclass(frozen=True)
class Skew:
    """The ``slowest`` rank, the ``ratio`` of its own work to that of the median rank of its stage, and whether that counts."""

    slowest: OwnWork
    usual: float
    ratio: float
    counts: bool

    def __str__(self) -> str:
        return (
            f"rank {self.slowest.rank} on {self.slowest.host} is slow: {self.slowest.seconds:.3g} s a step for data and forward "
            f"passes, {self.ratio:.1f} times the median of the ranks with the same layers ({self.usual:.3g} s)"
        )


def has_own_work(layout: ParallelLayout, sequence_parallel: int = 1) -> bool:
    """Whether forward passes wait for no other rank, and there are ranks to compare."""
    return sequence_parallel == 1 and layout.tensor_parallel == 1 and layout.zero_stage < 3 and layout.data_parallel > 1


def skew(work: Sequence[OwnWork], step_seconds: float, ratio: float) -> Skew:
    """Find the slowest of ``work`` relative to its stage. It counts from ``ratio`` on, if it delays the step noticeably."""
    stages = {one.stage for one in work}
    usual = {stage: median_low([one.seconds for one in work if one.stage == stage]) for stage in stages}
    slowest = max(work, key=lambda one: one.seconds / max(usual[one.stage], 1e-9))
    median = usual[slowest.stage]
    found = slowest.seconds / max(median, 1e-9)
    return Skew(
        slowest, median, found, found >= ratio and slowest.seconds - median >= LEAST_SHARE * max(step_seconds, 1e-9)
    )


class ForwardClock:
    """Adds up the time of a module's forward passes in training, on a GPU by its own clock."""

    def __init__(self, module: nn.Module) -> None:
        self._seconds, self._began, self._passes = 0.0, 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._cuda = next(module.parameters()).is_cuda
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> float:
        """Mean seconds of a pass since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        found = self._seconds / max(self._passes, 1)
        self._seconds, self._passes, self._events = 0.0, 0, []
        return found

    def _begin(self, module: nn.Module, *_: Any) -> None:
        if self._cuda and module.training:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._events.append((begin, end))
        self._began = time.perf_counter()

    def _end(self, module: nn.Module, *_: Any) -> None:
        if not module.training:
            return
        self._passes += 1
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began


def host() -> str:
    """The name of this rank's machine."""
    return socket.gethostname()
