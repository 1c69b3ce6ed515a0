"""The walk over chunks of tokens that computes the loss and its gradients, and its place in autograd.

Logits exist for one chunk of tokens at a time and are overwritten with their gradient, so nothing of size
tokens x vocabulary outlives the forward pass, which leaves the finished gradients. Shapes: N tokens, Hs and Ht the widths of
student and teacher, V this rank's real columns, C the tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from incr_ds.kernels.rows import RowKernels, Rows
from incr_ds.losses.planner import LossPlan, LossShape, plan_loss
from incr_ds.losses.projection import Projection
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, SparseEntries, TopKTeacher, sparse_entries
from incr_ds.losses.terms import Objective, SparseTerms, label_terms, sparse_terms
from incr_ds.losses.vocabulary import Totals, VocabularyPart, combine, picked_logits

CE, DIVERGENCE, Z, ENTROPY = range(4)
PARTS = 4


@dataclass(frozen=True)
class Problem:
    """What one call works on, apart from the tensors that may need a gradient.

    ``head_gradient``, if given, is the buffer that the head's gradient is added to, times ``gradient_scale``.
    """

    labels: Tensor
    teacher: HiddenTeacher | TopKTeacher | SampledTeacher | None
    objective: Objective
    ignore_index: int
    part: VocabularyPart
    kernels: RowKernels
    budget_bytes: int
    head_gradient: Tensor | None
    gradient_scale: Tensor | None
    wants_hidden: bool
    wants_head: bool


class FusedLoss(torch.autograd.Function):
    """(hidden [N, Hs], head [V, Hs], problem) -> loss (0-d), parts per token [PARTS, N], valid tokens (0-d)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and, in the same pass, its gradients."""
        walk = _Walk(hidden, head, problem)  # takes the products' dtype from autocast, which then stays out of the way
        with torch.autocast(hidden.device.type, enabled=False):
            walk.run()
        # Saved for autograd's own check: it names an input that was changed in place before the backward pass.
        ctx.save_for_backward(hidden, head)
        ctx.gradients, ctx.scale = walk.gradients(), problem.gradient_scale
        ctx.mark_non_differentiable(walk.parts, walk.tokens)
        return walk.loss(), walk.parts, walk.tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """Hand the gradients out, scaled in place: once."""
        if torch.is_grad_enabled():
            raise RuntimeError("distillation_loss has no second derivative; call backward without create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError(
                "distillation_loss: a second backward through the same call; its gradients were handed out by the first. "
                "Add the losses and call backward once, or compute the loss again"
            )
        ctx.saved_tensors  # noqa: B018 - runs the check
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None
        scale = grad_loss if ctx.scale is None else _kept_promise(grad_loss, ctx.scale)
        scaled = [
            part if part is None else part.mul_(scale.to(part.dtype)) for part in (hidden_gradient, head_gradient)
        ]
        return scaled[0], scaled[1], None


def _kept_promise(grad_loss: Tensor, promised: Tensor) -> Tensor:
    """1, or not a number when backward arrives with another scale than the head's gradient was made with."""
    return torch.where(grad_loss == promised, torch.ones_like(grad_loss), torch.nan)


