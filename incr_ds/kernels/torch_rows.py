"""The row kernels in plain torch, for any device, in fp32 or fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from incr_ds.kernels.rows import FAR, NEAR, STATISTICS, Rows, Tempering, accumulation_dtype


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
        maximum, total, tempered, logits, weighted, teacher_maximum, teacher_tempered = result
        logits.copy_(student.sum(dim=1))
        shifted = _shifted(student, maximum)
        exponential = shifted.exp()
        total.copy_(exponential.sum(dim=1))
        tempered.copy_(total if tempering.unit else _tempered_sum(shifted, tempering))
        weighted.copy_(exponential.mul_(shifted.clamp_min_(-FAR)).sum(dim=1))
        if teacher is not None:
            teacher_tempered.copy_(_tempered_sum(_shifted(teacher, teacher_maximum), tempering))
        return result

    def centre(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """See RowKernels. Returns [2, C]."""
        log_p, log_q = _log_probabilities(student, teacher, rows)
        p, q = log_p.exp(), log_q.exp()
        if rows.kind == "reverse_kl":
            divergence = termwise(p, q, log_p - log_q).sum(dim=1)
            return torch.stack([divergence, divergence])
        over_p, over_q = _over_mixture(log_q - log_p)
        mixture = (p + q) / 2
        centre = termwise(p, mixture, over_p).sum(dim=1)
        return torch.stack([(centre + termwise(q, mixture, over_q).sum(dim=1)) / 2, centre])

    def gradient(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """See RowKernels. Returns [C]; ``student`` then holds the gradient."""
        divergence = student.new_zeros(student.shape[0], dtype=rows.factors.dtype)
        towards = None
        if teacher is not None:
            log_p, log_q = _log_probabilities(student, teacher, rows)
            p, q = log_p.exp(), log_q.exp()
            distance = log_q.sub_(log_p)
            if rows.kind == "forward_kl":
                divergence = termwise(q, p, distance).sum(dim=1)
            towards = _direction(p, q, distance, rows) if rows.write else None
        elif rows.kind == "sparse" and rows.write:
            towards = _tempered_log(student, rows.normalizers[0], rows.normalizers[2], rows.tempering).exp_()
        if rows.write:
            _write(student, towards, rows)
        return divergence


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
    shifted = logits - maximum[:, None]
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
    """D as defined in Rows, with ``distance`` = log q - log p."""
    if rows.kind == "forward_kl":
        return p.sub_(q)
    assert rows.centre is not None
    if rows.kind == "reverse_kl":
        pull = -distance - rows.centre[:, None]
    else:
        pull = (_over_mixture(distance)[0] - rows.centre[:, None]) / 2
    return torch.where(p > 0, p * pull, 0)


def _write(student: Tensor, towards: Tensor | None, rows: Rows) -> None:
    on_p, on_divergence, on_label, everywhere = rows.factors[:, :, None]
    maximum, log_total = rows.normalizers[:2, :, None]
    student.sub_(maximum).sub_(log_total).exp_().mul_(on_p).sub_(everywhere)
    if towards is not None:
        student.add_(towards.mul_(on_divergence))
    if student.shape[1]:
        owned = rows.label >= 0
        taken = torch.where(owned[:, None], on_label, 0)
        student.scatter_add_(1, rows.label.clamp_min(0)[:, None], -taken.to(student.dtype))
    student.masked_fill_(~rows.live[:, None], 0)
