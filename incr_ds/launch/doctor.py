"""Judges whether a machine can run this package's training, and says what to do where it cannot. Pure: no process, no file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from incr_ds.launch.machine import DEFAULT_PORT, Machine

Level = Literal["ok", "warning", "error"]
GIB = 1 << 30
LEAST_SHARED_MEMORY = GIB  # NCCL and data workers of one node
LEAST_DISK, LEAST_INODES = 10 * GIB, 10_000
MOST_SKEW = 5.0  # seconds between this clock and the file server's
LEAST_LIMITS = {"open files": 65536, "locked memory": 64 << 20, "processes": 4096}
_LIMIT_OPTIONS = {"open files": "-n", "locked memory": "-l", "processes": "-u"}
_NEEDS_LESS = {"triton": "the loss uses the slower torch kernels on a GPU"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``action`` says what to do; it is empty if the level is ok."""

    level: Level
    subject: str
    found: str
    expected: str
    action: str = ""


def findings(machine: Machine, needed_bytes: int | None = None) -> tuple[Finding, ...]:
    """Judge everything. ``needed_bytes`` is what the run's checkpoints need at once, if that is known."""
    return (
        *_versions(machine),
        _compiler(machine),
        *_accelerator(machine),
        _port(machine),
        _shared_memory(machine),
        *_disk(machine, needed_bytes),
        *_limits(machine),
        *_slurm(machine),
    )


def supported() -> dict[str, SpecifierSet]:
    """The versions of each package that this package's own metadata asks for."""
    listed = [Requirement(line) for line in metadata.requires("incr_ds") or ()]
    return {requirement.name: requirement.specifier for requirement in listed}


def _judge(holds: bool, otherwise: Level, subject: str, found: str, expected: str, action: str) -> Finding:
    return Finding("ok", subject, found, expected) if holds else Finding(otherwise, subject, found, expected, action)


def _versions(machine: Machine) -> Iterator[Finding]:
    python = SpecifierSet(metadata.metadata("incr_ds")["Requires-Python"])
    fits = machine.python in python
    yield _judge(
        fits, "error", "python", machine.python, str(python), "make the virtual environment with such a Python"
    )
    known = supported()
    for name, version in machine.versions.items():
        wanted = known.get(name, SpecifierSet())
        expected = str(wanted) or "any version"
        if version is None:
            lost = _NEEDS_LESS.get(name)
            cure = f"pip install {name}" if lost else "pip install 'incr_ds[train]'"
            reason = lost or "a training run needs it"
            yield Finding("warning" if lost else "error", name, "not installed", expected, f"{cure}: {reason}")
            continue
        cure = f"pip install '{name}{wanted}'; constraints.txt lists the versions that the tests ran with"
        yield _judge(wanted.contains(version, prereleases=True), "error", name, version, expected, cure)


def _compiler(machine: Machine) -> Finding:
    return _judge(
        machine.compiler is not None,
        "warning",
        "C++ compiler",
        machine.compiler or "none",
        "c++, g++, clang++ or CXX",
        "install one or load its module: Triton kernels and optimizer.implementation: deepspeed are compiled on first use",
    )


