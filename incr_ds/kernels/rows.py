"""What a row kernel computes: the interface between the loss's matrix products and its softmax arithmetic.

A row holds one token's logits z over the V real entries of this rank's vocabulary, and u are the teacher's. Let
p = softmax(z), p_T = softmax(z / T) and q_T = softmax(u / T). A kernel makes two passes over a chunk of C rows:
``statistics``, whose results are combined over the ranks, and ``gradient``, which overwrites z with the loss's gradient.
Reverse KL and JSD need ``centre`` in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Kind = Literal["none", "forward_kl", "reverse_kl", "jsd", "sparse"]
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")

# Rows of the statistics [STATISTICS, C]: max z, then sums of e, e^(1/T), z and e * (z - max z) with e = exp(z - max z);
# max u, sum exp((u - max u) / T).
MAXIMUM, TOTAL, TEMPERED, LOGITS, WEIGHTED, TEACHER_MAXIMUM, TEACHER_TEMPERED = range(7)
STATISTICS = 7

# Stands for minus infinity where 0 * infinity would be NaN.
FAR = 1e30
# Below this distance between two log-probabilities the termwise divergence is a polynomial or expm1.
NEAR = 0.5


@dataclass(frozen=True)
class Tempering:
    """1 / T as a 0-d tensor on the rows' device; ``unit`` says that T is known to be 1."""

    inverse: Tensor
    unit: bool


@dataclass(frozen=True)
class Rows:
    """Everything about C rows that is not in their logits.

    ``normalizers`` [5, C] over the whole vocabulary: max z, log sum exp(z - max z), log sum exp((z - max z) / T), max u,
    log sum exp((u - max u) / T). ``label`` [C] is the label's column, or -1 if another rank holds it. A row's
    gradient is

        on_p * p + on_divergence * D - on_label * onehot(label) - everywhere

    with D = p_T - q_T (forward KL), p_T * (log p_T - log q_T - centre) (reverse KL),
    p_T / 2 * (log(p_T / m) - centre) (JSD, m = (p_T + q_T) / 2), or p_T (sparse); all four factors are ``factors``
    [4, C]. Where ``live`` [C] is False the row's gradient is exactly 0. Without ``write`` the logits stay as they are.
    """

    normalizers: Tensor
    label: Tensor
    live: Tensor
    factors: Tensor
    centre: Tensor | None
    tempering: Tempering
    kind: Kind
    write: bool

    def part(self, rows: slice) -> Rows:
        """Only the rows ``rows``."""
        return replace(
            self,
            normalizers=self.normalizers[:, rows],
            label=self.label[rows],
            live=self.live[rows],
            factors=self.factors[:, rows],
            centre=None if self.centre is None else self.centre[rows],
        )


class RowKernels(Protocol):
    """The functions that each backend implements.

    ``student`` [C, V] and ``teacher`` [C, V] (None without a dense teacher) may have rows that are longer than V in
    memory. Everything else is contiguous. ``temporaries`` counts the [C, V] buffers in the accumulation dtype that a call
    needs on a GPU besides its arguments. On a CPU they are small.
    """

    name: str
    temporaries: int

    def logits_dtype(self, operand: torch.dtype) -> torch.dtype:
        """The dtype of logits for products whose operands are ``operand``."""
        ...

    def statistics(self, student: Tensor, teacher: Tensor | None, tempering: Tempering) -> Tensor:
        """[STATISTICS, C] over this rank's columns. The teacher's rows have no meaning without a teacher."""
        ...

    def centre(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """[2, C] over this rank's columns, for reverse KL and JSD: the divergence, and the gradient's centre."""
        ...

    def gradient(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """Overwrite ``student`` with the gradient. Returns this rank's part of forward KL, [C], or zeros without it."""
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
