"""Processes that work together: how they communicate, and how one failure becomes the failure of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from incr_ds.errors import IncrError

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

    kind: type[Exception]
    text: str
    number: int | None = None
    file: str | None = None

    def error(self, where: str = "") -> Exception:
        if self.number is not None:
            return OSError(self.number, self.text + (f" ({where})" if where else ""), self.file)
        return self.kind(f"{where}: {self.text}" if where else self.text)


def agree(group: ProcessGroup, work: Callable[[], T]) -> T:
    """Do ``work`` in every process and return its result if all succeed. Otherwise raise the first failing one's error.

    If processes fail in different ways, the message names the rank. IncrError and OSError keep their kind. Any other error
    becomes a RuntimeError.
    """
    if group.size == 1:
        return work()
    result, error = _attempted(work)
    failure = None if error is None or isinstance(error, StoppedError) else _failure(error)
    if failure is not None:
        group.warn()
    failures = group.gather(failure)
    if first := next((item for item in failures if item is not None), None):
        alike = all(item == first for item in failures)
        raise first.error("" if alike else f"rank {failures.index(first)} of {group.size}") from error
    if error is not None:
        raise ConnectionError(0, "another process failed without a message")
    return cast(T, result)


def on_first(group: ProcessGroup, work: Callable[[], T]) -> T:
    """Do ``work`` in the first process and return its result in all. Its error is raised in all, as ``agree`` does."""
    if group.size == 1:
        return work()
    result, error = _attempted(work) if group.rank == 0 else (None, None)
    result, failure = group.gather((result, error and _failure(error)))[0]
    if failure is not None:
        raise failure.error() from error
    return cast(T, result)


def _attempted(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _failure(error: Exception) -> _Failure:
    if isinstance(error, IncrError):
        return _Failure(type(error), str(error))
    if isinstance(error, OSError):
        return _Failure(OSError, error.strerror or str(error), error.errno or 0, error.filename)
    return _Failure(RuntimeError, f"{type(error).__name__}: {error}")


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
