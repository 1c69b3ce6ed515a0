"""Settings of the distillation term: the teacher, its weight, and for how long it counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings

BEFORE_GROWTH = "before-growth"  # as teacher: the model as it was right before the newest growth


class DistillationSettings(Settings):
    """Loss (1 - a) * CE + a * T^2 * D, with a annealed from ``weight`` to ``final_weight``.

    D is KL(teacher || student), KL(student || teacher) for ``divergence: reverse_kl``, or their Jensen-Shannon mean.

    ``teacher`` is a folder in any supported checkpoint format. ``before-growth`` is the model as it was right before
    the newest growth of this run, with which it begins to teach. ``anneal_steps`` counts optimizer steps from that
    growth, otherwise from ``start_step`` (None: the run's first step).

    ``cache`` is a folder of tools/cache_teacher.py with the teacher's most probable entries. The run reads them and does not
    build the teacher.
    """

    teacher: str
    cache: str | None = None
    weight: float = Field(default=0.5, ge=0.0, le=1.0)
    final_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    anneal_steps: int = Field(ge=1)
    start_step: int | None = Field(default=None, ge=0)
    anneal: Literal["linear", "cosine"] = "linear"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0.0)
    final_temperature: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _anneals_downwards(self) -> Self:
        if self.teacher == BEFORE_GROWTH and self.start_step is not None:
            raise ValueError(f"start_step {self.start_step}: with teacher: {BEFORE_GROWTH} the growth's step decides")
        if self.cache is not None:
            self._check_cache(self.cache)
        if self.final_weight > self.weight:
            raise ValueError(f"final_weight {self.final_weight} is above weight {self.weight}; the teacher fades out")
        return self

    def _check_cache(self, cache: str) -> None:
        """Raise ValueError for settings that need the whole teacher, or another teacher than the one that was cached."""
        if self.teacher == BEFORE_GROWTH:
            raise ValueError(
                f"cache {cache}: with teacher: {BEFORE_GROWTH} the teacher does not exist yet when a cache is written; name the "
                "teacher's folder, or remove cache"
            )
        if self.divergence != "forward_kl":
            raise ValueError(
                f"cache {cache}: divergence {self.divergence} needs the teacher's whole distribution, but a cache holds its "
                "largest entries; set divergence: forward_kl, or remove cache"
            )
        if self.final_temperature not in (None, self.temperature):
            raise ValueError(
                f"cache {cache}: it is written at one temperature, but the run goes from {self.temperature:g} to "
                f"{self.final_temperature:g}; remove final_temperature, or remove cache"
            )
