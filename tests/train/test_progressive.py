"""Runs that grow on the way, with the real engine in real processes."""

import json

import numpy as np
import pytest
import torch
import yaml
from progressive_runs import GROWTH, LAST, growth, train, train_all, train_both_ways, train_until_killed
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import ProcessError, run_processes
from incr_ds.train.metrics import TIMINGS, read_metrics

TARGET = {"hidden_size": 144, "num_hidden_layers": 4, "intermediate_size": 331}
TAUGHT = {"teacher": "before-growth", "weight": 0.5, "anneal_steps": 3}
# The same run in one command and in three.
CASES = {"data": {"distillation": TAUGHT}}
SLOW_CASES = {
    "zero3-bf16": {"layout": {"data_parallel": 2, "zero_stage": 3}, "precision": "bf16"},
    "pipeline": {"layout": {"pipeline_parallel": 2}, "distillation": TAUGHT},
    "tensor": {"layout": {"tensor_parallel": 2}, "precision": "bf16"},
    "zero2-wsd": {
        "layout": {"data_parallel": 2, "zero_stage": 2},
        "schedule": {"warmup_steps": 0, "decay": "wsd", "decay_steps": 3},
        "optimizer": {"multipliers": "none"},
    },
}


def write_material(folder):
    """A small model's config, data for it, and a recipe that changes width and depth, with multipliers per tensor."""
    write_random_documents(folder, documents=30, length=50)
    architecture = small_architecture("llama", tie_word_embeddings=True, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))


def rows_of(folder, *leave_out):
    found = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in (*TIMINGS, *leave_out)} for item in found]


def numbers(item):
    return {key: value for key, value in item.items() if isinstance(value, int | float)}


def assert_same_checkpoints(one, other):
    first, second = open_source(one), open_source(other)
    assert first.facts.step == second.facts.step
    for spec in first.architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.read(spec.name, state), second.read(spec.name, state)), (spec.name, state)


@pytest.fixture(scope="module", params=["default", pytest.param("slow", marks=pytest.mark.slow)])
def both_ways(request, tmp_path_factory):
    """Every case, trained in one run and as three commands by one group of processes."""
    folder = tmp_path_factory.mktemp("both")
    write_material(folder)
    cases = CASES if request.param == "default" else SLOW_CASES
    run_processes(train_both_ways, 2, str(folder), cases)
    return folder, cases


def test_one_run_that_grows_equals_three_commands_bit_for_bit(both_ways):
    folder, cases = both_ways
    for name in cases:
        one, small, large = folder / name / "one", folder / name / "three" / "small", folder / name / "three" / "large"
        assert_same_checkpoints(one / f"checkpoints/step_{LAST:08d}", large / f"checkpoints/step_{LAST:08d}")
        assert_same_checkpoints(one / f"checkpoints/step_{GROWTH:08d}", small / f"checkpoints/step_{GROWTH:08d}")
        by_one = rows_of(one, "stage", "flops")
        by_three = [*rows_of(small, "stage", "flops"), *rows_of(large, "stage", "flops")]
        assert [item for item in by_one if item["kind"] != "growth"] == by_three, name
        assert open_source(one / f"checkpoints/step_{LAST:08d}").architecture.sizes["hidden"] == 144


def test_the_boundary_is_marked_between_two_evaluations(both_ways):
    folder, cases = both_ways
    for name in cases:
        rows = rows_of(folder / name / "one")
        at_growth = [item for item in rows if item["step"] == GROWTH and item["kind"] != "train"]
        assert [(item["kind"], item["stage"]) for item in at_growth] == [
            ("evaluation", 0), ("growth", 1), ("evaluation", 1),
        ]  # fmt: skip
        before, growth, after = at_growth
        # The recipe keeps the function, up to rounding.
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-3 if "bf16" in name or name == "tensor" else 1e-5)
        assert growth["function_preserving"] and growth["recipe"] == str(folder / "recipe.yaml")
        final = open_source(folder / name / "one" / "checkpoints" / f"step_{LAST:08d}").architecture
        first = open_source(folder / name / "one" / "checkpoints" / f"step_{GROWTH:08d}").architecture
        assert growth["parameters"] == final.num_parameters and growth["parameters_before"] == first.num_parameters
        assert [item["step"] for item in rows if item["kind"] == "train"] == list(range(1, LAST + 1))
        samples = [item["consumed_samples"] for item in rows if item["kind"] == "train"]
        assert samples == [4 * step for step in range(1, LAST + 1)]


