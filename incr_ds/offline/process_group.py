"""Processes that grow one checkpoint together: how they communicate, and how one failure becomes the failure of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from incr_ds.errors import CheckpointError, IncrError

T = TypeVar("T")


class ProcessGroup(Protocol):
    """All processes of a launch. All of them call every method except ``has_failed``, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process. Process 0 opens and publishes."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. Raises ConnectionError if one has ended."""
        ...

    def warn(self) -> None:
        """Notify the others at once that this process has failed."""
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
        """Do nothing, since there are no others."""

    def has_failed(self) -> bool:
        """Never."""
        return False


SINGLE_PROCESS = SingleProcess()


class StoppedError(Exception):
    """This process stopped because another one failed."""


@dataclass(frozen=True)
class _Failure:
    """A failure that every process raises. ``number`` is the errno of a disk failure."""

    text: str
    number: int | None = None
    file: str | None = None

    def error(self) -> Exception:
        if self.number is None:
            return CheckpointError(self.text)
        return OSError(self.number, self.text, self.file)


def agree(group: ProcessGroup, work: Callable[[], T]) -> T:
    """Do ``work`` in every process and return its result if all succeed. Otherwise raise the first failing one's error.

    If processes fail in different ways, the message names the process. Any error except IncrError and OSError ends its own
    process, and the others with a ConnectionError.
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
        raise _with_rank(first, failures).error()
    if stopped:
        raise ConnectionError(0, "another process failed without a message")
    return result


def _with_rank(first: _Failure, failures: Sequence[_Failure | None]) -> _Failure:
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
    """Distribute jobs over processes, the largest first, each to the process with the least work. Returns numbers by rank.

    shares([5, 1, 4, 1], 2) -> [[0, 3], [1, 2]]
    """
    found: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for job in sorted(range(len(sizes)), key=lambda job: (-sizes[job], job)):
        rank = loads.index(min(loads))
        found[rank].append(job)
        loads[rank] += sizes[job]
    return [sorted(jobs) for jobs in found]
