"""Computes the loss over chunks of tokens. A chunk's logits are stored and overwritten with their gradient.

Nothing of size tokens x vocabulary outlives a chunk. The teacher's logits exist for one slab of a chunk at a time.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from incr_ds.losses.planner import SLAB_ROWS, LossShape, cached_rows, plan_loss
from incr_ds.losses.problem import DIVERGENCE, Prepared, RowTerms, place_entries, row_numbers, row_terms
from incr_ds.losses.vocabulary import Totals, combine, picked_logits


class StoredWalk:
    """One pass over the tokens. ``parts`` [PARTS, N] are the losses of each token, 0 where it is ignored."""

    _hidden_gradient: Tensor | None
    _head_gradient: Tensor | None

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        slab = SLAB_ROWS if prepared.hidden.is_cuda else cached_rows(prepared.shape)
        self._plan = plan_loss(prepared.shape, prepared.problem.budget_bytes, slab)
        self.parts = prepared.empty_parts()
        self._allocate()

    def run(self) -> None:
        """Process all chunks. Afterwards all results are final."""
        tokens, plan = self._prepared.hidden.shape[0], self._plan
        for start in range(0, tokens, plan.chunk_rows):
            self._chunk(slice(start, min(start + plan.chunk_rows, tokens)))
        if self._prepared.teacher is not None:
            self._prepared.problem.part.all_reduce(self.parts[DIVERGENCE])
        self.parts.masked_fill_(~self._prepared.live, 0)
        # Freed before the gradients are rounded.
        del self._logits, self._teacher_logits

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden and head in their dtypes, with a ``lift`` the head's in that of sums.

        The head's is None if it was added to a given buffer.
        """
        prepared = self._prepared
        if self._hidden_gradient is not None:
            for reduction in self._reductions:
                reduction.wait()
            self._hidden_gradient = self._hidden_gradient.to(prepared.hidden.dtype)
        if prepared.problem.head_gradient is not None or self._head_gradient is None:
            return self._hidden_gradient, None
        if prepared.lift is not None:
            return self._hidden_gradient, self._head_gradient
        return self._hidden_gradient, self._head_gradient.to(prepared.head.dtype)

    def _allocate(self) -> None:
        prepared, problem, plan = self._prepared, self._prepared.problem, self._plan
        hidden, head = prepared.hidden, prepared.head
        stride = LossShape(0, problem.part.size, 0).stride
        self._logits = hidden.new_empty((plan.chunk_rows, stride), dtype=prepared.logits_dtype)
        self._teacher_logits = None
        if prepared.teacher is not None:
            self._teacher_logits = hidden.new_empty((plan.slab_rows, stride), dtype=prepared.logits_dtype)
        self._reductions: list[dist.Work] = []
        self._hidden_gradient, self._head_gradient = None, problem.head_gradient
        # Whether to add to the head's gradient. The first chunk overwrites a buffer that was allocated here.
        self._started = problem.head_gradient is not None
        if problem.wants_hidden:
            # With several ranks, partial gradients are summed first and rounded afterwards.
            dtype = hidden.dtype if problem.part.group is None else prepared.dtype
            self._hidden_gradient = hidden.new_empty(hidden.shape, dtype=dtype)
        if problem.wants_head and problem.head_gradient is None:
            # The product of a single chunk is rounded only once in any dtype. Sums of lifted gradients may exceed fp16.
            wide = plan.chunks > 1 or prepared.lift is not None
            self._head_gradient = head.new_empty(head.shape, dtype=prepared.dtype if wide else head.dtype)
            self._head_gradient[problem.part.size if hidden.shape[0] else 0 :] = 0

    def _chunk(self, rows: slice) -> None:
        prepared, problem, size = self._prepared, self._prepared.problem, self._prepared.problem.part.size
        padded = self._logits[: rows.stop - rows.start]  # [C, stride]
        logits = padded[:, :size]  # [C, V]
        prepared.student.logits(rows, logits)
        for start in range(rows.start, rows.stop, self._plan.slab_rows):
            slab = slice(start, min(start + self._plan.slab_rows, rows.stop))
            self._slab(slab, padded[slab.start - rows.start : slab.stop - rows.start])
        if problem.wants_hidden and self._hidden_gradient is not None:
            prepared.student.through_head(logits, self._hidden_gradient[rows], add=False)
            # The ranks exchange it during the next product.
            self._reductions += problem.part.begin_all_reduce(self._hidden_gradient[rows])
        if problem.wants_head and self._head_gradient is not None:
            prepared.student.through_hidden(logits, rows, self._head_gradient[:size], add=self._started)
            self._started = True

    def _slab(self, rows: slice, padded: Tensor) -> None:
        """Losses of the tokens ``rows``, and their gradient in place of their logits, the first columns of ``padded``."""
        prepared, problem = self._prepared, self._prepared.problem
        tempering, part = problem.objective.tempering, problem.part
        student, teacher = padded[:, : part.size], None  # [C, V]
        if prepared.teacher is not None and self._teacher_logits is not None:
            teacher = self._teacher_logits[: student.shape[0], : part.size]  # [C, V]
            prepared.teacher.logits(rows, teacher)
        statistics = problem.kernels.statistics(student, teacher, tempering)  # [STATISTICS, C]
        totals = combine(statistics, picked_logits(student, prepared.picks[rows].t()), tempering, part)
        terms = row_terms(prepared, rows, totals, self.parts)
        slope = prepared.student.slope(student) if problem.writes else None
        self._differentiate(rows, student, teacher, totals, terms)
        if terms.at_entries is not None and problem.writes:
            place_entries(padded, part.size, prepared.picks[rows, 1:], terms.at_entries, prepared.live[rows])
        if slope is not None:
            student.mul_(slope)

    def _differentiate(
        self, rows: slice, student: Tensor, teacher: Tensor | None, totals: Totals, terms: RowTerms
    ) -> None:
        problem, label = self._prepared.problem, self._prepared.picks[rows, 0]
        centre = None
        if teacher is not None and problem.objective.kind != "forward_kl":
            both = problem.kernels.centre(student, teacher, row_numbers(self._prepared, rows, totals, terms, label))
            self.parts[DIVERGENCE, rows] = both[0]
            centre = both[1].contiguous()
            problem.part.all_reduce(centre)
        if problem.writes or problem.objective.kind == "forward_kl":
            numbers = row_numbers(self._prepared, rows, totals, terms, label, centre)
            divergence = problem.kernels.gradient(student, teacher, numbers)
            if problem.objective.kind == "forward_kl":
                self.parts[DIVERGENCE, rows] = divergence
