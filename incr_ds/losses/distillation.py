"""The training loss (1 - a) * CE + a * T^2 * KL(teacher || student), fused with the output projections.

Logits exist for one chunk of tokens at a time, and the gradients are computed in the forward pass, so nothing of size
tokens x vocabulary is kept. Shapes: N tokens, Hs and Ht the widths of student and teacher, V this rank's part of the
vocabulary, C the tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from incr_ds.losses.vocabulary import combine, local_log_sum, target_values

CHUNK_BYTES = 256 * 2**20
Scalar = float | Tensor


class DistillationLoss(NamedTuple):
    """Means over the valid tokens, all 0-d.

    ``loss`` has a gradient; ``ce`` (cross entropy), ``divergence`` (KL at the temperature, without T^2) and ``tokens``
    (how many were valid) are detached.
    """

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _Problem:
    """What one call works on, apart from the tensors that may need a gradient."""

    labels: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    alpha: Scalar
    temperature: Scalar
    ignore_index: int
    group: dist.ProcessGroup | None
    vocab_start: int
    vocab_part: int
    chunk_bytes: int
    hidden_gradient: bool
    head_gradient: bool


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    *,
    alpha: Scalar,
    temperature: Scalar = 1.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> DistillationLoss:
    """(1 - alpha) * CE + alpha * temperature^2 * KL(teacher || student), mean over the labels != ``ignore_index``.

    ``student_hidden`` [N, Hs], ``student_head`` [V, Hs], ``labels`` [N], ``teacher_hidden`` [N, Ht], ``teacher_head``
    [V, Ht]; the logits are hidden @ head.T. ``alpha`` in [0, 1] and ``temperature`` > 0 may be 0-d tensors, so that a
    schedule recompiles nothing. Without a teacher, or with alpha the float 0.0, the loss is the cross entropy alone.

    With ``group`` the vocabulary is cut over its ranks: hidden states and labels are the same on all of them, each
    holds the rows of both heads from ``vocab_start`` on, of ``vocab_size`` in all (parts may differ in size), every
    rank gets the same loss and the whole gradient of ``student_hidden``, and its own rows' gradient of
    ``student_head``.

    ``chunk_bytes`` bounds a rank's memory for the logits of a chunk; it must be the same on every rank. A second
    derivative is refused with a RuntimeError; wrong shapes raise ValueError.
    """
    if isinstance(alpha, float | int) and alpha == 0:
        teacher_hidden = teacher_head = None
    if teacher_hidden is None:
        alpha, temperature = 0.0, 1.0
    _check_shapes(student_hidden, student_head, labels, teacher_hidden, teacher_head)
    group, vocab_start, vocab_part = _vocabulary(student_head, group, vocab_start, vocab_size)
    problem = _Problem(
        labels=labels,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        alpha=alpha,
        temperature=temperature,
        ignore_index=ignore_index,
        group=group,
        vocab_start=vocab_start,
        vocab_part=vocab_part,
        chunk_bytes=chunk_bytes,
        hidden_gradient=torch.is_grad_enabled() and student_hidden.requires_grad,
        head_gradient=torch.is_grad_enabled() and student_head.requires_grad,
    )
    return DistillationLoss(*_FusedLoss.apply(student_hidden, student_head, problem))


def _vocabulary(
    head: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group if it has several ranks, first row, rows of a nearly even part: the same number on every rank)."""
    if group is None or dist.get_world_size(group) == 1:
        return None, vocab_start or 0, head.shape[0]
    if vocab_start is None or vocab_size is None:
        raise ValueError("distillation_loss: a group of several ranks needs vocab_start and vocab_size")
    return group, vocab_start, -(-vocab_size // dist.get_world_size(group))


def _check_shapes(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None
) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"student_hidden {list(hidden.shape)} and student_head {list(head.shape)}: expected [N, Hs], [V, Hs]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)}: expected [{hidden.shape[0]}], one per row of student_hidden")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head belong together; one of them is missing")
    if teacher_hidden is None or teacher_head is None:
        return
    if teacher_hidden.shape != (hidden.shape[0], teacher_head.shape[1]):
        raise ValueError(
            f"teacher_hidden {list(teacher_hidden.shape)}: expected [{hidden.shape[0]}, {teacher_head.shape[1]}], "
            "the student's tokens by teacher_head's width"
        )
    if teacher_head.shape[0] != head.shape[0]:
        raise ValueError(
            f"teacher_head has {teacher_head.shape[0]} rows, student_head {head.shape[0]}: vocabularies differ"
        )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, problem: _Problem) -> tuple[Tensor, ...]:
        sums = _Sums(hidden, head, problem)
        for start in range(0, hidden.shape[0], sums.chunk_rows):
            sums.add(slice(start, min(start + sums.chunk_rows, hidden.shape[0])))
        ce, divergence = sums.means()
        loss = ce
        if problem.teacher_hidden is not None:
            loss = (1 - problem.alpha) * ce + problem.alpha * problem.temperature**2 * divergence
        ctx.save_for_backward(*sums.gradients())
        ctx.mark_non_differentiable(ce_out := ce.clone(), divergence, sums.tokens)
        return loss.clone(), ce_out, divergence, sums.tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("distillation_loss has no second derivative; call backward without create_graph=True")
        hidden_gradient, head_gradient = ctx.saved_tensors
        scale = [None if part is None else part * grad_loss.to(part.dtype) for part in (hidden_gradient, head_gradient)]
        return scale[0], scale[1], None


