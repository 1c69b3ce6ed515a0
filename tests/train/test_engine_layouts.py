"""Training cut over processes equals training in one process without DeepSpeed, losses and weights."""

import pytest
import torch
from engine_cases import (
    OPTIMIZER,
    Case,
    assert_pieces,
    reference,
    train,
)

from incr_ds.testing.processes import run_processes

# Every layout with tied and untied embeddings, and accumulations from 1 to 8; Qwen3 has norms over heads, whose
# gradients tensor ranks must sum; Qwen2 has biases; Mistral's window of 5 needs masks on every stage.
CASES = [
    Case("llama", tied=False, tensor=2, accumulation=8),
    Case("qwen3", tied=True, tensor=2, accumulation=1, recompute=True),
    Case("llama", tied=True, pipeline=2, accumulation=8),
    Case("mistral", tied=False, pipeline=2, accumulation=1, recompute=True),
    Case("qwen3", tied=True, tensor=2, pipeline=2, accumulation=4, divergence="reverse_kl", z_loss=0.01),
    pytest.param(Case("llama", tied=False, data=2, zero=1, accumulation=4), marks=pytest.mark.slow),
    Case("qwen3", tied=True, data=2, zero=2, accumulation=1),
    Case("qwen2", tied=False, data=2, zero=3, accumulation=8, divergence="reverse_kl", z_loss=0.01),
    Case("llama", tied=True, data=2, zero=3, accumulation=1, recompute=True),
    pytest.param(Case("qwen2", tied=True, pipeline=2, data=2, accumulation=2), marks=pytest.mark.slow),
    pytest.param(Case("qwen3", tied=False, tensor=2, data=2, zero=2, accumulation=2), marks=pytest.mark.slow),
    pytest.param(Case("qwen3", tied=True, tensor=2, data=2, zero=3, accumulation=2), marks=pytest.mark.slow),
    pytest.param(Case("llama", tied=False, pipeline=3, accumulation=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_one_process(case):
    expected_steps, expected_evaluations, expected_weights = reference(case)
    ranks = run_processes(train, case.world, case)
    steps, evaluations, _ = ranks[0]
    assert all(rank[:2] == (steps, evaluations) for rank in ranks), "every rank reports the same numbers"
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in steps]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected_steps), rtol=1e-5, atol=1e-6)
    assert found[0][3] > OPTIMIZER["gradient_clipping"], "the gradients must be clipped for the test to see clipping"
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected_evaluations), rtol=1e-5, atol=0)
    assert_pieces(expected_weights, [values for *_, values in ranks])
