"""Jobs in threads, where the result of one may start the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from incr_ds.offline.process_group import StoppedError


class Stages:
    """Jobs and what follows each. What follows runs in the thread that calls ``finish``, one at a time.

    ``has_failed`` says whether another process has failed.
    """

    def __init__(self, has_failed: Callable[[], bool]) -> None:
        self._has_failed = has_failed
        self._then: dict[Future[Any], Callable[[Any], None] | None] = {}
        self._finished: SimpleQueue[Future[Any]] = SimpleQueue()

    def start(
        self, pool: ThreadPoolExecutor, then: Callable[[Any], None] | None, work: Callable[..., Any], *arguments: Any
    ) -> None:
        """Run ``work`` in ``pool``, and give its result to ``then``."""
        job = pool.submit(work, *arguments)
        self._then[job] = then
        job.add_done_callback(self._finished.put)

    def finish(self) -> None:
        """Wait for all jobs, also for those that others start. Raises what a job raises, and StoppedError if another process
        has failed."""
        while self._then:
            job = self._finished.get()
            then, result = self._then.pop(job), job.result()
            if self._has_failed():
                raise StoppedError
            if then is not None:
                then(result)


@contextmanager
def job_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads, because all that takes time (copies, arithmetic, checksums, writes) runs outside Python's lock, and threads
    share one process's memory. One thread of torch each; what waits is cancelled when a job fails."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
