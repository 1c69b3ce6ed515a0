"""Publishing, choosing and pruning with a stand-in engine that writes real files; the real one is tested elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.checkpoint.runs import step_folder
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError, ConfigError, LayoutError
from incr_ds.testing.memory import small_architecture
from incr_ds.train.checkpoints import (
    TrainingState,
    newest_complete,
    save_checkpoint,
    saved_state,
)
from incr_ds.train.metrics import Position
from incr_ds.train.resuming import changed_settings

MODEL = small_architecture("llama")


class FileEngine:
    """Keeps one number and its client state in files below folder/tag."""

    is_writing = False

    def finish_save(self):
        return {}

    def __init__(self, value=0.0, fails=False):
        self.value, self.fails = value, fails

    def save(self, folder, tag, client_state):
        (folder / tag).mkdir()
        save_file({"value": torch.tensor(self.value)}, folder / tag / "value.safetensors")
        (folder / tag / "client.json").write_text(json.dumps(client_state))
        if self.fails:
            raise OSError(28, "No space left on device")

    def load(self, folder, tag):
        self.value = load_file(folder / tag / "value.safetensors")["value"].item()
        return json.loads((folder / tag / "client.json").read_text())


def run_settings(output, **changes):
    content = {
        "output": str(output),
        "precision": "fp32",
        "model": {"config": "config.json"},
        "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "schedule": {"train_steps": 10, "learning_rate": 0.1},
        "data": {"train": [{"prefix": "a"}]},
        "checkpoint": {"interval": 1, "keep_last": 2},
    }
    return parse_settings(content | changes, RunSettings, "test")


def state(run, step):
    position = Position(step=step, consumed_samples=2 * step, tokens=16 * step, flops=1e3 * step)
    return TrainingState(position=position, evaluated_step=0, data={"a": "f00"}, settings=run.model_dump(mode="json"))


def resume(engine, run, folder, data):
    """Continue from ``folder`` as a run does."""
    found = saved_state(run, folder, data, MODEL, run.layout)
    engine.load(folder, f"global_step{found.position.step}")
    return found


def save(run, step, value=1.5):
    return save_checkpoint(FileEngine(value), run, MODEL, state(run, step))


def test_a_checkpoint_is_whole_and_comes_back(tmp_path):
    run = run_settings(tmp_path)
    folder = save(run, 3)
    assert folder == tmp_path / "checkpoints" / "step_00000003"
    facts = verify_manifest(folder)["facts"]
    assert facts["layout"] == {
        "tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 1, "zero_stage": 1, "stages": "even",
    }  # fmt: skip
    assert (folder / "latest").read_text() == facts["tag"] == "global_step3"
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 96
    engine = FileEngine()
    assert resume(engine, run, folder, {"a": "f00"}) == state(run, 3)
    assert engine.value == 1.5


def test_tokenizer_files_travel_with_the_model(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    run = run_settings(tmp_path / "run", data={"train": [{"prefix": "a"}], "tokenizer": str(tmp_path / "tok")})
    assert (save(run, 1) / "tokenizer.json").read_text() == "{}"


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path):
    run = run_settings(tmp_path)
    for step in (1, 2, 3):
        save(run, step)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    with pytest.raises(CheckpointError, match="saving failed: OSError.*No space left.*Nothing was published"):
        save_checkpoint(FileEngine(fails=True), run, MODEL, state(run, 4))
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_keep_last_0_keeps_all(tmp_path):
    run = run_settings(tmp_path, checkpoint={"interval": 1, "keep_last": 0})
    for step in range(1, 6):
        save(run, step)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5


def test_keep_steps_are_never_deleted(tmp_path):
    run = run_settings(tmp_path, checkpoint={"interval": 1, "keep_last": 1, "keep_steps": [2, 3]})
    for step in range(1, 6):
        save(run, step)
    left = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000003", "step_00000005"]


def test_the_newest_whole_one_is_taken_and_damage_is_reported(tmp_path):
    run, said = run_settings(tmp_path), []
    assert newest_complete(run, said.append) is None
    good, bad = save(run, 1), save(run, 2)
    (bad / "global_step2" / "value.safetensors").write_bytes(b"short")
    assert newest_complete(run, said.append) == good
    assert len(said) == 1 and "step_00000002/global_step2/value.safetensors: 5 bytes" in said[0]


def test_saving_over_a_damaged_one_keeps_it_aside_and_never_drops_the_whole_ones(tmp_path):
    run = run_settings(tmp_path, checkpoint={"interval": 1, "keep_last": 1})
    save(run, 4)
    (tmp_path / "checkpoints" / "step_00000004" / "latest").write_text("other")
    save(run, 2)
    assert newest_complete(run, lambda text: None) == step_folder(Path(run.output), 2)
    save(run, 4, value=7.0)
    assert newest_complete(run, lambda text: None) == step_folder(Path(run.output), 4)
    assert (tmp_path / "checkpoints" / "damaged_step_00000004.1").is_dir()
    save(run, 5)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_a_whole_checkpoint_of_another_run_is_not_set_aside(tmp_path):
    run = run_settings(tmp_path)
    save(run, 4, value=7.0)
    with pytest.raises(CheckpointError, match="step_00000004: exists and is whole, but this run did not write it"):
        save(run, 4, value=8.0)
    engine = FileEngine()
    resume(engine, run, step_folder(Path(run.output), 4), {"a": "f00"})
    assert engine.value == 7.0


def test_only_damaged_ones_are_an_error_and_not_a_new_start(tmp_path):
    run = run_settings(tmp_path)
    (save(run, 1) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole.*\n.*config.json: missing"):
        newest_complete(run, lambda text: None)


def test_another_layout_is_refused_with_the_way_out(tmp_path):
    folder = save(run_settings(tmp_path), 1)
    other = run_settings(tmp_path, layout={"tensor_parallel": 2, "data_parallel": 2})
    with pytest.raises(
        LayoutError, match="tensor_parallel 1 .this run: 2., data_parallel 1 .this run: 2.*load_optimizer"
    ):
        resume(FileEngine(), other, folder, {"a": "f00"})


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"seed": 9}, {"a": "f00"}, "seed: 0 there, 9 in this run file"),
        ({}, {"a": "bad"}, "data a: changed since"),
        ({}, {"a": "f00", "b": "f11"}, "data b: not part of it"),
        (
            {"batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 4}},
            {"a": "f00"},
            "batch.global_batch_size: 2 there, 4 in this run file",
        ),
    ],
)
def test_what_would_change_the_order_of_tokens_is_refused(tmp_path, changes, data, message):
    folder = save(run_settings(tmp_path), 1)
    with pytest.raises(ConfigError, match=f"would not continue the same order of tokens:\n  {message}"):
        resume(FileEngine(), run_settings(tmp_path, **changes), folder, data)


def corpora(*prefixes, weights=(1.0, 2.0), **others):
    return {"data": {"train": [{"prefix": p, "weight": w} for p, w in zip(prefixes, weights, strict=False)], **others}}


SETS = {"a": "f00", "b": "f11", "v": "f22"}


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        (corpora("x/a", "y", validation="z"), {"x/a": "f00", "y": "f11", "z": "f22"}, None),
        # The names were exchanged together with the content.
        (corpora("b", "a", validation="v"), {"b": "f00", "a": "f11", "v": "f22"}, None),
        (corpora("b", "a", validation="v"), SETS, r"data.train: .*'a', 'weight': 1.0.* there"),
        (corpora("a", "b", validation="v"), {"a": "f11", "b": "f00", "v": "f22"}, "data a: changed since\n  data b: changed"),
        (corpora("x/a", "b", validation="v"), {**SETS, "x/a": "f99"}, r"data x/a: not part of it\n  data.train: "),
        (corpora("x/a", "b", weights=(2, 1.0), validation="v"), {"x/a": "f00", "b": "f11", "v": "f22"}, "data.train: "),
        (corpora("a", "b", validation="z"), {"a": "f00", "b": "f11", "z": "f99"}, "data z: not part of it"),
    ],
)  # fmt: skip
def test_moved_data_goes_on_and_changed_data_does_not(tmp_path, changes, data, message):
    first = run_settings(tmp_path, evaluation={"interval": 1, "samples": 2}, **corpora("a", "b", validation="v"))
    position = Position(step=1, consumed_samples=2, tokens=16, flops=1e3)
    begun = TrainingState(position=position, evaluated_step=0, data=SETS, settings=first.model_dump(mode="json"))
    folder = save_checkpoint(FileEngine(), first, MODEL, begun)
    later = run_settings(tmp_path, evaluation={"interval": 1, "samples": 2}, **changes)
    if message is None:
        assert resume(FileEngine(), later, folder, data).position == position
        return
    with pytest.raises(ConfigError, match=f"same order of tokens:\n  {message}"):
        resume(FileEngine(), later, folder, data)


def test_other_parameter_groups_are_refused(tmp_path):
    folder = save(run_settings(tmp_path), 1)
    with pytest.raises(
        ConfigError, match="other parameter groups:\n  optimizer.multipliers: checkpoint there, none in this run file"
    ):
        resume(FileEngine(), run_settings(tmp_path, optimizer={"multipliers": "none"}), folder, {"a": "f00"})


def test_changed_settings_are_listed_by_key():
    old = {"schedule": {"train_steps": 3, "decay": "cosine"}, "seed": 1, "deepspeed": None}
    new = {"schedule": {"train_steps": 6, "decay": "cosine"}, "seed": 1, "deepspeed": "x.json"}
    assert changed_settings(old, new) == ["deepspeed: None -> x.json", "schedule.train_steps: 3 -> 6"]
