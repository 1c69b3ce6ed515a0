"""The training loss (1 - a) CE + a T^2 D(teacher, student) + z lse^2, fused with the output projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from incr_ds.kernels.dispatch import Backend, row_kernels
from incr_ds.kernels.rows import Divergence, Kind, Tempering, accumulation_dtype
from incr_ds.losses.arguments import (
    Scalar,
    check_numbers,
    check_reference,
    check_shapes,
    checked_buffer,
    resolve_teacher,
    vocabulary_part,
)
from incr_ds.losses.fused import FusedLoss
from incr_ds.losses.planner import default_budget
from incr_ds.losses.problem import CE, DIVERGENCE, ENTROPY, Problem, Z, means
from incr_ds.losses.projection import operand_dtype
from incr_ds.losses.reference import reference_parts
from incr_ds.losses.sequence import gather_teacher, gather_tokens
from incr_ds.losses.teachers import HiddenTeacher, Teacher
from incr_ds.losses.terms import Objective
from incr_ds.losses.vocabulary import VocabularyPart


class DistillationLoss(NamedTuple):
    """Means over the valid tokens, all 0-d, and the parts that they are means of.

    ``loss`` has a gradient; everything else is detached. ``ce`` is the cross entropy (smoothed if requested),
    ``divergence`` is at the temperature and without T^2, ``z`` is the squared log-sum-exp without its factor, ``entropy``
    is the student's, and ``tokens`` counts the valid ones. ``per_token`` [4, N] holds ce, divergence, z and entropy of
    each token, 0 where it is ignored.
    """

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    z: Tensor
    entropy: Tensor
    tokens: Tensor
    per_token: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    *,
    alpha: Scalar,
    temperature: Scalar = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    divergence: Divergence = "forward_kl",
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
    teacher: Teacher | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    budget_bytes: int | None = None,
    head_gradient: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> DistillationLoss:
    """(1 - alpha) CE + alpha temperature^2 divergence + z_loss lse^2, mean over the labels != ``ignore_index``.

    ``student_hidden`` [N, Hs], ``student_head`` [V, Hs], ``labels`` [N], ``teacher_hidden`` [N, Ht], ``teacher_head`` [V, Ht].
    The logits are z = hidden @ head.T, or c tanh(z / c) with ``softcap`` c (``teacher_softcap`` for the teacher).
    ``teacher`` replaces the two teacher arguments by another kind of teacher. ``alpha`` in [0, 1] and ``temperature`` > 0
    may be 0-d tensors, so that a schedule neither recompiles nor synchronises anything. Without a teacher alpha must be the
    float 0.0, and the loss is the cross entropy (and z-loss) alone. ``divergence`` is KL(teacher || student),
    KL(student || teacher), or their Jensen-Shannon mean; sparse teachers support only the first.

    Head rows from ``vocab_size`` on are padding: they count in no sum and get no gradient. The heads may be padded differently.
    With ``group`` the vocabulary is cut over its ranks. Hidden states and labels are then the same on all of them, and each holds
    the rows of both heads from ``vocab_start`` on (default: equal parts). Every rank gets the same loss, the whole gradient of
    ``student_hidden``, and its own rows' gradient of ``student_head``. With ``sequence_parallel`` each rank passes an equal part
    of the tokens instead (hidden states, labels, sparse entries) and gets the gradient of that part.

    ``budget_bytes`` bounds the logits' memory and must be the same on every rank. With ``head_gradient``, fp32 [V, Hs]
    (fp64 for fp64), the head's gradient, times ``gradient_scale`` (0-d, default 1), is added to that buffer during this
    call, and autograd gets no gradient for the head. A backward with another scale then makes the hidden gradient NaN. Wrong
    arguments raise ValueError. A second derivative or backward, and inputs changed before the backward, raise RuntimeError.
    """
    teacher = resolve_teacher(teacher, teacher_hidden, teacher_head, teacher_softcap, alpha)
    check_shapes(student_hidden, student_head, labels, teacher)
    check_numbers(alpha, temperature, label_smoothing, divergence, teacher, softcap)
    if sequence_parallel:
        student_hidden, labels = gather_tokens(student_hidden, group), gather_tokens(labels, group)
        teacher = gather_teacher(teacher, group)
    part = vocabulary_part(student_head, teacher, group, vocab_start, vocab_size)
    objective = _objective(
        student_hidden, student_head, teacher, alpha, temperature, z_loss, label_smoothing, divergence
    )
    call = _Call(student_hidden, student_head, labels, teacher, objective, divergence, ignore_index, part, softcap)
    if backend == "reference":
        check_reference(part, head_gradient)
        return _by_reference(call)
    buffer = checked_buffer(head_gradient, student_head, gradient_scale)
    return _fused(call, backend, budget_bytes, buffer, gradient_scale)


@dataclass(frozen=True)
class _Call:
    """The arguments after all checks."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    teacher: Teacher | None
    objective: Objective
    divergence: Divergence
    ignore_index: int
    part: VocabularyPart
    softcap: float | None


