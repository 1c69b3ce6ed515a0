"""inspect_checkpoint.py: what it prints, and its diff."""

import json
import re

import pytest
import yaml
from commands import run_tool

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """The same model in two layouts, and a wider one."""
    home = tmp_path_factory.mktemp("inspect")
    recipes = {
        "native": {"target": {}, "layout": {"data_parallel": 2, "tensor_parallel": 3}},
        "universal": {"target": {}, "layout": {"format": "universal"}},
        "staged": {"target": {}, "layout": {"pipeline_parallel": 2, "stages": [2, 1]}},
        "wider": {"target": {"intermediate_size": 60}},
    }
    source = SyntheticCheckpoint(pico_architecture())
    for name, content in recipes.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump(content))
        recipe = parse_settings(content, GrowthRecipe, "test")
        grow_checkpoint(plan_files(GrowthRequest(home, home / f"{name}.yaml", home / name), source, recipe))
    return home


def test_components_are_listed(folders):
    done = run_tool("inspect_checkpoint", folders / "universal")
    assert done.returncode == 0
    for shown in ("DeepSpeed universal", "feed-forward", "10,800", "manifest: every file as published"):
        assert shown in done.stdout
    content = json.loads(run_tool("inspect_checkpoint", folders / "native", "--json").stdout)
    assert sum(content["components"].values()) == content["parameters"]


def test_unlike_stages_are_shown(folders):
    shown = run_tool("inspect_checkpoint", folders / "staged").stdout
    assert re.search(r"layers per stage +2, 1", shown)
    assert json.loads(run_tool("inspect_checkpoint", folders / "staged", "--json").stdout)["stages"] == [2, 1]
    assert "layers per stage" not in run_tool("inspect_checkpoint", folders / "native").stdout


def test_every_tensor_stands_in_the_tree(folders):
    shown = run_tool("inspect_checkpoint", folders / "universal").stdout
    architecture = pico_architecture()
    last = architecture.num_layers - 1
    lines = [re.sub("[│├└─]", "", line).strip() for line in shown.splitlines()]
    assert f"0 to {last}" in lines and "embed_tokens" in lines
    down = architecture.by_name["model.layers.0.mlp.down_proj.weight"]
    assert (
        lines.count(f"weight {list(down.shape)}") == 1
        and lines[lines.index("down_proj") + 1] == f"weight {list(down.shape)}"
    )
    content = json.loads(run_tool("inspect_checkpoint", folders / "native", "--json").stdout)
    assert content["tensors"] == {spec.name: list(spec.shape) for spec in architecture.tensors}


def test_layouts_of_one_model_do_not_differ(folders):
    done = run_tool("inspect_checkpoint", "diff", folders / "native", folders / "universal")
    assert (done.returncode, done.stdout.strip()) == (0, "no difference: every weight and moment is the same")


def test_growth_differs_where_it_grew(folders):
    done = run_tool("inspect_checkpoint", "diff", folders / "native", folders / "wider", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)["differences"]
    assert {item["name"].split(".")[-2] for item in found} == {"gate_proj", "up_proj", "down_proj"}
    assert "shape [50, 24] and [60, 24]" in {item["what"] for item in found}
    shown = run_tool("inspect_checkpoint", "diff", folders / "native", folders / "wider").stdout
    assert "model.layers.2.mlp.down_proj.weight" in shown


def test_options_of_one_folder_do_not_go_with_diff(folders):
    done = run_tool("inspect_checkpoint", "diff", folders / "native", folders / "universal", "--tag", "grown")
    assert done.returncode == 2 and "--tag and --config belong to one folder only" in done.stderr


@pytest.mark.parametrize("arguments", [["diff", "one"], ["one", "two"], ["one", "two", "three"]])
def test_other_arguments_are_refused(arguments):
    done = run_tool("inspect_checkpoint", *arguments)
    assert done.returncode == 2 and "expected one checkpoint folder, or: diff FOLDER FOLDER" in done.stderr
