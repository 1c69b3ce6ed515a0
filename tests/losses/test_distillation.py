"""The fused loss against the formula written out in fp64, in value and gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from incr_ds.losses.distillation import distillation_loss

N, V, HS, HT = 37, 101, 24, 17
DOUBLE = partial(torch.tensor, dtype=torch.float64)


def problem(dtype=torch.float64, seed=0, ignored=(5, 9, 36)):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, HS, generator=generator, dtype=torch.float64)
    head = torch.randn(V, HS, generator=generator, dtype=torch.float64)
    teacher_hidden = torch.randn(N, HT, generator=generator, dtype=torch.float64)
    teacher_head = torch.randn(V, HT, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[list(ignored)] = -100
    hidden, head = (tensor.to(dtype).requires_grad_() for tensor in (hidden, head))
    return hidden, head, labels, teacher_hidden.to(dtype), teacher_head.to(dtype)


def reference(hidden, head, labels, teacher_hidden, teacher_head, alpha, temperature):
    valid = labels != -100
    logits, teacher = (hidden @ head.T)[valid], (teacher_hidden @ teacher_head.T)[valid]
    ce = F.cross_entropy(logits, labels[valid])
    log_p, log_q = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    return (1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


# alpha at both ends and inside; temperature below, at and above 1; both as run-time tensors.
@pytest.mark.parametrize(
    ("alpha", "temperature"),
    [(0.3, 2.0), (1.0, 0.7), (0.5, 1.0), (DOUBLE(0.4), DOUBLE(1.5)), (DOUBLE(0.0), 1.0)],
)
def test_value_and_gradients_equal_the_formula(alpha, temperature):
    tensors = problem()
    ours = distillation_loss(*tensors, alpha=alpha, temperature=temperature)
    theirs, ce, kl = reference(*tensors, alpha, temperature)
    torch.testing.assert_close(torch.stack(ours[:3]), torch.stack([theirs, ce, kl]), rtol=1e-12, atol=1e-12)
    assert ours.tokens == N - 3
    for mine, expected in zip(gradients(3 * ours.loss, *tensors[:2]), gradients(3 * theirs, *tensors[:2]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("teacher", [True, False])
def test_alpha_zero_or_no_teacher_is_plain_cross_entropy(teacher):
    hidden, head, labels, *taught = problem()
    ours = distillation_loss(hidden, head, labels, *(taught if teacher else ()), alpha=0.0, temperature=3.0)
    theirs = F.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(ours.loss, theirs)
    assert ours.divergence == 0
    for mine, expected in zip(gradients(ours.loss, hidden, head), gradients(theirs, hidden, head), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_that_of_the_inputs(dtype):
    tensors = problem(dtype)
    ours = distillation_loss(*tensors, alpha=0.5, temperature=2.0)
    exact = [tensor if tensor is tensors[2] else tensor.detach().double() for tensor in tensors]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    theirs, *_ = reference(*exact, 0.5, 2.0)
    torch.testing.assert_close(ours.loss.double(), theirs, rtol=1e-6, atol=0)
    for mine, expected in zip(gradients(ours.loss, *tensors[:2]), gradients(theirs, *exact[:2]), strict=True):
        assert mine.dtype == dtype
        # Products and sums are fp32; only the finished gradient is rounded to the input's dtype.
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 2.5e-3)


@given(budget=st.integers(1, 5 * 7 * V * 8), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_chunk_size_changes_nothing(budget, seed):
    tensors = problem(seed=seed)
    whole = distillation_loss(*tensors, alpha=0.4, temperature=1.7)
    cut = distillation_loss(*tensors, alpha=0.4, temperature=1.7, budget_bytes=budget)
    torch.testing.assert_close(torch.stack(cut[:3]), torch.stack(whole[:3]), rtol=1e-13, atol=0)
    for mine, expected in zip(gradients(cut.loss, *tensors[:2]), gradients(whole.loss, *tensors[:2]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


def test_ignored_rows_get_exactly_no_gradient_and_do_not_count():
    hidden, head, labels, *taught = problem()
    ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    (gradient,) = gradients(ours.loss, hidden)
    assert not gradient[labels == -100].any()
    kept = labels != -100
    alone = distillation_loss(hidden[kept], head, labels[kept], taught[0][kept], taught[1], alpha=0.5)
    torch.testing.assert_close(ours.loss, alone.loss, rtol=1e-13, atol=0)


def test_all_rows_ignored_is_zero_not_nan():
    hidden, head, labels, *taught = problem(ignored=range(N))
    ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    assert ours.loss == 0 and ours.tokens == 0
    assert not any(gradient.any() for gradient in gradients(ours.loss, hidden, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_student_equal_to_its_teacher_has_exactly_no_divergence(dtype, temperature):
    hidden, head, labels, *_ = problem(dtype)
    ours = distillation_loss(
        hidden, head, labels, hidden.detach(), head.detach(), alpha=1.0, temperature=temperature, budget_bytes=9999
    )
    assert ours.divergence == 0
    assert not any(gradient.any() for gradient in gradients(ours.loss, hidden, head))


@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_a_small_divergence_keeps_its_digits_in_fp32(distance):
    hidden, head, labels, *_ = problem(torch.float32)
    generator = torch.Generator().manual_seed(1)
    teacher = hidden.detach() + distance * torch.randn(hidden.shape, generator=generator)
    # Logits that are exact in both precisions, so that only the divergence's own error shows.
    identity = torch.eye(HS)
    ours = distillation_loss(hidden, identity, labels % HS, teacher, identity, alpha=1.0)
    _, _, exact = reference(
        hidden.detach().double(), identity.double(), labels % HS, teacher.double(), identity.double(), 1.0, 1.0
    )
    assert exact < 30 * distance**2
    torch.testing.assert_close(ours.divergence.double(), exact, rtol=2e-4, atol=0)


def test_extreme_logits_stay_finite():
    hidden, head, labels, *taught = problem(torch.float32)
    ours = distillation_loss(hidden * 1e3, head, labels, -taught[0] * 1e3, taught[1], alpha=0.5)
    assert all(torch.isfinite(part) for part in ours[:3])
    assert all(torch.isfinite(gradient).all() for gradient in gradients(ours.loss, hidden, head))


def test_an_impossible_label_shows_in_loss_and_gradient():
    hidden, head, labels, *_ = problem()
    labels[0] = V
    ours = distillation_loss(hidden, head, labels, alpha=0.0)
    assert ours.loss == torch.inf
    (gradient,) = gradients(ours.loss, hidden)
    assert gradient[0].isnan().all() and gradient[1:].isfinite().all()


def test_without_gradients_nothing_is_kept():
    hidden, head, labels, *taught = problem()
    with torch.no_grad():
        ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    assert not ours.loss.requires_grad
    torch.testing.assert_close(ours.loss, distillation_loss(hidden, head, labels, *taught, alpha=0.5).loss.detach())


def test_only_the_loss_has_a_gradient():
    hidden, head, labels, *taught = problem()
    ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    assert ours.loss.requires_grad and not any(part.requires_grad for part in ours[1:])


def test_a_second_backward_is_refused():
    hidden, head, labels, *taught = problem()
    ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    ours.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the same call; its gradients were handed out"):
        ours.loss.backward()


@pytest.mark.parametrize("changed", [0, 1], ids=["hidden", "head"])
def test_inputs_changed_in_place_before_the_backward_are_refused(changed):
    tensors = problem()
    copies = [tensor * 1 for tensor in tensors[:2]]
    ours = distillation_loss(*copies, *tensors[2:], alpha=0.5)
    with torch.no_grad():
        copies[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.loss.backward()


def test_a_second_derivative_is_refused():
    hidden, head, labels, *taught = problem()
    ours = distillation_loss(hidden, head, labels, *taught, alpha=0.5)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(ours.loss, head, create_graph=True)


def test_wrong_shapes_are_named():
    hidden, head, labels, *taught = problem()
    with pytest.raises(ValueError, match=r"student_hidden \[37, 24\] and student_head \[101, 23\]"):
        distillation_loss(hidden, head[:, 1:], labels, alpha=0.0)
    with pytest.raises(ValueError, match=r"labels \[36\]: expected \[37\]"):
        distillation_loss(hidden, head, labels[1:], alpha=0.0)
    with pytest.raises(ValueError, match="one of them is missing"):
        distillation_loss(hidden, head, labels, taught[0], alpha=0.5)
    with pytest.raises(ValueError, match=r"teacher_hidden \[37, 17\]: expected \[37, 16\]"):
        distillation_loss(hidden, head, labels, taught[0], taught[1][:, 1:], alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha is 0.5 but there is no teacher; give one, or alpha=0.0"):
        distillation_loss(hidden, head, labels, alpha=0.5)
    with pytest.raises(ValueError, match="teacher_head has 100 rows, student_head 101: vocabularies differ"):
        distillation_loss(hidden, head, labels, taught[0], taught[1][1:], alpha=0.5)