def _accelerator(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus and not machine.cuda_available:
        yield Finding(
            "warning",
            "GPU",
            "none that nvidia-smi reports",
            "a GPU and its driver",
            "training runs on the CPU; on a cluster, run this inside of a job that has GPUs",
        )
        return
    found = f"{len(machine.gpus)} x {', '.join(sorted(set(machine.gpus))) or 'unknown'}, driver {machine.driver}"
    cause = "torch is a build without CUDA" if machine.cuda is None else f"torch is built for CUDA {machine.cuda}"
    cure = f"{cause}: install the build of torch for this driver, and check CUDA_VISIBLE_DEVICES"
    yield _judge(machine.cuda_available, "error", "GPU", found, "torch can use it", cure)
    if machine.cuda_available:
        cure = "install torch's Linux build with CUDA, which contains NCCL"
        yield _judge(machine.nccl is not None, "error", "NCCL", machine.nccl or "none", "any version", cure)


def _port(machine: Machine) -> Finding:
    expected = f"a free port in MASTER_PORT, or {DEFAULT_PORT} free"
    if machine.port is None:
        cure = "set MASTER_PORT to a number from 1 to 65535"
        return Finding("error", "port", f"MASTER_PORT={machine.stated_port}", expected, cure)
    cure = (
        "another run may use it: give each run its own (deepspeed --master_port PORT, or MASTER_PORT under Slurm); "
        "below 1024 a port needs root"
    )
    found = f"{machine.port} is {'free' if machine.port_free else 'in use or not allowed'}"
    return _judge(machine.port_free, "error", "port", found, expected, cure)


def _shared_memory(machine: Machine) -> Finding:
    size = machine.shared_memory
    found = "no /dev/shm" if size is None else f"{size / GIB:.2f} GiB free"
    cure = "in a container, start it with --shm-size=16g or --ipc=host; NCCL fails without it"
    expected = f"{LEAST_SHARED_MEMORY / GIB:.0f} GiB free"
    return _judge((size or 0) >= LEAST_SHARED_MEMORY, "warning", "/dev/shm", found, expected, cure)


def _disk(machine: Machine, needed: int | None) -> Iterator[Finding]:
    disk = machine.disk
    if disk is None:
        return
    if disk.problem is not None:
        yield Finding("error", "output", disk.problem, "a folder that can be written", "choose another output")
        return
    least: int = LEAST_DISK if needed is None else needed
    level: Level = "warning" if needed is None else "error"
    cure = "free some space, choose another output, or keep fewer checkpoints (checkpoint.keep_last)"
    found, expected = f"{disk.free_bytes / GIB:,.1f} GiB free at {disk.folder}", f"{least / GIB:,.1f} GiB"
    yield _judge(disk.free_bytes >= least, level, "disk space", found, expected, cure)
    if disk.inodes is not None:
        cure = "delete small files, or ask for a larger quota of files; a large layout writes thousands"
        found = f"{disk.inodes:,} more files at {disk.folder}"
        yield _judge(disk.inodes >= LEAST_INODES, "warning", "inodes", found, f"{LEAST_INODES:,} more files", cure)
    cure = "synchronize the clocks (chrony or ntpd): times of files and logs are misleading otherwise"
    found = f"{disk.clock_ahead:+.1f} seconds between a new file and this clock"
    yield _judge(abs(disk.clock_ahead) <= MOST_SKEW, "warning", "clock", found, f"at most {MOST_SKEW:g} seconds", cure)


def _limits(machine: Machine) -> Iterator[Finding]:
    for name, least in LEAST_LIMITS.items():
        value = machine.limits[name]
        option = _LIMIT_OPTIONS[name]
        cure = f"raise it in the job script (ulimit {option}) or in /etc/security/limits.conf; on Slurm PropagateResourceLimits"
        found = "unlimited" if value is None else f"{value:,}"
        yield _judge(value is None or value >= least, "warning", f"ulimit: {name}", found, f"{least:,} or more", cure)


def _slurm(machine: Machine) -> Iterator[Finding]:
    """Slurm's variables, if this is a job: how many ranks it starts, and whether it sees their GPUs."""
    job, variables = machine.slurm.get("SLURM_JOB_ID"), machine.slurm
    if job is None:
        return
    tasks = variables.get("SLURM_NTASKS_PER_NODE", "").partition("(")[0]
    nodes = variables.get("SLURM_JOB_NUM_NODES", "unknown")
    yield Finding("ok", "Slurm", f"job {job}, {nodes} nodes, {tasks or 'no stated'} tasks a node", "a job")
    if tasks.isdigit() and machine.gpus:
        cure = "start one task for each GPU: #SBATCH --ntasks-per-node and --gpus-per-node must agree"
        found = f"{tasks} tasks for {len(machine.gpus)} GPUs"
        yield _judge(int(tasks) == len(machine.gpus), "warning", "Slurm tasks", found, "one task a GPU", cure)
    memory = variables.get("SLURM_MEM_PER_NODE", "")
    if memory.isdigit() and memory != "0":
        cure = (
            "ask for more (#SBATCH --mem=0 takes the whole node): each rank builds its part of the model in this memory"
        )
        found = f"{int(memory) / 1024:,.1f} GiB a node"
        yield _judge(int(memory) >= 16 * 1024, "warning", "Slurm memory", found, "16 GiB or more", cure)
