"""The output projection as a module that owns its weight and applies the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from incr_ds.kernels.rows import Divergence
from incr_ds.losses.arguments import Scalar
from incr_ds.losses.distillation import DistillationLoss, distillation_loss
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher

# distillation_loss, or a functools.partial of it that fixes the settings of a whole run.
Loss = Callable[..., DistillationLoss]


class DistillationHead(nn.Module):
    """A rank's rows [V, H] of the output projection, from vocabulary entry ``vocab_start`` on, of ``vocab_size``.

    The weight is only touched inside ``forward``, so ZeRO-3's hooks gather it in training and in evaluation.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        loss: Loss = distillation_loss,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size
        self.loss = loss

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        *,
        teacher: Teacher | None = None,
        alpha: Scalar = 0.0,
        temperature: Scalar = 1.0,
        divergence: Divergence | None = None,
    ) -> DistillationLoss:
        """Loss of ``hidden`` [..., H] against ``labels`` [...] and ``teacher_hidden`` [..., Ht].

        ``teacher`` replaces the two teacher arguments and has the same leading dimensions. ``divergence`` replaces the run's.
        """
        return self.loss(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            None if teacher_hidden is None else teacher_hidden.flatten(0, -2),
            teacher_head,
            teacher=None if teacher is None else _flattened(teacher),
            alpha=alpha,
            temperature=temperature,
            group=self.group,
            vocab_start=self.vocab_start,
            vocab_size=self.vocab_size,
            **({} if divergence is None else {"divergence": divergence}),
        )


def _flattened(teacher: Teacher) -> Teacher:
    """Reshape ``teacher`` to one token per row."""
    if isinstance(teacher, HiddenTeacher):
        return HiddenTeacher(teacher.hidden.flatten(0, -2), teacher.head, teacher.softcap)
    if isinstance(teacher, TopKTeacher):
        return TopKTeacher(teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2), teacher.tail)
    return SampledTeacher(teacher.indices.flatten(0, -2), teacher.weights.flatten(0, -2))
