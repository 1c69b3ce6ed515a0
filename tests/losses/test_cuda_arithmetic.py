"""The CUDA rows' own arithmetic, compiled for the host and called as on the device, against fp64."""

import subprocess
from pathlib import Path

import pytest
import torch
from loss_problem import make_problem, outcome, relative_errors
from test_backends import DIVERGENCES, FP32_ERRORS, SETTINGS, eager, sparse

from incr_ds.kernels.cuda_library import FOLDER, find_nvcc
from incr_ds.kernels.cuda_rows import CudaRows, open_library
from incr_ds.kernels.rows import Rows, Tempering
from incr_ds.kernels.torch_rows import TorchRows
from incr_ds.losses import distillation

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc in CUDA_HOME or on PATH")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory):
    library = tmp_path_factory.mktemp("host") / "rows.so"
    source = Path(__file__).parent / "host_rows.cu"
    options = ["-O1", "-std=c++17", "-shared", "-Xcompiler=-fPIC,-ffp-contract=off", "-Werror=all-warnings"]
    subprocess.run([find_nvcc(), *options, f"-I{FOLDER}", "-o", library, source], check=True, timeout=240)
    return CudaRows(open_library(library))


@pytest.fixture
def host(rows, monkeypatch: pytest.MonkeyPatch):
    """backend="cuda" then means the host's rows."""
    monkeypatch.setattr(distillation, "row_kernels", lambda backend, device, dtype: rows)
    return "cuda"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_reference(settings, divergence, host):
    exact = make_problem(torch.float32).to(torch.float64)
    expected = outcome(exact, **settings, divergence=divergence, backend="reference")
    for budget in (None, 9_000):
        found = outcome(
            make_problem(torch.float32), **settings, divergence=divergence, backend=host, budget_bytes=budget
        )
        assert all(error < bound for error, bound in zip(relative_errors(found, expected), FP32_ERRORS, strict=True))


@pytest.mark.parametrize("kind", ["bucket", "none", "sampled"])
def test_sparse_teachers_equal_the_reference(kind, host):
    problem = make_problem(torch.float32)
    settings = {"alpha": 0.4, "temperature": 1.5, "z_loss": 0.02, "label_smoothing": 0.1}
    settings["teacher"] = sparse(problem, kind)
    expected = outcome(problem.to(torch.float64), **settings, backend="reference")
    found = outcome(problem.to(torch.float32), **settings, backend=host)
    assert all(error < bound for error, bound in zip(relative_errors(found, expected), FP32_ERRORS, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_accurate_than_eager(dtype, host):
    problem = make_problem(dtype, tokens=64, scale=0.5)
    exact = outcome(problem.to(torch.float64), alpha=0.5, z_loss=1e-3, backend="reference")
    ours = relative_errors(outcome(problem.to(dtype), alpha=0.5, z_loss=1e-3, backend=host), exact)
    theirs = relative_errors(eager(problem.to(dtype)), exact)
    assert ours[0] <= 1.1 * theirs[0] + 1e-6
    assert ours[5] <= 1.1 * theirs[5] and ours[6] <= 1.1 * theirs[6]


def numbers(student, teacher, kind, inverse, live=None):
    """The gradient's numbers for rows of labels 0, 1, ..., from fp64."""
    count = student.shape[0]
    z, u = student.double(), teacher.double()
    tops = z.amax(1), u.amax(1)
    below, teacher_below = z - tops[0][:, None], u - tops[1][:, None]
    normalizers = [tops[0], below.logsumexp(1), (below * inverse).logsumexp(1), tops[1]]
    normalizers.append((teacher_below * inverse).logsumexp(1))
    factors = torch.tensor([0.7, 0.3, 0.6, 0.001])[:, None].repeat(1, count)
    tempering = Tempering(torch.tensor(inverse), inverse == 1)
    live = torch.ones(count, dtype=torch.bool) if live is None else live
    return Rows(
        torch.stack(normalizers).float(), torch.arange(count), live, factors, torch.zeros(count), tempering, kind, True
    )


# Widths around vectors of 8 and 4 and around the four lanes: only single columns, one vector, a tail longer than the lanes.
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 31, 32, 39, 103])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inverse", [1.0, 0.5])
def test_statistics_of_any_width(columns, dtype, inverse, rows):
    generator = torch.Generator().manual_seed(columns)
    wide = [(3 * torch.randn(5, 128, generator=generator)).to(dtype) for _ in range(2)]
    student, teacher = (logits[:, :columns] for logits in wide)
    tempering = Tempering(torch.tensor(inverse), inverse == 1)
    expected = TorchRows().statistics(student.double(), teacher.double(), tempering)
    found = rows.statistics(student, teacher, tempering)
    torch.testing.assert_close(found.double(), expected.clamp_min(-1e30), rtol=2e-6, atol=2e-5)