def test_flops_count_each_stage_by_its_own_model_and_the_teacher_while_it_counts(both_ways):
    """Counted by hand: 2 per element of a matrix, 4 x heads x head size x length per layer for attention, all of it thrice."""
    folder, cases = both_ways
    attention = 4 * 6 * 8 * 16  # per layer: 6 heads of 8, 16 tokens
    small = 2 * (3 * (2 * 96 * 48 + 2 * 96 * 16 + 3 * 96 * 250) + 96 * 101) + 3 * attention
    large = 2 * (4 * (2 * 144 * 48 + 2 * 144 * 16 + 3 * 144 * 331) + 144 * 101) + 4 * attention
    for name, changes in cases.items():
        taught = 3 if "distillation" in changes else 0  # steps with a weight above 0
        steps = [3 * small] * 4 + [3 * large + small] * taught + [3 * large] * (4 - taught)
        spent = [item["flops"] for item in rows_of(folder / name / "one") if item["kind"] == "train"]
        assert spent == pytest.approx(np.cumsum(steps) * 4 * 16, rel=1e-12), name


def test_the_model_before_the_growth_teaches_from_the_growth_on(both_ways):
    folder, cases = both_ways
    for name, changes in cases.items():
        weights = [item["alpha"] for item in rows_of(folder / name / "one") if item["kind"] == "train"]
        taught = [0.5, 0.5 - 0.5 / 3, 0.5 - 1.0 / 3, 0.0] if "distillation" in changes else [0.0] * 4
        assert weights == pytest.approx([0.0] * 4 + taught)


# The points at which a process is killed, one after the other on the same output, and the newest checkpoint afterwards.
KILLS = {
    ("step", GROWTH): 3,  # the last step of the small model is lost
    ("save", GROWTH): 3,
    ("build", GROWTH): 4,
    ("fill", GROWTH): 4,
    ("evaluate", GROWTH): 4,
    ("step", 5): 4,  # nothing of the large model is saved yet
    ("step", 7): 6,
}
FEW_KILLS = (("save", GROWTH), ("evaluate", GROWTH), ("step", 7))


def test_a_run_that_is_killed_before_in_and_after_the_growth_ends_as_the_calm_one_bit_for_bit(both_ways):
    folder, cases = both_ways
    name, kills = ("data", FEW_KILLS) if "data" in cases else ("pipeline", tuple(KILLS))
    changes = {**cases[name], "growth": growth(folder)}
    for when in kills:
        with pytest.raises(ProcessError, match="ended without a result; it was killed|failed"):
            run_processes(train_until_killed, 2, str(folder), "killed", changes, when)
        found = max(path.name for path in (folder / "killed" / "checkpoints").glob("step_*"))
        assert found == f"step_{KILLS[when]:08d}", when
    run_processes(train, 2, str(folder), "killed", changes)
    assert rows_of(folder / "killed") == rows_of(folder / name / "one")
    last = f"checkpoints/step_{LAST:08d}"
    assert_same_checkpoints(folder / "killed" / last, folder / name / "one" / last)


