"""Joins the process group of a launch. torchrun, deepspeed or srun set the number of processes; gloo connects them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from incr_ds.errors import ConfigError
from incr_ds.offline.process_group import SINGLE_PROCESS, ProcessGroup

PATIENCE = timedelta(days=7)  # one process may write for hours while another waits; a lost connection shows at once
JOINING = timedelta(minutes=5)
_FAILED = "failed"
# Variables that each launcher sets: rank, number of processes. The first pair that exists counts.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """The group of the processes that were launched together, or a group of one without a launcher.

    Raises ConfigError if the launcher's variables are invalid. A single process does not import torch.distributed.
    """
    rank, size = _place()
    if size == 1:
        yield SINGLE_PROCESS
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)}: not set, and {size} processes were launched; export the first node's name and a free port "
            "(launchers/slurm/grow.sbatch does), or start with torchrun or deepspeed."
        )
    group = _GlooProcessGroup(rank, size)
    try:
        yield group
    finally:
        group.leave()


def _place() -> tuple[int, int]:
    for rank, size in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            try:
                return int(os.environ[rank]), int(os.environ[size])
            except ValueError as error:
                raise ConfigError(
                    f"{rank} {os.environ[rank]!r}, {size} {os.environ[size]!r}: expected whole numbers."
                ) from error
    return 0, 1


class _GlooProcessGroup:
    """Processes in a gloo group, and a store for the one message that cannot wait for the others."""

    def __init__(self, rank: int, size: int) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(size))
        self.rank, self.size, self._dist = rank, size, dist
        store, *_ = next(rendezvous("env://", rank, size, timeout=JOINING))
        self._store = PrefixStore("incr_ds", store)
        group = PrefixStore("gloo", store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        found: list[Any] = [None] * self.size
        try:
            self._dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise ConnectionError(
                0, f"another process ended or cannot be reached: {str(error).splitlines()[0]}"
            ) from error
        return found

    def warn(self) -> None:
        """Notify the others at once."""
        self._store.set(_FAILED, str(self.rank))

    def has_failed(self) -> bool:
        """Whether any process has warned. A process whose store is gone counts as well."""
        try:
            return bool(self._store.check([_FAILED]))
        except RuntimeError:
            return True

    def leave(self) -> None:
        """End the group without waiting for processes that have ended already."""
        self._dist.destroy_process_group()
