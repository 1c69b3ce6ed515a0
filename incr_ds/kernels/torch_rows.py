"""The row kernels in plain torch, for any device, in fp32 or fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from incr_ds.kernels.rows import FAR, NEAR, STATISTICS, Rows, Tempering, accumulation_dtype

# On a CPU, all passes over a block of rows come before the next block, so that its buffers stay in the cache of each core.
BLOCK_BYTES = 2**19
BLOCK_ROWS = 4  # at least


class TorchRows:
    """Row kernels of the ``torch`` backend; see RowKernels."""

    name = "torch"
    temporaries = 7

    def logits_dtype(self, operand: torch.dtype) -> torch.dtype:
        """Logits have the accumulation dtype."""
        return accumulation_dtype(operand)

    def statistics(self, student: Tensor, teacher: Tensor | None, tempering: Tempering) -> Tensor:
        """See RowKernels. Returns [STATISTICS, C]."""
        result = student.new_zeros((STATISTICS, student.shape[0]), dtype=accumulation_dtype(student.dtype))
        for block in _blocks(student):
            _statistics(student[block], None if teacher is None else teacher[block], tempering, result[:, block])
        return result

    def centre(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """See RowKernels. Returns [2, C]."""
        result = student.new_empty((2, student.shape[0]), dtype=rows.factors.dtype)
        for block in _blocks(student):
            result[:, block] = _centre(student[block], teacher[block], rows.part(block))
        return result

    def gradient(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """See RowKernels. Returns [C]; ``student`` then holds the gradient."""
        divergence = student.new_zeros(student.shape[0], dtype=rows.factors.dtype)
        for block in _blocks(student):
            own, part = student[block], rows.part(block)
            if teacher is not None and rows.kind == "forward_kl":
                divergence[block] = _forward_kl(own, teacher[block], part)
            elif rows.write:
                _write(own, _towards(own, None if teacher is None else teacher[block], part), part)
        return divergence


def _blocks(student: Tensor) -> list[slice]:
    """The rows of ``student`` in blocks of BLOCK_BYTES for each thread; on a GPU all of them in one."""
    rows = size = max(student.shape[0], 1)
    if not student.is_cuda:
        row_bytes = max(student.shape[1], 1) * accumulation_dtype(student.dtype).itemsize
        size = max(BLOCK_ROWS, BLOCK_BYTES * torch.get_num_threads() // row_bytes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _statistics(student: Tensor, teacher: Tensor | None, tempering: Tempering, result: Tensor) -> None:
    """Store the statistics of a block of rows in ``result`` [STATISTICS, C]."""
    maximum, total, tempered, logits, weighted, teacher_maximum, teacher_tempered = result
    logits.copy_(student.sum(dim=1))
    shifted = _shifted(student, maximum)
    exponential = shifted.exp()
    total.copy_(exponential.sum(dim=1))
    tempered.copy_(total if tempering.unit else _tempered_sum(shifted, tempering))
    weighted.copy_(exponential.mul_(shifted.clamp_min_(-FAR)).sum(dim=1))
    if teacher is not None:
        teacher_tempered.copy_(_tempered_sum(_shifted(teacher, teacher_maximum), tempering))


def _centre(student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
    log_p, log_q = _log_probabilities(student, teacher, rows)
    p, q = log_p.exp(), log_q.exp()
    if rows.kind == "reverse_kl":
        divergence = termwise(p, q, log_p - log_q).sum(dim=1)
        return torch.stack([divergence, divergence])
    over_p, over_q = _over_mixture(log_q - log_p)
    mixture = (p + q) / 2
    centre = termwise(p, mixture, over_p).sum(dim=1)
    return torch.stack([(centre + termwise(q, mixture, over_q).sum(dim=1)) / 2, centre])


def _towards(student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor | None:
    """D of a block of rows as defined in Rows, [C, V], for all kinds but forward KL. None without a teacher."""
    if teacher is not None:
        log_p, log_q = _log_probabilities(student, teacher, rows)
        p, q = log_p.exp(), log_q.exp()
        return _direction(p, q, log_q.sub_(log_p), rows)
    if rows.kind == "sparse":
        return _tempered_log(student, rows.normalizers[0], rows.normalizers[2], rows.tempering).exp_()
    return None


def _forward_kl(student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
    """KL(q || p) of each row, [C]; ``student`` then holds the gradient. Overwrites ``teacher``.

    Memory decides the time on a CPU, so that every pass that can works in place. At temperature 1 the probabilities of both
    losses are the same.
    """
    maximum, _, tempered, teacher_maximum, teacher_tempered = rows.normalizers
    alone = rows.tempering.unit and rows.write  # then log p takes the place of the logits
    log_p = student if alone else student.clone()
    log_p = _tempered_log_(log_p, maximum, tempered, rows.tempering)
    log_q = _tempered_log_(teacher, teacher_maximum, teacher_tempered, rows.tempering)
    p, q = log_p.exp(), log_q.exp()
    distance = log_q.sub_(log_p).nan_to_num_(0.0, math.inf, -FAR)
    towards = p - q
    divergence = _termwise_sum(q, towards, distance, log_p)
    if rows.write:
        _write(student, towards, rows, p if alone else None)
    return divergence


def _termwise_sum(q: Tensor, difference: Tensor, distance: Tensor, scratch: Tensor) -> Tensor:
    """Sums of ``termwise`` over the vocabulary, with ``difference`` = p - q. Overwrites ``distance`` and ``scratch``."""
    clamped = torch.clamp(distance, -NEAR, NEAR, out=scratch)
    far = torch.ne(clamped, distance, out=torch.empty_like(clamped))  # 0 or 1
    terms = clamped.neg_().expm1_().mul_(q)  # q * expm1(-d), which is p - q
    terms.lerp_(difference, far)  # one of the two, as far is 0 or 1
    return terms.add_(distance.mul_(q)).sum(dim=1)


def termwise(q: Tensor, p: Tensor, distance: Tensor) -> Tensor:
    """Terms that sum to KL(q || p) over a whole vocabulary: q * (d + expm1(-d)), ``distance`` d = log q - log p.

    They are non-negative, and accurate where sums of q * d cancel. For large d the same term is computed as
    q * d + p - q, which cannot overflow.
    """
    near = q * (distance + torch.expm1(-distance))
    far = torch.where(q > 0, q * distance, 0) + p - q
    return torch.where(distance.abs() < NEAR, near, far)


def _shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """Logits minus their row's maximum, which is stored in ``maximum``. A rank without columns has no maximum."""
    maximum.fill_(-FAR)
    if logits.shape[1]:
        maximum.copy_(logits.amax(dim=1).clamp_min(-FAR))
    return logits - maximum[:, None]


