"""Ends a process that hangs, after writing where each of its threads stands.

A rank that hangs lets all others wait in a collective operation, so that every rank's watchdog ends its wait at about the
same time and shows where it was. The rank whose stack differs from the others' is the one to look at.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

# The exit code of a run that hung: EX_PROTOCOL of sysexits.h. A Slurm script queues it again like a crash.
HUNG = 76
# Seconds between a rank's stacks and its end, in which the other ranks write theirs: a launcher ends all after the first.
GRACE = 5.0
FOLDER = "stacks"


class Watchdog:
    """A context in which ``beat`` has to be called at least every ``seconds``; None: as rarely as you like.

    Otherwise the process writes all of its stacks to <output>/stacks/rank_NNNNN.txt and to stderr, and ends with HUNG. If a
    thread holds the interpreter's lock, so that no Python code can run, it ends with exit code 1 a little later.
    """

    def __init__(self, output: Path, rank: int, seconds: float | None) -> None:
        self._file, self._rank, self._seconds = output / FOLDER / f"rank_{rank:05d}.txt", rank, seconds
        self._last = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._file.unlink(missing_ok=True)
            self.beat()
            threading.Thread(target=self._watch, args=(self._seconds,), daemon=True, name="watchdog").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Report that the process works."""
        self._last = time.monotonic()
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds * 1.05 + 2 * GRACE, exit=True, file=2)

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(max(0.0, self._last + seconds - time.monotonic())):
            if time.monotonic() - self._last >= seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        text = f"rank {self._rank} on {socket.gethostname()}: no progress for {seconds:g} s (watchdog_seconds); its threads:\n"
        text += self._stacks(text)
        os.write(2, text.encode())  # in one piece, so that the ranks' stacks do not mix
        time.sleep(GRACE)
        os._exit(HUNG)

    def _stacks(self, heading: str) -> str:
        """The stacks of all threads, which stay in the file."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "w+", encoding="utf-8") as file:
            file.write(heading)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(len(heading.encode()))
            return file.read()
