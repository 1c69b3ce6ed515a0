"""Computes a row's losses, and the factors of its gradient, from the row's statistics.

Shapes: C rows (tokens), K sparse teacher entries per row. All functions are elementwise over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from incr_ds.kernels.rows import Kind, Tempering
from incr_ds.kernels.torch_rows import termwise
from incr_ds.losses.teachers import SparseEntries
from incr_ds.losses.vocabulary import Totals

# The smallest probability of the student's tail outside the kept entries, so that its logarithm stays finite.
SMALLEST_TAIL = 1e-8


@dataclass(frozen=True)
class Objective:
    """(1 - alpha) CE + alpha T^2 divergence + z_loss lse^2; ``alpha`` and ``temperature`` are 0-d tensors."""

    alpha: Tensor
    temperature: Tensor
    tempering: Tempering
    z_loss: float
    label_smoothing: float
    kind: Kind

    def total(self, ce: Tensor, divergence: Tensor, z: Tensor) -> Tensor:
        """Combine the parts of the loss."""
        loss = ce
        if self.kind != "none":
            loss = (1 - self.alpha) * ce + self.alpha * self.temperature**2 * divergence
        return loss + self.z_loss * z if self.z_loss else loss


@dataclass(frozen=True)
class LabelTerms:
    """Cross entropy (smoothed) and squared log-sum-exp of each row, [C]; ``factors`` [4, C] are as in Rows."""

    ce: Tensor
    z: Tensor
    factors: Tensor


def label_terms(totals: Totals, weights: Tensor, objective: Objective, vocabulary: int) -> LabelTerms:
    """Terms of the labels, and the factors of rows with ``weights`` [C]. The label is the first pick."""
    maximum, log_total = totals.normalizers[:2]
    log_sum = maximum + log_total
    # maximum - picked is exact for two large logits of similar size, so it is computed first.
    target_ce = (maximum - totals.picked[0]) + log_total
    smoothing, hard = objective.label_smoothing, weights
    ce = target_ce
    if smoothing:
        ce = (1 - smoothing) * target_ce + smoothing * (log_sum - totals.logits / vocabulary)
    if objective.kind != "none":
        hard = weights * (1 - objective.alpha)
    on_p = hard + 2 * objective.z_loss * weights * log_sum if objective.z_loss else hard
    # A label outside the vocabulary must stop the step instead of losing its gradient silently.
    on_p = torch.where((weights != 0) & target_ce.isinf(), torch.nan, on_p)
    on_divergence = weights * objective.alpha * objective.temperature
    factors = torch.stack([on_p, on_divergence, (1 - smoothing) * hard, smoothing / vocabulary * hard])
    return LabelTerms(ce, log_sum.square(), factors)


@dataclass(frozen=True)
class SparseTerms:
    """The divergence to a sparse teacher [C], the factor of p_T in the gradient [C], and the gradient at its entries [C, K]."""

    divergence: Tensor
    on_tempered: Tensor
    at_entries: Tensor


def sparse_terms(
    totals: Totals, factors: Tensor, entries: SparseEntries, labels: Tensor, tempering: Tempering
) -> SparseTerms:
    """Forward KL to ``entries``, which are picks 1 to K of ``totals``."""
    maximum, log_total, log_tempered = totals.normalizers[:3, :, None]
    on_p, on_divergence, on_label, everywhere = factors[:, :, None]
    present, q = entries.indices >= 0, entries.probabilities
    shifted = totals.picked[1:].t() - maximum
    log_p = shifted * tempering.inverse - log_tempered
    p = torch.where(present, log_p.exp(), 0)
    log_q = q.log()
    if entries.bucket:
        rest_q, rest_p = (1 - q.sum(dim=1)).clamp_min(0), (1 - p.sum(dim=1)).clamp_min(SMALLEST_TAIL)
        tail = termwise(rest_q, rest_p, rest_q.log() - rest_p.log())
        divergence = torch.where(present, termwise(q, p, log_q - log_p), 0).sum(dim=1) + tail
        elsewhere, here = 1 - rest_q / rest_p, torch.ones_like(rest_q)
    else:
        divergence = torch.where(q > 0, q * (log_q - log_p), 0).sum(dim=1)
        elsewhere = here = q.sum(dim=1)
    at_entries = on_p * (shifted - log_total).exp() + on_divergence * (here[:, None] * p - q) - everywhere
    at_entries = at_entries - torch.where(entries.indices == labels[:, None], on_label, 0)
    return SparseTerms(divergence, factors[1] * elsewhere, at_entries)
