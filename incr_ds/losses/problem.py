"""The inputs of one loss call, and the arithmetic per token that does not depend on the order of computing logits.

Shapes: N tokens, C tokens of a part of them, Hs and Ht the widths of student and teacher, V this rank's real columns, K
entries of a sparse teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from incr_ds.kernels.rows import RowKernels, Rows
from incr_ds.losses.planner import LossShape
from incr_ds.losses.projection import Projection
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, SparseEntries, TopKTeacher, sparse_entries
from incr_ds.losses.terms import Objective, label_terms, sparse_terms
from incr_ds.losses.vocabulary import Totals, VocabularyPart

CE, DIVERGENCE, Z, ENTROPY = range(4)
PARTS = 4


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, except the tensors that may need a gradient.

    ``head_gradient``, if given, is the buffer to which the head's gradient, times ``gradient_scale``, is added. With
    ``recompute`` no logits are stored. ``softcap`` caps the student's logits.
    """

    labels: Tensor
    teacher: HiddenTeacher | TopKTeacher | SampledTeacher | None
    objective: Objective
    ignore_index: int
    part: VocabularyPart
    kernels: RowKernels
    recompute: bool
    budget_bytes: int
    head_gradient: Tensor | None
    gradient_scale: Tensor | None
    wants_hidden: bool
    wants_head: bool
    softcap: float | None = None

    @property
    def writes(self) -> bool:
        """Whether any gradient is needed."""
        return self.wants_hidden or self.wants_head


@dataclass(frozen=True)
class Prepared:
    """A problem whose projections are set up: what a pass over the logits needs.

    ``tokens`` (0-d) counts the valid tokens, ``live`` [N] marks them, and ``weights`` [N] are their weights in the
    gradient, times ``lift`` (0-d) if there is one. ``picks`` [N, 1 + K] are the columns whose logits are needed
    individually: the label's, then the sparse teacher's.
    """

    problem: Problem
    hidden: Tensor
    head: Tensor
    student: Projection
    teacher: Projection | None
    entries: SparseEntries | None
    logits_dtype: torch.dtype
    tokens: Tensor
    live: Tensor
    weights: Tensor
    lift: Tensor | None
    picks: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return self.student.dtype

    @property
    def shape(self) -> LossShape:
        """Sizes for the planner. They are the same on every rank, since every part of a pass is a collective."""
        problem, operand = self.problem, self.student.operand_dtype
        copied = self.logits_dtype != operand and self.hidden.is_cuda
        return LossShape(
            tokens=self.hidden.shape[0],
            vocabulary=problem.part.largest,
            student_width=self.hidden.shape[1],
            teacher_width=problem.teacher.head.shape[1] if isinstance(problem.teacher, HiddenTeacher) else 0,
            logits_bytes=self.logits_dtype.itemsize,
            accumulation_bytes=self.dtype.itemsize,
            copy_bytes=operand.itemsize if copied else 0,
            # The slope of a cap is stored while the row kernels overwrite the logits.
            temporaries=(problem.kernels.temporaries if self.hidden.is_cuda else 0) + (problem.softcap is not None),
        )

    def empty_parts(self) -> Tensor:
        """A buffer [PARTS, N] for the losses of each token."""
        return self.hidden.new_zeros((PARTS, self.hidden.shape[0]), dtype=self.dtype)


def prepare(hidden: Tensor, head: Tensor, problem: Problem) -> Prepared:
    """Set up the projections of student and teacher in the dtype of autocast or of the tensors."""
    student = Projection(hidden, head[: problem.part.size], problem.softcap)
    teacher, entries = _open_teacher(problem, student.dtype)
    live = problem.labels != problem.ignore_index
    tokens = live.sum()
    # A mean's gradients, divided by thousands of tokens, would be 0 in fp16. So they are divided in the backward pass, where
    # the loss's scale comes in.
    lift = tokens.clamp_min(1) if student.operand_dtype == torch.float16 and problem.head_gradient is None else None
    weights = live.to(student.dtype) / (1 if lift is not None else tokens.clamp_min(1))
    if problem.gradient_scale is not None:
        weights = weights * problem.gradient_scale
    picks = problem.labels[:, None] if entries is None else torch.cat([problem.labels[:, None], entries.indices], dim=1)
    return Prepared(
        problem=problem,
        hidden=hidden,
        head=head,
        student=student,
        teacher=teacher,
        entries=entries,
        logits_dtype=problem.kernels.logits_dtype(student.operand_dtype),
        tokens=tokens,
        live=live,
        weights=weights,
        lift=lift,
        picks=problem.part.columns(picks),
    )


def _open_teacher(problem: Problem, dtype: torch.dtype) -> tuple[Projection | None, SparseEntries | None]:
    teacher = problem.teacher
    if teacher is None:
        return None, None
    if isinstance(teacher, HiddenTeacher):
        return Projection(teacher.hidden, teacher.head[: problem.part.size], teacher.softcap), None
    return None, sparse_entries(teacher, dtype)


@dataclass(frozen=True)
class RowTerms:
    """Terms that follow from the statistics of C tokens: ``factors`` as in Rows, and the gradient at sparse entries [C, K]."""

    factors: Tensor
    at_entries: Tensor | None


def row_terms(prepared: Prepared, rows: slice, totals: Totals, parts: Tensor) -> RowTerms:
    """Terms of the tokens ``rows``. Stores in ``parts`` [PARTS, N] the losses that follow from statistics alone."""
    objective = prepared.problem.objective
    labels = label_terms(totals, prepared.weights[rows], objective, prepared.problem.part.whole)
    parts[CE, rows], parts[Z, rows], parts[ENTROPY, rows] = labels.ce, labels.z, totals.entropy
    if prepared.entries is None:
        return RowTerms(labels.factors, None)
    entries = prepared.entries
    chosen = SparseEntries(entries.indices[rows], entries.probabilities[rows], entries.bucket)
    sparse = sparse_terms(totals, labels.factors, chosen, prepared.problem.labels[rows], objective.tempering)
    parts[DIVERGENCE, rows] = sparse.divergence
    # Outside its entries a sparse teacher's gradient is a multiple of p_T, so it only replaces that factor.
    on_p, _, on_label, everywhere = labels.factors  # [C] each
    return RowTerms(torch.stack([on_p, sparse.on_tempered, on_label, everywhere]), sparse.at_entries)


def row_numbers(
    prepared: Prepared, rows: slice, totals: Totals, terms: RowTerms, label: Tensor, centre: Tensor | None = None
) -> Rows:
    """The row kernels' argument for the tokens ``rows`` with their labels in the columns ``label`` [C]."""
    return Rows(
        normalizers=totals.normalizers,
        label=label.contiguous(),
        live=prepared.live[rows],
        factors=terms.factors,
        centre=centre,
        tempering=prepared.problem.objective.tempering,
        kind=prepared.problem.objective.kind,
        write=prepared.problem.writes,
    )


def place_entries(padded: Tensor, width: int, columns: Tensor, values: Tensor, live: Tensor) -> None:
    """Store the exact gradients ``values`` [C, K] at a sparse teacher's ``columns`` [C, K] of ``padded`` [C, > width].

    Entries without a column here (-1) are stored in the column after the last.
    """
    kept = torch.where(live[:, None], values, 0).to(padded.dtype)
    padded.scatter_(1, torch.where(columns >= 0, columns, width), kept)


def means(parts: Tensor, tokens: Tensor) -> Tensor:
    """Means [PARTS] over the ``tokens`` valid ones of ``parts`` [PARTS, N]."""
    return parts.sum(dim=1) / tokens.clamp_min(1)
