"""The module computes the function's loss, over any leading dimensions and with its settings."""

from functools import partial

import pytest
import torch
from loss_problem import V, make_problem
from torch import nn

from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.head import DistillationHead
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher


def teachers(problem):
    q, indices = (problem.teacher_hidden @ problem.teacher_head.T).softmax(1).topk(3)
    return [
        HiddenTeacher(problem.teacher_hidden, problem.teacher_head),
        TopKTeacher(indices, q.log()),
        TopKTeacher(indices, q.log(), tail="none"),
        SampledTeacher(indices, q),
    ]


def batched(teacher):
    """Tokens 12 as 3 x 4."""
    if isinstance(teacher, HiddenTeacher):
        return HiddenTeacher(teacher.hidden.unflatten(0, (3, 4)), teacher.head)
    values = {name: value.unflatten(0, (3, 4)) for name, value in vars(teacher).items() if name != "tail"}
    return type(teacher)(**values, **({"tail": teacher.tail} if isinstance(teacher, TopKTeacher) else {}))


@pytest.mark.parametrize("index", range(4))
def test_the_module_is_the_function(index):
    problem = make_problem(tokens=12)
    teacher = teachers(problem)[index]
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "backend": "torch", "budget_bytes": 5_000}
    if index == 0:
        options["divergence"] = "jsd"
    module = DistillationHead(nn.Parameter(problem.head.detach()), None, 0, V, partial(distillation_loss, **options))
    ours = module(
        problem.hidden.unflatten(0, (3, 4)), problem.labels.unflatten(0, (3, 4)), teacher=batched(teacher), alpha=0.5,
        temperature=torch.tensor(2.0),
    )  # fmt: skip
    expected = distillation_loss(*problem.tensors[:3], teacher=teacher, alpha=0.5, temperature=2.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ours.loss.backward()
    assert torch.equal(module.weight.grad, torch.autograd.grad(expected.loss, problem.head)[0])


def test_without_a_teacher_it_is_cross_entropy():
    problem = make_problem()
    module = DistillationHead(nn.Parameter(problem.head.detach()), None, 0, V)
    expected = nn.functional.cross_entropy(problem.hidden @ problem.head.T, problem.labels)
    torch.testing.assert_close(module(problem.hidden, problem.labels).loss, expected)