def _tempered_sum(shifted: Tensor, tempering: Tempering) -> Tensor:
    return (shifted if tempering.unit else shifted * tempering.inverse).exp().sum(dim=1)


def _tempered_log(logits: Tensor, maximum: Tensor, log_total: Tensor, tempering: Tempering) -> Tensor:
    return _tempered_log_(logits.clone(), maximum, log_total, tempering)


def _tempered_log_(logits: Tensor, maximum: Tensor, log_total: Tensor, tempering: Tempering) -> Tensor:
    """Log-probabilities at the temperature, in place of ``logits``."""
    shifted = logits.sub_(maximum[:, None])
    return (shifted if tempering.unit else shifted.mul_(tempering.inverse)).sub_(log_total[:, None])


def _log_probabilities(student: Tensor, teacher: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    maximum, _, tempered, teacher_maximum, teacher_tempered = rows.normalizers
    return (
        _tempered_log(student, maximum, tempered, rows.tempering),
        _tempered_log(teacher, teacher_maximum, teacher_tempered, rows.tempering),
    )


def _over_mixture(distance: Tensor) -> tuple[Tensor, Tensor]:
    """(log(p / m), log(q / m)) with m = (p + q) / 2 and ``distance`` = log q - log p."""
    # Near 0, log m exceeds the mean of log p and log q by log cosh(distance / 2), and cosh x - 1 = 2 sinh(x / 2)^2.
    rise = torch.log1p(2 * torch.sinh(distance / 4).square())
    near = distance.abs() < NEAR
    zero = torch.zeros_like(distance)
    over_p = torch.where(near, -distance / 2 - rise, math.log(2) - torch.logaddexp(zero, distance))
    return over_p, torch.where(near, distance / 2 - rise, math.log(2) - torch.logaddexp(zero, -distance))


def _direction(p: Tensor, q: Tensor, distance: Tensor, rows: Rows) -> Tensor:
    """D of reverse KL or JSD as defined in Rows, with ``distance`` = log q - log p."""
    assert rows.centre is not None
    if rows.kind == "reverse_kl":
        pull = -distance - rows.centre[:, None]
    else:
        pull = (_over_mixture(distance)[0] - rows.centre[:, None]) / 2
    return torch.where(p > 0, p * pull, 0)


def _write(student: Tensor, towards: Tensor | None, rows: Rows, p: Tensor | None = None) -> None:
    """Write the gradient to ``student``, which holds the logits, unless their probabilities ``p`` are known."""
    on_p, on_divergence, on_label, everywhere = rows.factors[:, :, None]
    if p is None:
        maximum, log_total = rows.normalizers[:2, :, None]
        student.sub_(maximum).exp_().mul_(on_p * log_total.neg().exp_())
    else:
        torch.mul(p, on_p, out=student)
    if student.is_cuda or everywhere.any():  # asking a GPU would wait for it
        student.sub_(everywhere)
    if towards is not None:
        student.add_(towards.mul_(on_divergence))
    if student.shape[1]:
        owned = rows.label >= 0
        taken = torch.where(owned[:, None], on_label, 0)
        student.scatter_add_(1, rows.label.clamp_min(0)[:, None], -taken.to(student.dtype))
    if student.is_cuda or not rows.live.all():
        student.masked_fill_(~rows.live[:, None], 0)
