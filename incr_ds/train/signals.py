"""Stopping on SIGTERM and SIGUSR1: one rank that hears of it is enough, and all ranks stop after the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from incr_ds.train.ranks import any_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """A context in which the signals set a flag; the previous handlers are put back at its end."""

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether any rank has received a signal; the same answer on every rank. All ranks must call."""
        return any_rank(self._received)
