"""Softmax statistics over a vocabulary that is cut over the ranks of a process group.

Shapes: C rows (tokens), V the rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class LogSum(NamedTuple):
    """log(sum(exp(v))) over the rank's columns, unfinished: the maximum [C] and the sum of exp(v - maximum) [C]."""

    maximum: Tensor
    total: Tensor


def local_log_sum(values: Tensor) -> LogSum:
    """The statistics of the rank's own columns of ``values`` [C, V]."""
    maximum = values.amax(dim=1)
    return LogSum(maximum, (values - maximum[:, None]).exp_().sum(dim=1))


def target_values(logits: Tensor, labels: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rank's part in each row's label.

    Returns (value [C] of the label's logit, -inf where another rank owns it; owned [C]; local column [C], 0 where not
    owned). A label that no rank owns therefore ends as an infinite cross entropy instead of a plausible number.
    """
    owned = (labels >= vocab_start) & (labels < vocab_start + logits.shape[1])
    column = torch.where(owned, labels - vocab_start, 0)
    value = logits.gather(1, column[:, None]).squeeze(1)
    return torch.where(owned, value, -torch.inf), owned, column


def combine(parts: list[LogSum], target: Tensor, group: dist.ProcessGroup | None) -> tuple[list[Tensor], Tensor]:
    """Finish every ``LogSum`` over the group's ranks with one collective.

    Returns ([log-sum-exp [C] for each part], the label's logit [C]); bit for bit the same on every rank.
    """
    if group is None:
        return [part.maximum + part.total.log() for part in parts], target
    packed = torch.stack([column for part in parts for column in part] + [target])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    ranks = torch.stack(gathered)
    sums = [_log_sum_exp(ranks[:, 2 * index], ranks[:, 2 * index + 1]) for index in range(len(parts))]
    return sums, ranks[:, -1].amax(dim=0)


def _log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    highest = maximum.amax(dim=0)
    return highest + (total * (maximum - highest).exp()).sum(dim=0).log()
