"""On a CUDA device: the kernels in bf16 against fp64, within eager's own error, without synchronising."""

import pytest
import torch
from loss_problem import LossProblem, outcome, relative_errors
from test_backends import eager

from incr_ds.kernels.cuda_library import find_nvcc, library_path
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import TopKTeacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, V, HS, HT = 512, 8191, 256, 128
CAN_BUILD = find_nvcc() is not None or library_path().exists()
CUDA_ROWS = pytest.param("cuda", marks=pytest.mark.skipif(not CAN_BUILD, reason="there is no nvcc to build the rows"))


def make_problem(dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((N, HS, 1.0), (V, HS, HS**-0.5), (N, HT, 1.0), (V, HT, HT**-0.5))
    floats = [
        (scale * torch.randn((rows, columns), generator=generator, device="cuda")).to(torch.bfloat16).to(dtype)
        for rows, columns, scale in shapes
    ]
    labels = torch.randint(0, V, (N,), generator=generator, device="cuda")
    labels[::7] = -100
    return LossProblem(floats[0].requires_grad_(), floats[1].requires_grad_(), labels, *floats[2:])


@pytest.mark.parametrize("budget", [None, 3_000_000], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("backend", ["triton", "torch", "recompute", CUDA_ROWS])
def test_no_less_accurate_than_eager(backend: str, budget):
    exact = outcome(make_problem(torch.float64), alpha=0.5, z_loss=1e-3, backend="reference")
    ours = relative_errors(outcome(make_problem(), alpha=0.5, z_loss=1e-3, backend=backend, budget_bytes=budget), exact)
    theirs = relative_errors(eager(make_problem()), exact)
    assert ours[0] <= 1.1 * theirs[0] + 1e-5
    assert ours[5] <= 1.1 * theirs[5] and ours[6] <= 1.1 * theirs[6]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("backend", ["triton", "recompute", CUDA_ROWS])
def test_rows_equal_the_reference_in_fp32(divergence, temperature, backend: str):
    options = {"alpha": 0.5, "temperature": temperature, "divergence": divergence, "label_smoothing": 0.1}
    expected = outcome(make_problem(torch.float64), **options, backend="reference")
    found = outcome(make_problem(torch.float32), **options, backend=backend)
    assert max(relative_errors(found, expected)) < 1e-4


@pytest.mark.parametrize("backend", ["triton", "recompute", CUDA_ROWS])
def test_a_student_equal_to_its_teacher_has_exactly_no_divergence(backend: str):
    problem = make_problem()
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        for temperature in (1.0, 2.5):
            result = distillation_loss(
                *problem.tensors[:3], problem.hidden.detach(), problem.head.detach(), alpha=1.0,
                temperature=temperature, divergence=divergence, backend=backend,
            )  # fmt: skip
            assert result.divergence == 0
            assert not torch.autograd.grad(result.loss, problem.hidden)[0].any()


@pytest.mark.parametrize("backend", ["triton", "recompute", CUDA_ROWS])
def test_repeats_are_the_same_bits(backend: str):
    first, second = (outcome(make_problem(), alpha=0.5, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_synchronises():
    problem, alpha = make_problem(), torch.tensor(0.5, device="cuda")
    indices = torch.arange(8, device="cuda").expand(N, 8).contiguous()
    sparse = TopKTeacher(indices, torch.full((N, 8), -3.0, device="cuda"))
    outcome(problem, alpha=0.5)  # compiles
    outcome(problem, alpha=0.5, teacher=sparse)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for teacher in (None, sparse):
            taught = {} if teacher else {"teacher_hidden": problem.teacher_hidden, "teacher_head": problem.teacher_head}
            result = distillation_loss(
                *problem.tensors[:3], **taught, teacher=teacher, alpha=alpha, temperature=alpha + 1, z_loss=0.01,
                label_smoothing=0.1,
            )  # fmt: skip
            torch.autograd.grad(result.loss, (problem.hidden, problem.head))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "recompute"])
def test_memory_stays_within_the_budget_and_the_gradients(backend: str):
    problem, budget = make_problem(), 4_000_000
    distillation_loss(*problem.tensors, alpha=0.5, budget_bytes=budget, backend=backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = distillation_loss(*problem.tensors, alpha=0.5, budget_bytes=budget, backend=backend)
    gradients = sum(tensor.numel() * (tensor.element_size() + 4) for tensor in (problem.hidden, problem.head))
    assert torch.cuda.max_memory_allocated() - before < budget + gradients + 2_000_000
    assert result.loss.isfinite()
