"""Gathers what a machine has: versions, compiler, GPUs, port, shared memory, disk, clock, limits, Slurm's variables."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from incr_ds.checkpoint.publish import check_writable
from incr_ds.errors import CheckpointError

PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core", "triton")
DEFAULT_PORT = 29500  # of torch.distributed and of the deepspeed launcher
SHARED_MEMORY = Path("/dev/shm")
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
}
_WAIT = 20  # seconds for nvidia-smi, which hangs on a broken driver


@dataclass(frozen=True)
class Disk:
    """The disk of an output folder. ``problem`` says why it cannot be written. ``inodes`` None: it has no limit.

    ``clock_ahead`` is by how many seconds a new file's time is ahead of this machine's clock.
    """

    folder: str
    problem: str | None
    free_bytes: int
    inodes: int | None
    clock_ahead: float


@dataclass(frozen=True)
class Machine:
    """What was found. ``limits`` are soft limits by name, None if unlimited. ``nccl`` and ``cuda`` are torch's."""

    python: str
    versions: Mapping[str, str | None]
    compiler: str | None
    gpus: tuple[str, ...]
    driver: str | None
    cuda: str | None
    cuda_available: bool
    nccl: str | None
    port: int | None
    stated_port: str
    port_free: bool
    shared_memory: int | None
    limits: Mapping[str, int | None]
    disk: Disk | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)


def examine(output: Path | None) -> Machine:
    """Examine this machine, and the disk of ``output``. Writes nothing that stays."""
    gpus, driver = _gpus()
    cuda, available, nccl = _torch_cuda()
    stated = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
    port = int(stated) if stated.isdigit() and 0 < int(stated) < 1 << 16 else None
    return Machine(
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None),
        gpus=gpus,
        driver=driver,
        cuda=cuda,
        cuda_available=available,
        nccl=nccl,
        port=port,
        stated_port=stated,
        port_free=port is not None and _is_free(port),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        limits={name: _limit(which) for name, which in LIMITS.items()},
        disk=None if output is None else _disk(output),
        slurm={name: value for name, value in os.environ.items() if name.startswith("SLURM_")},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs and the driver's version, as nvidia-smi reports them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT, check=True)
    except (OSError, subprocess.SubprocessError):
        return (), None
    rows = [line.rpartition(",") for line in ended.stdout.splitlines() if "," in line]
    return tuple(name.strip() for name, _, _ in rows), rows[0][2].strip() if rows else None


def _torch_cuda() -> tuple[str | None, bool, str | None]:
    """The CUDA version that torch was built for, whether torch can use a GPU, and its NCCL."""
    try:
        import torch
    except ImportError:
        return None, False, None
    if not torch.cuda.is_available():
        return torch.version.cuda, False, None
    return torch.version.cuda, True, ".".join(map(str, torch.cuda.nccl.version()))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _disk(output: Path) -> Disk:
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    facts = os.statvfs(existing)
    free, inodes = facts.f_bavail * facts.f_frsize, facts.f_favail if facts.f_files else None
    try:
        check_writable(output)
    except CheckpointError as error:
        return Disk(str(output), str(error), free, inodes, 0.0)
    with tempfile.NamedTemporaryFile(dir=existing) as probe:
        ahead = os.stat(probe.name).st_mtime - time.time()
    return Disk(str(output), None, free, inodes, ahead)