def test_statistics_of_extreme_rows(rows):
    """+-1e4, minus infinity as padding, one number everywhere; what is not a number shows."""
    student = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    student[0, ::3], student[0, 1::3] = 1e4, -1e4
    student[1, 5:] = -torch.inf
    student[2] = -1e4
    student[3, 17] = torch.nan
    tempering = Tempering(torch.tensor(0.5), False)
    maximum, total, tempered, _, weighted, teacher_maximum, teacher_tempered = rows.statistics(
        student, student, tempering
    )
    expected = TorchRows().statistics(student.double(), student.double(), tempering)
    fine = [0, 1, 2, 4]
    for found, row in ((maximum, 0), (total, 1), (tempered, 2), (weighted, 4), (teacher_tempered, 6)):
        torch.testing.assert_close(found[fine].double(), expected[row, fine], rtol=1e-6, atol=1e-6)
    assert total[3].isnan() and tempered[3].isnan() and teacher_tempered[3].isnan()
    assert torch.equal(tempered[fine], teacher_tempered[fine]) and torch.equal(maximum, teacher_maximum)


@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_a_small_divergence_keeps_its_digits(distance, rows):
    """Logits that differ by 1e-3 have a divergence near 5e-7, which the usual form in fp32 loses completely."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4, 2048, generator=generator)
    teacher = student + distance * torch.randn(4, 2048, generator=generator)
    p, q = (torch.log_softmax(logits.double(), 1) for logits in (student, teacher))
    expected = (q.exp() * (q - p)).sum(1)
    found = rows.gradient(student.clone(), teacher, numbers(student, teacher, "forward_kl", 1.0)).double()
    assert (found >= 0).all()
    torch.testing.assert_close(found, expected, rtol=2e-3 if distance < 1e-2 else 1e-4, atol=0)


@pytest.mark.parametrize("inverse", [1.0, 0.4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_exactly_no_divergence(divergence, inverse, host):
    problem = make_problem(torch.float32)
    result = distillation.distillation_loss(
        *problem.tensors[:3], problem.hidden.detach(), problem.head.detach(), alpha=1.0, temperature=1 / inverse,
        divergence=divergence, backend=host,
    )  # fmt: skip
    assert result.divergence == 0
    assert not torch.autograd.grad(result.loss, problem.hidden)[0].any()


def test_ignored_rows_are_zero_whatever_they_hold(rows):
    student, teacher = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    student[2] = torch.nan
    live = torch.tensor([True, True, False, True])
    gradient = student.clone()
    divergence = rows.gradient(gradient, teacher, numbers(student, teacher, "forward_kl", 1.0, live))
    assert not gradient[2].any() and divergence[2] == 0
    assert gradient[live].isfinite().all() and gradient[live].any(dim=1).all()


def test_only_the_logits_own_columns_are_written(rows):
    wide = torch.full((4, 48), 7.0)
    student = wide[:, :37]
    student.copy_(torch.randn(4, 37, generator=torch.Generator().manual_seed(0)))
    rows.gradient(student, None, numbers(student, student, "none", 1.0))
    assert (wide[:, 37:] == 7).all() and (student.abs() < 1).all()
