"""Kinds of teachers: a model's hidden states and head, its cached top entries, or entries sampled from it.

Shapes: N tokens, V the rank's rows of the vocabulary, K entries kept per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from incr_ds.data.targets import Targets


@dataclass(frozen=True)
class HiddenTeacher:
    """The whole distribution softmax(z / T) of z = hidden @ head.T: ``hidden`` [N, Ht], ``head`` [V, Ht].

    With ``softcap`` c the logits are c tanh(z / c).
    """

    hidden: Tensor
    head: Tensor
    softcap: float | None = None


@dataclass(frozen=True)
class TopKTeacher:
    """The K most probable entries of each token's distribution.

    ``indices`` [N, K] into the whole vocabulary are distinct within a row, -1 for none. ``log_probs`` [N, K] are
    log-probabilities at the loss's temperature. With ``tail`` "bucket" the rest of the vocabulary is one more entry with
    the remaining probability, and the divergence is at most the full one. With "none" the rest is ignored.
    """

    indices: Tensor
    log_probs: Tensor
    tail: Literal["bucket", "none"] = "bucket"


@dataclass(frozen=True)
class SampledTeacher:
    """Entries drawn from the teacher: ``weights`` [N, K] estimate probabilities at the loss's temperature.

    ``indices`` [N, K] into the whole vocabulary, -1 for none. An entry that is drawn twice is one index with the sum of
    its weights. With weights count / draws, the expected gradient is that of the full forward KL
    (random sampling distillation, arXiv 2503.16870).
    """

    indices: Tensor
    weights: Tensor


def split_targets(targets: Targets, vocabulary: int) -> tuple[Tensor, TopKTeacher | None]:
    """The labels in ``targets`` and, if they hold one, the teacher. If its K entries are the whole vocabulary, it has no tail."""
    if isinstance(targets, Tensor):
        return targets, None
    labels, indices, log_probs = targets
    tail: Literal["bucket", "none"] = "none" if indices.shape[-1] == vocabulary else "bucket"
    return labels, TopKTeacher(indices, log_probs, tail)


Teacher = HiddenTeacher | TopKTeacher | SampledTeacher


@dataclass(frozen=True)
class SparseEntries:
    """Entries of a top-k or sampled teacher: ``probabilities`` [N, K], 0 where ``indices`` [N, K] is -1."""

    indices: Tensor
    probabilities: Tensor
    bucket: bool


def sparse_entries(teacher: TopKTeacher | SampledTeacher, dtype: torch.dtype) -> SparseEntries:
    """The entries of ``teacher`` with probabilities in ``dtype``."""
    if isinstance(teacher, TopKTeacher):
        probabilities, bucket = teacher.log_probs.to(dtype).exp(), teacher.tail == "bucket"
    else:
        probabilities, bucket = teacher.weights.to(dtype), False
    return SparseEntries(teacher.indices, torch.where(teacher.indices >= 0, probabilities, 0), bucket)
