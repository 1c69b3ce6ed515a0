"""The row kernels in Triton: one program per row, logits read in blocks and overwritten with their gradient.

Every lane of a program keeps its own running statistics. So the loop over blocks has no reduction across threads and only
one exponential per element and softmax. There are no atomics, so results are bitwise reproducible. This module is imported
only when it is used; ``import incr_ds`` does not need Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from incr_ds.kernels.rows import STATISTICS, Kind, Rows, Tempering

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Constants shared with incr_ds.kernels.rows. Triton can read module constants only in this form.
_FAR = tl.constexpr(1e30)
_NEAR = tl.constexpr(0.5)
_LOG_2 = tl.constexpr(0.6931471805599453)
_KINDS: dict[Kind, int] = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3, "sparse": 4}
_FORWARD = tl.constexpr(1)
_REVERSE = tl.constexpr(2)
_JSD = tl.constexpr(3)
_SPARSE = tl.constexpr(4)


@dataclass(frozen=True)
class RowLaunch:
    """How a row kernel is launched: columns per step of its loop, and warps per program."""

    block: int
    warps: int


# The widest blocks with which a thread of the CE and forward KL kernels needs at most 64 registers, so that an sm_90
# multiprocessor holds 32 warps or more. incr_ds.kernels.aot prints what each variant uses.
STATISTICS_LAUNCH = RowLaunch(block=1024, warps=8)
GRADIENT_LAUNCH = RowLaunch(block=2048, warps=8)


class TritonRows:
    """Row kernels of the ``triton`` backend; see RowKernels."""

    name = "triton"
    temporaries = 0

    def logits_dtype(self, operand: torch.dtype) -> torch.dtype:
        """Logits have the dtype of the products' operands."""
        return operand

    def statistics(self, student: Tensor, teacher: Tensor | None, tempering: Tempering) -> Tensor:
        """See RowKernels. Returns [STATISTICS, C]."""
        count, columns = student.shape
        result = torch.empty((STATISTICS, count), dtype=torch.float32, device=student.device)
        given = student if teacher is None else teacher
        launch = STATISTICS_LAUNCH
        with torch.cuda.device_of(student):  # Triton launches on the current device
            statistics_kernel[(count,)](
                student, given, result, tempering.inverse, student.stride(0), given.stride(0), count, columns,
                HAS_TEACHER=teacher is not None, UNIT=tempering.unit, BLOCK=launch.block,
                num_warps=launch.warps, enable_fp_fusion=True,
            )  # fmt: skip
        return result

    def centre(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """See RowKernels. Returns [2, C]."""
        count, columns = student.shape
        result = torch.empty((2, count), dtype=torch.float32, device=student.device)
        launch = GRADIENT_LAUNCH
        with torch.cuda.device_of(student):  # Triton launches on the current device
            centre_kernel[(count,)](
                student, teacher, result, rows.normalizers, rows.tempering.inverse, student.stride(0), teacher.stride(0),
                count, columns, KIND=_KINDS[rows.kind], UNIT=rows.tempering.unit, BLOCK=launch.block,
                num_warps=launch.warps, enable_fp_fusion=True,
            )  # fmt: skip
        return result

    def gradient(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """See RowKernels. Returns [C]; ``student`` then holds the gradient."""
        count, columns = student.shape
        result = torch.empty(count, dtype=torch.float32, device=student.device)
        # Values of placeholders are never read. The interpreter would restore one that is also written.
        given = rows.normalizers if teacher is None else teacher
        centre = rows.normalizers if rows.centre is None else rows.centre
        launch = GRADIENT_LAUNCH
        with torch.cuda.device_of(student):  # Triton launches on the current device
            gradient_kernel[(count,)](
                student, given, result, rows.normalizers, rows.factors, rows.label, rows.live.view(torch.uint8), centre,
                rows.tempering.inverse, student.stride(0), given.stride(0), count, columns,
                KIND=_KINDS[rows.kind], UNIT=rows.tempering.unit, WRITE=rows.write, BLOCK=launch.block,
                num_warps=launch.warps, enable_fp_fusion=True,
            )  # fmt: skip
        return result


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1]: by its series below 0.1; above, the sum's rounding no longer matters."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x * (1 / 7)))))))
    return tl.where(x < 0.1, series, tl.log(1 + x))


@triton.jit
def _near_term(d):
    """d + expm1(-d) for |d| below _NEAR, by its series."""
    tail = 1 / 720 - d * (1 / 5040 - d * (1 / 40320 - d * (1 / 362880)))
    return d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * tail))))


