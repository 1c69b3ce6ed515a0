"""The reference against functions of torch, and its gradient against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_problem import V, make_problem

from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher


def kl(target, estimate):
    return F.kl_div(estimate, target, log_target=True, reduction="batchmean")


def formula(problem, alpha, temperature, divergence, cap=None, teacher_cap=None):
    kept = problem.labels != -100
    logits = (problem.hidden @ problem.head.T)[kept]
    scores = (problem.teacher_hidden @ problem.teacher_head.T)[kept]
    logits, scores = (z if c is None else c * (z / c).tanh() for z, c in ((logits, cap), (scores, teacher_cap)))
    log_p, log_q = F.log_softmax(logits / temperature, 1), F.log_softmax(scores / temperature, 1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    distance = {
        "forward_kl": lambda: kl(log_q, log_p),
        "reverse_kl": lambda: kl(log_p, log_q),
        "jsd": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }[divergence]()
    ce = F.cross_entropy(logits, problem.labels[kept], label_smoothing=0.1)
    z = logits.logsumexp(1).square().mean()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    return [(1 - alpha) * ce + alpha * temperature**2 * distance + 0.01 * z, ce, distance, z, entropy]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (1.0, 0.7)])
def test_the_reference_is_the_formula(alpha, temperature, divergence):
    problem = make_problem()
    found = distillation_loss(
        *problem.tensors, alpha=alpha, temperature=temperature, z_loss=0.01, label_smoothing=0.1, divergence=divergence,
        backend="reference",
    )  # fmt: skip
    expected = formula(problem, alpha, temperature, divergence)
    torch.testing.assert_close(torch.stack(found[:5]), torch.stack(expected), rtol=1e-12, atol=0)
    assert found.tokens == 9
    torch.testing.assert_close(found.per_token.sum(1) / 9, torch.stack(expected[1:]).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("cap", "teacher_cap"), [(2.0, None), (None, 3.0), (2.0, 3.0)])
def test_capped_logits_are_their_formula(cap, teacher_cap):
    problem = make_problem()
    found = distillation_loss(
        *problem.tensors, alpha=0.3, temperature=2.0, z_loss=0.01, label_smoothing=0.1, backend="reference",
        softcap=cap, teacher_softcap=teacher_cap,
    )  # fmt: skip
    expected = formula(problem, 0.3, 2.0, "forward_kl", cap, teacher_cap)
    torch.testing.assert_close(torch.stack(found[:5]), torch.stack(expected), rtol=1e-12, atol=0)
    uncapped = formula(problem, 0.3, 2.0, "forward_kl")
    assert (found.loss - uncapped[0]).abs() > 0.1, "the caps must matter"


def test_sparse_teachers_are_their_formulas():
    problem = make_problem(ignored=())
    log_p = F.log_softmax(problem.hidden @ problem.head.T / 1.5, 1)
    q = F.softmax(problem.teacher_hidden @ problem.teacher_head.T / 1.5, 1)
    top, indices = q.topk(7, dim=1)
    kept = log_p.gather(1, indices)

    def divergence(teacher):
        return distillation_loss(
            *problem.tensors[:3], alpha=0.5, temperature=1.5, teacher=teacher, backend="reference"
        ).divergence

    plain = (top * (top.log() - kept)).sum(1)
    rest_q, rest_p = 1 - top.sum(1), 1 - kept.exp().sum(1)
    bucket = plain + rest_q * (rest_q.log() - rest_p.log())
    torch.testing.assert_close(divergence(TopKTeacher(indices, top.log())), bucket.mean().detach())
    torch.testing.assert_close(divergence(TopKTeacher(indices, top.log(), tail="none")), plain.mean().detach())
    torch.testing.assert_close(divergence(SampledTeacher(indices, top)), plain.mean().detach())


def test_all_entries_kept_is_the_full_divergence():
    problem = make_problem()
    log_q = F.log_softmax(problem.teacher_hidden @ problem.teacher_head.T, 1)
    everything = TopKTeacher(torch.arange(V).expand(len(log_q), V), log_q)
    sparse = distillation_loss(*problem.tensors[:3], alpha=0.5, teacher=everything, backend="reference")
    dense = HiddenTeacher(problem.teacher_hidden, problem.teacher_head)
    full = distillation_loss(*problem.tensors[:3], alpha=0.5, teacher=dense, backend="reference")
    torch.testing.assert_close(sparse.divergence, full.divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradcheck(divergence):
    problem = make_problem()
    hidden, head = (tensor.detach().requires_grad_() for tensor in (problem.hidden[:3, :5], problem.head[:7, :5]))

    def loss(x, w):
        return distillation_loss(
            x, w, problem.labels[:3] % 7, problem.teacher_hidden[:3], problem.teacher_head[:7], alpha=0.6,
            temperature=1.3, z_loss=0.1, label_smoothing=0.2, divergence=divergence, backend="reference",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_equal_distributions_have_the_entropy_of_their_size():
    hidden, head = torch.zeros(2, 3, dtype=torch.float64), torch.ones(V, 3, dtype=torch.float64)
    found = distillation_loss(hidden, head, torch.tensor([0, 1]), alpha=0.0, backend="reference")
    assert found.entropy.item() == pytest.approx(math.log(V)) == found.ce.item()
