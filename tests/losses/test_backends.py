"""Every backend against the reference in fp64: values and gradients, all kinds of teacher, paddings, precisions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_problem import HS, N, V, make_problem, outcome, relative_errors

from incr_ds.kernels import triton_rows
from incr_ds.kernels.triton_rows import RowLaunch
from incr_ds.losses import planner
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher

# The interpreter evaluates both sides of a choice, also where the side not taken overflows.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

# What fp32 arithmetic leaves of a loss and of a gradient of this size.
FP32_ERRORS = [1e-6] * 5 + [3e-6] * 2


@pytest.fixture(autouse=True)
def several_blocks_per_row(monkeypatch: pytest.MonkeyPatch):
    """V = 101 then takes several steps of every loop, the last one partly filled; recompute has 7 blocks of columns."""
    monkeypatch.setattr(planner, "COLUMN_QUANTUM", 16)
    monkeypatch.setattr(triton_rows, "STATISTICS_LAUNCH", RowLaunch(32, 1))
    monkeypatch.setattr(triton_rows, "GRADIENT_LAUNCH", RowLaunch(64, 1))


def sparse(problem, kind):
    """A teacher of ``kind`` with entries missing in some rows and the label among them in others."""
    q = F.softmax(problem.teacher_hidden.double() @ problem.teacher_head.double().T / 1.5, 1)
    top, indices = q.topk(7, dim=1)
    indices[:3, 0] = problem.labels[:3]
    indices[1, 4:] = -1
    top = torch.where(indices >= 0, q.gather(1, indices.clamp_min(0)), 0)
    assert all(row[row >= 0].unique().numel() == (row >= 0).sum() for row in indices), "entries must be distinct"
    if kind == "sampled":
        return SampledTeacher(indices, top / top.sum(1, keepdim=True))
    return TopKTeacher(indices, top.log(), tail=kind)


SETTINGS = [
    {"alpha": 0.3, "temperature": 2.0},
    {"alpha": 0.3, "temperature": 1.0, "z_loss": 0.02, "label_smoothing": 0.1},
    {"alpha": 1.0, "temperature": 0.7, "z_loss": 0.02},
    {"alpha": torch.tensor(0.25), "temperature": torch.tensor(1.5), "label_smoothing": 0.2},
    {"alpha": 0.0, "z_loss": 0.02, "label_smoothing": 0.1},
]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torch_equals_the_reference(settings, divergence):
    expected = outcome(make_problem(), **settings, divergence=divergence, backend="reference")
    for budget in (None, 30_000):
        found = outcome(make_problem(), **settings, divergence=divergence, backend="torch", budget_bytes=budget)
        assert max(relative_errors(found, expected)) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lean_equals_the_reference(settings, divergence):
    expected = outcome(make_problem(), **settings, divergence=divergence, backend="reference")
    for budget in (None, 40_000, 1):
        found = outcome(make_problem(), **settings, divergence=divergence, backend="recompute", budget_bytes=budget)
        assert max(relative_errors(found, expected)) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("settings", [*SETTINGS[:3], SETTINGS[4]], ids=str)
def test_triton_equals_the_reference(settings, divergence):
    exact = make_problem(torch.float32).to(torch.float64)
    expected = outcome(exact, **settings, divergence=divergence, backend="reference")
    found = outcome(
        make_problem(torch.float32), **settings, divergence=divergence, backend="triton", budget_bytes=2_500
    )
    assert all(error < bound for error, bound in zip(relative_errors(found, expected), FP32_ERRORS, strict=True))


CAPS = [{"softcap": 2.0}, {"teacher_softcap": 3.0}, {"softcap": 4.0, "teacher_softcap": 3.0}]


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_capped_logits_equal_the_reference(backend: str, caps, divergence):
    """The reference's gradient is autograd's through the cap."""
    problem = make_problem(torch.float32)
    settings = {
        "alpha": 0.3,
        "temperature": 1.5,
        "z_loss": 0.02,
        "label_smoothing": 0.1,
        "divergence": divergence,
        **caps,
    }
    expected = outcome(problem.to(torch.float64), **settings, backend="reference")
    dtype = torch.float32 if backend == "triton" else torch.float64
    bounds = FP32_ERRORS if backend == "triton" else [1e-12] * 7
    for budget in (None, 9_000):
        found = outcome(problem.to(dtype), **settings, backend=backend, budget_bytes=budget)
        assert all(error < bound for error, bound in zip(relative_errors(found, expected), bounds, strict=True))


@pytest.mark.parametrize("backend", ["torch", "recompute"])
def test_capped_logits_and_sparse_teachers(backend: str):
    problem = make_problem()
    settings = {"alpha": 0.4, "temperature": 1.5, "teacher": sparse(problem, "bucket"), "softcap": 3.0}
    expected = outcome(problem, **settings, backend="reference")
    found = outcome(make_problem(), **settings, backend=backend, budget_bytes=9_000)
    assert max(relative_errors(found, expected)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_capped_logits_of_low_precision(dtype):
    """A cap's slope is taken from logits that were rounded once more; what that leaves stays within rounding."""
    problem = make_problem(dtype, tokens=64, scale=0.5)
    settings = {"alpha": 0.5, "softcap": 4.0, "teacher_softcap": 4.0}
    exact = outcome(problem.to(torch.float64), **settings, backend="reference")
    for backend in ("torch", "recompute"):
        ours = relative_errors(outcome(problem.to(dtype), **settings, backend=backend), exact)
        assert ours[0] < 1e-2 and max(ours[5:]) < 2e-2, backend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0, expected a positive number, or None"),
        ({"teacher_softcap": -1.0, "alpha": 0.5}, "the teacher's softcap is -1.0, expected a positive number"),
    ],
)
def test_caps_that_are_none_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        outcome(make_problem(), **{"alpha": 0.0, **arguments})