@triton.jit
def _termwise(q, p, d):
    """A term of KL(q || p), d = log q - log p; see incr_ds.kernels.torch_rows.termwise."""
    far = tl.where(q > 0, q * d, 0.0) + p - q
    return tl.where(tl.abs(d) < _NEAR, q * _near_term(d), far)


@triton.jit
def _over_mixture(d):
    """(log(p / m), log(q / m)) with m = (p + q) / 2 and d = log q - log p."""
    # cosh(x) - 1 by its series, x = d / 2. log m exceeds the mean of log p and log q by log cosh x.
    square = d * d / 4
    rise = _log1p(square * (1 / 2 + square * (1 / 24 + square * (1 / 720 + square * (1 / 40320)))))
    near = tl.abs(d) < _NEAR
    bend = _log1p(tl.exp(-tl.abs(d)))
    over_p = tl.where(near, -d / 2 - rise, _LOG_2 - (tl.maximum(d, 0.0) + bend))
    over_q = tl.where(near, d / 2 - rise, _LOG_2 - (tl.maximum(-d, 0.0) + bend))
    return over_p, over_q


@triton.jit
def _load(row_pointer, columns, count):
    return tl.load(row_pointer + columns, mask=columns < count, other=-float("inf")).to(tl.float32)


@triton.jit
def _tempered(shifted, inverse, UNIT: tl.constexpr):
    if UNIT:
        return shifted
    return shifted * inverse


