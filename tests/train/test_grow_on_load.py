"""A run that grows its source on load starts with the same bits as a run on the grown checkpoint."""

import re

import pytest
import torch
import yaml
from growing_engines import grow_and_save, refuse_or_start, run_settings
from muon_source import TrainedByMuon

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import ConfigError, GrowthError, LayoutError
from incr_ds.offline.growth_on_load import open_grown
from incr_ds.offline.plan import GrowthRequest, plan_files, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.optimizer_groups import set_apart
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.synthetic import SyntheticCheckpoint
from incr_ds.train.start import check_growth, find_start

TARGET = {"hidden_size": 144, "num_hidden_layers": 5, "intermediate_size": 331}
LAYOUTS = {
    "dp2-zero2-bf16": ("bf16", {"data_parallel": 2, "zero_stage": 2}),
    "dp2-zero3-bf16": ("bf16", {"data_parallel": 2, "zero_stage": 3}),
    "pp2": ("fp32", {"pipeline_parallel": 2}),
    "tp2": ("fp32", {"tensor_parallel": 2}),
    "muon-dp2-zero2-bf16": ("bf16", {"data_parallel": 2, "zero_stage": 2}),
    "muon-pp2": ("fp32", {"pipeline_parallel": 2}),
}


def write_source(folder, kind=SyntheticCheckpoint):
    """Kept in a layout that no run below has."""
    (folder / "same.yaml").write_text("target: {}\n")
    degrees = {"data_parallel": 3} if kind is TrainedByMuon else {"tensor_parallel": 3, "data_parallel": 2}
    recipe = parse_settings({"target": {}, "layout": degrees}, GrowthRecipe, "test")
    source = kind(small_architecture("llama", tie_word_embeddings=True, num_attention_heads=12, num_key_value_heads=6))
    request = GrowthRequest(folder, folder / "same.yaml", folder / "source", allow_nonfinite=True)
    grow_checkpoint(plan_files(request, source, recipe))
    return source


@pytest.mark.parametrize(
    "name",
    [
        "dp2-zero3-bf16",
        "pp2",
        "muon-pp2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dp2-zero2-bf16", "tp2", "muon-dp2-zero2-bf16")),
    ],
)
def test_equal_to_loading_the_grown_checkpoint(tmp_path, name):
    precision, layout = LAYOUTS[name]
    muon = name.startswith("muon")
    write_source(tmp_path, TrainedByMuon if muon else SyntheticCheckpoint)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    (tmp_path / "laid_out.yaml").write_text(yaml.safe_dump({"target": TARGET, "layout": {**layout, "dtype": dtype}}))
    request = GrowthRequest(tmp_path / "source", tmp_path / "laid_out.yaml", tmp_path / "target")
    grow_checkpoint(plan_request(request))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))
    run_processes(grow_and_save, 2, str(tmp_path), layout, precision, "muon" if muon else "adamw")
    loaded, target = open_source(tmp_path / "loaded", "after"), open_source(tmp_path / "target")
    assert loaded.facts.step == target.facts.step == 100
    assert loaded.facts.recorded.global_steps == 100
    assert loaded.facts.momentum == target.facts.momentum
    assert loaded.facts.momentum == (set_apart("muon", target.architecture) if muon else frozenset())
    for spec in target.architecture.stored:
        for state in target.facts.states_of(spec.name):
            assert torch.equal(loaded.read(spec.name, state), target.read(spec.name, state)), (spec.name, state)
    assert len(list(loaded.self_check())) >= len(target.architecture.stored)