class _Walk:
    """One pass over the tokens. ``parts`` [PARTS, N] are the losses of each token, 0 where it is ignored."""

    _hidden_gradient: Tensor | None
    _head_gradient: Tensor | None

    def __init__(self, hidden: Tensor, head: Tensor, problem: Problem) -> None:
        self._problem, part = problem, problem.part
        self._inputs = (hidden, head)
        self._student = Projection(hidden, head[: part.size])
        self._dtype = self._student.dtype
        self._teacher, self._entries = self._open_teacher()
        self._plan = self._make_plan()
        live = problem.labels != problem.ignore_index
        self.tokens = live.sum()
        self._live, self._weights = live, live.to(self._dtype) / self.tokens.clamp_min(1)
        self._picks = self._picked_columns()
        self.parts = hidden.new_zeros((PARTS, hidden.shape[0]), dtype=self._dtype)
        self._allocate()

    def run(self) -> None:
        """Walk over the chunks; afterwards everything is final."""
        tokens, plan = self._inputs[0].shape[0], self._plan
        for start in range(0, tokens, plan.chunk_rows):
            self._chunk(slice(start, min(start + plan.chunk_rows, tokens)))
        if self._teacher is not None:
            self._problem.part.all_reduce(self.parts[DIVERGENCE])
        self.parts.masked_fill_(~self._live, 0)
        # Not kept while the gradients are rounded.
        del self._logits, self._teacher_logits

    def loss(self) -> Tensor:
        """The mean loss over the valid tokens, 0-d."""
        return self._problem.objective.total(*means(self.parts, self.tokens)[:ENTROPY])

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden and head in the dtypes of those; None for the head when they went into a given buffer."""
        hidden, head = self._inputs
        if self._hidden_gradient is not None:
            for reduction in self._reductions:
                reduction.wait()
            self._hidden_gradient = self._hidden_gradient.to(hidden.dtype)
        if self._problem.head_gradient is not None or self._head_gradient is None:
            return self._hidden_gradient, None
        return self._hidden_gradient, self._head_gradient.to(head.dtype)

    def _open_teacher(self) -> tuple[Projection | None, SparseEntries | None]:
        teacher = self._problem.teacher
        if teacher is None:
            return None, None
        if isinstance(teacher, HiddenTeacher):
            return Projection(teacher.hidden, teacher.head[: self._problem.part.size]), None
        return None, sparse_entries(teacher, self._dtype)

    def _make_plan(self) -> LossPlan:
        # From sizes that are the same on every rank, since every slab is a collective.
        hidden, problem = self._inputs[0], self._problem
        self._logits_dtype = problem.kernels.logits_dtype(self._student.operand_dtype)
        copied = self._logits_dtype != self._student.operand_dtype and hidden.is_cuda
        shape = LossShape(
            tokens=hidden.shape[0],
            vocabulary=problem.part.largest,
            student_width=hidden.shape[1],
            teacher_width=problem.teacher.head.shape[1] if isinstance(problem.teacher, HiddenTeacher) else 0,
            logits_bytes=self._logits_dtype.itemsize,
            accumulation_bytes=self._dtype.itemsize,
            copy_bytes=self._student.operand_dtype.itemsize if copied else 0,
            temporaries=problem.kernels.temporaries,
        )
        return plan_loss(shape, problem.budget_bytes)

    def _picked_columns(self) -> Tensor:
        """Columns [N, 1 + K] whose logits are needed one by one: the label's, then the sparse teacher's."""
        entries = self._problem.labels[:, None]
        if self._entries is not None:
            entries = torch.cat([entries, self._entries.indices], dim=1)
        return self._problem.part.columns(entries)

    def _allocate(self) -> None:
        (hidden, head), problem, plan = self._inputs, self._problem, self._plan
        stride = LossShape(0, problem.part.size, 0).stride
        self._logits = hidden.new_empty((plan.chunk_rows, stride), dtype=self._logits_dtype)
        self._teacher_logits = None
        if self._teacher is not None:
            self._teacher_logits = hidden.new_empty((plan.slab_rows, stride), dtype=self._logits_dtype)
        self._reductions: list[dist.Work] = []
        self._hidden_gradient, self._head_gradient = None, problem.head_gradient
        # Whether the head's gradient is to be added to: its own buffer is first written by the first chunk.
        self._started = problem.head_gradient is not None
        if problem.wants_hidden:
            # Parts of it are summed over the ranks, and rounded after that.
            dtype = hidden.dtype if problem.part.group is None else self._dtype
            self._hidden_gradient = hidden.new_empty(hidden.shape, dtype=dtype)
        if problem.wants_head and problem.head_gradient is None:
            # A single chunk's product is rounded once, whatever it is stored in.
            self._head_gradient = head.new_empty(head.shape, dtype=self._dtype if plan.chunks > 1 else head.dtype)
            self._head_gradient[problem.part.size if hidden.shape[0] else 0 :] = 0

    def _chunk(self, rows: slice) -> None:
        problem, size = self._problem, self._problem.part.size
        padded = self._logits[: rows.stop - rows.start]
        logits = padded[:, :size]
        self._student.logits(rows, logits)
        for start in range(rows.start, rows.stop, self._plan.slab_rows):
            slab = slice(start, min(start + self._plan.slab_rows, rows.stop))
            self._slab(slab, padded[slab.start - rows.start : slab.stop - rows.start])
        if problem.wants_hidden and self._hidden_gradient is not None:
            self._student.through_head(logits, self._hidden_gradient[rows])
            # The ranks exchange it while the next product runs.
            self._reductions += problem.part.begin_all_reduce(self._hidden_gradient[rows])
        if problem.wants_head and self._head_gradient is not None:
            self._student.through_hidden(logits, rows, self._head_gradient[:size], add=self._started)
            self._started = True

    def _slab(self, rows: slice, padded: Tensor) -> None:
        """Losses of the tokens ``rows``, and their gradient over their logits, the first columns of ``padded``."""
        problem, objective, part = self._problem, self._problem.objective, self._problem.part
        student, teacher = padded[:, : part.size], None
        if self._teacher is not None and self._teacher_logits is not None:
            teacher = self._teacher_logits[: student.shape[0], : part.size]
            self._teacher.logits(rows, teacher)
        statistics = problem.kernels.statistics(student, teacher, objective.tempering)
        totals = combine(statistics, picked_logits(student, self._picks[rows].t()), objective.tempering, part)
        weights = self._weights[rows]
        if problem.gradient_scale is not None:
            weights = weights * problem.gradient_scale
        labels = label_terms(totals, weights, objective, part.whole)
        self.parts[CE, rows], self.parts[Z, rows], self.parts[ENTROPY, rows] = labels.ce, labels.z, totals.entropy
        sparse = self._sparse(rows, totals, labels.factors)
        factors = labels.factors
        if sparse is not None:
            self.parts[DIVERGENCE, rows] = sparse.divergence
            factors = torch.stack([factors[0], sparse.on_tempered, factors[2], factors[3]])
        self._differentiate(rows, student, teacher, totals, factors)
        if sparse is not None and (problem.wants_hidden or problem.wants_head):
            self._place(padded, sparse.at_entries, rows)

    def _sparse(self, rows: slice, totals: Totals, factors: Tensor) -> SparseTerms | None:
        if self._entries is None:
            return None
        entries = SparseEntries(self._entries.indices[rows], self._entries.probabilities[rows], self._entries.bucket)
        return sparse_terms(totals, factors, entries, self._problem.labels[rows], self._problem.objective.tempering)

    def _differentiate(
        self, rows: slice, student: Tensor, teacher: Tensor | None, totals: Totals, factors: Tensor
    ) -> None:
        problem, objective = self._problem, self._problem.objective
        write = problem.wants_hidden or problem.wants_head
        numbers = Rows(
            normalizers=totals.normalizers,
            label=self._picks[rows, 0].contiguous(),
            live=self._live[rows],
            factors=factors,
            centre=None,
            tempering=objective.tempering,
            kind=objective.kind,
            write=write,
        )
        if teacher is not None and objective.kind != "forward_kl":
            both = problem.kernels.centre(student, teacher, numbers)
            self.parts[DIVERGENCE, rows] = both[0]
            centre = both[1].contiguous()
            problem.part.all_reduce(centre)
            numbers = Rows(**{**vars(numbers), "centre": centre})
        if write or objective.kind == "forward_kl":
            divergence = problem.kernels.gradient(student, teacher, numbers)
            if objective.kind == "forward_kl":
                self.parts[DIVERGENCE, rows] = divergence

    def _place(self, padded: Tensor, values: Tensor, rows: slice) -> None:
        """Put exact gradients at the sparse teacher's entries; those of other ranks go into the column after the last."""
        columns = self._picks[rows, 1:]
        values = torch.where(self._live[rows, None], values, 0).to(padded.dtype)
        padded.scatter_(1, torch.where(columns >= 0, columns, self._problem.part.size), values)


def means(parts: Tensor, tokens: Tensor) -> Tensor:
    """Means [PARTS] over the ``tokens`` valid ones of ``parts`` [PARTS, N]."""
    return parts.sum(dim=1) / tokens.clamp_min(1)
