"""Runs jobs in threads. The result of one may start the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from incr_ds.offline.process_group import StoppedError


class Stages:
    """Jobs, each with a callback for its result. Callbacks run one at a time in the thread that calls ``finish``.

    ``has_failed`` says whether another process has failed.
    """

    def __init__(self, has_failed: Callable[[], bool]) -> None:
        self._has_failed = has_failed
        self._then: dict[Future[Any], Callable[[Any], None] | None] = {}
        self._finished: SimpleQueue[Future[Any]] = SimpleQueue()

    def start(
        self, pool: ThreadPoolExecutor, then: Callable[[Any], None] | None, work: Callable[..., Any], *arguments: Any
    ) -> None:
        """Run ``work`` in ``pool``, and pass its result to ``then``."""
        job = pool.submit(work, *arguments)
        self._then[job] = then
        job.add_done_callback(self._finished.put)

    def finish(self) -> None:
        """Wait for all jobs, including those that callbacks start.

        Raises a job's error, and StoppedError if another process has failed.
        """
        while self._then:
            job = self._finished.get()
            then, result = self._then.pop(job), job.result()
            if self._has_failed():
                raise StoppedError
            if then is not None:
                then(result)


@contextmanager
def job_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. All slow work (copies, arithmetic, checksums, writes) runs outside Python's lock.

    Threads share the memory of one process. Each has one thread of torch. If a job fails, waiting jobs are cancelled.
    """
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