@pytest.mark.parametrize("kind", ["bucket", "none", "sampled"])
@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_sparse_teachers_equal_the_reference(kind, backend: str):
    dtype = torch.float32 if backend == "triton" else torch.float64
    problem = make_problem(torch.float32)
    settings = {
        "alpha": 0.4,
        "temperature": 1.5,
        "z_loss": 0.02,
        "label_smoothing": 0.1,
        "teacher": sparse(problem, kind),
    }
    expected = outcome(problem.to(torch.float64), **settings, backend="reference")
    found = outcome(problem.to(dtype), **settings, backend=backend, budget_bytes=9_000)
    bounds = FP32_ERRORS if backend == "triton" else [1e-12] * 7
    assert all(error < bound for error, bound in zip(relative_errors(found, expected), bounds, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_padding_is_outside_every_sum(backend: str):
    """Each model has its own padding behind 101 entries; garbage in it must not matter."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    plain, settings = make_problem(dtype), {"alpha": 0.5, "label_smoothing": 0.1, "z_loss": 0.01, "backend": backend}
    expected = outcome(plain, **settings)
    padded = torch.cat([plain.head.detach(), torch.full((27, HS), torch.inf, dtype=dtype)]).requires_grad_()
    teacher = HiddenTeacher(plain.teacher_hidden, F.pad(plain.teacher_head, (0, 0, 0, 11), value=1e4))
    result = distillation_loss(plain.hidden, padded, plain.labels, teacher=teacher, vocab_size=V, **settings)
    hidden_gradient, head_gradient = torch.autograd.grad(result.loss, (plain.hidden, padded))
    found = [*result[:5], hidden_gradient, head_gradient[:V]]
    assert all(torch.equal(a.detach().double(), b) for a, b in zip(found, expected, strict=True))
    assert not head_gradient[V:].any()


# The gate: no further from fp64 than torch's own bf16 arithmetic on whole logits, within a tenth.
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float16), ("recompute", torch.bfloat16)]
)
@pytest.mark.parametrize("budget", [None, 12_000], ids=["one chunk", "many chunks"])
def test_no_less_accurate_than_eager(backend: str, dtype, budget):
    problem = make_problem(dtype, tokens=64, scale=0.5)
    settings = {"alpha": 0.5, "temperature": 1.0, "z_loss": 1e-3}
    exact = outcome(problem.to(torch.float64), **settings, backend="reference")
    ours = relative_errors(outcome(problem.to(dtype), **settings, backend=backend, budget_bytes=budget), exact)
    theirs = relative_errors(eager(problem.to(dtype)), exact)
    assert ours[0] <= 1.1 * theirs[0] + 1e-6
    assert ours[5] <= 1.1 * theirs[5] and ours[6] <= 1.1 * theirs[6]


def eager(problem):
    """The same loss by autograd over whole logits in the inputs' dtype, with an fp32 softmax, as it is usually written."""
    kept = problem.labels != -100
    logits = (problem.hidden @ problem.head.T)[kept].float()
    scores = (problem.teacher_hidden @ problem.teacher_head.T)[kept].float()
    ce = F.cross_entropy(logits, problem.labels[kept])
    log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(scores, 1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    z = logits.logsumexp(1).square().mean()
    loss = 0.5 * ce + 0.5 * kl + 1e-3 * z
    gradients = torch.autograd.grad(loss, (problem.hidden, problem.head))
    return [value.detach().double() for value in (loss, ce, kl, z, z, *gradients)]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float16), ("recompute", torch.bfloat16)]
)
def test_autocast_takes_low_precision_operands_and_keeps_the_gradients_dtype(backend: str, dtype):
    problem = make_problem(torch.float32)
    with torch.autocast("cpu", dtype):
        found = outcome(problem, alpha=0.5, backend=backend)
    lower = outcome(problem.to(dtype), alpha=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found[:5], lower[:5], strict=True))
    gradient = torch.autograd.grad(distillation_loss(*problem.tensors, alpha=0.5, backend=backend).loss, problem.head)[
        0
    ]
    assert gradient.dtype == torch.float32
    assert relative_errors(found[5:], lower[5:])[1] < 4e-3


