"""The loop's own decisions, with a stand-in engine of one number in one process; the real engine is tested elsewhere."""

import json
import math
import os
import signal

import numpy as np
import pytest

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError
from incr_ds.testing.memory import SMALL, small_architecture
from incr_ds.train import loop
from incr_ds.train.engine import StepResult
from incr_ds.train.loop import DivergedError, pretrain
from incr_ds.train.megatron import IndexedDatasetBuilder
from incr_ds.train.metrics import TIMINGS, read_metrics

LENGTH = 8


class OneNumber:
    """Its number depends on every token, rate and weight that it was given, in order."""

    data_parallel_rank = 0
    reads_data = True

    def __init__(self, run, on_step):
        self.number, self._run, self._on_step, self.steps, self.closed = 1.0, run, on_step, 0, False

    def train_step(self, batches, *, learning_rate, alpha, temperature):
        for _ in range(self._run.accumulation_steps):
            inputs, labels = next(batches)
            self.number = (0.9 * self.number + learning_rate * inputs.double().mean().item() * (1 + alpha)) % 10.0
        self.steps += 1
        loss = self._on_step(self.steps, self.number)
        return StepResult(loss=loss, ce=loss, divergence=0.0, gradient_norm=1.0, skipped=False)

    def evaluate(self, batches, num_micro_batches):
        found = list(batches)
        assert len(found) == num_micro_batches
        return self.number / 4 + sum(inputs.double().mean().item() for inputs, _ in found) / num_micro_batches / 100

    def save(self, folder, tag, client_state):
        (folder / tag).mkdir()
        (folder / tag / "state.json").write_text(json.dumps([self.number, client_state]))

    def load(self, folder, tag):
        self.number, client_state = json.loads((folder / tag / "state.json").read_text())
        return client_state

    def close(self):
        self.closed = True


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a model, data, and engines that are remembered; ``on_step`` may be replaced."""
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"x_{name}_text_document.bin"), dtype=np.uint16)
        for _ in range(20):
            ids = generator.integers(0, SMALL["vocab"], 30).tolist()
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(tmp_path / f"x_{name}_text_document.idx"))
    (tmp_path / "config.json").write_text(json.dumps(dict(small_architecture("llama").config)))
    world = {"folder": tmp_path, "engines": [], "on_step": lambda step, number: number}

    def build_engine(run, architecture, weights, teacher, dynamics):
        world["engines"].append(OneNumber(run, lambda step, number: world["on_step"](step, number)))
        return world["engines"][-1]

    monkeypatch.setattr(loop, "build_engine", build_engine)
    monkeypatch.setattr(loop, "initialize_distributed", lambda layout: None)
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
        "log_interval": 1,
        "tensorboard": False,
    }
    return parse_settings(content | changes, RunSettings, "test")


def curve(run):
    rows = read_metrics(loop.Path(run.output) / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in rows]


def names(run):
    return sorted(path.name for path in (loop.Path(run.output) / "checkpoints").iterdir())


def test_a_run_logs_evaluates_and_saves_when_due(world, capsys):
    run = settings(world, "whole")
    outcome = pretrain(run)
    rows = curve(run)
    assert [(item["kind"], item["step"]) for item in rows] == [
        ("evaluation", 0), ("train", 1), ("train", 2), ("evaluation", 2), ("train", 3), ("train", 4),
        ("evaluation", 4), ("train", 5), ("train", 6), ("evaluation", 6),
    ]  # fmt: skip
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["loss"]))
    assert rows[-1]["tokens"] == 6 * 4 * LENGTH and rows[-1]["consumed_samples"] == 24
    assert (outcome.position.step, outcome.stopped) == (6, False)
    assert names(run) == ["step_00000003", "step_00000006"]
    assert world["engines"][0].closed
    shown = capsys.readouterr().out
    assert "finished after step 6 of 6: 192 tokens" in shown
    assert "fresh weights of" in shown and "GFLOP/s a process (" in shown


def stop_at(when):
    def on_step(step, number):
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return number

    return on_step


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(world, when):
    whole, parts = settings(world, "whole"), settings(world, "parts")
    pretrain(whole)
    world["on_step"] = stop_at(when)
    first = pretrain(parts)
    assert first.stopped and first.position.step == when
    world["on_step"] = lambda step, number: number
    assert pretrain(parts).position == pretrain(whole).position
    assert curve(parts) == curve(whole)
    assert world["engines"][1].number != world["engines"][2].number == world["engines"][0].number


def test_rows_after_the_checkpoint_of_a_killed_run_are_replaced(world):
    whole, parts = settings(world, "whole"), settings(world, "parts")
    pretrain(whole)

    def killed(step, number):
        if step == 5:
            raise KeyboardInterrupt
        return number

    world["on_step"] = killed
    with pytest.raises(KeyboardInterrupt):
        pretrain(parts)
    assert world["engines"][1].closed and names(parts) == ["step_00000003"]
    world["on_step"] = lambda step, number: number
    pretrain(parts)
    assert curve(parts) == curve(whole)


def test_a_finished_run_trains_no_further_and_a_longer_one_goes_on(world, capsys):
    run = settings(world, "run")
    pretrain(run)
    assert pretrain(run).position.step == 6
    assert world["engines"][1].steps == 0
    schedule = {"train_steps": 8, "learning_rate": 0.1, "warmup_steps": 2}
    assert pretrain(settings(world, "run", schedule=schedule)).position.step == 8
    assert world["engines"][2].steps == 2
    assert "changed settings: schedule.train_steps: 6 -> 8" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_and_saves_nothing(world):
    run = settings(world, "run")
    world["on_step"] = lambda step, number: math.nan if step == 5 else number
    with pytest.raises(DivergedError, match="step 5: the loss is nan .*Lower schedule.learning_rate"):
        pretrain(run)
    assert names(run) == ["step_00000003"]
    assert curve(run)[-1]["step"] == 4


def test_no_resume_refuses_a_run_that_has_checkpoints(world):
    run = settings(world, "run")
    pretrain(run, resume=False)
    with pytest.raises(ConfigError, match="--no-resume: .*step_00000006 exists; remove it, or name another output"):
        pretrain(run, resume=False)


def test_the_teacher_costs_flops_only_while_its_weight_lasts(world, monkeypatch):
    monkeypatch.setattr(loop, "open_described", lambda path: loop.find_start(settings(world, "run")))
    taught = settings(world, "taught", distillation={"teacher": "t", "weight": 0.5, "anneal_steps": 2})
    alone = settings(world, "alone")
    pretrain(taught)
    pretrain(alone)
    spent, plain = ([item["flops"] for item in curve(run) if item["kind"] == "train"] for run in (taught, alone))
    step = plain[0]
    assert spent[0] == pytest.approx(step * 4 / 3)  # the teacher is as large as the student here: one more forward
    assert np.diff(spent).tolist() == pytest.approx([step * 4 / 3] + [step] * 4)
    assert [item["alpha"] for item in curve(taught) if item["kind"] == "train"] == [0.5, 0.25, 0, 0, 0, 0]
