"""A vocabulary that is cut over the ranks of a process group: which rank holds which part, and global statistics.

Shapes: C rows (tokens), V the rank's real columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from incr_ds.kernels.rows import (
    FAR,
    LOGITS,
    MAXIMUM,
    STATISTICS,
    TEACHER_MAXIMUM,
    TEACHER_TEMPERED,
    TEMPERED,
    TOTAL,
    WEIGHTED,
    Tempering,
)


@dataclass(frozen=True)
class VocabularyPart:
    """A rank's entries [start, start + size) of ``whole``. ``group`` is None if the rank holds all of them."""

    group: dist.ProcessGroup | None
    start: int
    size: int
    whole: int

    @property
    def largest(self) -> int:
        """Number of columns, equal on all ranks, for which every rank plans its memory."""
        return self.whole if self.group is None else -(-self.whole // dist.get_world_size(self.group))

    def columns(self, entries: Tensor) -> Tensor:
        """Local columns of vocabulary ``entries``, or -1 if another rank (or none) holds them."""
        owned = (entries >= self.start) & (entries < self.start + self.size)
        return torch.where(owned, entries - self.start, -1)

    def begin_all_reduce(self, values: Tensor) -> list[dist.Work]:
        """Start summing ``values`` over the ranks in place. It is done once all returned handles were waited for."""
        if self.group is None:
            return []
        return [dist.all_reduce(values, group=self.group, async_op=True)]

    def all_reduce(self, values: Tensor) -> None:
        """Sum ``values`` over the ranks in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)


@dataclass(frozen=True)
class Totals:
    """Statistics of C rows over the whole vocabulary, each [C]; ``picked`` [P, C] are the logits of chosen entries.

    ``normalizers`` [5, C] are as in Rows, ``logits`` is the sum of z, and ``entropy`` that of softmax(z).
    """

    normalizers: Tensor
    logits: Tensor
    entropy: Tensor
    picked: Tensor


def picked_logits(logits: Tensor, columns: Tensor) -> Tensor:
    """Logits [P, C] in the columns [P, C] of ``logits`` [C, V], or -inf where the column is -1.

    So an entry that no rank holds gives an infinite cross entropy instead of a plausible number.
    """
    if not logits.shape[1]:
        return logits.new_full(columns.shape, -torch.inf)
    values = logits.gather(1, columns.clamp_min(0).t()).t()
    return torch.where(columns >= 0, values, -torch.inf)


def combine(local: Tensor, picked: Tensor, tempering: Tempering, part: VocabularyPart) -> Totals:
    """Combine the ``local`` statistics [STATISTICS, C] over the ranks with one collective. All ranks get the same bits."""
    merged, picked = local, picked.to(local.dtype)
    if part.group is not None:
        packed = torch.cat([local, picked])
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(part.group))]
        dist.all_gather(gathered, packed, group=part.group)
        ranks = torch.stack(gathered)
        merged, picked = merge(ranks[:, :STATISTICS], tempering), ranks[:, STATISTICS:].amax(dim=0)
    log_total, log_tempered, log_teacher = (merged[row].log() for row in (TOTAL, TEMPERED, TEACHER_TEMPERED))
    return Totals(
        normalizers=torch.stack([merged[MAXIMUM], log_total, log_tempered, merged[TEACHER_MAXIMUM], log_teacher]),
        logits=merged[LOGITS],
        entropy=log_total - merged[WEIGHTED] / merged[TOTAL],
        picked=picked,
    )


def merge(parts: Tensor, tempering: Tempering) -> Tensor:
    """Statistics [STATISTICS, C] of all columns from those of their parts, [parts, STATISTICS, C]."""
    merged = parts[0].clone()
    merged[MAXIMUM], merged[TEACHER_MAXIMUM] = (parts[:, row].amax(dim=0) for row in (MAXIMUM, TEACHER_MAXIMUM))
    below = (parts[:, MAXIMUM] - merged[MAXIMUM]).clamp_min(-FAR)
    teacher_below = (parts[:, TEACHER_MAXIMUM] - merged[TEACHER_MAXIMUM]).clamp_min(-FAR)
    scale = below.exp()
    merged[TOTAL] = (parts[:, TOTAL] * scale).sum(dim=0)
    merged[WEIGHTED] = (scale * (parts[:, WEIGHTED] + below * parts[:, TOTAL])).sum(dim=0)
    merged[TEMPERED] = (parts[:, TEMPERED] * (below * tempering.inverse).exp()).sum(dim=0)
    merged[LOGITS] = parts[:, LOGITS].sum(dim=0)
    merged[TEACHER_TEMPERED] = (parts[:, TEACHER_TEMPERED] * (teacher_below * tempering.inverse).exp()).sum(dim=0)
    return merged
