"""A long run on a machine that keeps failing: how much of the time becomes training, and whether anything grows."""

import json
import random
import shutil
import statistics
import time
from dataclasses import dataclass, field

import psutil
import pytest
from fault_runs import Started, curve, newest, write_material, write_run
from token_data import write_random_documents

from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.checkpoint.runs import step_folders
from incr_ds.train.metrics import FILE, read_metrics

pytestmark = pytest.mark.soak
MEAN_LIFE = 60.0  # seconds from a start to the kill, start-up included
STEADY = 1 / 6  # of the time: the last part, in which nothing is killed and memory is measured
SETTINGS = {
    "growth": [],
    "evaluation": None,
    "batch": {"sequence_length": 64, "micro_batch_size": 8, "global_batch_size": 16},
    "schedule": {"train_steps": 400_000, "learning_rate": 1e-3, "warmup_steps": 10},
    "checkpoint": {"interval": 20, "keep_last": 2, "background": True},
    "log_interval": 10,
}


@dataclass
class Life:
    """One start of the run. Times are in seconds of ``time.monotonic``; ``ready`` is that of the first new row."""

    began: float
    ready: float | None = None
    ended: float = 0.0
    memory: list[int] = field(default_factory=list)  # bytes of both ranks that are theirs alone
    descriptors: list[int] = field(default_factory=list)

    @property
    def working(self):
        return 0.0 if self.ready is None else self.ended - self.ready


def live(run_file, output, seconds):
    """Start the run and let it live for ``seconds``. Returns its life and the process, still running."""
    found = newest(output)
    saved = 0 if found is None else int(found.name.removeprefix("step_"))
    run, life, cut = Started(run_file), Life(time.monotonic()), False
    sampled = life.began
    while (now := time.monotonic()) - life.began < seconds and run.command.poll() is None:
        if life.ready is None:
            last = last_row(output)
            cut = cut or last["step"] <= saved  # the rows after the checkpoint are dropped before the first new one
            if cut and last["step"] > saved:
                life.ready = now - last["seconds"]
        elif now - sampled > 5:
            measure(run, life)
            sampled = now
        time.sleep(0.1)
    life.ended = time.monotonic()
    return life, run


def last_row(output):
    path = output / FILE
    lines = path.read_bytes()[-4096:].splitlines()[-2:] if path.exists() else []
    return next((json.loads(line) for line in reversed(lines) if line.endswith(b"}")), {"step": 0})


def measure(run, life):
    memory = descriptors = 0
    for rank in run.ranks():
        try:
            memory += rank.memory_full_info().uss
            descriptors += rank.num_fds()
        except psutil.Error:
            return
    life.memory.append(memory)
    life.descriptors.append(descriptors)


@pytest.mark.timeout(4 * 3600)
def test_soak(tmp_path, tried, request):
    minutes = request.config.getoption("--soak-minutes")
    material = write_material(tmp_path / "material")
    write_random_documents(material, documents=4000, length=200)
    output = tmp_path / "run"
    run_file = write_run(material, output, **SETTINGS)
    draw, end = random.Random(29), time.monotonic() + 60 * minutes
    lives = []
    while time.monotonic() < end - 60 * minutes * STEADY:
        life, run = live(run_file, output, draw.expovariate(1 / MEAN_LIFE))
        with tried.case(f"kill {len(lives) + 1}"):
            assert run.command.poll() is None, run.log.read_text()[-3000:]
            run.kill_all()
        run.close()
        lives.append(life)
    last, run = live(run_file, output, end - time.monotonic())
    run.command.terminate() if run.command.poll() is None else None
    with tried.case("what is left"):
        run.close()
        verify_manifest(newest(output))
        assert len(step_folders(output)) <= SETTINGS["checkpoint"]["keep_last"] + 1
        steps = [row["step"] for row in curve(output)]
        every = SETTINGS["log_interval"]
        assert steps == [1, *range(every, steps[-1] + 1, every)]
    with tried.case("goodput"):
        kept, working = seconds_kept(output), sum(life.working for life in [*lives, last])
        goodput = kept / working
        assert 0.9 <= goodput <= 1.02, (kept, working)
    with tried.case("memory and file descriptors"):
        memory, files = medians(last.memory), medians(last.descriptors)
        assert memory[1] < 1.02 * memory[0], last.memory
        assert files[1] <= files[0], last.descriptors
    with tried.case("the curve of a calm run"):
        rows = min(len(steps), 100)
        calm = tmp_path / "calm"
        calm_run = Started(write_run(material, calm, **SETTINGS))
        assert calm_run.wait_for(lambda: last_row(calm)["step"] >= steps[rows - 1], 600)
        calm_run.kill_all()
        calm_run.close()
        assert curve(output)[:rows] == curve(calm)[:rows]
    shutil.rmtree(output)
    tried.note = (
        f"{minutes:g} minutes, {len(lives)} kills of all processes, one a minute on average; {steps[-1]:,} steps; "
        f"{goodput:.1%} of the time after start-up became training; in the last {minutes * STEADY:.0f} minutes without kills "
        f"memory {memory[1] / memory[0] - 1:+.1%}, open files {files[1] - files[0]:+.0f}"
    )


def medians(samples):
    """Medians of the second and the last third. A single sample may meet a save, which has a few more files open."""
    third = len(samples) // 3
    return [statistics.median(part) for part in (samples[third : 2 * third], samples[2 * third :])]


def seconds_kept(output):
    """What the steps of the final curve took, saving included."""
    rows = [row for row in read_metrics(output / FILE) if row["kind"] == "train"]
    return sum(row["seconds"] + row["save_seconds"] for row in rows)
