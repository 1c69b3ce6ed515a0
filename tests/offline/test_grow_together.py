"""Several processes grow one checkpoint: the same bytes for any number of them, and one failure ends all."""

import multiprocessing
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import group_member
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sources import TARGET, contents, hidden, write_synthetic

from incr_ds.errors import ConfigError
from incr_ds.offline.launcher import join_process_group
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.process_group import shares
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a source, a recipe, and the target that one process makes."""
    folder = tmp_path_factory.mktemp("together")
    write_synthetic(folder, pico_architecture(), data_parallel=2)
    recipe = {"target": TARGET, "layout": {"data_parallel": 2, "pipeline_parallel": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(folder / "source", folder / "recipe.yaml", folder / "target")))
    return folder


def arguments(home, output, *more):
    return ["--source", home / "source", "--recipe", home / "recipe.yaml", "--output", output, *more]


@dataclass
class Ended:
    code: int
    out: str
    err: str


def launch(size, folder, arguments, fault=None, names=("RANK", "WORLD_SIZE")):
    """Start ``size`` processes as a launcher does, the second one with a fault; how each ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["group_member"])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(size):
        environment = {**meeting, names[0]: str(rank), names[1]: str(size)}
        own = (environment, fault if rank == 1 else None, list(map(str, arguments)), str(folder / f"process{rank}"))
        processes.append(context.Process(target=group_member.run, args=own))
        processes[-1].start()
    try:
        for process in processes:
            process.join(120)
        texts = [[(folder / f"process{rank}.{end}").read_text() for end in ("out", "err")] for rank in range(size)]
        return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def printed(tmp_path_factory: pytest.TempPathFactory):
    """A folder for what processes print, beside the output's."""
    return tmp_path_factory.mktemp("printed")


@pytest.mark.parametrize(
    ("size", "names"),
    [(3, ("RANK", "WORLD_SIZE")), pytest.param(2, ("SLURM_PROCID", "SLURM_NTASKS"), marks=pytest.mark.slow)],
)
def test_the_same_bytes_for_any_number_of_processes(home, tmp_path: Path, printed, size, names):
    found = launch(size, printed, arguments(home, tmp_path / "out", "--workers", 2), names=names)
    assert [ended.code for ended in found] == [0] * size, found
    assert "published" in found[0].out and all(ended.out == "" for ended in found[1:])
    assert contents(tmp_path / "out") == contents(home / "target")
    assert hidden(tmp_path) == []


FAULTS = {
    "disk": (2, r"out: No space left on device (rank 1 of 3) (while writing); nothing was published."),
    "kill": (2, "out: another process ended or cannot be reached"),
}


# A failed disk is the slow case: test_process_group.py has its wording.
@pytest.mark.parametrize("fault", [pytest.param("disk", marks=pytest.mark.slow), "kill"])
def test_a_failing_process_fails_all_and_publishes_nothing(home, tmp_path: Path, printed, fault):
    """Afterwards, fewer processes continue from the finished files of all."""
    code, message = FAULTS[fault]
    found = launch(3, printed, arguments(home, tmp_path / "out"), fault)
    assert [ended.code for ended in found] == [code, -9 if fault == "kill" else code, code], found
    assert found[0].err.replace("\n", " ").count(message) == 1, found[0].err
    assert "Traceback" not in found[0].err + found[2].err and "error:" not in found[2].err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.incomplete-plan-*")), "finished files are kept"
    grow_checkpoint(plan_request(GrowthRequest(home / "source", home / "recipe.yaml", tmp_path / "out")))
    assert contents(tmp_path / "out") == contents(home / "target")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("recipe", "rank 1 of 2: ", marks=pytest.mark.slow),
        ("plan", "rank 1 of 2 sees other files (sizes or times) there, or another recipe, than rank 0"),
    ],
)
def test_mistakes_of_one_process_leave_nothing(home, tmp_path: Path, printed, fault, message: str):
    found = launch(2, printed, arguments(home, tmp_path / "out"), fault)
    assert [ended.code for ended in found] == [2, 2]
    assert message in found[0].err and "error:" not in found[1].err
    assert hidden(tmp_path) == [] and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers(home, tmp_path: Path, launcher):
    port = str(free_port())
    options = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port],
    }[launcher]
    command = [sys.executable, *options, "tools/grow_checkpoint.py", *map(str, arguments(home, tmp_path / "out"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(home / "target")
    assert hidden(tmp_path) == []


def test_a_launch_without_a_meeting_point(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR and MASTER_PORT: not set, and 2 processes were launched"):
        with join_process_group():
            pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"RANK 'first', WORLD_SIZE '2': expected whole numbers"):
        with join_process_group():
            pass


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_every_job_has_one_process(sizes, size):
    found = shares(sizes, size)
    assert sorted(job for jobs in found for job in jobs) == list(range(len(sizes)))
    loads = [sum(sizes[job] for job in jobs) for jobs in found]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert found == shares(sizes, size)


def test_shares_of_the_docstring():
    assert shares([5, 1, 4, 1], 2) == [[0, 3], [1, 2]]
