"""The output projection as a module that owns its weight and applies the loss."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from incr_ds.losses.arguments import Scalar
from incr_ds.losses.distillation import DistillationLoss, distillation_loss


class DistillationHead(nn.Module):
    """The rank's rows [V, H] of the output projection, from vocabulary entry ``vocab_start`` on, of ``vocab_size``.

    The weight is only touched inside ``forward``, so ZeRO-3's hooks gather it in training and in evaluation.
    """

    def __init__(
        self, weight: nn.Parameter, group: dist.ProcessGroup | None, vocab_start: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        *,
        alpha: Scalar = 0.0,
        temperature: Scalar = 1.0,
    ) -> DistillationLoss:
        """Loss of ``hidden`` [..., H] against ``labels`` [...] and ``teacher_hidden`` [..., Ht]."""
        return distillation_loss(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            None if teacher_hidden is None else teacher_hidden.flatten(0, -2),
            teacher_head,
            alpha=alpha,
            temperature=temperature,
            group=self.group,
            vocab_start=self.vocab_start,
            vocab_size=self.vocab_size,
        )