@triton.jit
def statistics_kernel(
    student, teacher, result, inverse_temperature, student_stride, teacher_stride, count, columns,
    HAS_TEACHER: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of row ``program_id`` of ``count``, as incr_ds.kernels.rows lists them."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    inverse = tl.load(inverse_temperature).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], -_FAR, tl.float32)
    total, tempered, weighted, logits = high * 0, high * 0, high * 0, high * 0
    teacher_high, teacher_tempered = high, high * 0
    for start in range(0, columns, BLOCK):
        z = _load(student, start + lanes, columns)
        logits += tl.where(start + lanes < columns, z, 0.0)
        # One of exp(z - new maximum) and exp(old - new maximum) is 1; this is the other.
        step = tl.maximum(z - high, -_FAR)
        decay = tl.exp(-tl.abs(step))
        rises = step > 0
        weighted = tl.where(rises, decay * (weighted - step * total), weighted + decay * step)
        total = tl.where(rises, total * decay + 1, total + decay)
        if not UNIT:
            decay = tl.exp(-tl.abs(step) * inverse)
            tempered = tl.where(rises, tempered * decay + 1, tempered + decay)
        high = tl.maximum(high, z)
        if HAS_TEACHER:
            u = _load(teacher, start + lanes, columns)
            step = tl.maximum(u - teacher_high, -_FAR)
            decay = tl.exp(_tempered(-tl.abs(step), inverse, UNIT))
            rises = step > 0
            teacher_tempered = tl.where(rises, teacher_tempered * decay + 1, teacher_tempered + decay)
            teacher_high = tl.maximum(teacher_high, u)
    _store_student(result + row, count, high, total, tempered, weighted, logits, inverse, UNIT)
    _store_teacher(result + row, count, teacher_high, teacher_tempered, inverse, UNIT)


@triton.jit
def _store_student(result, count, high, total, tempered, weighted, logits, inverse, UNIT: tl.constexpr):
    maximum = tl.max(high, axis=0)
    below = high - maximum
    scale = tl.exp(below)
    whole = tl.sum(total * scale, axis=0)
    soft = whole
    if not UNIT:
        soft = tl.sum(tempered * tl.exp(below * inverse), axis=0)
    tl.store(result, maximum)
    tl.store(result + count, whole)
    tl.store(result + 2 * count, soft)
    tl.store(result + 3 * count, tl.sum(logits, axis=0))
    tl.store(result + 4 * count, tl.sum(scale * (weighted + below * total), axis=0))


@triton.jit
def _store_teacher(result, count, high, tempered, inverse, UNIT: tl.constexpr):
    maximum = tl.max(high, axis=0)
    tl.store(result + 5 * count, maximum)
    tl.store(result + 6 * count, tl.sum(tempered * tl.exp(_tempered(high - maximum, inverse, UNIT)), axis=0))


@triton.jit
def centre_kernel(
    student, teacher, result, normalizers, inverse_temperature, student_stride, teacher_stride, count, columns,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute divergence and centre of row ``program_id`` of ``count`` over this rank's columns (reverse KL, JSD)."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    inverse = tl.load(inverse_temperature).to(tl.float32)
    maximum, log_tempered = tl.load(normalizers + row), tl.load(normalizers + 2 * count + row)
    teacher_maximum = tl.load(normalizers + 3 * count + row)
    teacher_log_tempered = tl.load(normalizers + 4 * count + row)
    lanes = tl.arange(0, BLOCK)
    first, second = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        z, u = _load(student, start + lanes, columns), _load(teacher, start + lanes, columns)
        log_p = _tempered(z - maximum, inverse, UNIT) - log_tempered
        log_q = _tempered(u - teacher_maximum, inverse, UNIT) - teacher_log_tempered
        p, q = tl.exp(log_p), tl.exp(log_q)
        if KIND == _REVERSE:
            first += _termwise(p, q, log_p - log_q)
        else:
            over_p, over_q = _over_mixture(log_q - log_p)
            mixture = (p + q) / 2
            first += _termwise(p, mixture, over_p)
            second += _termwise(q, mixture, over_q)
    centre = tl.sum(first, axis=0)
    divergence = centre
    if KIND == _JSD:
        divergence = (centre + tl.sum(second, axis=0)) / 2
    tl.store(result + row, divergence)
    tl.store(result + count + row, centre)


@triton.jit
def gradient_kernel(
    student, teacher, result, normalizers, factors, labels, live, centres, inverse_temperature,
    student_stride, teacher_stride, count, columns,
    KIND: tl.constexpr, UNIT: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite row ``program_id`` of ``count`` with its gradient (if WRITE), and store forward KL in ``result``."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    inverse = tl.load(inverse_temperature).to(tl.float32)
    maximum, log_total = tl.load(normalizers + row), tl.load(normalizers + count + row)
    log_tempered = tl.load(normalizers + 2 * count + row)
    # Loaded for every kind and used by some; each is one number per row.
    teacher_maximum = tl.load(normalizers + 3 * count + row)
    teacher_log_tempered = tl.load(normalizers + 4 * count + row)
    centre = tl.load(centres + row)
    on_p, on_divergence = tl.load(factors + row), tl.load(factors + count + row)
    on_label, everywhere = tl.load(factors + 2 * count + row), tl.load(factors + 3 * count + row)
    label, counts = tl.load(labels + row), tl.load(live + row) != 0
    lanes = tl.arange(0, BLOCK)
    divergence = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        place = start + lanes
        z = _load(student, place, columns)
        shifted = z - maximum
        g = on_p * tl.exp(shifted - log_total) - everywhere - tl.where(place == label, on_label, 0.0)
        if KIND != 0:
            log_p = _tempered(shifted, inverse, UNIT) - log_tempered
            p = tl.exp(log_p)
            direction = p
            if KIND != _SPARSE:
                u = _load(teacher, place, columns)
                log_q = _tempered(u - teacher_maximum, inverse, UNIT) - teacher_log_tempered
                if KIND == _FORWARD:
                    q = tl.exp(log_q)
                    divergence += _termwise(q, p, log_q - log_p)
                    direction = p - q
                elif KIND == _REVERSE:
                    direction = tl.where(p > 0, p * (log_p - log_q - centre), 0.0)
                else:
                    over_p, over_q = _over_mixture(log_q - log_p)
                    direction = tl.where(p > 0, p * (over_p - centre) / 2, 0.0)
            g += on_divergence * direction
        if WRITE:
            tl.store(student + place, tl.where(counts, g, 0.0).to(student.dtype.element_ty), mask=place < columns)
    tl.store(result + row, tl.sum(divergence, axis=0))
