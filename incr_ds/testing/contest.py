"""Races commands against each other: seconds, bytes moved, and anonymous memory with all child processes."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLING_SECONDS = 0.05  # five times as often would use a twentieth of a core


@dataclass(frozen=True)
class Run:
    """One run of one command: wall seconds, bytes left in its output, peak anonymous bytes over its process tree.

    ``cpu_seconds`` are those of the tree, as far as every process waited for its children.
    """

    seconds: float
    written: int
    peak: int
    cpu_seconds: float


@dataclass(frozen=True)
class Contestant:
    """A command that creates ``output`` from files that it reads once (``inputs``)."""

    name: str
    command: Sequence[str]
    inputs: tuple[Path, ...]
    output: Path

    @property
    def read_bytes(self) -> int:
        """Bytes of the files that it reads."""
        return sum(path.stat().st_size for path in self.inputs)


@dataclass(frozen=True)
class Result:
    """The median run of a contestant, and what it read."""

    name: str
    seconds: float
    read: int
    written: int
    peak: int
    cpu_seconds: float

    @property
    def throughput(self) -> float:
        """Bytes read and written per second."""
        return (self.read + self.written) / self.seconds


def race(contestants: Sequence[Contestant], rounds: int) -> list[Result]:
    """Run all contestants in turn, ``rounds`` times, each with a cold page cache if the disk has one. Returns medians.

    Taking turns spreads other load on the machine over all of them.
    """
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            runs[contestant.name].append(_run(contestant))
    return [_median(contestant, runs[contestant.name]) for contestant in contestants]


def _median(contestant: Contestant, runs: Sequence[Run]) -> Result:
    return Result(
        contestant.name,
        statistics.median(run.seconds for run in runs),
        contestant.read_bytes,
        runs[0].written,
        max(run.peak for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
    )


def _run(contestant: Contestant) -> Run:
    shutil.rmtree(contestant.output, ignore_errors=True)
    os.sync()  # pending writes of others must not count for this one
    for path in contestant.inputs:
        _evict(path)
    with tempfile.TemporaryFile("w+") as said:
        started, used = time.perf_counter(), _cpu_of_children()
        process = subprocess.Popen(contestant.command, stdout=said, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_anonymous_bytes(process.pid))
            time.sleep(_SAMPLING_SECONDS)
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_of_children() - used
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{contestant.name} failed:\n{said.read()}")
    written = sum(path.stat().st_size for path in contestant.output.rglob("*") if path.is_file())
    shutil.rmtree(contestant.output, ignore_errors=True)
    return Run(seconds, written, peak, cpu_seconds)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _evict(path: Path) -> None:
    """Drop a file's clean pages, so that the next reader reads the disk (a memory file system keeps them)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _tree_anonymous_bytes(process: int) -> int:
    total, waiting = 0, [process]
    while waiting:
        current = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (current / "status").read_text(encoding="ascii").splitlines()
            for children in (current / "task").glob("*/children"):
                waiting += [int(child) for child in children.read_text(encoding="ascii").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
    return total
