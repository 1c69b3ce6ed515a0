"""Fitting lowers the loss, and the recipe that it writes grows the very model that was fitted."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from fit_growth import main
from token_data import write_documents

import incr_ds
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.training import RunSettings
from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import held_out_batches, open_held_out_data
from incr_ds.errors import CheckpointError, ConfigError, GrowthError
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.offline.compare import load_model
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.train.fitting import _Operators, fit_growth

TARGET = {
    "hidden_size": 144,
    "intermediate_size": 331,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
}
RECIPE = {
    "target": TARGET,
    "width": {"ffn": {"new": "copy"}, "heads": {"new": "copy"}},
    "depth": {"method": "stack", "new": "copy"},
    "optimizer": "reset",
    "layout": {"format": "huggingface"},
}


def write_data(prefix, count, seed):
    """Tokens of a language that a constant can learn: small numbers are frequent."""
    numbers = np.random.default_rng(seed).geometric(0.12, size=count).clip(max=100)
    return write_documents(prefix, (numbers[start : start + 100].tolist() for start in range(0, count, 100)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fitting")
    architecture = small_architecture("qwen3", tie_word_embeddings=True)
    drawn_model(architecture, torch.float32).save_pretrained(path / "source")
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = {
        "output": str(path / "run"),
        "precision": "fp32",
        "model": {"initialize_from": {"source": str(path / "source"), "recipe": str(path / "recipe.yaml")}},
        "batch": {"sequence_length": 16, "micro_batch_size": 4, "global_batch_size": 8},
        "schedule": {"train_steps": 25, "learning_rate": 0.03},
        "data": {
            "train": [{"prefix": write_data(path / "train", 4000, 1)}],
            "validation": write_data(path / "held", 2000, 2),
        },
        "evaluation": {"interval": 1, "samples": 16},
        "checkpoint": {"interval": 1},
    }
    (path / "run.yaml").write_text(yaml.safe_dump(run))
    return path


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fit_growth.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_fit_lowers_the_loss_and_its_recipe_is_the_fitted_model(folder, monkeypatch, capsys):
    fitted = folder / "fitted.yaml"
    assert tool(monkeypatch, "--config", folder / "run.yaml", "--output", fitted, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss_after"] < found["loss_before"] - 0.2
    recipe, source = load_settings(fitted, GrowthRecipe), open_source(folder / "source")
    assert recipe.model_copy(update={"fitted": None}) == load_settings(folder / "recipe.yaml", GrowthRecipe)
    plan = plan_growth(source.architecture, recipe)
    assert any("fitted operators lower the loss and do not keep" in reason for reason in plan.inexact)
    request = incr_ds.GrowthRequest(folder / "source", fitted, folder / "grown")
    incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    model = load_model(incr_ds.open_source(folder / "grown"))
    losses = []
    run = load_settings(folder / "run.yaml", RunSettings)
    samples = open_held_out_data(describe(run.data.validation), 16, folder / "index", 16)
    with torch.no_grad():
        for input_ids, labels in held_out_batches(samples, 16, run.batch, 0, 1):
            logits = model(input_ids).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, labels.flatten()).item())
    assert np.mean(losses) == pytest.approx(found["loss_after"], rel=1e-5)


@pytest.mark.parametrize("breaking", ["per-element", "diagonal", "none"])
@pytest.mark.parametrize("new", ["zero-output", "copy"])
def test_factors_of_one_are_the_recipes_own_operators(folder, breaking, new):
    source = open_source(folder / "source")
    width = {
        "hidden": "isometric",
        "ffn": {"new": new},
        "heads": {"new": new},
        "symmetry_breaking": {"method": breaking},
    }
    recipe = GrowthRecipe.model_validate(RECIPE | {"width": width, "depth": {"method": "interleave", "new": new}})
    plan = plan_growth(source.architecture, recipe)
    operators = _Operators(plan, source)
    grown = GrownTensors(plan, source)
    for name, tensor in operators.tensors().items():
        expected = grown.read(name, "weight", tuple((0, size) for size in tensor.shape))
        torch.testing.assert_close(tensor.detach(), expected.float(), rtol=1e-6, atol=1e-7)


def test_any_factors_are_what_the_recipe_grows(folder):
    """Random factors and weights: the operators' tensors are those of the recipe that carries them."""
    source = open_source(folder / "source")
    plan = plan_growth(source.architecture, GrowthRecipe.model_validate(RECIPE))
    operators = _Operators(plan, source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in operators.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    fitted = plan_growth(source.architecture, plan.recipe.model_copy(update={"fitted": operators.fitted()}))
    grown = GrownTensors(fitted, source)
    for name, tensor in operators.tensors().items():
        whole = grown.read(name, "weight", tuple((0, size) for size in tensor.shape))
        torch.testing.assert_close(whole.float(), tensor.detach(), rtol=1e-4, atol=1e-6)
        rows = grown.read(name, "weight", ((1, 3), *((0, size) for size in tensor.shape[1:])))
        torch.testing.assert_close(rows, whole[1:3])


def test_what_cannot_be_fitted_is_refused(folder, tmp_path, monkeypatch, capsys):
    run = load_settings(folder / "run.yaml", RunSettings)
    cases = [
        ({"optimizer": "rescale"}, "optimizer: rescale; moments do not follow fitted operators, set reset"),
        ({"width": {"symmetry_breaking": {"method": "noise"}}}, "symmetry_breaking: noise; set per-element"),
        ({"width": {"copies_from": "next-layer"}}, "copies_from: next-layer; set own-layer"),
    ]
    for changes, message in cases:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
        started = {"source": str(folder / "source"), "recipe": str(tmp_path / "recipe.yaml")}
        changed = run.model_copy(update={"model": run.model.model_validate({"initialize_from": started})})
        with pytest.raises(GrowthError, match=message):
            fit_growth(changed, lambda step, loss: None)
    model = drawn_model(small_architecture("qwen3", tie_word_embeddings=True), torch.float32)
    model.model.norm.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "diverged")
    started = {"source": str(tmp_path / "diverged"), "recipe": str(folder / "recipe.yaml")}
    changed = run.model_copy(update={"model": run.model.model_validate({"initialize_from": started})})
    with pytest.raises(
        CheckpointError, match=r"norm.weight \(weight\): 1 of 96 numbers .* no operators can be fitted to"
    ):
        fit_growth(changed, lambda step, loss: None)
    plain = run.model_copy(update={"model": run.model.model_validate({"initialize_from": str(folder / "source")})})
    with pytest.raises(ConfigError, match="must have model.initialize_from: {source, recipe}"):
        fit_growth(plain, lambda step, loss: None)
    (tmp_path / "there.yaml").write_text("")
    assert tool(monkeypatch, "--config", folder / "run.yaml", "--output", tmp_path / "there.yaml") == 2
    assert "there.yaml: exists already" in capsys.readouterr().err


def test_operators_of_another_growth_are_named():
    fitted = {"axes": {"hidden": {"amplitude": [1.0], "share": [1.0]}, "vocab": {"amplitude": [], "share": []}}}
    fitted["layers"] = [{0: 1.0}, {7: 1.0}]
    recipe = GrowthRecipe.model_validate(RECIPE | {"fitted": fitted})
    with pytest.raises(GrowthError) as caught:
        plan_growth(small_architecture("qwen3"), recipe)
    for text in (
        "the fitted operators belong to another growth; fit again",
        "fitted.axes.hidden.amplitude: 1 factors, but the axis has 144 positions",
        "fitted.axes.vocab: not an axis that can be fitted; these can: hidden, ffn, heads, kv_heads",
        "fitted.layers: 2 entries, but the target has 5 layers",
        "fitted.layers: 7 is not a layer of the source",
    ):
        assert text in str(caught.value)
