"""Runs in one process with a stand-in engine of one number, for the decisions of the loop and of the stages."""

import json
import math
import os
import signal

from token_data import write_random_documents

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.launch.stopping import StopRequest
from incr_ds.testing.memory import small_architecture
from incr_ds.train import loop, pretraining
from incr_ds.train.engine import HeldOutMeans, StepResult
from incr_ds.train.metrics import TIMINGS, read_metrics
from incr_ds.train.pretraining import pretrain

LENGTH = 8
SKIPPED = 4.25  # the loss of steps whose gradients are not finite here


class OneNumber:
    """Its number depends on every token, rate and weight that it was given, in order."""

    data_parallel_rank = 0
    reads_data = computes_loss = True
    skips_nan = False
    teacher = None

    def __init__(self, run, on_step):
        self.number, self._run, self._on_step, self.steps, self.closed = 1.0, run, on_step, 0, False

    def train_step(self, batches, *, learning_rate, alpha, temperature, new_ratio, global_batch_size):
        self.inputs = []  # of this step
        for _ in range(global_batch_size // self._run.batch.micro_batch_size):
            inputs, labels = next(batches)
            self.inputs.append(inputs)
            self.number = (0.9 * self.number + learning_rate * inputs.double().mean().item() * (1 + alpha)) % 10.0
        self.steps += 1
        loss = self._on_step(self.steps, self.number)
        skipped = loss == SKIPPED or (math.isnan(loss) and self.skips_nan)
        return StepResult(
            loss=loss, ce=loss, divergence=0.0, gradient_norm=math.nan if skipped else 1.0, skipped=skipped
        )

    def forget_teacher(self):
        had, self.teacher = self.teacher is not None, None
        return had

    def evaluate(self, batches, num_micro_batches, *, taught):
        found = list(batches)
        assert len(found) == num_micro_batches
        seen = sum(inputs.double().mean().item() for inputs, _ in found) / num_micro_batches / 100
        return HeldOutMeans(self.number / 4 + seen, self.number / 8 if taught else None)

    def save(self, folder, tag, client_state):
        (folder / tag).mkdir()
        (folder / tag / "state.json").write_text(json.dumps([self.number, client_state]))

    is_writing = False

    def forward_seconds(self):
        return None

    def finish_save(self):
        return {}

    def load(self, folder, tag):
        self.number, client_state = json.loads((folder / tag / "state.json").read_text())
        return client_state

    def release(self):
        self.closed = True


def make_world(tmp_path, monkeypatch):
    """A folder with a model, data, and engines that are remembered; ``on_step`` may be replaced."""
    write_random_documents(tmp_path, documents=20, length=30)
    (tmp_path / "config.json").write_text(json.dumps(dict(small_architecture("llama").config)))
    world = {"folder": tmp_path, "engines": [], "on_step": lambda step, number: number}

    def build_engine(run, architecture, weights, teacher, multipliers):
        world["engines"].append(OneNumber(run, lambda step, number: world["on_step"](step, number)))
        world["engines"][-1].teacher = teacher
        world["engines"][-1].skips_nan = world.get("skips", False)
        return world["engines"][-1]

    monkeypatch.setattr(pretraining, "build_engine", build_engine)
    monkeypatch.setattr(pretraining, "initialize_distributed", lambda layout: None)
    return world


def settings(world, output, **changes):
    folder = world["folder"]
    content = {
        "output": str(folder / output),
        "precision": "fp32",
        "model": {"config": str(folder / "config.json")},
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4},
        "schedule": {"train_steps": 6, "learning_rate": 0.1, "warmup_steps": 2},
        "data": {
            "train": [{"prefix": str(folder / "x_train_text_document")}],
            "validation": str(folder / "x_validation_text_document"),
        },
        "evaluation": {"interval": 2, "samples": 4},
        "checkpoint": {"interval": 3, "keep_last": 0},
        "divergence": {"max_loss_rise": None},  # the number goes up and down
        "log_interval": 1,
        "tensorboard": False,
        "report": False,
    }
    return parse_settings(content | changes, RunSettings, "test")


def curve(run):
    rows = read_metrics(loop.Path(run.output) / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in rows]


def names(run):
    return sorted(path.name for path in (loop.Path(run.output) / "checkpoints").iterdir())


def stop_at(when):
    def on_step(step, number):
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return number

    return on_step


def stoppable(run):
    with StopRequest() as stop:
        return pretrain(run, stop=stop)
