"""Growth at its limits: little memory, many workers, a full or failing disk, and death at every point of a run."""

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from limits import POINTS, grow_until
from sources import TARGET, contents, hidden, write_synthetic

from incr_ds.checkpoint import sink, workspace
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import read_manifest, verify_manifest
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a source of two data-parallel ranks, a recipe of five files, and the grown target."""
    folder = tmp_path_factory.mktemp("limits")
    write_synthetic(folder, pico_architecture(), data_parallel=2)
    recipe = {"target": TARGET, "layout": {"data_parallel": 2, "pipeline_parallel": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(folder / "source", folder / "recipe.yaml", folder / "target")))
    return folder


def request(home, output, **options):
    return GrowthRequest(home / "source", home / "recipe.yaml", output, **options)


def test_the_synthetic_source_is_what_its_checkpoint_says(home):
    read, truth = open_source(home / "source"), SyntheticCheckpoint(pico_architecture())
    for spec in truth.architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(read.read(spec.name, state), truth.read(spec.name, state)), (spec.name, state)
    embedding = truth.read("model.embed_tokens.weight")
    assert torch.equal(truth.read("model.embed_tokens.weight", bounds=((13, 57),)), embedding[13:57])
    assert embedding[2, 5] == torch.tensor((2 * 24 + 5) / 65521 - 0.5) / 8


@pytest.mark.parametrize(("workers", "budget"), [(3, 2 << 30), (1, None), (8, None)])
def test_bytes_do_not_depend_on_workers_or_memory(home, tmp_path: Path, workers, budget):
    """A budget of None: the smallest that the plan accepts, so that every read is a row or a few."""
    if budget is None:
        with pytest.raises(ConfigError, match=rf"with {workers} worker\(s\); it needs --memory-budget") as caught:
            grow_checkpoint(plan_request(request(home, tmp_path / "out", workers=workers, memory_budget=1 << 20)))
        assert not list(tmp_path.iterdir())
        budget = (int(str(caught.value).split("--memory-budget ")[1].split("MiB")[0]) + 3) << 20
    grow_checkpoint(plan_request(request(home, tmp_path / "out", workers=workers, memory_budget=budget)))
    assert contents(tmp_path / "out") == contents(home / "target")


WITH_MOMENTS = (
    {"format": "deepspeed"},
    {"format": "universal"},
    {"data_parallel": 2, "zero_stage": 3},
    {"tensor_parallel": 3, "pipeline_parallel": 2, "data_parallel": 2},
    {"modules": "megatron-deepspeed", "tensor_parallel": 3},
    {"modules": "megatron-deepspeed", "format": "universal"},
    {"format": "torch_dist", "tensor_parallel": 3},
    {"format": "torch", "tensor_parallel": 3, "pipeline_parallel": 2},
    {"format": "torch", "tensor_parallel": 3, "distributed_optimizer": True},
)


@pytest.mark.parametrize(
    ("layout", "states"),
    [
        ({"format": "huggingface"}, 1),
        *(pytest.param(layout, 3, marks=pytest.mark.slow) for layout in WITH_MOMENTS),
    ],
    ids=str,
)
def test_an_embedding_larger_than_the_budget(tmp_path: Path, layout, states):
    """330,000 x 318 in fp32 are 400 MiB a state; the whole process stays below 370 MiB with two workers."""
    architecture = pico_architecture(
        tied=True, vocab_size=330_000, hidden_size=258, num_hidden_layers=2, intermediate_size=51
    )
    write_synthetic(tmp_path, architecture, dtype="bfloat16", **layout)
    recipe = {"target": {"hidden_size": 318}, "layout": {**layout, "dtype": "float32"}}
    if states == 1:
        recipe["optimizer"] = "reset"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    peak = peak_of_growth(tmp_path, "--workers", "2", "--memory-budget", "370MiB")
    assert 100 << 20 < peak <= 370 << 20
    assert read_manifest(tmp_path / "out")["facts"]["target"]["tensor_bytes"] > peak * states
    found, truth = open_source(tmp_path / "out"), open_source(tmp_path / "source")
    rows = ((329_990, 330_000),)
    for state in truth.facts.states:
        grown, old = (c.read("model.embed_tokens.weight", state, rows) for c in (found, truth))
        assert grown.shape == (10, 318) and grown.any()
        ratio = grown[:, :258].double() / old.double()
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-5), "each column by its own factor"


def peak_of_growth(folder, *options):
    """Largest anonymous memory of the tool while it grows folder/source into folder/out."""
    command = [sys.executable, "tools/grow_checkpoint.py", "--source", folder / "source", "--output", folder / "out"]
    command += ["--recipe", folder / "recipe.yaml", *options]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes_of(process.pid))
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


def anonymous_bytes_of(process):
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.parametrize("point", [*(pytest.param(point, marks=pytest.mark.slow) for point in POINTS[:2]), *POINTS[2:]])
def test_killed_and_run_again_gives_the_same_bytes(home, tmp_path: Path, point):
    """At every boundary of the journal: five model and layer files, four optimizer files, then publication."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["incr_ds.offline.run", "transformers.models.llama.configuration_llama"])
    files = len(plan_request(request(home, tmp_path / "out")).files)
    for name in ("source", "recipe.yaml"):
        os.symlink(home / name, tmp_path / name)
    for number in range(files if "note" in point else 1):
        child = context.Process(target=grow_until, args=(str(tmp_path), 1 + number % 2, point, number))
        child.start()
        child.join(60)
        assert child.exitcode == -9
        if point == "after reveal":
            verify_manifest(tmp_path / "out")
        else:
            assert not (tmp_path / "out").exists()
            grow_checkpoint(plan_request(request(tmp_path, tmp_path / "out")))
        assert contents(tmp_path / "out") == contents(home / "target")
        grow_checkpoint(plan_request(request(tmp_path, tmp_path / "out", overwrite=True)))
        assert hidden(tmp_path) == []
        assert contents(tmp_path / "out") == contents(home / "target")
        shutil.rmtree(tmp_path / "out")


