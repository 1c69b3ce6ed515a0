"""A grown checkpoint in every layout: DeepSpeed loads it, it gives the source's loss, and every moment is in place."""

import pytest
import torch
from grown_layouts import load_evaluate_save, masters_after_start

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture
from incr_ds.testing.processes import run_processes

TARGET = {
    "hidden_size": 144,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 331,
}
# Uneven vocabulary (101) and FFN (331) shards, 5 layers over 2 stages, tied and untied, every parallel kind.
LAYOUTS = {
    "tp2": ("qwen3", True, "fp32", {"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 1, "zero_stage": 1}),
    "pp2": (
        "llama",
        False,
        "bf16",
        {"tensor_parallel": 1, "pipeline_parallel": 2, "data_parallel": 1, "zero_stage": 1},
    ),
    "tp2-pp2": (
        "llama",
        True,
        "fp32",
        {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 1, "zero_stage": 1},
    ),
    "tp2-dp2-zero2": (
        "qwen2",
        False,
        "fp32",
        {"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 2, "zero_stage": 2},
    ),
}


def source_loss(model, tokens):
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 101), tokens[:, 1:].reshape(-1)).item()


def write_grown(folder, source, layout, precision, **more):
    """The target of an in-memory source with drawn moments, published as grow_checkpoint does."""
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text("target: {}\n")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    recipe = parse_settings({"target": TARGET, "layout": {**layout, "dtype": dtype}, **more}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder, recipe_file, folder / "grown"), source, recipe))
    return folder / "grown"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "tp2" else name for name in LAYOUTS]
)
def test_deepspeed_loads_a_grown_checkpoint(name, tmp_path):
    family, tied, precision, layout = LAYOUTS[name]
    architecture = small_architecture(family, tie_word_embeddings=tied)
    model = drawn_model(architecture, torch.float32)
    folder = write_grown(tmp_path, model_checkpoint(architecture, model, with_moments=True), layout, precision)
    tokens = torch.randint(101, (1, 13), generator=torch.Generator().manual_seed(1))
    expected = source_loss(model, tokens)
    world = layout["tensor_parallel"] * layout["pipeline_parallel"] * layout["data_parallel"]
    results = run_processes(load_evaluate_save, world, str(folder), layout, precision, tokens)
    for loss, after in results:
        assert abs(loss - expected) <= (1e-5 if precision == "fp32" else 0.02) * expected
        assert after != loss
    before, again = open_source(folder), open_source(folder / "again", "loaded")
    assert again.facts.layout == before.facts.layout == layout
    assert again.facts.step == 100
    for spec in before.architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before.read(spec.name, state), again.read(spec.name, state)), (spec.name, state)


@pytest.mark.parametrize("by", ["DeepSpeed", "us"])
@pytest.mark.parametrize("name", ["pp2", pytest.param("tp2-dp2-zero2", marks=pytest.mark.slow)])
def test_a_grown_checkpoint_without_moments_trains_from_its_masters(name, by, tmp_path):
    """optimizer: reset writes none."""
    family, tied, precision, layout = LAYOUTS[name]
    architecture = small_architecture(family, tie_word_embeddings=tied)
    model = drawn_model(architecture, torch.float32)
    source = model_checkpoint(architecture, model, with_moments=True)
    folder = write_grown(tmp_path, source, layout, precision, optimizer="reset")
    before = open_source(folder)
    assert before.facts.states == ("weight",)
    tokens = torch.randint(101, (1, 13), generator=torch.Generator().manual_seed(1))
    expected = source_loss(model, tokens)
    world = layout["tensor_parallel"] * layout["pipeline_parallel"] * layout["data_parallel"]
    for loss, after in run_processes(load_evaluate_save, world, str(folder), layout, precision, tokens, by):
        assert abs(loss - expected) <= (1e-5 if precision == "fp32" else 0.02) * expected
        assert after != loss
    again = open_source(folder / "again", "loaded")
    for spec in before.architecture.stored:
        assert torch.equal(before.read(spec.name), again.read(spec.name)), spec.name
        if "exp_avg" in again.facts.states:
            assert not again.read(spec.name, "exp_avg").any()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"data_parallel": 2, "zero_stage": 1}, marks=pytest.mark.slow),
        {"pipeline_parallel": 2},
        {"data_parallel": 2, "zero_stage": 3},
    ],
)
def test_bf16_runs_start_from_fp32_masters(layout, tmp_path):
    """Grown weights in fp32 keep the source's function; rounded to bf16 they keep it to a percent only."""
    layout = {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 1, "zero_stage": 1, **layout}
    architecture = small_architecture("llama")
    model = drawn_model(architecture, torch.float32)
    model.save_pretrained(tmp_path / "exported")
    world = layout["pipeline_parallel"] * layout["data_parallel"]
    run_processes(masters_after_start, world, str(tmp_path), layout, str(tmp_path / "exported"))
    found = open_source(tmp_path / "started", "after")
    for name, parameter in model.named_parameters():
        # One step at learning rate 0 with decoupled decay moves nothing.
        assert torch.equal(found.read(name), parameter.data), name
