"""What must hold for any numbers, on the torch backend in fp64 and on the Triton kernels in fp32."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problem import HS, LossProblem, V, make_problem, outcome, relative_errors

from incr_ds.kernels import torch_rows, triton_rows
from incr_ds.kernels.rows import Tempering
from incr_ds.kernels.torch_rows import TorchRows
from incr_ds.kernels.triton_rows import RowLaunch, TritonRows
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import TopKTeacher

# The interpreter evaluates both sides of a choice, also where the side not taken overflows.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

BACKENDS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("triton", torch.float16),
    ("recompute", torch.float32),
]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
FEW = settings(max_examples=20, deadline=None)


def gradients(loss, problem):
    return torch.autograd.grad(loss, (problem.hidden, problem.head))


def taught_by_itself(problem):
    return LossProblem(problem.hidden, problem.head, problem.labels, problem.hidden.detach(), problem.head.detach())


@pytest.mark.parametrize(
    ("backend", "dtype"), [*BACKENDS, ("torch", torch.bfloat16), ("recompute", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_exactly_no_divergence(backend: str, dtype, divergence):
    problem = taught_by_itself(make_problem(dtype))
    for temperature in (1.0, 2.5):
        result = distillation_loss(
            *problem.tensors, alpha=1.0, temperature=temperature, divergence=divergence, backend=backend
        )
        assert result.loss == 0 and result.divergence == 0
        assert not any(gradient.any() for gradient in gradients(result.loss, problem))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_a_small_divergence_keeps_its_digits_in_fp32(backend: str, distance, divergence):
    """Heads that are the identity: the logits are exact, so that only the divergence's own error shows."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, HS, generator=generator)
    teacher = hidden + distance * torch.randn(9, HS, generator=generator)
    labels, identity = torch.arange(9), torch.eye(HS)

    def divergence_of(dtype, name):
        tensors = [tensor.to(dtype) for tensor in (hidden, identity)]
        taught = [tensor.to(dtype) for tensor in (teacher, identity)]
        return distillation_loss(
            *tensors, labels, *taught, alpha=1.0, divergence=divergence, backend=name
        ).divergence.double()

    exact = divergence_of(torch.float64, "reference")
    assert 0 < exact < 2 * distance**2
    torch.testing.assert_close(divergence_of(torch.float32, backend), exact, rtol=3e-4, atol=0)


@given(
    budget=st.integers(1, 300_000),
    seed=st.integers(0, 5),
    divergence=st.sampled_from(DIVERGENCES),
    backend=st.sampled_from(["torch", "recompute"]),
)
@FEW
def test_chunks_and_blocks_change_nothing(budget, seed, divergence, backend):
    options = {"alpha": 0.4, "temperature": 1.7, "z_loss": 0.01, "divergence": divergence}
    whole = outcome(make_problem(seed=seed), **options)
    cut = outcome(make_problem(seed=seed), **options, budget_bytes=budget, backend=backend)
    assert max(relative_errors(cut, whole)) < 1e-13


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_ignored_rows_have_no_gradient_and_do_not_count(backend: str, dtype):
    problem = make_problem(dtype)
    kept = problem.labels != -100
    options = {"alpha": 0.5, "z_loss": 0.01, "label_smoothing": 0.1, "backend": backend}
    result = distillation_loss(*problem.tensors, **options)
    gradient = gradients(result.loss, problem)[0]
    as_bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert not gradient[~kept].view(as_bits).any()
    alone = LossProblem(
        problem.hidden[kept], problem.head, problem.labels[kept], problem.teacher_hidden[kept], problem.teacher_head
    )
    torch.testing.assert_close(result.loss, distillation_loss(*alone.tensors, **options).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_a_batch_without_a_valid_token_is_zero(backend: str, dtype):
    problem = make_problem(dtype, ignored=range(11))
    result = distillation_loss(*problem.tensors, alpha=0.5, backend=backend)
    assert not any(part.any() for part in result[:6])
    assert not any(gradient.any() for gradient in gradients(result.loss, problem))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_logits_of_ten_thousand_stay_finite(backend: str, divergence):
    problem = make_problem(torch.float32)
    far = LossProblem(
        (problem.hidden * 1e3).detach().requires_grad_(), problem.head, problem.labels,
        -1e3 * problem.teacher_hidden, problem.teacher_head,
    )  # fmt: skip
    assert (far.hidden @ far.head.T).abs().max() > 1e4
    found = outcome(far, alpha=0.5, divergence=divergence, backend=backend)
    assert all(value.isfinite().all() for value in found)
    exact = outcome(far.to(torch.float64), alpha=0.5, divergence=divergence, backend="reference")
    assert max(relative_errors(found[:4], exact[:4])) < 1e-5
    assert max(relative_errors(found[5:], exact[5:])) < 1e-2  # the logits' own rounding, exponentiated


@pytest.mark.parametrize("kernels", [TorchRows(), TritonRows()], ids=lambda kernels: kernels.name)
def test_statistics_of_logits_with_minus_infinity(kernels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_rows, "STATISTICS_LAUNCH", RowLaunch(16, 1))
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    logits[0, 20:] = logits[1, :20] = logits[2, ::2] = -torch.inf
    logits[3] = -torch.inf
    found = kernels.statistics(logits, logits, Tempering(torch.tensor(0.5), unit=False))
    for row in (0, 1, 2, 4):
        real = logits[row][logits[row] > -torch.inf].double()
        maximum = real.max()
        e = (real - maximum).exp()
        expected = [maximum, e.sum(), (e**0.5).sum(), found[3, row], (e * (real - maximum)).sum()]
        expected += [maximum, (e**0.5).sum()]
        torch.testing.assert_close(found[:, row].double(), torch.stack([*map(torch.as_tensor, expected)]).double())
    assert not found[[1, 2, 4, 6], 3].isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_rows_in_blocks_give_the_same_bits(divergence, temperature, monkeypatch: pytest.MonkeyPatch):
    """On a CPU the torch backend goes through its rows in blocks: here of 4, 4 and 3 rows, one of them ignored."""
    settings = {"alpha": 0.5, "temperature": temperature, "divergence": divergence, "label_smoothing": 0.1}
    whole = outcome(make_problem(torch.float32), backend="torch", **settings)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 1)
    in_blocks = outcome(make_problem(torch.float32), backend="torch", **settings)
    assert all(torch.equal(one, other) for one, other in zip(whole, in_blocks, strict=True))


