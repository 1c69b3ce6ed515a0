"""Runs that grow on the way, with the real engine in real processes."""

import json

import numpy as np
import pytest
import torch
import yaml
from progressive_runs import GROWTH, LAST, train_both_ways

from incr_ds.checkpoint.opening import open_source
from incr_ds.data.megatron import IndexedDatasetBuilder
from incr_ds.testing.memory import SMALL, small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.train.flops import forward_flops_per_token
from incr_ds.train.metrics import TIMINGS, read_metrics

TARGET = {"hidden_size": 144, "num_hidden_layers": 4, "intermediate_size": 331}
TAUGHT = {"teacher": "before-growth", "weight": 0.5, "anneal_steps": 3}
# The same run in one command and in three: ZeRO-1 with a teacher, ZeRO-3 in bf16; a pipeline and tensor ranks are slow ones.
CASES = {
    "data": {"distillation": TAUGHT},
    "zero3-bf16": {"layout": {"data_parallel": 2, "zero_stage": 3}, "precision": "bf16"},
}
SLOW_CASES = {
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
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        builder = IndexedDatasetBuilder(str(folder / f"x_{name}_text_document.bin"), dtype=np.uint16)
        for _ in range(30):
            ids = generator.integers(0, SMALL["vocab"], 50).tolist()
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(folder / f"x_{name}_text_document.idx"))
    architecture = small_architecture("llama", tie_word_embeddings=True, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": TARGET}))


def rows_of(folder, *leave_out):
    found = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in (*TIMINGS, *leave_out)} for item in found]


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
    folder, cases = both_ways
    for name, changes in cases.items():
        one = folder / name / "one" / "checkpoints"
        small, large = (
            forward_flops_per_token(open_source(one / f"step_{step:08d}").architecture, 16) for step in (GROWTH, LAST)
        )
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
