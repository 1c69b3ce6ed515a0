"""Steps that must not change the weights, and invalid requests."""

import math

import pytest
import torch

from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run


def batches(run, seed, label=None):
    """Micro-batches of one data-parallel rank; ``label`` spoils one position of the last."""
    ids = torch.randint(0, 101, (run.accumulation_steps, 2, 13), generator=torch.Generator().manual_seed(seed))
    labels = ids[..., 1:].clone()
    if label is not None:
        labels[-1, 1, 3] = label
    return iter(list(zip(ids[..., :-1].contiguous(), labels, strict=True)))


def spoil_the_second_step(layout):
    from incr_ds.train.engine import build_engine

    run = pico_run(layout=layout, batch={"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 8})
    engine = build_engine(run, pico_architecture(num_key_value_heads=2), None, None)
    results, weights = [], []
    for step in range(3):
        spoiled = step == 1 and engine.data_parallel_rank == run.layout.data_parallel - 1
        # 101 is outside the vocabulary: the loss is infinite and the gradient not a number, on one rank only.
        results.append(engine.train_step(batches(run, step, 101 if spoiled else None), learning_rate=0.01))
        weights.append([parameter.detach().clone() for parameter in engine.module.parameters()])
    engine.close()
    same = [
        all(torch.equal(*pair) for pair in zip(*two, strict=True)) for two in zip(weights, weights[1:], strict=False)
    ]
    return results, same


@pytest.mark.parametrize(
    "layout",
    [pytest.param({"data_parallel": 2, "zero_stage": 2}, marks=pytest.mark.slow), {"pipeline_parallel": 2}],
    ids=str,
)
def test_a_step_with_gradients_that_are_not_finite_is_skipped_everywhere(layout):
    for results, same in run_processes(spoil_the_second_step, ParallelLayout(**layout).world_size, layout):
        assert [result.skipped for result in results] == [False, True, False]
        assert results[1].loss == math.inf and not math.isfinite(results[1].gradient_norm)
        assert same == [True, False], "the weights stay in the spoiled step and move again in the next"
        assert math.isfinite(results[2].loss)


def unreasonable_requests():
    from incr_ds.train.engine import build_engine

    run = pico_run()
    engine = build_engine(run, pico_architecture(), None, None)
    messages = []
    for request in (lambda: engine.train_step(batches(run, 0), learning_rate=0.1, alpha=0.5),):
        try:
            request()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_alpha_needs_a_teacher():
    ((message,),) = run_processes(unreasonable_requests, 1)
    assert "alpha is 0.5, but the run file has no section distillation that names a teacher" in message


def wrong_teacher():
    from incr_ds.train.engine import build_engine

    run = pico_run(distillation={"teacher": "pico", "anneal_steps": 2})
    try:
        build_engine(run, pico_architecture(), None, drawn_checkpoint(pico_architecture(vocab_size=99)))
    except ConfigError as error:
        return str(error)
    return None