@given(seed=st.integers(0, 99), shift=st.floats(-50, 50))
@FEW
def test_order_of_the_vocabulary_and_a_constant_in_the_logits_do_not_matter(seed, shift):
    problem, order = make_problem(seed=seed), torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    expected = outcome(problem, alpha=0.5, temperature=1.3, label_smoothing=0.1)
    # A last hidden feature of 1 against a head column of ``shift`` adds it to every logit.
    hidden = torch.cat([problem.hidden, torch.ones(11, 1)], 1).detach().requires_grad_()
    head = torch.cat([problem.head, torch.full((V, 1), shift)], 1)[order].detach().requires_grad_()
    labels = torch.where(problem.labels >= 0, order.argsort()[problem.labels.clamp_min(0)], -100)
    moved = LossProblem(hidden, head, labels, problem.teacher_hidden, problem.teacher_head[order])
    found = outcome(moved, alpha=0.5, temperature=1.3, label_smoothing=0.1)
    assert max(relative_errors(found[:3], expected[:3])) < 1e-10
    assert relative_errors([found[5][:, :-1], found[6][order.argsort(), :-1]], expected[5:]) < [1e-10, 1e-10]


@given(alpha=st.floats(0.01, 0.99), seed=st.integers(0, 9))
@FEW
def test_the_loss_is_linear_in_alpha(alpha, seed):
    ends = [outcome(make_problem(seed=seed), alpha=torch.tensor(end), temperature=2.0) for end in (0.0, 1.0)]
    found = outcome(make_problem(seed=seed), alpha=alpha, temperature=2.0)
    for index in (0, 5, 6):
        mixed = (1 - alpha) * ends[0][index] + alpha * ends[1][index]
        torch.testing.assert_close(found[index], mixed, rtol=1e-12, atol=1e-14)
    assert torch.equal(ends[0][0], ends[0][1]) and torch.equal(ends[1][0], 4 * ends[1][2])


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_a_teacher_that_is_sure_is_a_label(tail):
    problem = make_problem(ignored=())
    sure = TopKTeacher(problem.labels[:, None], torch.zeros(11, 1, dtype=torch.float64), tail=tail)
    found = outcome(problem, alpha=1.0, teacher=sure)
    assert found[2].item() == pytest.approx(found[1].item(), rel=1e-6 if tail == "bucket" else 1e-12)
    expected = outcome(problem, alpha=0.0, teacher=sure)
    assert max(relative_errors(found[5:], expected[5:])) < 1e-6


def test_the_top_entries_bound_the_full_divergence():
    problem = make_problem(ignored=())
    log_q = F.log_softmax(problem.teacher_hidden @ problem.teacher_head.T, 1)
    found = []
    for count in (1, 5, 20, V):
        log_probs, indices = log_q.topk(count, dim=1)
        found.append(outcome(problem, alpha=1.0, teacher=TopKTeacher(indices, log_probs))[2].item())
    full = outcome(problem, alpha=1.0)[2].item()
    assert found == sorted(found) and found[0] < found[2] < full
    assert math.isclose(found[-1], full, rel_tol=1e-6)


def test_a_hot_temperature_makes_the_divergence_that_of_the_logits_variance():
    """T^2 KL tends to half the variance of u - z over the vocabulary."""
    problem = make_problem(ignored=())
    difference = problem.teacher_hidden @ problem.teacher_head.T - problem.hidden @ problem.head.T
    half_variance = difference.var(dim=1, correction=0).mean().item() / 2
    found = outcome(problem, alpha=1.0, temperature=1e4)[0].item()
    assert found == pytest.approx(half_variance, rel=1e-2)
