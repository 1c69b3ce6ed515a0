"""Tools accept a run's output folder, use its newest complete checkpoint and name it. Exports keep the run's dtype."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_tool
from safetensors import safe_open
from sources import write_synthetic

from incr_ds.checkpoint.huggingface.export import own_dtype
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.runs import newest_in_run
from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.pico import pico_architecture


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A run with steps 10 and 20, a copy that a user kept, and a step 30 that lost a file."""
    home = tmp_path_factory.mktemp("runs")
    write_synthetic(home, pico_architecture(num_hidden_layers=1, vocab_size=11))
    for name in ("step_00000010", "step_00000020", "step_00000030", "step_00000020.bak", "damaged_step_00000040.1"):
        shutil.copytree(home / "source", home / "run" / "checkpoints" / name)
    next((home / "run" / "checkpoints" / "step_00000030").rglob("*_optim_states.pt")).unlink()
    (home / "run" / "metrics.jsonl").write_text("")
    return home / "run"


def test_the_newest_complete_checkpoint_is_taken(run, tmp_path: Path):
    assert newest_in_run(run) == run / "checkpoints" / "step_00000020"
    for folder in (run / "checkpoints" / "step_00000010", tmp_path, tmp_path / "nowhere"):
        assert newest_in_run(folder) == folder


def test_a_run_without_a_complete_checkpoint_says_what_each_lacks(run, tmp_path: Path):
    shutil.copytree(run / "checkpoints" / "step_00000030", tmp_path / "checkpoints" / "step_00000030")
    (tmp_path / "checkpoints" / "step_00000040").mkdir()
    with pytest.raises(
        CheckpointError, match=r"(?s)a training run without a complete checkpoint:.*40.*manifest\.json: missing"
    ):
        newest_in_run(tmp_path)


def test_every_tool_takes_a_run_and_says_which_checkpoint(run, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": {"num_hidden_layers": 2}}))
    grow = ("grow_checkpoint", "--source", run, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "grown")
    suggest = (
        "grow_checkpoint",
        "--source",
        run,
        "--suggest",
        3 * pico_architecture(num_hidden_layers=1).num_parameters,
    )
    for command in (
        ("inspect_checkpoint", run, "--json"),
        ("inspect_checkpoint", "diff", run, run / "checkpoints" / "step_00000010"),
        ("export_huggingface", run, tmp_path / "exported"),
        (*grow, "--json"),
        suggest,
        ("verify_checkpoint", tmp_path / "grown", "--against", run, "--samples", 1, "--length", 8, "--json"),
        ("verify_checkpoint", run),
    ):
        done = run_tool(*command)
        assert done.returncode == 0, (command, done.stderr)
        said = f"{run}: a training run; its newest complete checkpoint is step_00000020"
        assert done.stderr.replace("\n", "").count(said) == 1, done.stderr
        if "--json" in command:
            json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_keeps_the_dtype_of_the_run(tmp_path: Path, dtype):
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=1, vocab_size=11), dtype=dtype)
    done = run_tool("export_huggingface", tmp_path / "source", tmp_path / "out")
    assert done.returncode == 0 and f"parameters in {dtype}" in done.stdout
    assert stored(tmp_path / "out") == {"float32": "F32", "bfloat16": "BF16"}[dtype]
    other = {"float32": "bfloat16", "bfloat16": "float16"}[dtype]
    assert run_tool("export_huggingface", tmp_path / "source", tmp_path / "other", "--dtype", other).returncode == 0
    assert stored(tmp_path / "other") == {"bfloat16": "BF16", "float16": "F16"}[other]
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dtype"] == other


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return tensors.get_slice("model.norm.weight").get_dtype()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_of_a_hugging_face_folder_keeps_its_dtype(tmp_path: Path, dtype):
    drawn_model(small_architecture("llama"), dtype).save_pretrained(tmp_path)
    assert own_dtype(open_source(tmp_path)) == dtype
