"""Sequence-parallel inputs: every rank of the vocabulary's group has its own part of the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher


class _GatherTokens(torch.autograd.Function):
    """[N / ranks, ...] on each rank -> [N, ...] on all. The gradient, whole and equal on all ranks, is sliced again."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, part.shape[0]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = dist.get_rank(ctx.group) * ctx.rows
        return gradient[start : start + ctx.rows], None


def gather_tokens(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather all ranks' equal parts of the tokens in rank order. Later code must give every rank the whole gradient."""
    if group is None:
        return part
    whole: Tensor = _GatherTokens.apply(part, group)  # type: ignore[no-untyped-call]
    return whole


def gather_teacher(teacher: Teacher | None, group: dist.ProcessGroup | None) -> Teacher | None:
    """Gather all ranks' tokens of ``teacher``."""
    if teacher is None or group is None:
        return teacher
    if isinstance(teacher, HiddenTeacher):
        return HiddenTeacher(gather_tokens(teacher.hidden.detach(), group), teacher.head, teacher.softcap)
    indices = gather_tokens(teacher.indices, group)
    if isinstance(teacher, TopKTeacher):
        return TopKTeacher(indices, gather_tokens(teacher.log_probs, group), teacher.tail)
    return SampledTeacher(indices, gather_tokens(teacher.weights, group))
