"""Suggested targets are valid, exact, near the budget, and cost what they say."""

import importlib
import sys
from pathlib import Path

import pytest

from incr_ds.arch.family import families
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError
from incr_ds.growth.planner import plan_growth
from incr_ds.growth.suggest import parse_count, parse_layout, recipe_text, suggest_targets
from incr_ds.sharding.placement import check_layout
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.mark.parametrize("family", sorted(families()))
def test_every_suggestion_can_be_grown(family: str):
    source = small_architecture(family)
    layout = ParallelLayout(data_parallel=2)
    found = suggest_targets(source, 3 * source.num_parameters, layout)
    assert 1 <= len(found) <= 8
    for item in found:
        new = {"width": {"heads": {"new": "copy"}}} if family == "olmo2" else {}
        recipe = GrowthRecipe.model_validate({"target": dict(item.target), "function_preserving": "required", **new})
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


def test_more_layers_come_before_more_width():
    source = small_architecture("llama")
    widths = [
        item.target.get("hidden_size", 0)
        for item in suggest_targets(source, 2 * source.num_parameters, ParallelLayout())
    ]
    assert widths == sorted(widths) and widths[0] == 0 < widths[-1]


def test_warnings():
    source = small_architecture("llama")
    large = suggest_targets(source, 6 * source.num_parameters, ParallelLayout())
    assert all("published gains are for 2 to 4 times" in item.warnings[0] for item in large)
    three = suggest_targets(source, 3 * source.num_parameters, ParallelLayout())
    assert all("; 2 times is most reliable" in item.warnings[0] for item in three)
    little = suggest_targets(source, 17 * source.num_parameters // 10, ParallelLayout())
    assert not any("times" in warning for item in little for warning in item.warnings)
    assert [item.gain_tokens for item in little] == [20 * item.parameters for item in little]


def test_large_models_get_sizes_that_kernels_like_in_groups_that_stay():
    """Llama of 1.2 billion: 32 query heads in 8 groups, everything a multiple of 128."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    more = {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True}
    source = small_architecture("llama", **sizes, **more)
    assert source.num_parameters == 1_235_814_400
    found = suggest_targets(source, 3 * 10**9, ParallelLayout(tensor_parallel=4, data_parallel=2), most=5)
    assert len(found) == 5
    for item in found:
        target = {**sizes, **more, **item.target}
        assert target["hidden_size"] % 128 == 0 and target["intermediate_size"] % (4 * 128) == 0
        assert target["num_attention_heads"] == 4 * target["num_key_value_heads"]
        assert target["num_key_value_heads"] % 4 == 0
        hidden, ffn, heads = target["hidden_size"], target["intermediate_size"], target["num_attention_heads"]
        layer = 3 * hidden * ffn + 2 * hidden * heads * 64 + 2 * hidden * heads // 4 * 64
        matrices = target["num_hidden_layers"] * layer + 128_256 * hidden
        norms = (2 * target["num_hidden_layers"] + 1) * hidden
        assert item.parameters == matrices + norms and item.flops_per_token == 6 * matrices
        assert item.bytes_per_rank == pytest.approx((2 + 2 + 12 / 2) * (matrices / 4 + norms), rel=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "the source has [0-9,]+ parameters already"),
        (
            "9e15",
            "within 10% of it .* up to 4 times as wide and 8 times as deep; the nearest has [0-9,]{9,} parameters",
        ),
        ("many", "like 3e9, 1.3B"),
        ("inf", "like 3e9, 1.3B"),
    ],
)
def test_impossible_budgets(text, message: str):
    with pytest.raises(ConfigError, match=message):
        suggest_targets(small_architecture("llama"), parse_count(text), ParallelLayout())


def test_numbers_and_layouts_as_people_write_them():
    assert [parse_count(text) for text in ("3e9", "1.3B", "350M", "1_000")] == [3 * 10**9, 13 * 10**8, 35 * 10**7, 1000]
    assert parse_layout("2x4x8").world_size == 64
    with pytest.raises(ConfigError, match="--layout 2x2: expected three degrees"):
        parse_layout("2x2")


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    source = small_architecture("llama")
    drawn_model(source).save_pretrained(tmp_path)
    arguments = ["--source", str(tmp_path), "--suggest", str(3 * source.num_parameters)]
    monkeypatch.setattr(sys, "argv", ["grow_checkpoint", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grow_checkpoint").main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "num_hidden_layers" in shown and "tokens: 20 per parameter. In publications, growth pays" in " ".join(
        shown.split()
    )
    monkeypatch.setattr(sys, "argv", ["grow_checkpoint", "--source", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grow_checkpoint").main()
    assert ended.value.code == 2
    assert "--recipe and --output: both are required" in capsys.readouterr().err


SMOLLM2 = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_shapes_are_those_of_published_models():
    """SmolLM2-135M to 300 million: not 77 layers of width 576, although that would be valid."""
    source = small_architecture("llama", **SMOLLM2)
    found = suggest_targets(source, 300 * 10**6, ParallelLayout())
    assert len(found) >= 4
    for item in found:
        sizes = {**SMOLLM2, **item.target}
        assert item.shape == sizes["hidden_size"] / sizes["num_hidden_layers"] >= 576 / 30 / 1.1
        assert sizes["num_attention_heads"] == 3 * sizes["num_key_value_heads"]
        assert not any("published models near its size" in warning for warning in item.warnings)
    assert len({tuple(item.target.items()) for item in found}) == len(found)


def test_an_unusual_shape_is_said_where_nothing_else_fits():
    source = small_architecture("llama", **SMOLLM2)
    (found, *_) = suggest_targets(source, 165 * 10**6, ParallelLayout())
    assert list(found.target) == ["num_hidden_layers"] and found.shape < 17
    expected = "deeper than published models near its size, 19 (SmolLM2-135M) to 64 (GPT-2) hidden size per layer"
    assert expected.replace("GPT-2", "Pythia-160M") in found.warnings or expected in found.warnings


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["grow_checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grow_checkpoint").main()
    return ended.value.code


@pytest.mark.parametrize(("family", "row"), [("llama", 2), ("olmo2", 1)])
def test_a_row_becomes_a_recipe_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str, row
):
    source = small_architecture(family)
    drawn_model(source).save_pretrained(tmp_path / "source")
    suggest = ("--source", tmp_path / "source", "--suggest", 3 * source.num_parameters, "--layout", "1x2x2")
    assert run(monkeypatch, *suggest, "--write-recipe", tmp_path / "recipe.yaml", "--row", row) == 0
    assert f"wrote {tmp_path / 'recipe.yaml'}: row {row}" in capsys.readouterr().out.replace("\n", "")
    recipe = load_settings(tmp_path / "recipe.yaml", GrowthRecipe)
    layout = parse_layout("1x2x2")
    second = suggest_targets(source, 3 * source.num_parameters, layout)[row - 1]
    assert recipe.target == dict(second.target) and recipe.optimizer == "reset"
    assert (recipe.layout.pipeline_parallel, recipe.layout.data_parallel) == (2, 2)
    plan = plan_growth(source, recipe)
    assert plan.function_preserving and plan.target.num_parameters == second.parameters
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith(f"# {second.parameters:,} parameters, {second.ratio:.2f} times the source's")
    moved = load_settings(_written(tmp_path, recipe_text(second, layout, has_moments=True)), GrowthRecipe)
    assert moved.optimizer == "rescale"


def _written(folder, text):
    (folder / "other.yaml").write_text(text)
    return folder / "other.yaml"


def test_a_recipe_is_written_where_it_can_be_and_of_a_row_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = small_architecture("llama")
    drawn_model(source).save_pretrained(tmp_path / "source")
    suggest = ("--source", tmp_path / "source", "--suggest", 3 * source.num_parameters)
    (tmp_path / "here.yaml").write_text("kept")
    for options, message in (
        (("--write-recipe", tmp_path / "here.yaml"), "exists already; choose another name"),
        (("--write-recipe", tmp_path / "here.yaml" / "x"), "a part of the path is a file"),
        (("--write-recipe", tmp_path / "new.yaml", "--row", 99), "--row 99: there are"),
    ):
        assert run(monkeypatch, *suggest, *options) == 2
        assert message in capsys.readouterr().err.replace("\n", "")
    assert run(monkeypatch, "--source", tmp_path / "source", "--write-recipe", tmp_path / "new.yaml") == 2
    assert "--write-recipe: needs --suggest" in capsys.readouterr().err
    assert (tmp_path / "here.yaml").read_text() == "kept" and not (tmp_path / "new.yaml").exists()
