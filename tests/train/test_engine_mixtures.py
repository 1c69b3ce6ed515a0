"""Mixtures of experts: training equals transformers' own model with its router loss, in every layout; saving and resuming."""

from pathlib import Path

import pytest
import torch
from engine_cases import Case, reference, student
from saving_engines import SAVED, train_cases

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.layout import ParallelLayout
from incr_ds.sharding.placement import rank_parameters
from incr_ds.testing.processes import run_processes

CASES = {
    "mixtral-pipeline": Case("mixtral", tied=False, pipeline=2, accumulation=4, router=0.3),
    "qwen3_moe-pipeline-recompute": Case(
        "qwen3_moe", tied=True, pipeline=2, accumulation=2, recompute=True, router=0.3
    ),
    "qwen3_moe-zero2": Case("qwen3_moe", tied=False, data=2, zero=2, accumulation=2, router=0.3),
    "mixtral-zero3": Case("mixtral", tied=True, data=2, zero=3, recompute=True, router=0.3),
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
    """What the ranks found in a case. The cases of a default run, and the slow ones, are one group of processes each."""
    known = {}

    def ranks(name):
        slow = name in SLOW
        if slow not in known:
            group = {other: CASES[other] for other in CASES if (other in SLOW) == slow}
            known[slow] = run_processes(train_cases, 2, str(tmp_path_factory.mktemp("mixtures")), group)
        return [rank[name] for rank in known[slow]]

    return ranks


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_one_process(trained, name):
    expected_steps, evaluations, expected = reference(CASES[name])
    means = trained(name)[0]["evaluation"]
    assert (means.ce, means.teacher_kl) == pytest.approx(evaluations[SAVED - 1], rel=1e-5)
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in trained(name)[0]["results"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected_steps), rtol=1e-5, atol=1e-6)
    seen = dict.fromkeys(expected, 0)
    for rank in trained(name):
        for (tensor, bounds), value in rank["whole"].items():
            whole = expected[tensor][tuple(slice(*bound) for bound in bounds)]
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5, msg=lambda text, n=tensor: f"{n}: {text}")
            seen[tensor] += value.numel()
    assert all(count >= expected[tensor].numel() for tensor, count in seen.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_whole_one_and_its_checkpoint_is_read(trained, name):
    for rank in trained(name):
        assert rank["again"] == rank["results"][2:]
        assert all(torch.equal(value, rank["resumed"][key]) for key, value in rank["whole"].items())
    checkpoint = open_source(Path(trained(name)[0]["saved"]))
    for rank in trained(name):
        for (tensor, bounds), value in rank["at_save"].items():
            assert torch.equal(checkpoint.read(tensor)[tuple(slice(*bound) for bound in bounds)], value), tensor
    parameters = rank_parameters(checkpoint.architecture, ParallelLayout(), 0, 0)
    assert len(list(checkpoint.self_check())) >= len(parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_reports_the_routers(trained, name):
    first, second = ([step.routing for step in rank["results"]] for rank in trained(name))
    assert first == second
    sizes = student(CASES[name]).architecture.sizes
    assert all(1.0 < step.expert_load <= sizes["experts"] / 2 for step in first)
    assert all(1.9 < step.loss < sizes["experts"] for step in first)
