"""Runs a function in several processes that form a gloo world, as a launcher would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

# The server imports these once. Every process is then a cheap fork of it.
_PRELOAD = ["incr_ds.train.engine"]
_PORTS = (15000, 32000)


class ProcessError(AssertionError):
    """A process raised an error. The message holds its traceback."""


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes and return what each returned, by rank.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher sets them. ``function`` must be
    importable. Raises ProcessError with the traceback of the first process that fails. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = _environment(rank, world_size, port)
        process = context.Process(target=_child, args=(sender, environment, function, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        _end(processes)


def free_port() -> int:
    """A TCP port on which nothing listens, below those that systems give to outgoing connections.

    A port of theirs can be taken between this call and its use.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _child(sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    try:
        import torch

        torch.set_num_threads(1)
        result = (True, function(*args), time.monotonic())
    except BaseException:
        result = (False, traceback.format_exc(), time.monotonic())
    # Pickled by value: torch's own way of sending a tensor needs the sender to outlive the receipt.
    sender.send_bytes(pickle.dumps(result))
    if not result[0]:
        raise SystemExit(1)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise ProcessError(f"rank(s) {missing} gave no result in time")
        found = [(pipes.index(pipe), _receive(pipes.index(pipe), pipe)) for pipe in ready]  # type: ignore[arg-type]
        # One failure makes others fail with a broken connection. The first one has the reason.
        failures = sorted((moment, rank, value) for rank, (succeeded, value, moment) in found if not succeeded)
        if failures:
            raise ProcessError(f"rank {failures[0][1]} failed:\n{failures[0][2]}")
        results.update((rank, value) for rank, (_, value, _) in found)
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection) -> tuple[bool, Any, float]:
    try:
        result: tuple[bool, Any, float] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} ended without a result; it was killed or crashed", float("inf")
    return result


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
