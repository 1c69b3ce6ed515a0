"""Processes that grow one checkpoint together: what they share, and how the failure of one becomes the failure of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from incr_ds.errors import CheckpointError, IncrError

T = TypeVar("T")


class ProcessGroup(Protocol):
    """All processes of a launch. Every method but ``has_failed`` is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 opens and publishes."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. ConnectionError if one is gone."""
        ...

    def warn(self) -> None:
        """Tell the others at once that this process has failed."""
        ...

    def has_failed(self) -> bool:
        """Whether any process has warned."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """A group of one process."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def warn(self) -> None:
        """Nobody to tell."""

    def has_failed(self) -> bool:
        """Never."""
        return False


SINGLE_PROCESS = SingleProcess()


class StoppedError(Exception):
    """This process stopped because another one failed."""


@dataclass(frozen=True)
class _Failure:
    """A failure as every process raises it. ``number`` is the errno of one of the disk."""

    text: str
    number: int | None = None
    file: str | None = None

    def error(self) -> Exception:
        if self.number is None:
            return CheckpointError(self.text)
        return OSError(self.number, self.text, self.file)


def agree(group: ProcessGroup, work: Callable[[], T]) -> T:
    """Do ``work`` in every process and return its result, if all succeed; else raise what the first failing one raised.

    Where processes fail differently the message says which one it is. Anything but an IncrError or an OSError ends the
    process as it is, and the others with a ConnectionError.
    """
    if group.size == 1:
        return work()
    failure: _Failure | None = None
    stopped = False
    try:
        result = work()
    except IncrError as error:
        failure = _Failure(str(error))
    except OSError as error:
        failure = _Failure(error.strerror or str(error), error.errno or 0, error.filename)
    except StoppedError:
        stopped = True
    if failure is not None:
        group.warn()
    failures = group.gather(failure)
    if first := next((item for item in failures if item is not None), None):
        raise _told(first, failures).error()
    if stopped:
        raise ConnectionError(0, "another process failed without saying why")
    return result


def _told(first: _Failure, failures: Sequence[_Failure | None]) -> _Failure:
    rank = failures.index(first)
    if all(item == first for item in failures):
        return first
    text = (
        f"{first.text} (process {rank} of {len(failures)})"
        if first.number is not None
        else (f"process {rank} of {len(failures)}: {first.text}")
    )
    return _Failure(text, first.number, first.file)


def shares(sizes: Sequence[int], size: int) -> list[list[int]]:
    """Spread jobs over processes, the largest first, each to the one with the least to do: job numbers by rank.

    shares([5, 1, 4, 1], 2) -> [[0, 3], [1, 2]]
    """
    found: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for job in sorted(range(len(sizes)), key=lambda job: (-sizes[job], job)):
        rank = loads.index(min(loads))
        found[rank].append(job)
        loads[rank] += sizes[job]
    return [sorted(jobs) for jobs in found]
