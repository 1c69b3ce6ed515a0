"""Pipeline stages with unlike numbers of layers: the same training, checkpoints, growth, and where layers cost the least."""

import json
from itertools import combinations

import pytest
import torch
import yaml
from engine_cases import OPTIMIZER, Case, reference, train
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import write_random_documents
from uneven_runs import train_everything

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.launch.balance import placed, stage_flops
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.metrics import TIMINGS, read_metrics


def run_with(pipeline, stages, **sections):
    return pico_run(layout={"pipeline_parallel": pipeline, "stages": stages}, **sections)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(10, 3000), st.booleans())
@settings(deadline=None, max_examples=50)
def test_balanced_stages_have_the_smallest_largest_stage(layers, depth, vocabulary, recompute):
    depth = min(depth, layers)
    architecture = pico_architecture(num_hidden_layers=layers, vocab_size=vocabulary)
    run = run_with(depth, "balanced", model={"config": "pico", "activation_checkpointing": recompute})

    def largest(stages):
        return max(stage_flops(run.model_copy(update={"layout": with_stages(run, stages)}), architecture))

    cuts = combinations(range(1, layers), depth - 1)
    lists = [tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts]
    assert max(stage_flops(placed(run, architecture), architecture)) == min(map(largest, lists))


def with_stages(run, stages):
    return run.layout.model_copy(update={"stages": stages})


def test_the_cost_of_stages_by_hand():
    """A layer of 24 x 24 x (2 + 2/3) + 3 x 24 x 50 elements and 12 tokens of attention; a head of 24 x 101."""
    architecture = pico_architecture("llama", num_hidden_layers=3)
    run = run_with(2, (2, 1))
    sizes = architecture.sizes
    heads, kv = (sizes[name] * sizes["head_dim"] for name in ("heads", "kv_heads"))
    layer = 3 * (2 * (sizes["hidden"] * (2 * heads + 2 * kv) + 3 * sizes["hidden"] * sizes["ffn"]) + 4 * heads * 12)
    head = 3 * 2 * sizes["hidden"] * sizes["vocab"]
    assert stage_flops(run, architecture) == (2 * layer, layer + head)


def test_even_is_said_so():
    architecture = pico_architecture(num_hidden_layers=3)
    assert placed(run_with(2, (2, 1)), architecture).layout.stages == "even"
    assert placed(run_with(2, (1, 2)), architecture).layout.stages == (1, 2)
    assert str(placed(run_with(2, (1, 2)), architecture).layout) == "tp1 pp2 dp1 zero1 stages1-2"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([1, 2, 1], r"layout: stages \[1, 2, 1\]: expected the decoder layers of pipeline_parallel 2 stages, found 3"),
        ([3, 0], r"layout.stages.*greater than or equal to 1"),
        ("uneven", r"layout.stages"),
    ],
)
def test_wrong_stages_are_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        run_with(2, stages)


def test_stages_must_have_the_models_layers():
    with pytest.raises(LayoutError, match=r"stages \[2, 2\]: 4 decoder layers, and the model has 3"):
        placed(run_with(2, (2, 2)), pico_architecture(num_hidden_layers=3))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"stages": "balanced"}, "stages: balanced depends on a run's sequence length; state the list"),
        ({"stages": [1, 2], "modules": "megatron-deepspeed"}, r"stages \[1, 2\]: modules: megatron-deepspeed spreads"),
    ],
)
def test_a_recipe_needs_a_list_and_our_modules(layout, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings({"target": {}, "layout": {"pipeline_parallel": 2, **layout}}, GrowthRecipe, "test")


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", tied=True, pipeline=2, accumulation=4, stages=(1, 2)),
        pytest.param(
            Case("qwen3", tied=False, tensor=2, pipeline=2, accumulation=2, stages=(1, 2)), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_training_equals_one_process(case):
    """With a teacher, whose layers are spread evenly."""
    expected, expected_evaluations, weights = reference(case)
    ranks = run_processes(train, case.world, case)
    steps, evaluations, _ = ranks[0]
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in steps]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found[0][3] > OPTIMIZER["gradient_clipping"]
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected_evaluations), rtol=1e-5, atol=0)
    layers = [{int(name.split(".")[2]) for name, _ in values if ".layers." in name} for *_, values in ranks]
    assert layers == [{0}, {1, 2}] if case.tensor == 1 else layers == [{0}, {0}, {1, 2}, {1, 2}]
    for *_, values in ranks:
        for (name, bounds), value in values.items():
            whole = weights[name][tuple(slice(*bound) for bound in bounds)]
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    write_random_documents(folder, documents=30, length=50)
    architecture = small_architecture("llama", num_hidden_layers=3, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    deeper = {"target": {"num_hidden_layers": 4}, "depth": {"method": "append"}}
    (folder / "deeper.yaml").write_text(yaml.safe_dump(deeper))
    layout = {"pipeline_parallel": 2, "stages": [1, 3]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**deeper, "layout": layout}))
    return folder, run_processes(train_everything, 2, str(folder))[0]


def rows(folder, output):
    found = read_metrics(folder / output / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in found]


def losses(folder, output):
    return [item["loss"] for item in rows(folder, output)]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_its_stages_are_noted(runs):
    folder, _ = runs
    assert rows(folder, "stopped") == rows(folder, "uneven")
    last = folder / "uneven" / "checkpoints" / "step_00000004"
    assert read_manifest(last)["facts"]["layout"]["stages"] == [1, 2]
    found = open_source(last)
    assert found.facts.stages == (1, 2) and list(found.self_check())
    assert open_source(folder / "even" / "checkpoints" / "step_00000004").facts.stages == (2, 1)


@pytest.mark.slow
def test_stages_are_resharded_when_asked(runs):
    folder, _ = runs
    for output in ("uneven", "to even", "to uneven"):
        assert losses(folder, output) == pytest.approx(losses(folder, "even"), rel=1e-5)


@pytest.mark.slow
def test_other_stages_are_another_layout(runs):
    _, refused = runs
    assert "laid out for stages (1, 2) (this run: even)" in refused["resumed"]
    assert "laid out for stages (1, 3) (this run: even)" in refused["grown"]
    assert "stages [2, 3]: 5 decoder layers, and the model has 3" in refused["layers"]


@pytest.mark.slow
def test_a_growth_writes_and_computes_the_stages_that_a_run_has(runs):
    """The grown folder is loaded as it is, and a growth on load begins with the same numbers."""
    folder, _ = runs
    assert open_source(folder / "grown").facts.stages == (1, 3)
    assert losses(folder, "on grown") == losses(folder, "on load")


@pytest.mark.slow
def test_balanced_stages_follow_a_model_that_grows(runs):
    folder, _ = runs
    checkpoints = folder / "growing" / "checkpoints"
    small, large = (open_source(checkpoints / f"step_0000000{step}") for step in (2, 4))
    assert (sum(small.facts.stages), sum(large.facts.stages)) == (3, 4)