def test_a_layout_that_disagrees_is_refused(tmp_path):
    write_source(tmp_path)
    layout = {"pipeline_parallel": 2, "zero_stage": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET, "layout": layout}))
    with pytest.raises(
        LayoutError, match=r"layout states pipeline_parallel 2 \(this run: 1\)\. The run file decides the layout"
    ):
        find_start(run_settings(tmp_path, {"data_parallel": 2, "zero_stage": 1}, "fp32"))
    start = find_start(run_settings(tmp_path, {"pipeline_parallel": 2, "data_parallel": 2}, "fp32"))
    assert (
        start.with_moments
        and "weights and optimizer state" in start.description
        and "grown on load" in start.description
    )
    start = find_start(run_settings(tmp_path, {"pipeline_parallel": 2}, "fp32", load_optimizer=False))
    assert not start.with_moments
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))
    with pytest.raises(LayoutError, match=r"tensor_parallel 5: num_attention_heads 12 does not divide"):
        find_start(run_settings(tmp_path, {"tensor_parallel": 5}, "fp32"))


MOMENT = "model.layers.2.mlp.up_proj.weight"


class InfiniteMoment(SyntheticCheckpoint):
    """Two entries of one moment are infinity."""

    def read(self, name, state="weight", bounds=None):
        found = super().read(name, state, bounds).clone()
        if (name, state) == (MOMENT, "exp_avg_sq") and (bounds or ((0, 1),))[0][0] == 0:
            found[0, :2] = torch.inf
        return found


def test_infinity_in_a_moment_is_named_on_every_rank_unless_moments_are_left(tmp_path):
    """One rank finds it. The others get its message, too, instead of waiting for it while they build their engines."""
    write_source(tmp_path, InfiniteMoment)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))
    said = run_processes(refuse_or_start, 2, str(tmp_path), {"data_parallel": 2, "zero_stage": 1})
    assert said[0] == said[1] and said[0][1] is None
    count = r"model\.layers\.2\.mlp\.up_proj\.weight \(exp_avg_sq\): 2 of 24,000 numbers are not finite"
    assert re.search(rf"rank [01] of 2: growth on load: refused: .*source/grown: {count}", said[0][0])
    assert "tools/grow_checkpoint.py --allow-nonfinite grows this one as it is, into a folder to start" in said[0][0]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET, "optimizer": "reset"}))
    assert refuse_growth(tmp_path) is None, "moments that are not grown do not matter"


def refuse_growth(folder):
    """In this process: no world, one rank."""
    return check_growth(find_start(run_settings(folder, {}, "fp32")))


def test_a_source_without_moments(tmp_path):
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": {"intermediate_size": 260}}))
    with pytest.raises(GrowthError, match=r"no Adam moments, but optimizer: rescale needs them; set optimizer: reset"):
        open_grown(tmp_path / "source", tmp_path / "recipe.yaml")
    recipe = {"target": {"intermediate_size": 260}, "optimizer": "reset"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grown, _ = open_grown(tmp_path / "source", tmp_path / "recipe.yaml")
    assert grown.facts.step == 0 and grown.architecture.sizes["ffn"] == 260
    name = "model.layers.0.mlp.up_proj.weight"
    assert grown.read(name).shape == (260, 96) and not grown.read(name, "exp_avg", ((3, 9),)).any()
    assert torch.equal(grown.read(name, bounds=((240, 258),)), grown.read(name)[240:258])


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    """AdamW's moments for a run with Muon, and Muon's momentum for one with AdamW; with optimizer: reset, neither is read."""
    kinds = {"adamw": SyntheticCheckpoint, "muon": TrainedByMuon}
    for before, name in (("adamw", "muon"), ("muon", "adamw")):
        folder = tmp_path / before
        folder.mkdir()
        write_source(folder, kinds[before])
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))
        anew = f"set name: {before}, or optimizer: reset in .*recipe.yaml, which starts the optimizer anew"
        with pytest.raises(ConfigError, match=f"optimizer.name: {name}, but .* optimizer state of {before}; {anew}"):
            find_start(run_settings(folder, {}, "fp32", name))
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET, "optimizer": "reset"}))
        start = find_start(run_settings(folder, {}, "fp32", name))
        assert start.weights.facts.states == ("weight",) and start.weights.facts.step == 0