def test_what_was_finished_is_not_written_again(home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workspace, "seal", broken(errno.EIO))
    with pytest.raises(CheckpointError, match=r"Input/output error .*; nothing was published.*same command continues"):
        grow_checkpoint(plan_request(request(home, tmp_path / "out")))
    monkeypatch.undo()
    monkeypatch.setattr("incr_ds.offline.run.write_file", broken(errno.EIO))
    grow_checkpoint(plan_request(request(home, tmp_path / "out")))
    assert contents(tmp_path / "out") == contents(home / "target")


def broken(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output")]
)
def test_a_failing_disk_publishes_nothing(home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number, message: str):
    """The disk fails in the middle of some file; the next run goes on and the bytes are the same."""
    write = sink.Sink.write
    written = [0]

    def failing(self, data, label=None):
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(number, os.strerror(number))
        write(self, data, label)

    monkeypatch.setattr(sink.Sink, "write", failing)
    with pytest.raises(CheckpointError, match=rf"out: {message}.*nothing was published"):
        grow_checkpoint(plan_request(request(home, tmp_path / "out", workers=2)))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    grow_checkpoint(plan_request(request(home, tmp_path / "out")))
    assert contents(tmp_path / "out") == contents(home / "target")
    assert hidden(tmp_path) == []


def test_room_is_checked_before_the_first_byte(home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planned = plan_request(request(home, tmp_path / "out"))
    real = os.statvfs(tmp_path)
    for change, message in (
        (
            {"f_bavail": 10},
            rf"out: needs [\d,]+ bytes, but {10 * real.f_frsize:,} are free on its disk; nothing was written",
        ),
        ({"f_files": 100, "f_favail": 3}, r"out: needs 15 files, but its disk allows 3 more"),
    ):
        monkeypatch.setattr(os, "statvfs", lambda _, change=change: Changed(real, change))
        with pytest.raises(CheckpointError, match=message):
            grow_checkpoint(planned)
    assert list(tmp_path.iterdir()) == []


class Changed:
    """A statvfs result with some fields replaced."""

    def __init__(self, real, change):
        self.real, self.change = real, change

    def __getattr__(self, name):
        return self.change.get(name, getattr(self.real, name))
