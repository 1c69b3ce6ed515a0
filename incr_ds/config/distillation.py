"""Settings of the distillation term: the teacher, its weight, and for how long it counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings

BEFORE_GROWTH = "before-growth"  # as teacher: the model as it was right before the newest growth


class DistillationSettings(Settings):
    """The distillation term: the loss is (1 - a) CE + a T^2 D, with a annealed from ``weight`` to ``final_weight``."""

    teacher: str
    """A folder in any supported checkpoint format, or before-growth: the model before this run's newest growth."""
    cache: str | None = None
    """A folder of tools/cache_teacher.py with the teacher's most probable entries; the run then builds no teacher."""
    weight: float = Field(default=0.5, ge=0.0, le=1.0)
    """The weight a at first, in (1 - a) CE + a T^2 D."""
    final_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    """The weight after anneal_steps."""
    anneal_steps: int = Field(ge=1)
    """Steps over which weight and temperature change."""
    start_step: int | None = Field(default=None, ge=0)
    """The step that anneal_steps count from; null is the run's first, or the growth's with before-growth."""
    anneal: Literal["linear", "cosine"] = "linear"
    """The form of the change."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """D: KL(teacher || student), KL(student || teacher), or their Jensen-Shannon mean."""
    temperature: float = Field(default=1.0, gt=0.0)
    """The temperature T at first."""
    final_temperature: float | None = Field(default=None, gt=0.0)
    """T after anneal_steps; null keeps it."""

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
