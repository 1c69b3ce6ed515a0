"""What a micro-batch is trained on: labels, and the entries of a cached teacher."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# Labels [...], alone or with a cached teacher's indices and log-probabilities, [..., K] each.
Targets = Tensor | tuple[Tensor, Tensor, Tensor]


class Entries(Protocol):
    """The teacher's entries of samples, by sample number."""

    def entries(self, numbers: range) -> tuple[Tensor, Tensor] | None:
        """Indices and log-probabilities of samples, [B, sequence_length, K] each; None if the teacher no longer counts."""
        ...
