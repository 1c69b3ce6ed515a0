"""Optimizer states in the host's memory: the same training on CPUs, and checkpoints that go on either way."""

import json
import math

import pytest
import torch
from engine_cases import OPTIMIZER, Case, reference, train
from offloaded_runs import spoil_a_step, train_either_way
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.train.metrics import TIMINGS, read_metrics


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", tied=True, pipeline=2, accumulation=4, offload="cpu"),
        pytest.param(Case("qwen3", tied=False, tensor=2, accumulation=1, offload="cpu"), marks=pytest.mark.slow),
        Case("qwen3", tied=True, data=2, zero=2, accumulation=4, offload="cpu"),
        Case("qwen2", tied=False, data=2, zero=3, accumulation=4, offload="cpu"),
    ],
    ids=str,
)
def test_training_with_an_optimizer_on_the_host_equals_one_process(case):
    expected, expected_evaluations, weights = reference(case)
    ranks = run_processes(train, case.world, case)
    steps, evaluations, _ = ranks[0]
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in steps]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found[0][3] > OPTIMIZER["gradient_clipping"], "the gradients must be clipped for the test to see clipping"
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected_evaluations), rtol=1e-5, atol=0)
    for *_, values in ranks:
        for (name, bounds), value in values.items():
            whole = weights[name][tuple(slice(*bound) for bound in bounds)]
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_are_not_finite_are_skipped_on_the_host_too(stage):
    ((first, spoiled, last),) = run_processes(spoil_a_step, 1, stage, {"offload": "cpu"})
    assert [part[0].skipped for part in (first, spoiled, last)] == [False, True, False]
    assert spoiled[1] or stage == 3  # ZeRO-3's parameters are placeholders between steps
    assert math.isfinite(last[0].loss) and math.isfinite(last[0].gradient_norm)


@pytest.fixture(
    scope="module", params=[{"data_parallel": 2, "zero_stage": 1}, {"data_parallel": 2, "zero_stage": 3}], ids=str
)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    write_random_documents(folder, documents=30, length=50)
    (folder / "config.json").write_text(json.dumps(dict(small_architecture("llama", num_hidden_layers=2).config)))
    run_processes(train_either_way, 2, str(folder), request.param)
    return folder


def rows(folder, output):
    found = read_metrics(folder / output / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in found]


@pytest.mark.slow
def test_a_run_resumes_on_the_host_bit_for_bit(runs):
    assert rows(runs, "stopped") == rows(runs, "host")
    first, second = (open_source(runs / name / "checkpoints" / "step_00000006") for name in ("host", "stopped"))
    for spec in first.architecture.stored:
        for state in first.facts.states:
            assert torch.equal(first.read(spec.name, state), second.read(spec.name, state)), (spec.name, state)


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_its_states_were_not(runs):
    expected = [item["loss"] for item in rows(runs, "device")]
    for output in ("host", "to host", "to device"):
        assert [item["loss"] for item in rows(runs, output)] == pytest.approx(expected, rel=1e-6)
