"""Runs that the fault tests disturb: a tiny model that grows on the way, started by the deepspeed command."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
import yaml
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.runs import step_folders
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import free_port
from incr_ds.train.metrics import TIMINGS, read_metrics

ROOT = Path(__file__).parents[2]
LAST, GROWTH = 24, 12
RECIPE = {"target": {"num_hidden_layers": 4}, "depth": {"method": "interleave", "new": "zero-output"}}


def write_material(folder):
    """Config, data and a growth recipe in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_random_documents(folder, documents=60, length=50)
    (folder / "config.json").write_text(json.dumps(dict(small_architecture("llama", num_hidden_layers=2).config)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def run_content(material, output, **changes):
    content = {
        "output": str(output),
        "seed": 5,
        "precision": "fp32",
        "model": {"config": str(material / "config.json")},
        "layout": {"data_parallel": 2, "zero_stage": 1},
        "batch": {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 4},
        "schedule": {"train_steps": LAST, "learning_rate": 1e-2, "warmup_steps": 2},
        "data": {
            "train": [{"prefix": str(material / "x_train_text_document")}],
            "validation": str(material / "x_validation_text_document"),
        },
        "evaluation": {"interval": 6, "samples": 8},
        "checkpoint": {"interval": 3, "keep_last": 2},
        "growth": [{"at_step": GROWTH, "recipe": str(material / "recipe.yaml"), "rewarmup_steps": 2}],
        "log_interval": 1,
        "tensorboard": False,
    }
    return content | changes


def write_run(material, output, **changes):
    path = Path(f"{output}.yaml")
    path.write_text(yaml.safe_dump(run_content(material, output, **changes)))
    return path


class Started:
    """A run under the deepspeed command, with all of its processes.

    ``changes`` are environment variables, None to remove one. ``within`` are words before the command.
    """

    def __init__(self, run_file, ranks=2, changes=None, within=()):
        words = [
            *within,
            Path(sys.executable).with_name("deepspeed"),
            "--num_gpus",
            ranks,
            "--master_port",
            free_port(),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        environment |= changes or {}
        environment = {key: value for key, value in environment.items() if value is not None}
        self.log, self.run_file = Path(f"{run_file}.log"), run_file
        with open(self.log, "a") as log:
            self.command = subprocess.Popen(
                [*map(str, words), str(ROOT / "launchers" / "pretrain.py"), "--config", str(run_file)],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def tree(self):
        """All processes of the run: the command first, ranks last."""
        try:
            top = psutil.Process(self.command.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self):
        return [one for one in self.tree() if any(word.startswith("--local_rank") for word in _words(one))]

    def wait_for(self, condition, seconds=120):
        """Wait until ``condition()``, or until the run has ended. Returns whether the condition holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.command.poll() is not None:
                return bool(condition())
            time.sleep(0.05)
        return False

    def kill_all(self):
        """SIGKILL to every process at once, as a node that loses its power."""
        tree = self.tree()
        for process in tree:
            process.suspend() if process.is_running() else None
        for process in tree:
            if process.is_running():
                process.kill()
        psutil.wait_procs(tree, timeout=20)
        self.command.wait(20)

    def end(self, seconds=240):
        """Wait for the end. Returns the exit code."""
        try:
            return self.command.wait(seconds)
        finally:
            self.close()

    def close(self):
        """End what is left."""
        for process in psutil.process_iter():
            if str(self.run_file) in _words(process):
                process.kill()
        if self.command.poll() is None:
            self.command.kill()
            self.command.wait(10)

    def left(self):
        """Processes of this run that are alive."""
        return [process for process in psutil.process_iter() if str(self.run_file) in _words(process)]


def _words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def curve(output):
    """The rows of a run without what depends on the clock."""
    rows = read_metrics(Path(output) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def newest(output):
    """The newest published checkpoint of a run, or None."""
    folders = step_folders(Path(output))
    return folders[0] if folders else None


def states(output):
    """Every weight and moment of a run's newest checkpoint."""
    checkpoint = open_source(newest(output))
    return {
        (spec.name, state): checkpoint.read(spec.name, state)
        for spec in checkpoint.architecture.stored
        for state in ("weight", "exp_avg", "exp_avg_sq")
    }


def assert_equal_runs(one, other):
    """The same rows and, bit for bit, the same weights and moments."""
    assert curve(one) == curve(other)
    first, second = states(one), states(other)
    assert first.keys() == second.keys()
    unequal = [key for key, value in first.items() if not torch.equal(value, second[key])]
    assert not unequal, unequal[:3]


def train_each(contents, damages=None):
    """Train each run in this process group, one after the other. Returns the message of each one's error, or None.

    ``damages`` are a file and what to do to it, or None, for each run. The file is restored afterwards.
    """
    from incr_ds.config.fields import parse_settings
    from incr_ds.config.training import RunSettings
    from incr_ds.errors import IncrError
    from incr_ds.train.distributed import initialize_distributed
    from incr_ds.train.pretraining import train_run

    found = []
    for content, damage in zip(contents, damages or [None] * len(contents), strict=True):
        run = parse_settings(content, RunSettings, "a disturbed run")
        initialize_distributed(run.layout)
        with damaged(*damage) if damage else nullcontext():
            try:
                train_run(run)
                found.append(None)
            except (IncrError, OSError) as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


@contextmanager
def damaged(path, damage):
    """A context in which a file is damaged."""
    content, times = path.read_bytes(), path.stat()
    damage(path)
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
