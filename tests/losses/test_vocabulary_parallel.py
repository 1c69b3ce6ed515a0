"""The loss with its vocabulary cut over processes equals the loss of one process."""

import pytest
import torch
import torch.distributed as dist

from incr_ds.losses.distillation import distillation_loss
from incr_ds.testing.processes import ProcessError, run_processes

N, V, HS, HT = 23, 101, 12, 7
CASES = [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)]


def problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[[2, 11]] = -100
    shapes = ((N, HS), (V, HS), (N, HT), (V, HT))
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return hidden, head, labels, teacher_hidden, teacher_head


def part(cuts, alpha, temperature):
    """One rank's loss and gradients; rank r holds vocabulary entries cuts[r] to cuts[r + 1]."""
    rank = dist.get_rank()
    rows = slice(cuts[rank], cuts[rank + 1])
    hidden, head, labels, teacher_hidden, teacher_head = problem()
    hidden, head = hidden.requires_grad_(), head[rows].clone().requires_grad_()
    loss = distillation_loss(
        hidden, head, labels, teacher_hidden, teacher_head[rows], alpha=alpha, temperature=temperature,
        group=dist.group.WORLD, vocab_start=rows.start, vocab_size=V, budget_bytes=30_000,
    )  # fmt: skip
    loss.loss.backward()
    return [value.detach() for value in loss], hidden.grad, head.grad


def parts(cuts):
    dist.init_process_group("gloo")
    results = [part(cuts, *case) for case in CASES]
    hidden, head, labels, *_ = problem()
    try:
        distillation_loss(hidden, head, labels, alpha=0.0, group=dist.group.WORLD, vocab_start=0)
        message = "nothing"
    except ValueError as error:
        message = str(error)
    dist.destroy_process_group()
    return results, message


# Two nearly even parts, and three uneven ones with a single row in the middle.
@pytest.mark.parametrize("cuts", [(0, 51, 101), (0, 60, 61, 101)])
def test_cut_equals_whole(cuts):
    ranks = run_processes(parts, len(cuts) - 1, cuts)
    for index, (alpha, temperature) in enumerate(CASES):
        hidden, head, labels, *taught = problem()
        whole = distillation_loss(
            hidden.requires_grad_(), head.requires_grad_(), labels, *taught, alpha=alpha, temperature=temperature
        )
        whole.loss.backward()
        values = [results[index][0] for results, _ in ranks]
        assert all(torch.equal(a, b) for value in values for a, b in zip(value, values[0], strict=True)), (
            "every rank reports the same numbers"
        )
        torch.testing.assert_close(torch.stack(values[0][:3]), torch.stack(whole[:3]).detach(), rtol=1e-12, atol=1e-13)
        for results, _ in ranks:
            torch.testing.assert_close(results[index][1], hidden.grad, rtol=1e-11, atol=1e-13)
        rows = torch.cat([results[index][2] for results, _ in ranks])
        torch.testing.assert_close(rows, head.grad, rtol=1e-11, atol=1e-13)
    assert "vocab_start and vocab_size belong together; one of them is missing" in ranks[0][1]


def fail(rank):
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("no luck")
    dist.barrier()


def test_a_failing_process_shows_its_traceback_and_ends_the_others():
    with pytest.raises(ProcessError, match=r"(?s)rank 1 failed:.*ValueError: no luck"):
        run_processes(fail, 2, 1)
