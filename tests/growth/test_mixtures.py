"""Mixtures of experts as sources: more and wider experts, in a wider and deeper model, from folder to folder."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import incr_ds
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, GrowthError, LayoutError
from incr_ds.offline.compare import random_batches
from incr_ds.offline.plan import plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

FFN = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}


@pytest.fixture
def request_for(tmp_path: Path):
    def write(family, target, older=False, **recipe):
        config = AutoConfig.for_model(**small_architecture(family).config)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / "source")
        if older:  # as the releases spell it
            stated = json.loads((tmp_path / "source" / "config.json").read_text())
            stated["num_experts"] = stated.pop("num_local_experts")
            stated["rope_theta"] = stated.pop("rope_parameters")["rope_theta"]
            (tmp_path / "source" / "config.json").write_text(json.dumps(stated))
        content = {"target": target, "optimizer": "reset", "layout": {"format": "huggingface"}, **recipe}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return incr_ds.GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown")

    return write


def compared(request):
    incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    pair = (incr_ds.open_source(request.source), incr_ds.open_source(request.output))
    return incr_ds.compare(*pair, random_batches(101, 3, 16)).relative_difference


# The sources have 4 experts, and the router chooses 2.
GROWTHS = {
    "twice as many": {"num_local_experts": 8, "num_experts_per_tok": 4},
    "three times as many": {"num_local_experts": 12, "num_experts_per_tok": 6},
    "wider ones": {"ffn": 331},
    "a wider model": {"hidden_size": 150},
    "a deeper model": {"num_hidden_layers": 5},
    "everything": {
        "num_local_experts": 8, "num_experts_per_tok": 4, "ffn": 331, "hidden_size": 150, "num_hidden_layers": 4,
        "num_attention_heads": 9,
    },
}  # fmt: skip


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize(("family", "new"), [("mixtral", "copy"), ("qwen3_moe", "zero-output")])
def test_a_grown_mixture_computes_the_same(request_for, family: str, new, growth):
    target = {FFN[family] if field == "ffn" else field: size for field, size in GROWTHS[growth].items()}
    if family == "mixtral" and "hidden_size" in target:  # transformers wants whole heads
        target["hidden_size"] = 144
    request = request_for(family, target, function_preserving="required", width={"ffn": {"new": new}})
    assert compared(request) <= 2e-5


def test_a_release_that_spells_its_experts_otherwise(request_for):
    """Qwen3-30B-A3B states num_experts: the target must not state both."""
    target = {"num_local_experts": 8, "num_experts_per_tok": 4}
    request = request_for("qwen3_moe", target, older=True, function_preserving="required")
    assert compared(request) <= 2e-5
    written = json.loads((request.output / "config.json").read_text())
    assert written["num_local_experts"] == 8 and "num_experts" not in written
    assert written["rope_parameters"]["rope_theta"] == 10000.0


def test_copies_that_compete_for_the_places_are_inexact_and_said_to_be(request_for):
    request = request_for("mixtral", {"num_local_experts": 8})
    planned = incr_ds.plan_request(request)
    assert (
        "num_experts_per_tok: 2 of 2 copies of each expert does not keep the source's function"
        in planned.plan.inexact[0]
    )
    assert compared(request) > 1e-3


@pytest.mark.parametrize(
    ("target", "recipe", "message"),
    [
        ({"num_local_experts": 6}, {}, "num_local_experts: 6 is not a multiple of the source's 4 experts.*work: 4, 8"),
        ({"num_experts_per_tok": 1}, {}, "num_experts_per_tok: 1 differs from the source's 2"),
        ({"model_type": "llama"}, {}, "a mixtral cannot become another family"),
        (
            {},
            {"optimizer": "rescale", "layout": {"data_parallel": 2}},
            "has no Adam moments, but optimizer: rescale needs them",
        ),
        ({}, {"experts": {"new": "copy"}}, "experts: how a dense model becomes a mixture"),
    ],
)
def test_what_a_mixture_cannot_become(request_for, target, recipe, message: str):
    with pytest.raises((GrowthError, LayoutError), match=message):
        incr_ds.plan_request(request_for("mixtral", target, **recipe))


def test_moments_of_a_mixture_grow_into_its_own_layouts(tmp_path: Path):
    """Native ZeRO-1 and 3 and universal: each is read back as the plan says, and computes what the source did."""
    source = tmp_path / "source"
    write_zero(
        source, model_checkpoint(small_architecture("qwen3_moe"), drawn_model(small_architecture("qwen3_moe")), True)
    )
    target = {"num_local_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 331, "num_hidden_layers": 4}
    grown = {}
    staged = {"format": "universal", "pipeline_parallel": 2}
    layouts = (
        *({"zero_stage": 1}, {"zero_stage": 3}, {"format": "universal"}),
        *({"pipeline_parallel": 2}, staged, {"tensor_parallel": 3}),
    )
    for number, layout in enumerate(layouts):
        content = {
            "target": target,
            "function_preserving": "required",
            "layout": {"format": "deepspeed", "data_parallel": 2, **layout},
        }
        if layout.get("format"):
            del content["layout"]["data_parallel"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        request = incr_ds.GrowthRequest(source, tmp_path / "recipe.yaml", tmp_path / f"grown{number}")
        incr_ds.grow_checkpoint(incr_ds.plan_request(request))
        grown[number] = incr_ds.open_source(request.output)
    names = [spec.name for spec in grown[0].architecture.stored]
    for name in names:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            for number in (1, 2, 3, 4, 5):
                assert torch.equal(grown[0].read(name, state), grown[number].read(name, state)), (name, state, number)
    opened = incr_ds.open_source(source)
    assert incr_ds.compare(opened, grown[2], random_batches(101, 3, 16)).relative_difference <= 2e-5
    expert = "model.layers.0.mlp.experts.{}.up_proj.weight"
    first, copy = (grown[0].read(expert.format(number), "exp_avg") for number in (1, 5))
    assert torch.equal(first[:250], opened.read(expert.format(1), "exp_avg") / 2)
    assert torch.equal(first, copy)


def write_zero(folder, checkpoint):
    """A checkpoint in memory as one of ZeRO-1 over two ranks."""
    folder.parent.mkdir(exist_ok=True)
    recipe_file = folder.parent / "same.yaml"
    recipe_file.write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": {"data_parallel": 2}}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(incr_ds.GrowthRequest(folder.parent, recipe_file, folder), checkpoint, recipe))


def test_experts_cut_over_ranks_are_refused(tmp_path: Path):
    architecture = small_architecture("mixtral")
    write_zero(tmp_path / "source", SyntheticCheckpoint(architecture))
    stated = json.loads((tmp_path / "source" / "config.json").read_text())
    stated["num_local_experts"] = 8
    (tmp_path / "source" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: expected shape \[8, 500, 96\] .*found \[4, 500, 96\]"):
        incr_ds.open_source(tmp_path / "source")