def _fused(
    call: _Call, backend: Backend, budget_bytes: int | None, buffer: Tensor | None, scale: Tensor | None
) -> DistillationLoss:
    hidden, head, wants = call.hidden, call.head, torch.is_grad_enabled()
    problem = Problem(
        labels=call.labels,
        teacher=call.teacher,
        objective=call.objective,
        ignore_index=call.ignore_index,
        part=call.part,
        kernels=row_kernels(backend, hidden.device, operand_dtype(hidden, head)),
        recompute=backend == "recompute",
        budget_bytes=budget_bytes or default_budget(hidden.is_cuda, recompute=backend == "recompute"),
        head_gradient=buffer if wants else None,
        gradient_scale=scale,
        wants_hidden=wants and hidden.requires_grad,
        wants_head=wants and (head.requires_grad or buffer is not None),
        softcap=call.softcap,
    )
    loss, parts, tokens = FusedLoss.apply(hidden, head, problem)  # type: ignore[no-untyped-call]
    return _result(loss, parts, tokens)


def _result(loss: Tensor, parts: Tensor, tokens: Tensor) -> DistillationLoss:
    mean = means(parts, tokens)
    return DistillationLoss(loss, mean[CE], mean[DIVERGENCE], mean[Z], mean[ENTROPY], tokens, parts)


def _by_reference(call: _Call) -> DistillationLoss:
    with torch.autocast(call.hidden.device.type, enabled=False):
        parts = reference_parts(
            call.hidden,
            call.head,
            call.labels,
            call.teacher,
            temperature=call.objective.temperature,
            label_smoothing=call.objective.label_smoothing,
            ignore_index=call.ignore_index,
            divergence=call.divergence,
            vocab_size=call.part.whole,
            softcap=call.softcap,
        )
    tokens = (call.labels != call.ignore_index).sum()
    return _result(call.objective.total(*means(parts, tokens)[:ENTROPY]), parts.detach(), tokens)


def _objective(
    hidden: Tensor,
    head: Tensor,
    teacher: Teacher | None,
    alpha: Scalar,
    temperature: Scalar,
    z_loss: float,
    label_smoothing: float,
    divergence: Divergence,
) -> Objective:
    kind: Kind = "none"
    if teacher is None:
        alpha, temperature = 0.0, 1.0
    else:
        kind = divergence if isinstance(teacher, HiddenTeacher) else "sparse"
    unit = not isinstance(temperature, Tensor) and temperature == 1
    dtype = accumulation_dtype(operand_dtype(hidden, head))
    weight, softness = (_scalar(value, hidden.device, dtype) for value in (alpha, temperature))
    return Objective(weight, softness, Tempering(softness.reciprocal(), unit), z_loss, label_smoothing, kind)


def _scalar(value: Scalar, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``value`` as a 0-d tensor. A number is filled in on the device, which does not synchronise."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).reshape(())
    return torch.full((), value, device=device, dtype=dtype)