def test_two_growths_in_changing_layouts_train_as_in_one_layout(tmp_path):
    """ZeRO-3, then a pipeline, then ZeRO-2 with other micro-batches: the losses are those of one layout.

    No engine of a stage is left in memory when the next one is built.
    """
    write_material(tmp_path)
    deeper = {"target": {"num_hidden_layers": 5}, "depth": {"method": "append", "new": "copy"}}
    (tmp_path / "deeper.yaml").write_text(yaml.safe_dump(deeper))
    second = {"at_step": 6, "recipe": str(tmp_path / "deeper.yaml"), "rewarmup_steps": 0, "learning_rate": 5e-3}
    changing = [
        {**growth(tmp_path)[0], "layout": {"pipeline_parallel": 2}},
        {**second, "layout": {"data_parallel": 2, "zero_stage": 2}, "micro_batch_size": 2},
    ]
    taught = {"distillation": TAUGHT, "checkpoint": {"interval": 100, "keep_last": 1}}
    cases = {
        "same": {**taught, "growth": [*growth(tmp_path), second]},
        "changing": {**taught, "growth": changing, "layout": {"data_parallel": 2, "zero_stage": 3}},
    }
    run_processes(train_all, 2, str(tmp_path), cases)
    same, other = rows_of(tmp_path / "same", "gradient_norm"), rows_of(tmp_path / "changing", "gradient_norm")
    assert [item["stage"] for item in other if item["kind"] == "growth"] == [1, 2]
    assert len(same) == len(other)
    for one, two in zip(same, other, strict=True):
        assert numbers(one) == pytest.approx(numbers(two), rel=2e-4, abs=1e-6), one
    rates = [item["learning_rate"] for item in other if item["kind"] == "train"]
    cosine = [0.5 * (1 + np.cos(np.pi * (step - 2) / 6)) for step in range(2, 8)]
    ramp = [1, 1, 0.5, 0.75, 0.5, 0.5]
    expected = [1 / 3, 2 / 3, *(share * rate for share, rate in zip(ramp, cosine, strict=True))]
    assert rates == pytest.approx([1e-2 * rate for rate in expected])
    # The teacher is the model before the newest growth, and its weight is annealed anew.
    weights = [item["alpha"] for item in other if item["kind"] == "train"]
    assert weights == pytest.approx([0, 0, 0, 0, 0.5, 1 / 3, 0.5, 1 / 3])
    # keep_last: 1 keeps the newest and the one that the last stage is grown from and taught by.
    kept = sorted(path.name for path in (tmp_path / "changing" / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000008"]
    final = open_source(tmp_path / "changing" / "checkpoints" / "step_00000008")
    assert final.architecture.num_layers == 5 and final.facts.layout["zero_stage"] == 2


@pytest.mark.slow
def test_a_dense_model_becomes_a_mixture_on_the_way(tmp_path):
    write_material(tmp_path)
    target = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    recipe = {"target": target, "optimizer": "reset", "layout": {"format": "huggingface"}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(recipe))
    layouts = {"stages": {"pipeline_parallel": 2}, "cut": {"tensor_parallel": 2}}
    grows = growth(tmp_path, recipe=str(tmp_path / "mixture.yaml"))
    run_processes(train_all, 2, str(tmp_path), {name: {"layout": layouts[name], "growth": grows} for name in layouts})
    found = {}
    for name in layouts:
        rows = rows_of(tmp_path / name)
        before, after = (item["loss"] for item in rows if item["kind"] == "evaluation" and item["step"] == GROWTH)
        assert after == pytest.approx(before, rel=1e-5)
        routed = [item["router_loss"] for item in rows if item["kind"] == "train"]
        assert routed[:GROWTH] == [None] * GROWTH and all(1.9 < loss < 4 for loss in routed[GROWTH:])
        found[name] = [item["loss"] for item in rows if item["kind"] == "evaluation"]
        assert open_source(tmp_path / name / f"checkpoints/step_{LAST:08d}").architecture.family.model_type == "mixtral"
    assert found["stages"] == pytest.approx(found["cut"], rel=1e-3)
