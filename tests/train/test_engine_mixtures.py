"""Mixtures of experts: training equals transformers' own model with its router loss, in every layout; saving and resuming."""

import pytest
from engine_cases import Case, student
from saving_engines import SAVED, assert_resumes_and_is_read, assert_trains_as_one_process, trained_in_groups

from incr_ds.config.layout import ParallelLayout
from incr_ds.sharding.placement import rank_parameters

CASES = {
    "mixtral-pipeline": Case("mixtral", tied=False, pipeline=2, accumulation=4, router=0.3),
    "qwen3_moe-pipeline-recompute": Case(
        "qwen3_moe", tied=True, pipeline=2, accumulation=2, recompute=True, router=0.3
    ),
    "qwen3_moe-zero2": Case("qwen3_moe", tied=False, data=2, zero=2, accumulation=2, router=0.3),
    # Experts of these sizes are multiplied in one grouped product, also by each tensor rank.
    "mixtral-zero3": Case("mixtral", tied=True, data=2, zero=3, recompute=True, router=0.3, neurons=252),
    "qwen3_moe-tensor-grouped": Case("qwen3_moe", tied=False, tensor=2, accumulation=2, router=0.3, neurons=264),
    "qwen3_moe-without": Case("qwen3_moe", tied=False, pipeline=2, router=0.0),
    "mixtral-tensor": Case("mixtral", tied=False, tensor=2, accumulation=2, router=0.3),
    "qwen3_moe-tensor-recompute": Case("qwen3_moe", tied=True, tensor=2, recompute=True, router=0.3),
    "mixtral-frozen-experts": Case("mixtral", tied=False, pipeline=2, router=0.3, freeze=("*.experts.*",)),
    "mixtral-frozen": Case(
        "mixtral", tied=False, pipeline=2, router=0.3, freeze=("*", "!*.experts.*", "!*.gate.weight")
    ),
}


SLOW = ("qwen3_moe-zero2", "qwen3_moe-without", "qwen3_moe-tensor-recompute", "mixtral-frozen")  # like others in most
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_in_groups(CASES, SLOW, tmp_path_factory.mktemp("mixtures"))


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_one_process(trained, name):
    evaluations = assert_trains_as_one_process(CASES[name], trained(name))
    means = trained(name)[0]["evaluation"]
    assert (means.ce, means.teacher_kl) == pytest.approx(evaluations[SAVED - 1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_whole_one_and_its_checkpoint_is_read(trained, name):
    checkpoint = assert_resumes_and_is_read(trained(name))
    parameters = rank_parameters(checkpoint.architecture, ParallelLayout(), 0, 0)
    assert len(list(checkpoint.self_check())) >= len(parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_reports_the_routers(trained, name):
    first, second = ([step.routing for step in rank["results"]] for rank in trained(name))
    assert first == second
    sizes = student(CASES[name]).architecture.sizes
    assert all(1.0 < step.expert_load <= sizes["experts"] / 2 for step in first)
    assert all(1.9 < step.loss < sizes["experts"] for step in first)
