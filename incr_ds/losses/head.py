"""The output projection as a module that owns its weight and applies the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from incr_ds.kernels.dispatch import Backend
from incr_ds.kernels.rows import Divergence
from incr_ds.losses.arguments import Scalar
from incr_ds.losses.distillation import DistillationLoss, distillation_loss
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher


@dataclass(frozen=True)
class LossSettings:
    """Settings that are the same for a whole run; see ``distillation_loss``."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    divergence: Divergence = "forward_kl"
    backend: Backend = "auto"
    budget_bytes: int | None = None
    sequence_parallel: bool = False
    softcap: float | None = None
    teacher_softcap: float | None = None


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
        settings: LossSettings | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size
        self.settings = settings or LossSettings()

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
    ) -> DistillationLoss:
        """Loss of ``hidden`` [..., H] against ``labels`` [...] and ``teacher_hidden`` [..., Ht].

        ``teacher`` replaces the two teacher arguments and has the same leading dimensions.
        """
        return distillation_loss(
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
            z_loss=self.settings.z_loss,
            label_smoothing=self.settings.label_smoothing,
            divergence=self.settings.divergence,
            backend=self.settings.backend,
            budget_bytes=self.settings.budget_bytes,
            sequence_parallel=self.settings.sequence_parallel,
            softcap=self.settings.softcap,
            teacher_softcap=self.settings.teacher_softcap if teacher_hidden is not None else None,
        )


def _flattened(teacher: Teacher) -> Teacher:
    """Reshape ``teacher`` to one token per row."""
    if isinstance(teacher, HiddenTeacher):
        return HiddenTeacher(teacher.hidden.flatten(0, -2), teacher.head, teacher.softcap)
    if isinstance(teacher, TopKTeacher):
        return TopKTeacher(teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2), teacher.tail)
    return SampledTeacher(teacher.indices.flatten(0, -2), teacher.weights.flatten(0, -2))
