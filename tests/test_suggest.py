"""Suggested targets are valid, exact, near the budget, and cost what they say."""

import importlib
import sys

import pytest

from incr_ds.arch.family import families
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError
from incr_ds.growth.planner import plan_growth
from incr_ds.suggest import parse_count, parse_layout, suggest_targets
from incr_ds.target.placement import check_layout
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.mark.parametrize("family", sorted(families()))
def test_every_suggestion_can_be_grown(family):
    source = small_architecture(family)
    layout = ParallelLayout(data_parallel=2)
    found = suggest_targets(source, 3 * source.num_parameters, layout)
    assert 1 <= len(found) <= 5
    for item in found:
        new = {"width": {"heads": {"new": "copy"}}} if family == "olmo2" else {}
        recipe = GrowthRecipe.model_validate({"target": dict(item.target), "exact": "required", **new})
        plan = plan_growth(source, recipe)
        assert plan.target.num_parameters == item.parameters
        assert abs(item.parameters / (3 * source.num_parameters) - 1) <= 0.1
        assert item.ratio == pytest.approx(item.parameters / source.num_parameters)


def test_suggestions_fit_the_layout_and_say_what_a_rank_holds():
    source = small_architecture("llama", num_attention_heads=6, num_key_value_heads=6)
    layout = ParallelLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=4)
    for item in suggest_targets(source, 4 * source.num_parameters, layout):
        target = plan_growth(source, GrowthRecipe.model_validate({"target": dict(item.target)})).target
        check_layout(target, layout)
        assert target.num_layers % 2 == 0
        # Weights and gradients in bf16, a quarter of master and moments; the fullest rank holds a bit more than a quarter.
        even = item.parameters / 4 * (2 + 2 + 12 / 4)
        assert even <= item.bytes_per_rank <= 1.5 * even
        matrices = sum(spec.numel for spec in target.tensors if spec.is_matrix and spec.role != "embedding")
        assert item.flops_per_token == 6 * matrices


def test_warnings():
    source = small_architecture("llama")
    large = suggest_targets(source, 6 * source.num_parameters, ParallelLayout())
    assert all("published gains are for 2 to 4 times" in item.warnings[0] for item in large)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "the source has [0-9,]+ parameters already"),
        ("9e15", "no valid target within 10%"),
        ("many", "like 3e9, 1.3B"),
        ("inf", "like 3e9, 1.3B"),
    ],
)
def test_impossible_budgets(text, message):
    with pytest.raises(ConfigError, match=message):
        suggest_targets(small_architecture("llama"), parse_count(text), ParallelLayout())


def test_numbers_and_layouts_as_people_write_them():
    assert [parse_count(text) for text in ("3e9", "1.3B", "350M", "1_000")] == [3 * 10**9, 13 * 10**8, 35 * 10**7, 1000]
    assert parse_layout("2x4x8").world_size == 64
    with pytest.raises(ConfigError, match="--layout 2x2: expected three degrees"):
        parse_layout("2x2")


def test_the_tool(tmp_path, monkeypatch, capsys):
    source = small_architecture("llama")
    drawn_model(source).save_pretrained(tmp_path)
    arguments = ["--source", str(tmp_path), "--suggest", str(3 * source.num_parameters)]
    monkeypatch.setattr(sys, "argv", ["grow_checkpoint", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grow_checkpoint").main()
    assert ended.value.code == 0
    assert "num_hidden_layers" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["grow_checkpoint", "--source", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grow_checkpoint").main()
    assert ended.value.code == 2
    assert "--recipe and --output: both are needed" in capsys.readouterr().err
