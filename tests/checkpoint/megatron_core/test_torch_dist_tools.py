"""The command-line tools and growth on load with torch_dist as source and as target, and with torch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_tool
from torch_dist_folders import STATES, write_source

from incr_ds.checkpoint.opening import open_source
from incr_ds.offline.growth_on_load import open_grown
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

GROWN = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 300}
RECIPES = {
    "grown": {"target": GROWN, "layout": {"format": "torch_dist", "tensor_parallel": 2, "dtype": "float32"}},
    "native": {"target": {}, "layout": {"data_parallel": 2, "dtype": "float32"}},
    "back": {"target": {}, "layout": {"format": "torch_dist"}},
    "ranks": {"target": {}, "layout": {"format": "torch", "tensor_parallel": 2, "pipeline_parallel": 2}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint in Megatron-LM's form, grown into torch_dist, taken from there to DeepSpeed and back, by the tool."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "source").mkdir()
    write_source(folder / "source", SyntheticCheckpoint(small_architecture("llama", num_key_value_heads=2)))
    source = "source"
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        paths = ("--source", folder / source, "--recipe", folder / f"{name}.yaml", "--output", folder / name)
        done = run_tool("grow_checkpoint", *paths)
        assert done.returncode == 0 and "published" in done.stdout + done.stderr, done.stderr
        source = name
    return folder


def test_inspect_says_what_it_is(home):
    content = json.loads(run_tool("inspect_checkpoint", home / "grown", "--json").stdout)
    assert (content["kind"], content["step"], content["dtype"]) == ("Megatron-core torch_dist", 100, "float32")
    assert content["layout"] == {"tensor_parallel": 2, "pipeline_parallel": 1}
    assert "manifest: every file as published" in run_tool("inspect_checkpoint", home / "grown").stdout
    content = json.loads(run_tool("inspect_checkpoint", home / "ranks", "--json").stdout)
    assert (content["kind"], content["step"], content["dtype"]) == ("Megatron-LM torch", 100, "float32")
    assert content["layout"] == {"tensor_parallel": 2, "pipeline_parallel": 2}


def test_diff_finds_no_difference_on_the_way_and_names_one(home):
    for other in ("native", "back", "ranks"):
        done = run_tool("inspect_checkpoint", "diff", home / "grown", home / other)
        assert done.returncode == 0 and "no difference" in done.stdout
    done = run_tool("inspect_checkpoint", "diff", home / "source", home / "grown")
    assert "shape [96] and [192]" in done.stdout


def test_verify_compares_with_the_source(home):
    for folder, source in (("grown", "source"), ("native", "grown"), ("back", "native"), ("ranks", "back")):
        done = run_tool("verify_checkpoint", home / folder, "--against", home / source)
        assert done.returncode == 0 and "logits kept" in done.stdout, done.stderr
        assert "files as in manifest.json" in done.stdout


def test_verify_names_what_a_flipped_byte_changed(home, tmp_path: Path):
    shutil.copytree(home / "grown", tmp_path / "bad")
    path = tmp_path / "bad/iter_0000007/__2_0.distcp"
    extents = json.loads((tmp_path / "bad/manifest.json").read_text())["files"]["iter_0000007/__2_0.distcp"]["tensors"]
    extent = next(
        e for e in extents if e["tensor"] == "model.layers.1.mlp.down_proj.weight" and e["state"] == "exp_avg"
    )
    content = bytearray(path.read_bytes())
    content[extent["offset"] + 5] ^= 4
    path.write_bytes(content)
    done = run_tool("verify_checkpoint", tmp_path / "bad")
    assert done.returncode == 2 and "model.layers.1.mlp.down_proj.weight (exp_avg, bytes" in done.stderr
    (tmp_path / "bad/manifest.json").unlink()
    done = run_tool("verify_checkpoint", tmp_path / "bad")
    assert done.returncode == 2 and "record archive/data/0 is damaged" in done.stderr


def test_export_gives_the_weights(home, tmp_path: Path):
    assert run_tool("export_huggingface", home / "grown", tmp_path / "out").returncode == 0
    one, other = open_source(home / "grown"), open_source(tmp_path / "out")
    for spec in one.architecture.stored:
        assert torch.equal(one.read(spec.name), other.read(spec.name))


def test_growth_on_load_gives_what_growth_on_disk_writes(home):
    loaded, _ = open_grown(home / "source", home / "grown.yaml")
    written = open_source(home / "grown")
    assert loaded.facts.step == written.facts.step == 100
    for spec in written.architecture.stored:
        for state in STATES:
            assert torch.equal(loaded.read(spec.name, state), written.read(spec.name, state)), (spec.name, state)
