"""The loop's own decisions, with a stand-in engine that has one number. Other tests have the real engine."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from one_number import LENGTH, SKIPPED, curve, make_world, names, settings, stop_at, stoppable
from safetensors.torch import load_file, save_file

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.launch.stopping import StopRequest
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.train import inputs, loop, pretraining
from incr_ds.train.metrics import HeldOut, read_metrics
from incr_ds.train.pretraining import pretrain
from incr_ds.train.recovery import DivergedError


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


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
    assert "fresh weights of" in shown and "mfu" not in shown  # nothing is known of a CPU's peak
    assert all(item["mfu"] is None for item in read_metrics(loop.Path(run.output) / "metrics.jsonl") if "mfu" in item)


def test_a_run_that_grows_nan_is_refused_before_its_engine_and_a_resumed_one_is_not_looked_at(world):
    folder = world["folder"]
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder / "source")
    recipe = {"target": {"intermediate_size": 260}, "optimizer": "reset"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    growth = {"source": str(folder / "source"), "recipe": str(folder / "recipe.yaml")}
    run = settings(world, "grown", model={"initialize_from": growth, "load_optimizer": False})
    file, name = folder / "source" / "model.safetensors", "model.layers.1.self_attn.o_proj.weight"
    whole = load_file(file)
    save_file(whole | {name: torch.where(whole[name] == whole[name].max(), torch.nan, whole[name])}, file)
    with pytest.raises(CheckpointError, match=rf"refused: .*{name} \(weight\): 1 of 4,608 numbers"):
        pretrain(run)
    assert world["engines"] == [] and not list(folder.glob("grown/checkpoints/*"))
    damaged = file.read_bytes()
    save_file(whole, file)
    world["on_step"] = stop_at(2)
    assert stoppable(run).stopped
    file.write_bytes(damaged)
    world["on_step"] = lambda step, number: number
    assert pretrain(run).position.step == 6


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(world, when, capsys):
    whole, parts = settings(world, "whole"), settings(world, "parts")
    pretrain(whole)
    world["on_step"] = stop_at(when)
    first = stoppable(parts)
    assert first.stopped and first.position.step == when
    assert f"stopped by SIGTERM after step {when} of 6" in capsys.readouterr().out
    world["on_step"] = lambda step, number: number
    assert pretrain(parts).position == pretrain(whole).position
    assert curve(parts) == curve(whole)
    assert world["engines"][1].number != world["engines"][2].number == world["engines"][0].number


def test_a_run_that_is_stopped_at_its_last_step_is_finished(world):
    world["on_step"] = stop_at(6)
    assert not stoppable(settings(world, "run")).stopped


def test_a_run_that_is_stopped_before_its_first_step_saves_nothing(world, capsys):
    run = settings(world, "run")
    with StopRequest() as stop:
        stop.join()
        stop.request("SIGUSR1")
        outcome = pretrain(run, stop=stop)
    assert outcome.stopped and outcome.checkpoint is None and not (loop.Path(run.output) / "checkpoints").exists()
    assert (
        "stopped by SIGUSR1 after step 0 of 6: 0 tokens, 0.000e+00 FLOPs; nothing to save yet"
        in capsys.readouterr().out
    )


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
    assert (curve(run)[-1]["step"], curve(run)[-1]["loss"]) == (5, None)  # JSON has no NaN


def test_no_resume_refuses_a_run_that_has_checkpoints(world):
    run = settings(world, "run")
    pretrain(run, resume=False)
    with pytest.raises(ConfigError, match="--no-resume: .*step_00000006 exists; remove it, or set another output"):
        pretrain(run, resume=False)


def test_the_teacher_costs_flops_only_while_its_weight_lasts(world, monkeypatch):
    monkeypatch.setattr(pretraining, "open_described", lambda path: pretraining.find_start(settings(world, "run")))
    taught = settings(world, "taught", distillation={"teacher": "t", "weight": 0.5, "anneal_steps": 2})
    alone = settings(world, "alone")
    pretrain(taught)
    pretrain(alone)
    spent, plain = ([item["flops"] for item in curve(run) if item["kind"] == "train"] for run in (taught, alone))
    step = plain[0]
    assert spent[0] == pytest.approx(step * 4 / 3)  # the teacher is as large as the student here: one more forward
    assert np.diff(spent).tolist() == pytest.approx([step * 4 / 3] + [step] * 4)
    assert [item["alpha"] for item in curve(taught) if item["kind"] == "train"] == [0.5, 0.25, 0, 0, 0, 0]


def test_evaluations_ask_the_teacher_while_its_weight_lasts(world, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "open_described", lambda path: pretraining.find_start(settings(world, "run")))
    taught = settings(world, "taught", distillation={"teacher": "t", "weight": 0.5, "anneal_steps": 4})
    pretrain(taught)
    evaluated = [item for item in curve(taught) if item["kind"] == "evaluation"]
    distances = [item["teacher_kl"] for item in evaluated]
    assert [item["step"] for item in evaluated] == [0, 2, 4, 6] and distances[2:] == [None, None]
    assert distances[0] == 0.125 and distances[1] not in (None, distances[0])
    shown = capsys.readouterr().out
    assert f"kl from the teacher {distances[1]:.4f}" in shown and shown.count("kl from the teacher") == 2
    cached = settings(world, "cached", distillation={"teacher": "t", "cache": "c", "weight": 0.5, "anneal_steps": 4})
    assert loop._asks_teacher(taught, 3) and not loop._asks_teacher(taught, 4) and not loop._asks_teacher(cached, 0)


def test_the_distance_to_the_teacher_is_the_mean_over_the_held_out_sets(world):
    found = {"old": HeldOut(1.0, 2.0, None, 0.25), "new": HeldOut(3.0, 4.0, None, 0.75)}
    assert loop._evaluation_row(settings(world, "run"), found, 1.0).teacher_kl == 0.5


def long(world, output, **changes):
    changes = {"schedule": {"train_steps": 40, "learning_rate": 0.1}, "evaluation": None} | changes
    return settings(world, output, checkpoint={"interval": 5, "keep_last": 1}, **changes)


def losses(values):
    """Steps whose loss is the next value, and the last one from there on."""
    return lambda step, number: values[min(step, len(values)) - 1]


def test_gradients_that_stay_not_finite_end_the_run_with_its_last_healthy_checkpoint(world, capsys):
    run = long(world, "run", divergence={"max_skipped_steps": 8, "max_loss_rise": 2.0})
    world["on_step"] = losses([4.0] * 11 + [SKIPPED])
    message = (
        r"step 19: the gradients of the last 8 steps were not finite, and no step was taken .divergence.max_skipped_steps: 8.; "
        r"gradient norm nan, .*; the run resumes from .*step_00000010"
    )
    with pytest.raises(DivergedError, match=message):
        pretrain(run)
    assert names(run) == ["step_00000010"]
    assert (
        "step 15: not saved, because the run is not healthy: the last 4 step(s) were skipped" in capsys.readouterr().out
    )


def test_a_few_skipped_steps_are_passed_over_and_the_save_that_was_due_follows(world):
    run = long(world, "run", schedule={"train_steps": 18, "learning_rate": 0.1})
    world["on_step"] = losses([4.0] * 9 + [SKIPPED, SKIPPED, 4.0])
    assert pretrain(run).position.step == 18
    run = long(world, "kept", schedule={"train_steps": 14, "learning_rate": 0.1}, divergence={"max_loss_rise": 2.0})
    world["on_step"] = losses([4.0] * 9 + [SKIPPED, SKIPPED, 4.0, 4.0, math.nan])
    with pytest.raises(DivergedError, match="step 14: the loss is nan"):
        pretrain(run)
    assert names(run) == ["step_00000012"]


def test_a_loss_that_rises_and_stays_up_ends_the_run_and_is_never_saved(world):
    run = long(world, "run", divergence={"max_loss_rise": 2.0, "rise_steps": 12})
    world["on_step"] = losses([7.0] * 12 + [179.0])
    with pytest.raises(DivergedError, match=r"step 24: the loss rose: .* lowest; it has been more than .* for 12 step"):
        pretrain(run)
    assert names(run) == ["step_00000010"]
    # With another rate it goes on from there.
    world["on_step"] = losses([7.0])
    assert pretrain(run).position.step == 40


def test_a_run_does_not_finish_with_a_loss_that_rose(world):
    run = long(world, "run", schedule={"train_steps": 12, "learning_rate": 0.1}, divergence={})
    world["on_step"] = losses([7.0] * 10 + [60.0])
    with pytest.raises(DivergedError, match="step 12: the loss rose: .* for 2 step"):
        pretrain(run)
    assert names(run) == ["step_00000010"]


def test_what_a_stop_saved_while_the_loss_was_up_is_set_aside_when_the_run_diverges(world):
    run = long(world, "run", divergence={"max_loss_rise": 2.0, "rise_steps": 8})
    high = losses([7.0] * 10 + [60.0])
    world["on_step"] = lambda step, number: stop_at(13)(step, number) and high(step, number)
    assert stoppable(run).position.step == 13
    assert names(run) == ["step_00000010", "step_00000013"]  # the last healthy one is kept beside keep_last
    world["on_step"] = lambda step, number: 60.0
    with pytest.raises(DivergedError, match="step 18: .*for 8 step.*the run resumes from .*step_00000010"):
        pretrain(run)  # the count of the first run goes on
    assert names(run) == ["diverged_step_00000013.1", "step_00000010"]


def test_a_second_run_on_the_same_output_is_refused_and_changes_nothing(world):
    run = settings(world, "run")
    found = []

    def second(step, number):
        if step == 4:
            with pytest.raises(
                CheckpointError, match="run: process .* is writing to it; wait for it, or choose another output"
            ):
                pretrain(run)
            found.append(names(run))
        return number

    world["on_step"] = second
    pretrain(run)
    assert found == [["step_00000003"]] and names(run) == ["step_00000003", "step_00000006"]
    pretrain(run)  # the lock is gone with the run


def test_a_damaged_line_of_metrics_does_not_keep_a_run_from_resuming(world, capsys):
    run = settings(world, "run")
    world["on_step"] = stop_at(3)
    stoppable(run)
    metrics = loop.Path(run.output) / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")
    metrics.write_bytes(b"\n".join([lines[0], b"\xff\x00 damaged", b"[]", *lines[1:]]))
    world["on_step"] = lambda step, number: number
    assert pretrain(run).position.step == 6
    assert [item["step"] for item in curve(run) if item["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert "dropped a damaged line: " in capsys.readouterr().out


def test_a_copy_that_somebody_made_is_not_resumed_from(world):
    run = settings(world, "run")
    world["on_step"] = stop_at(3)
    stoppable(run)
    folder = loop.Path(run.output) / "checkpoints"
    shutil.copytree(folder / "step_00000003", folder / "step_00000020.bak")
    shutil.copytree(folder / "step_00000003", folder / ".step_00000006.incomplete-elsewhere-1-abc")
    world["on_step"] = lambda step, number: number
    assert pretrain(run).position.step == 6
    assert world["engines"][1].steps == 3
    assert names(run) == ["step_00000003", "step_00000006", "step_00000020.bak"]


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_model_precision_or_tokenizer_is_refused_on_resume(world):
    tokenizer, config = world["folder"] / "tokenizer", world["folder"] / "config.json"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    data = {"train": [{"prefix": str(world["folder"] / "x_train_text_document")}], "tokenizer": str(tokenizer)}
    changes = {"data": data, "evaluation": None}
    pretrain(settings(world, "run", **changes))
    before = config.read_text()
    rewritten(config, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    message = (
        "another model, or holds it in another precision:\n  model config rms_norm_eps: 1e-06 there, 0.001 in this run\n"
        "  model config rope_parameters: .*10000.* there, .*7.0.* in this run"
    )
    with pytest.raises(ConfigError, match=message):
        pretrain(settings(world, "run", **changes))
    config.write_text(before)
    with pytest.raises(ConfigError, match="precision: fp32 there, bf16 in this run file"):
        pretrain(settings(world, "run", **changes, precision="bf16"))
    (tokenizer / "tokenizer.json").write_text("{ }")
    with pytest.raises(ConfigError, match="data.tokenizer .*tokenizer.json: changed since"):
        pretrain(settings(world, "run", **changes))
    (tokenizer / "tokenizer.json").write_text("{}")
    assert pretrain(settings(world, "run", **changes)).position.step == 6


def test_data_that_changed_at_equal_size_is_refused_on_resume(world):
    run = settings(world, "run")
    pretrain(run)
    path = world["folder"] / "x_train_text_document.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="same order of tokens:\n  data .*x_train_text_document: changed since"):
        pretrain(run)


def test_data_that_was_moved_goes_on_and_is_named(world, capsys):
    whole = settings(world, "whole")
    pretrain(whole)
    run, folder = settings(world, "run"), world["folder"]
    world["on_step"] = stop_at(3)
    assert stoppable(run).stopped
    world["on_step"] = lambda step, number: number
    for ending in (".bin", ".idx"):
        (folder / f"x_train_text_document{ending}").rename(folder / f"moved{ending}")
    moved = run.model_dump()
    moved["data"]["train"][0]["prefix"] = str(folder / "moved")
    capsys.readouterr()
    pretrain(parse_settings(moved, RunSettings, "test"))
    shown = capsys.readouterr().out
    assert f"data.train.0.prefix: {folder}/x_train_text_document -> {folder}/moved" in shown
    assert curve(run) == curve(whole)


def test_data_is_read_whole_once_and_not_at_every_start(world, monkeypatch):
    run, scanned = settings(world, "run"), []
    scan = inputs.scan_chunk
    monkeypatch.setattr(inputs, "scan_chunk", lambda index, number: scanned.append(index.prefix) or scan(index, number))
    pretrain(run)
    assert len(scanned) == 2
    pretrain(run)
    assert len(scanned) == 2
