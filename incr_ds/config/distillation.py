"""Settings of the distillation term: the teacher, its weight, and for how long it counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings


class DistillationSettings(Settings):
    """Loss (1 - a) * CE + a * T^2 * D, with a annealed from ``weight`` to ``final_weight``.

    D is KL(teacher || student), KL(student || teacher) for ``divergence: reverse_kl``, or their Jensen-Shannon mean.

    ``teacher`` is a folder in any supported checkpoint format. ``anneal_steps`` counts optimizer steps from the
    start of the run.
    """

    teacher: str
    weight: float = Field(default=0.5, ge=0.0, le=1.0)
    final_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    anneal_steps: int = Field(ge=1)
    anneal: Literal["linear", "cosine"] = "linear"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0.0)
    final_temperature: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _anneals_downwards(self) -> Self:
        if self.final_weight > self.weight:
            raise ValueError(f"final_weight {self.final_weight} is above weight {self.weight}; the teacher fades out")
        return self
