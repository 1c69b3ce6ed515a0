"""How large a portion of a tensor may be in memory under a budget for the process, and whether the disk has room."""

from __future__ import annotations

import math
import os
from pathlib import Path

from incr_ds.checkpoint.streaming import BLOCK_ELEMENTS
from incr_ds.errors import CheckpointError, ConfigError

RESERVE = 64 << 20  # pickles, file lists, thread stacks, memory that the allocator keeps
MEMORY_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(text: str) -> int:
    """Parse ``"2GiB"``, ``"500 MB"`` or ``"1000000"`` as bytes. Raises ConfigError for anything else."""
    number = text.strip().rstrip("BGIKMbgikm ")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        return int(float(number) * MEMORY_UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"--memory-budget: {text!r}: expected a size such as 2GiB, 500MB or a number of bytes."
        ) from error


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file (pages of mapped checkpoints do not count)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ConfigError("/proc/self/status: no RssAnon; memory budgets need Linux 4.5 or newer.")


def portion_elements(budget: int, workers: int, widest_row: int, bytes_per_element: int, held: int) -> int:
    """Number of elements of a tensor that each of ``workers`` threads may read at once.

    ``held`` is what the process holds already. ``widest_row`` is the longest row of any tensor, since rows are not cut.
    Raises ConfigError, with a sufficient budget, if there is not even memory for one row per thread.
    """
    fitting = (budget - held - RESERVE) // (workers * bytes_per_element)
    if fitting < widest_row:
        needed = held + RESERVE + workers * bytes_per_element * widest_row
        rounded = math.ceil(needed / (1 << 20))
        raise ConfigError(
            f"memory budget: {budget / (1 << 20):.0f} MiB are too small for this plan with {workers} worker(s); it needs "
            f"--memory-budget {rounded}MiB, or fewer --workers."
        )
    return min(BLOCK_ELEMENTS, fitting)


def check_disk(folder: Path, needed: int, entries: int, where: str) -> None:
    """Raise CheckpointError unless the disk of ``folder`` has room for ``needed`` bytes and ``entries`` more files or folders."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise CheckpointError(
            f"{where}: needs {needed:,} bytes, but {free:,} are free on its disk; nothing was written."
        )
    if disk.f_files and entries > disk.f_favail:
        raise CheckpointError(f"{where}: needs {entries:,} files, but its disk allows {disk.f_favail:,} more.")
