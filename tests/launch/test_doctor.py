"""What a bad machine shows: every finding has a level, what was found, and what to do."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from incr_ds.launch.doctor import findings, supported
from incr_ds.launch.machine import Disk, Machine, examine

ROOT = Path(__file__).parents[2]
VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
    "megatron-core": "0.16.1",
    "triton": "3.7.1",
}
GOOD = Machine(
    python="3.11.7", versions=VERSIONS, compiler="/usr/bin/c++", gpus=("NVIDIA H100",) * 8, driver="570.1", cuda="12.8",
    cuda_available=True, nccl="2.27.3", port=29500, stated_port="29500", port_free=True, shared_memory=64 << 30,
    limits={"open files": 1 << 20, "locked memory": None, "processes": None},
    disk=Disk("/runs", None, 900 << 30, 10**7, 0.0),
    slurm={"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_MEM_PER_NODE": "512000"},
)  # fmt: skip


def test_a_good_machine_has_no_finding_to_act_on():
    assert [one for one in findings(GOOD) if one.level != "ok" or one.action] == []


BAD = [
    ({"python": "3.9.1"}, "error", "python", "3.9.1", "make the virtual environment with such a Python"),
    ({"versions": {**VERSIONS, "deepspeed": "0.16.9"}}, "error", "deepspeed", "0.16.9", "pip install 'deepspeed<0.20,>=0.19.8'"),
    ({"versions": {**VERSIONS, "megatron-core": None}}, "error", "megatron-core", "not installed", "incr_ds[train]"),
    ({"versions": {**VERSIONS, "triton": None}}, "warning", "triton", "not installed", "slower torch kernels"),
    ({"compiler": None}, "warning", "C++ compiler", "none", "compiled on first use"),
    ({"gpus": (), "cuda_available": False}, "warning", "GPU", "none that nvidia-smi reports", "inside of a job"),
    ({"cuda_available": False, "cuda": None}, "error", "GPU", "8 x NVIDIA H100", "torch is a build without CUDA"),
    ({"nccl": None}, "error", "NCCL", "none", "install torch's Linux build"),
    ({"port_free": False}, "error", "port", "29500 is in use", "--master_port PORT"),
    ({"port": None, "stated_port": "abc"}, "error", "port", "MASTER_PORT=abc", "a number from 1 to 65535"),
    ({"shared_memory": 64 << 20}, "warning", "/dev/shm", "0.06 GiB free", "--shm-size=16g"),
    ({"shared_memory": None}, "warning", "/dev/shm", "no /dev/shm", "--shm-size=16g"),
    ({"limits": {**GOOD.limits, "open files": 1024}}, "warning", "ulimit: open files", "1,024", "ulimit -n"),
    ({"limits": {**GOOD.limits, "locked memory": 65536}}, "warning", "ulimit: locked memory", "65,536", "ulimit -l"),
    ({"slurm": {**GOOD.slurm, "SLURM_NTASKS_PER_NODE": "1"}}, "warning", "Slurm tasks", "1 tasks for 8 GPUs", "one task for"),
    ({"slurm": {**GOOD.slurm, "SLURM_MEM_PER_NODE": "4096"}}, "warning", "Slurm memory", "4.0 GiB a node", "--mem=0"),
    ({"disk": replace(GOOD.disk, free_bytes=1 << 30)}, "warning", "disk space", "1.0 GiB free at /runs", "keep_last"),
    ({"disk": replace(GOOD.disk, inodes=10)}, "warning", "inodes", "10 more files", "quota of files"),
    ({"disk": replace(GOOD.disk, clock_ahead=-90.0)}, "warning", "clock", "-90.0 seconds", "chrony"),
    ({"disk": replace(GOOD.disk, problem="/runs: read-only")}, "error", "output", "/runs: read-only", "choose another output"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "level", "subject", "found", "action"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_value_is_found_with_what_to_do(change, level, subject, found, action):
    bad = [one for one in findings(replace(GOOD, **change)) if one.level != "ok"]
    assert [(one.level, one.subject) for one in bad] == [(level, subject)]
    assert found in bad[0].found
    assert action in bad[0].action
    assert bad[0].expected


def test_checkpoints_that_are_known_not_to_fit_are_an_error():
    (bad,) = [one for one in findings(GOOD, needed_bytes=1000 << 30) if one.level != "ok"]
    assert (bad.level, bad.expected) == ("error", "1,000.0 GiB")


def test_supported_versions_are_the_packages_own():
    assert str(supported()["megatron-core"]) == "==0.16.1"


def test_the_command_finds_a_port_in_use_and_exits_with_2(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "doctor.py"), "--output", str(tmp_path / "run"), "--json"],
            capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "MASTER_PORT": str(port)}, check=False,
        )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    content = json.loads(ended.stdout)
    bad = {one["subject"]: one for one in content["findings"] if one["level"] == "error"}
    assert bad["port"]["found"] == f"{port} is in use or not allowed"
    assert content["errors"] == len(bad)
    assert not (tmp_path / "run").exists()


def test_the_clock_of_this_disk_agrees(tmp_path: Path):
    disk = examine(tmp_path).disk
    assert disk.problem is None
    assert abs(disk.clock_ahead) < 5
