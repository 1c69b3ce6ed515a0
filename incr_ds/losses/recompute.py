"""Computes the loss over blocks of the vocabulary and stores no logits. They are computed again for the gradient.

One block of columns, for all tokens, is in memory at a time. The statistics of all blocks are combined like those of a
vocabulary that is cut over ranks. Compared with the pass over tokens it costs 2 N V (Hs + Ht) more operations. In return
each row of the head's gradient is written only once, for any number of tokens. Experimental.
"""

from __future__ import annotations

import torch
from torch import Tensor

from incr_ds.losses.planner import LossShape, plan_recompute
from incr_ds.losses.problem import DIVERGENCE, Prepared, RowTerms, place_entries, row_numbers, row_terms
from incr_ds.losses.vocabulary import Totals, combine, merge, picked_logits


class RecomputingWalk:
    """Two passes over the columns, three for reverse KL and JSD. ``parts`` [PARTS, N] are as in StoredWalk."""

    _hidden_gradient: Tensor | None = None
    _head_gradient: Tensor | None = None

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, problem = prepared, prepared.problem
        self._rows = slice(0, prepared.hidden.shape[0])
        accumulates = problem.wants_hidden and prepared.hidden.dtype != prepared.dtype
        columns = plan_recompute(prepared.shape, problem.budget_bytes, accumulates=accumulates).columns
        size = problem.part.size
        # A rank without any columns joins the collectives with an empty block.
        self._blocks = [slice(start, min(start + columns, size)) for start in range(0, max(size, 1), columns)]
        stride = LossShape(0, min(columns, size), 0).stride
        self._logits = self._buffer(stride)
        self._teacher_logits = None if prepared.teacher is None else self._buffer(stride)
        self.parts = prepared.empty_parts()

    def run(self) -> None:
        """Process all columns. Afterwards all results are final."""
        self._allocate()
        if self._prepared.hidden.shape[0]:
            totals = self._totals()
            terms = row_terms(self._prepared, self._rows, totals, self.parts)
            self._differentiate(totals, terms, self._centre(totals, terms))
        problem = self._prepared.problem
        if self._prepared.teacher is not None:
            problem.part.all_reduce(self.parts[DIVERGENCE])
        self.parts.masked_fill_(~self._prepared.live, 0)
        if self._hidden_gradient is not None:
            problem.part.all_reduce(self._hidden_gradient)
        del self._logits, self._teacher_logits

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden and head; see StoredWalk."""
        hidden = self._hidden_gradient
        if hidden is not None:
            hidden = hidden.to(self._prepared.hidden.dtype)
        return hidden, None if self._prepared.problem.head_gradient is not None else self._head_gradient

    def _buffer(self, stride: int) -> Tensor:
        return self._prepared.hidden.new_empty((self._rows.stop, stride), dtype=self._prepared.logits_dtype)

    def _allocate(self) -> None:
        prepared, problem = self._prepared, self._prepared.problem
        if problem.wants_hidden:
            # Every block adds to it, so it starts at zero.
            self._hidden_gradient = prepared.hidden.new_zeros(prepared.hidden.shape, dtype=prepared.dtype)
        self._head_gradient = problem.head_gradient
        if problem.wants_head and problem.head_gradient is None:
            wide = prepared.head.dtype if prepared.lift is None else prepared.dtype  # see StoredWalk
            self._head_gradient = torch.empty_like(prepared.head, dtype=wide)
            self._head_gradient[problem.part.size if prepared.hidden.shape[0] else 0 :] = 0

    def _block(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Logits [N, width] of student and teacher in ``columns``. The student's are views of its buffer's first columns."""
        prepared, width = self._prepared, columns.stop - columns.start
        # student, teacher: [N, width]
        student, teacher = self._logits[:, :width], None
        prepared.student.of_columns(columns).logits(self._rows, student)
        if prepared.teacher is not None and self._teacher_logits is not None:
            teacher = self._teacher_logits[:, :width]
            prepared.teacher.of_columns(columns).logits(self._rows, teacher)
        return student, teacher

    def _picks(self, columns: slice) -> Tensor:
        """Positions of the picked columns within the block, [N, 1 + K]; -1 for columns outside it."""
        picks = self._prepared.picks
        return torch.where((picks >= columns.start) & (picks < columns.stop), picks - columns.start, -1)

    def _totals(self) -> Totals:
        problem = self._prepared.problem
        tempering, found, picked = problem.objective.tempering, list[Tensor](), None
        for columns in self._blocks:
            student, teacher = self._block(columns)
            found.append(problem.kernels.statistics(student, teacher, tempering))
            here = picked_logits(student, self._picks(columns).t())
            picked = here if picked is None else torch.maximum(picked, here)
        assert picked is not None
        return combine(merge(torch.stack(found), tempering), picked, tempering, problem.part)

    def _centre(self, totals: Totals, terms: RowTerms) -> Tensor | None:
        prepared, problem = self._prepared, self._prepared.problem
        if prepared.teacher is None or problem.objective.kind == "forward_kl":
            return None
        both = self.parts.new_zeros((2, self._rows.stop))
        for columns in self._blocks:
            student, teacher = self._block(columns)
            assert teacher is not None
            label = self._picks(columns)[:, 0]
            both += problem.kernels.centre(student, teacher, row_numbers(prepared, self._rows, totals, terms, label))
        self.parts[DIVERGENCE] = both[0]
        centre = both[1].contiguous()
        problem.part.all_reduce(centre)
        return centre

    def _differentiate(self, totals: Totals, terms: RowTerms, centre: Tensor | None) -> None:
        prepared, problem = self._prepared, self._prepared.problem
        forward = problem.objective.kind == "forward_kl"
        if not (problem.writes or forward):
            return
        for columns in self._blocks:
            student, teacher = self._block(columns)
            picks = self._picks(columns)
            slope = prepared.student.slope(student) if problem.writes else None
            numbers = row_numbers(prepared, self._rows, totals, terms, picks[:, 0], centre)
            divergence = problem.kernels.gradient(student, teacher, numbers)
            if forward:
                self.parts[DIVERGENCE] += divergence
            if terms.at_entries is not None and problem.writes:
                place_entries(self._logits, student.shape[1], picks[:, 1:], terms.at_entries, prepared.live)
            if slope is not None:
                student.mul_(slope)
            self._multiply(columns, student)

    def _multiply(self, columns: slice, gradient: Tensor) -> None:
        """Compute the two products of the block's gradient [N, width]."""
        problem = self._prepared.problem
        student = self._prepared.student.of_columns(columns)
        if self._hidden_gradient is not None:
            student.through_head(gradient, self._hidden_gradient, add=True)
        if problem.wants_head and self._head_gradient is not None:
            add = problem.head_gradient is not None
            student.through_hidden(gradient, self._rows, self._head_gradient[columns], add=add)
