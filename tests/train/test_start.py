import shutil

import pytest
import torch
import yaml

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError, ConfigError, LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.train.start import find_start


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder, and a native checkpoint of a 1 x 2 x 1 layout grown from it."""
    folder = tmp_path_factory.mktemp("start")
    model = drawn_model(small_architecture("llama", attention_dropout=0.1), torch.float32)
    model.save_pretrained(folder / "hf")
    recipe = {
        "target": {"num_hidden_layers": 4},
        "optimizer": "reset",
        "layout": {"tensor_parallel": 1, "pipeline_parallel": 2, "data_parallel": 1, "zero_stage": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(folder / "hf", folder / "recipe.yaml", folder / "native")))
    return folder, model


def run_settings(model, precision="fp32", *, reshard=False, **layout):
    content = {
        "output": "run",
        "precision": precision,
        "model": model,
        "layout": layout or {"pipeline_parallel": 2},
        "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "schedule": {"train_steps": 10, "learning_rate": 0.1},
        "data": {"train": [{"prefix": "a"}]},
        "checkpoint": {"interval": 1},
        "resume": {"reshard": reshard},
    }
    return parse_settings(content, RunSettings, "test")


def test_a_config_is_a_fresh_model(folders):
    folder, _ = folders
    start = find_start(run_settings({"config": str(folder / "hf" / "config.json")}))
    assert start.weights is None and start.checkpoint is None
    assert start.architecture.sizes["hidden"] == 96 and start.description.startswith("fresh weights")


def test_a_hugging_face_folder_gives_its_weights_and_says_so(folders):
    folder, model = folders
    start = find_start(run_settings({"initialize_from": str(folder / "hf")}))
    assert start.checkpoint is None and "the optimizer starts fresh" in start.description
    assert torch.equal(start.weights.read("model.norm.weight"), model.model.norm.weight.data)


def test_a_native_checkpoint_of_this_layout_keeps_its_optimizer(folders):
    folder, _ = folders
    start = find_start(run_settings({"initialize_from": str(folder / "native")}))
    assert (start.checkpoint, start.tag, start.weights) == (folder / "native", "grown", None)
    assert start.architecture.num_layers == 4


def test_a_native_checkpoint_of_another_precision_keeps_its_optimizer_too(folders):
    """DeepSpeed would look for files of another name, so they are read tensor by tensor."""
    folder, _ = folders
    start = find_start(run_settings({"initialize_from": str(folder / "native")}, "bf16"))
    assert start.checkpoint is None and start.weights is not None and start.with_moments


def test_a_native_checkpoint_of_another_layout_is_refused_unless_its_weights_are_enough(folders):
    folder, model = folders
    layout = {"tensor_parallel": 3, "data_parallel": 2}
    with pytest.raises(
        LayoutError,
        match=r"native: laid out for tensor_parallel 1 \(this run: 3\), pipeline_parallel 2 \(this run: 1\), "
        r"data_parallel 1 \(this run: 2\); .*resume.reshard: true, .*model.load_optimizer: false",
    ):
        find_start(run_settings({"initialize_from": str(folder / "native")}, **layout))
    start = find_start(run_settings({"initialize_from": str(folder / "native"), "load_optimizer": False}, **layout))
    assert start.checkpoint is None
    assert torch.equal(start.weights.read("model.embed_tokens.weight"), model.model.embed_tokens.weight.data)


def test_a_native_checkpoint_of_another_layout_keeps_its_optimizer_with_reshard(folders):
    folder, _ = folders
    start = find_start(run_settings({"initialize_from": str(folder / "native")}, reshard=True, tensor_parallel=3))
    assert start.checkpoint is None and start.weights is not None and start.with_moments
    assert start.description.endswith(
        "resharded from tp1 pp2 dp1 zero1 to tp3 pp1 dp1 zero1 (attention_dropout 0.1: each layout drops other elements)"
    )


def test_a_native_checkpoint_of_this_layout_is_loaded_as_it_is_with_reshard_too(folders):
    folder, _ = folders
    start = find_start(run_settings({"initialize_from": str(folder / "native")}, reshard=True, pipeline_parallel=2))
    assert (start.checkpoint, start.weights) == (folder / "native", None)


def test_a_deepspeed_checkpoint_of_others_gives_its_weights_only_when_asked(folders, tmp_path):
    folder, _ = folders
    shutil.copytree(folder / "native", tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match="incr_ds did not write this DeepSpeed checkpoint; .*set model.load_optimizer: false"
    ):
        find_start(run_settings({"initialize_from": str(tmp_path / "foreign")}))
    start = find_start(run_settings({"initialize_from": str(tmp_path / "foreign"), "load_optimizer": False}))
    assert start.weights is not None


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.json: cannot be read"):
        find_start(run_settings({"config": str(tmp_path / "nothing.json")}))