class _Sums:
    """Running sums over chunks: the two losses, and the gradients of the mean loss."""

    def __init__(self, hidden: Tensor, head: Tensor, problem: _Problem) -> None:
        self.hidden, self.head, self.problem = hidden, head, problem
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.valid = problem.labels != problem.ignore_index
        self.tokens = self.valid.sum()
        self.weights = self.valid.to(self.dtype) / self.tokens.clamp_min(1)
        self.student = _Projection(hidden, head, self.dtype)
        self.teacher = None
        if problem.teacher_hidden is not None and problem.teacher_head is not None:
            self.teacher = _Projection(problem.teacher_hidden.detach(), problem.teacher_head.detach(), self.dtype)
        buffers = 3 if self.teacher is None else 7
        row_bytes = buffers * problem.vocab_part * self.weights.element_size()
        # The same on every rank, since every chunk is a collective.
        self.chunk_rows = max(1, problem.chunk_bytes // row_bytes)
        self.losses = hidden.new_zeros(2, dtype=self.dtype)
        self.hidden_gradient = hidden.new_zeros(hidden.shape, dtype=self.dtype) if problem.hidden_gradient else None
        self.head_gradient = head.new_zeros(head.shape, dtype=self.dtype) if problem.head_gradient else None

    def add(self, rows: slice) -> None:
        """Add the tokens ``rows``."""
        logits = self.student.logits(rows)
        labels, weights = self.problem.labels[rows], self.weights[rows]
        teacher = None if self.teacher is None else self.teacher.logits(rows)
        chunk = _Chunk(logits, teacher, labels, self.problem)
        self.losses[0] += torch.where(weights > 0, chunk.cross_entropy * weights, 0).sum()
        if teacher is not None:
            self.losses[1] += (chunk.divergence() * weights).sum()
        if self.hidden_gradient is None and self.head_gradient is None:
            return
        # A label outside the vocabulary must stop the step, not vanish from its gradient.
        weights = torch.where((weights > 0) & chunk.cross_entropy.isinf(), torch.nan, weights)
        gradient = chunk.gradient().mul_(weights[:, None])
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] = self.student.through_head(gradient)
        if self.head_gradient is not None:
            self.head_gradient += self.student.through_hidden(gradient, rows)

    def means(self) -> tuple[Tensor, Tensor]:
        """(cross entropy, divergence) over the valid tokens and the whole vocabulary."""
        divergence = self.losses[1].clone()
        if self.problem.group is not None and self.teacher is not None:
            dist.all_reduce(divergence, group=self.problem.group)
        return self.losses[0].clone(), divergence

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden and head, in their own dtypes."""
        if self.hidden_gradient is not None and self.problem.group is not None:
            dist.all_reduce(self.hidden_gradient, group=self.problem.group)
        pairs = ((self.hidden_gradient, self.hidden), (self.head_gradient, self.head))
        hidden, head = (None if part is None else part.to(whole.dtype) for part, whole in pairs)
        return hidden, head


class _Projection:
    """hidden @ head.T with logits in the accumulation dtype.

    On CUDA the matrix products take the low-precision operands and give fp32 results; elsewhere the operands are
    converted, because only CUDA's ``mm`` has ``out_dtype``.
    """

    def __init__(self, hidden: Tensor, head: Tensor, dtype: torch.dtype) -> None:
        self.mixed = hidden.is_cuda and hidden.dtype != dtype
        self.dtype = dtype
        self.hidden = hidden
        self.head = head if self.mixed else head.to(dtype)

    def logits(self, rows: slice) -> Tensor:
        """Logits [C, V] of the tokens ``rows``."""
        return self._product(self._operand(self.hidden[rows]), self.head.t())

    def through_head(self, gradient: Tensor) -> Tensor:
        """[C, V] -> [C, H]."""
        return self._product(self._operand(gradient), self.head)

    def through_hidden(self, gradient: Tensor, rows: slice) -> Tensor:
        """[C, V] -> [V, H]."""
        return self._product(self._operand(gradient).t(), self._operand(self.hidden[rows]))

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.head.dtype)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out_dtype=self.dtype) if self.mixed else left @ right


class _Chunk:
    """Row losses of one chunk, and the gradient of their sum with respect to the logits."""

    def __init__(self, logits: Tensor, teacher: Tensor | None, labels: Tensor, problem: _Problem) -> None:
        self.problem = problem
        self.logits, self.log_p, self.log_q = logits, None, None
        target, self.owned, self.column = target_values(logits, labels, problem.vocab_start)
        parts = [local_log_sum(logits)]
        scaled = None
        if teacher is not None:
            scaled, teacher = logits / problem.temperature, teacher / problem.temperature
            parts += [local_log_sum(scaled), local_log_sum(teacher)]
        sums, target = combine(parts, target, problem.group)
        self.normalizer = sums[0]
        self.cross_entropy = sums[0] - target
        if scaled is not None and teacher is not None:
            self.log_p, self.log_q = scaled.sub_(sums[1][:, None]), teacher.sub_(sums[2][:, None])

    def divergence(self) -> Tensor:
        """The rank's part of KL(q || p) per row, [C].

        Near q = p every term q * (d + expm1(-d)), d = log q - log p, is non-negative and accurate, where sums of
        q * d cancel; away from it the same term is q * d + p - q, which cannot overflow.
        """
        assert self.log_p is not None and self.log_q is not None
        difference = self.log_q - self.log_p
        p, q = self.log_p.exp(), self.log_q.exp()
        near = q * (difference + torch.expm1(-difference))
        far = torch.where(q > 0, q * difference, 0) + p - q
        return torch.where(difference.abs() < 1, near, far).sum(dim=1)

    def gradient(self) -> Tensor:
        """d(row loss) / d(logits), [C, V]; uses the chunk up."""
        problem = self.problem
        gradient = self.logits.sub_(self.normalizer[:, None]).exp_()
        gradient.scatter_add_(1, self.column[:, None], -self.owned.to(gradient.dtype)[:, None])
        if self.log_p is None or self.log_q is None:
            return gradient
        gradient *= 1 - problem.alpha
        towards_teacher = self.log_p.exp_().sub_(self.log_q.exp_())
        return gradient.add_(towards_teacher.mul_(problem.alpha * problem.temperature))