@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_repeats_are_the_same_bits(backend: str):
    first, second = (outcome(make_problem(torch.float32), alpha=0.5, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton", "recompute"])
def test_without_gradients_values_are_the_same(backend: str):
    problem = make_problem(torch.float32)
    for divergence in DIVERGENCES:
        kept = distillation_loss(*problem.tensors, alpha=0.5, divergence=divergence, backend=backend)
        with torch.no_grad():
            free = distillation_loss(*problem.tensors, alpha=0.5, divergence=divergence, backend=backend)
        assert not free.loss.requires_grad
        torch.testing.assert_close(torch.stack(free[:5]), torch.stack(kept[:5]).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "recompute"])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_the_heads_gradient_goes_straight_into_a_given_buffer(budget, backend: str):
    problem, scale = make_problem(torch.bfloat16), torch.tensor(8.0)
    expected = outcome(problem.to(torch.float64), alpha=0.5, backend="reference")[6]
    buffer = torch.ones(V, HS)
    result = distillation_loss(
        *problem.tensors, alpha=0.5, head_gradient=buffer, gradient_scale=scale, budget_bytes=budget, backend=backend
    )
    (scale * result.loss).backward()
    assert problem.head.grad is None
    assert relative_errors([buffer.double() - 1], [8 * expected])[0] < 1e-6
    hidden = outcome(problem.to(torch.bfloat16), alpha=0.5, backend="torch")[5]
    torch.testing.assert_close(problem.hidden.grad.double(), 8 * hidden, rtol=1e-2, atol=0)


def test_another_scale_than_the_promised_one_shows():
    problem = make_problem()
    result = distillation_loss(
        *problem.tensors,
        alpha=0.5,
        head_gradient=torch.zeros(V, HS, dtype=torch.float64),
        gradient_scale=torch.tensor(2.0),
    )
    result.loss.backward()
    assert problem.hidden.grad.isnan().all()


def test_per_token_parts_are_zero_where_ignored():
    problem = make_problem()
    result = distillation_loss(*problem.tensors, alpha=0.5)
    assert result.per_token.shape == (4, N)
    assert (result.per_token == 0).all(0).nonzero().flatten().tolist() == [5, 9]


@pytest.mark.parametrize(
    ("backend", "budget"),
    [
        *(("torch", None), ("torch", 20_000), ("recompute", 20_000)),
        pytest.param("triton", None, marks=pytest.mark.slow),  # interpreted, 40 s
    ],
)
def test_small_gradients_in_fp16_survive_until_the_loss_is_scaled(backend, budget):
    """Divided by the number of tokens, gradients of hidden states here have no more than 5 bits in fp16."""
    problem = make_problem(tokens=512, scale=0.1)
    low = replace(problem, head=problem.head * 1e-4).to(torch.float16)
    expected = outcome(low.to(torch.float64), alpha=0.5, backend="reference")[5:]
    assert expected[0].abs().max() < 2e-6
    result = distillation_loss(*low.tensors, alpha=0.5, backend=backend, budget_bytes=budget)
    (result.loss * 2.0**14).backward()
    assert low.hidden.grad.dtype == low.head.grad.dtype == torch.float16
    found = [tensor.grad.double() / 2**14 for tensor in (low.hidden, low.head)]
    assert max(relative_errors(found, expected)) < 2e-3
