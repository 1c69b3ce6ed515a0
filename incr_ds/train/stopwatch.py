"""Measures where a process's time and memory go between two logged steps. Equal runs differ in these numbers."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Lap:
    """Where the time since the last lap went, in seconds.

    ``seconds`` and ``tokens_per_second`` are those of the steps. ``data_seconds`` is the part of ``seconds`` that waited for
    batches. ``save_seconds`` is what saving took besides.
    """

    seconds: float
    tokens_per_second: float
    data_seconds: float
    save_seconds: float


class Stopwatch:
    """Times the steps of one process, and what it waits for."""

    def __init__(self, tokens: int) -> None:
        self._save_seconds = 0.0
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start a lap at ``tokens``, so that the time since the last lap (saving, evaluation) is not counted."""
        self._time, self._tokens, self._data_seconds = time.perf_counter(), tokens, 0.0

    def lap(self, tokens: int) -> Lap:
        """Read the lap that ends at ``tokens``, and start the next one."""
        seconds = time.perf_counter() - self._time
        found = Lap(
            seconds=seconds,
            tokens_per_second=(tokens - self._tokens) / seconds,
            data_seconds=self._data_seconds,
            save_seconds=self._save_seconds,
        )
        self._save_seconds = 0.0
        self.restart(tokens)
        return found

    def waiting(self, feed: Iterator[Item]) -> Iterator[Item]:
        """Yield what ``feed`` yields, and count the time that it takes as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                item = next(feed)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - start
            yield item

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time in this block as saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._save_seconds += time.perf_counter() - start


def memory_bytes() -> tuple[int, int]:
    """Bytes of memory that this process holds now, and held at most: of its GPU's tensors, or on a CPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    now = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return now, max(now, peak)
