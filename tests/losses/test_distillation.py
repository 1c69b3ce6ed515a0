"""The function's contract: what it returns, what it refuses, and how it works with autograd."""

import pytest
import torch
import torch.nn.functional as F
from loss_problem import HS, HT, N, V, make_problem, outcome
from torch.utils.checkpoint import checkpoint

from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher


@pytest.mark.parametrize("teacher", [True, False])
def test_alpha_zero_or_no_teacher_is_plain_cross_entropy(teacher):
    hidden, head, labels, *taught = make_problem().tensors
    ours = distillation_loss(hidden, head, labels, *(taught if teacher else ()), alpha=0.0, temperature=3.0)
    theirs = F.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(ours.loss, theirs)
    assert ours.divergence == 0 and ours.tokens == N - 2
    for mine, expected in zip(
        *(torch.autograd.grad(loss, (hidden, head)) for loss in (ours.loss, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_an_impossible_label_shows_in_loss_and_gradient():
    hidden, head, labels, *_ = make_problem().tensors
    labels[0] = V
    ours = distillation_loss(hidden, head, labels, alpha=0.0)
    assert ours.loss == torch.inf
    (gradient,) = torch.autograd.grad(ours.loss, hidden)
    assert gradient[0].isnan().all() and gradient[1:].isfinite().all()


def test_only_the_loss_has_a_gradient():
    ours = distillation_loss(*make_problem().tensors, alpha=0.5)
    assert ours.loss.requires_grad and not any(part.requires_grad for part in ours[1:])


@pytest.mark.parametrize("backend", ["torch", "recompute"])
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_needs_no_gradient_gets_none(frozen, backend: str):
    problem = make_problem()
    expected = outcome(make_problem(), alpha=0.5)[5:]
    getattr(problem, frozen).requires_grad_(False)
    distillation_loss(*problem.tensors, alpha=0.5, backend=backend).loss.backward()
    assert getattr(problem, frozen).grad is None
    other, index = ("head", 1) if frozen == "hidden" else ("hidden", 0)
    torch.testing.assert_close(getattr(problem, other).grad, expected[index])


def test_a_second_backward_is_refused():
    ours = distillation_loss(*make_problem().tensors, alpha=0.5)
    ours.loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="a second backward through the same call; the first one already used its gradients"
    ):
        ours.loss.backward()


def test_a_second_derivative_is_refused():
    problem = make_problem()
    ours = distillation_loss(*problem.tensors, alpha=0.5)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(ours.loss, problem.head, create_graph=True)


@pytest.mark.parametrize("changed", [0, 1], ids=["hidden", "head"])
def test_inputs_changed_in_place_before_the_backward_are_refused(changed):
    problem = make_problem()
    copies = [tensor * 1 for tensor in problem.tensors[:2]]
    ours = distillation_loss(*copies, *problem.tensors[2:], alpha=0.5)
    with torch.no_grad():
        copies[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing_gradients_are_the_same(reentrant):
    problem, expected = make_problem(), outcome(make_problem(), alpha=0.5)

    def loss(hidden, head):
        return distillation_loss(hidden, head, *problem.tensors[2:], alpha=0.5).loss

    recomputed = checkpoint(loss, problem.hidden, problem.head, use_reentrant=reentrant)
    recomputed.backward()
    assert torch.equal(recomputed.detach(), expected[0])
    assert torch.equal(problem.hidden.grad, expected[5]) and torch.equal(problem.head.grad, expected[6])


def test_gradients_of_micro_batches_add_up_and_scale_with_the_loss():
    first, second = make_problem(seed=1), make_problem(seed=2)
    head = first.head.detach().clone().requires_grad_()
    for problem in (first, second):
        loss = distillation_loss(problem.hidden, head, *problem.tensors[2:], alpha=0.5).loss
        (loss / 2).backward()
    expected = torch.zeros_like(head)
    for problem in (first, second):
        loss = distillation_loss(problem.hidden, head, *problem.tensors[2:], alpha=0.5, backend="reference").loss
        expected += torch.autograd.grad(loss, head)[0] / 2
    torch.testing.assert_close(head.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_tied_embedding_gets_the_gradient_of_both_uses():
    problem = make_problem()
    ids = torch.arange(N)

    def gradient(backend):
        weight = problem.head.detach().clone().requires_grad_()
        loss = distillation_loss(
            F.embedding(ids, weight).tanh(), weight, *problem.tensors[2:], alpha=0.5, backend=backend
        )
        return torch.autograd.grad(loss.loss, weight)[0]

    torch.testing.assert_close(gradient("torch"), gradient("reference"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "recompute"])
def test_no_tokens_at_all_is_zero(backend: str):
    hidden, head = torch.zeros(0, HS, requires_grad=True), torch.randn(V, HS, requires_grad=True)
    loss = distillation_loss(
        hidden, head, torch.zeros(0, dtype=torch.long), alpha=0.0, z_loss=0.1, backend=backend
    ).loss
    loss.backward()
    assert loss == 0 and not head.grad.any() and hidden.grad.shape == (0, HS)


def test_wrong_shapes_are_named():
    hidden, head, labels, *taught = make_problem().tensors
    sparse = torch.zeros(N, 3, dtype=torch.long)
    cases = [
        ((hidden, head[:, 1:], labels), {}, r"student_hidden \[11, 24\] and student_head \[101, 23\]"),
        ((hidden, head, labels[1:]), {}, r"labels \[10\]: expected \[11\]"),
        ((hidden, head, labels, taught[0]), {}, "one of them is missing"),
        ((hidden, head, labels, taught[0], taught[1][:, 1:]), {}, rf"teacher_hidden \[11, {HT}\]: expected \[11, 16\]"),
        ((hidden, head, labels, taught[0], taught[1][1:]), {}, "teacher_head has 100 rows, student_head 101"),
        ((hidden, head, labels), {"vocab_size": 102}, "student_head has 101 rows, fewer than vocab_size 102"),
        ((hidden, head, labels), {"vocab_start": 3}, "vocab_start is 3, but without a group"),
        (
            (hidden, head, labels),
            {"teacher": TopKTeacher(sparse[1:], sparse)},
            r"teacher.indices \[10, 3\]: expected \[11",
        ),
        (
            (hidden, head, labels),
            {"teacher": SampledTeacher(sparse, sparse[1:])},
            r"indices \[11, 3\] and values \[10, 3\]",
        ),
    ]
    for tensors, arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            distillation_loss(*tensors, alpha=0.5 if "teacher" in arguments or len(tensors) > 3 else 0.0, **arguments)


def test_wrong_numbers_are_named():
    problem = make_problem()
    entries = torch.zeros(N, 3, dtype=torch.long)
    sparse = TopKTeacher(entries, entries.double())
    dense = HiddenTeacher(problem.teacher_hidden, problem.teacher_head)
    cases = [
        ({"alpha": 1.5, "teacher": dense}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"alpha": 0.5}, "alpha is 0.5 but there is no teacher; give one, or alpha=0.0"),
        ({"alpha": 0.0, "temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"alpha": 0.0, "label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"alpha": 0.0, "divergence": "kl"}, "'kl' is unknown; the divergences are forward_kl, reverse_kl, jsd"),
        ({"alpha": 0.5, "divergence": "jsd", "teacher": sparse}, "a sparse teacher has forward_kl"),
        ({"alpha": 0.0, "gradient_scale": torch.tensor(1.0)}, "gradient_scale belongs to head_gradient"),
        ({"alpha": 0.0, "head_gradient": torch.zeros(V, HS)}, r"expected torch.float64 \[101, 24\] like student_head"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            distillation_loss(*problem.tensors[:3], **arguments)
    with pytest.raises(ValueError, match="give either teacher, or teacher_hidden and teacher_head"):
        distillation_loss(*problem.tensors, alpha=0.5, teacher=dense)
