"""Run a function in several processes of one gloo group, collect what each returns, and leave none behind."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``world_size`` fresh processes; returns the results by rank.

    The environment is what a launcher sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, a free MASTER_PORT), on the CPU,
    one thread each; joining a process group is up to ``function``. The first child that fails ends the others, and its
    traceback is raised here as a RuntimeError.
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [
            context.Process(target=_child, args=(function, rank, world_size, port, folder, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        try:
            _wait(children, Path(folder), timeout)
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()


def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(function: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        result = function(rank, *arguments)
    except BaseException:
        (Path(folder) / f"{rank}.failed").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    torch.save(result, Path(folder) / f"{rank}.pt")


def _wait(children: list[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(child.is_alive() for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            time.sleep(0.5)  # a rank that fails takes others with it: let the first traceback be written
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(children)} processes did not end within {timeout:.0f} s")
        time.sleep(0.02)
    failures = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime)
    if failures:
        raise RuntimeError(f"rank {failures[0].stem} failed:\n{failures[0].read_text()}")
    dead = [rank for rank, child in enumerate(children) if child.exitcode not in (None, 0)]
    if dead:
        raise RuntimeError(f"rank(s) {dead} died with exit code {children[dead[0]].exitcode}")
