"""Checks the loss's arguments and fills in defaults."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from incr_ds.kernels.rows import DIVERGENCES, accumulation_dtype
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher
from incr_ds.losses.vocabulary import VocabularyPart

Scalar = float | Tensor


def resolve_teacher(
    teacher: Teacher | None, hidden: Tensor | None, head: Tensor | None, softcap: float | None, alpha: Scalar
) -> Teacher | None:
    """The teacher that is used, or None if alpha is the float 0. ``softcap`` belongs to ``hidden`` and ``head``."""
    if (hidden is None) != (head is None):
        raise ValueError("teacher_hidden and teacher_head belong together; one of them is missing")
    if hidden is not None and head is not None:
        if teacher is not None:
            raise ValueError("give either teacher, or teacher_hidden and teacher_head, not both")
        teacher = HiddenTeacher(hidden, head, softcap)
    elif softcap is not None and teacher is not None:
        raise ValueError("teacher_softcap belongs to teacher_hidden and teacher_head; a teacher has its own")
    if isinstance(alpha, float | int) and alpha == 0:
        return None
    if teacher is None:
        raise ValueError(f"alpha is {alpha} but there is no teacher; give one, or alpha=0.0")
    return teacher


def check_numbers(
    alpha: Scalar,
    temperature: Scalar,
    label_smoothing: float,
    divergence: str,
    teacher: Teacher | None,
    softcap: float | None,
) -> None:
    """Refuse numbers outside their ranges. Tensors are not checked, since reading them would synchronise."""
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a number from 0 to 1")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 1")
    caps = {"softcap": softcap, "the teacher's softcap": getattr(teacher, "softcap", None)}
    for name, cap in caps.items():
        if cap is not None and not cap > 0:
            raise ValueError(f"{name} is {cap}, expected a positive number, or None for logits as they are")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; the divergences are {', '.join(DIVERGENCES)}")
    if isinstance(teacher, TopKTeacher | SampledTeacher) and divergence != "forward_kl":
        raise ValueError(
            f"divergence {divergence!r} needs the teacher's whole distribution; a sparse teacher has forward_kl"
        )


def check_shapes(hidden: Tensor, head: Tensor, labels: Tensor, teacher: Teacher | None) -> None:
    """Refuse tensors whose shapes do not match."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"student_hidden {list(hidden.shape)} and student_head {list(head.shape)}: expected [N, Hs], [V, Hs]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)}: expected [{hidden.shape[0]}], one per row of student_hidden")
    if isinstance(teacher, HiddenTeacher) and teacher.hidden.shape != (hidden.shape[0], teacher.head.shape[1]):
        raise ValueError(
            f"teacher_hidden {list(teacher.hidden.shape)}: expected [{hidden.shape[0]}, {teacher.head.shape[1]}], "
            "the student's tokens by teacher_head's width"
        )
    if isinstance(teacher, TopKTeacher | SampledTeacher):
        values = teacher.log_probs if isinstance(teacher, TopKTeacher) else teacher.weights
        if teacher.indices.dim() != 2 or teacher.indices.shape[0] != hidden.shape[0]:
            raise ValueError(f"teacher.indices {list(teacher.indices.shape)}: expected [{hidden.shape[0]}, K]")
        if values.shape != teacher.indices.shape:
            raise ValueError(
                f"teacher has indices {list(teacher.indices.shape)} and values {list(values.shape)}: expected one shape"
            )


def vocabulary_part(
    head: Tensor, teacher: Teacher | None, group: dist.ProcessGroup | None, start: int | None, whole: int | None
) -> VocabularyPart:
    """Which vocabulary entries this rank's head rows are. ``start`` and ``whole`` are vocab_start and vocab_size."""
    rows, stated = head.shape[0], whole is not None
    if group is None or dist.get_world_size(group) == 1:
        if start:
            raise ValueError(f"vocab_start is {start}, but without a group of several ranks the heads start at entry 0")
        group, start, whole = None, 0, rows if whole is None else whole
    elif start is None and whole is None:
        start, whole = dist.get_rank(group) * rows, dist.get_world_size(group) * rows
    elif start is None or whole is None:
        raise ValueError("vocab_start and vocab_size belong together; one of them is missing")
    part = VocabularyPart(group, start, max(0, min(rows, whole - start)), whole)
    if group is None and part.size < whole - start:
        raise ValueError(f"student_head has {rows} rows, fewer than vocab_size {whole}; without a group it needs all")
    if isinstance(teacher, HiddenTeacher):
        _check_teacher_rows(rows, teacher.head.shape[0], part, stated)
    return part


def _check_teacher_rows(rows: int, teacher_rows: int, part: VocabularyPart, stated: bool) -> None:
    """Refuse heads of different sizes, unless they differ only beyond the stated end of the vocabulary."""
    holds_end = part.start + part.size >= part.whole
    if teacher_rows != rows and not (stated and holds_end and teacher_rows >= part.size):
        raise ValueError(
            f"teacher_head has {teacher_rows} rows, student_head {rows}: vocabularies differ. If only their padding does, "
            "pass the number of real entries as vocab_size, and cut both heads at the same entries"
        )


def check_reference(part: VocabularyPart, head_gradient: Tensor | None) -> None:
    """Refuse what the reference backend does not support: a process group, and gradients that are not autograd's."""
    if part.group is not None:
        raise ValueError("backend 'reference' needs the whole vocabulary in one process; use another with a group")
    if head_gradient is not None:
        raise ValueError("backend 'reference' leaves gradients to autograd; head_gradient needs another backend")


def checked_buffer(buffer: Tensor | None, head: Tensor, scale: Tensor | None) -> Tensor | None:
    """Check that the head's gradient can be added to ``buffer``, and return it."""
    if buffer is None:
        if scale is not None:
            raise ValueError("gradient_scale belongs to head_gradient, which is missing")
        return None
    dtype = accumulation_dtype(head.dtype)
    if buffer.shape != head.shape or buffer.dtype != dtype:
        raise ValueError(
            f"head_gradient is {buffer.dtype} {list(buffer.shape)}, expected {dtype} {list(head.shape)} like student_head"
        )
    return buffer
