"""Lets only one process write to an output, by a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from incr_ds.checkpoint.parents import own_parents
from incr_ds.errors import CheckpointError


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold ``.NAME.lock`` beside ``output`` in this block.

    The kernel holds the lock for the process (flock, also over NFS), so a killed process leaves no lock behind. Raises
    CheckpointError, which names the other process, if another process writes to ``output``.
    """
    output = output.resolve()  # one output has one lock, by any path to it
    with own_parents(output):
        yield from _held(output)


def _held(output: Path) -> Iterator[None]:
    path = output.with_name(f".{output.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode() or "another process"
            os.close(descriptor)
            raise CheckpointError(
                f"{output}: {holder} is writing to it; wait for it, or choose another output."
            ) from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # the previous process removed this file after we opened it
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
