"""A run whose model grows on the way: the growths, and what may differ from each one on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.distillation import BEFORE_GROWTH, DistillationSettings
from incr_ds.config.fields import Settings
from incr_ds.config.layout import ParallelLayout


class GrowthStep(Settings):
    """One growth on the way. What is not stated stays as before it."""

    at_step: int = Field(ge=1)
    """The step after which the model grows. Also a share of train_steps, like 40%."""
    recipe: str
    """The growth recipe."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """The schedule's peak from then on; null keeps it."""
    rewarmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the re-warm-up after the growth; null follows the recipe's advice."""
    rewarmup_from: float | None = Field(default=None, ge=0.0, le=1.0)
    """The factor of the schedule's rate at which the re-warm-up begins; null follows the advice."""
    layout: ParallelLayout | None = None
    """The layout from then on, with the same number of processes; null keeps it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """The micro-batch from then on; null keeps it."""
    distillation: DistillationSettings | Literal["keep", "none"] = "keep"
    """The section from then on. keep leaves it as it is, none ends it."""

    @model_validator(mode="after")
    def _rewarmup_is_whole(self) -> Self:
        if self.rewarmup_from is not None and self.rewarmup_steps is None:
            raise ValueError(f"rewarmup_from {self.rewarmup_from} needs rewarmup_steps, the length of the re-warm-up")
        return self


def check_growth_steps(growth: Sequence[GrowthStep], first: int, last: int, layout: ParallelLayout) -> None:
    """Raise ValueError unless the growths come one after the other between steps ``first`` and ``last``.

    Each must keep the number of processes, which is that of ``layout``.
    """
    before = first
    for number, step in enumerate(growth):
        key = f"growth.{number}"
        if number and step.at_step <= before:
            raise ValueError(f"{key}.at_step {step.at_step} is not after {before}, the step of the growth before it")
        if not first < step.at_step < last:
            raise ValueError(
                f"{key}.at_step {step.at_step} is not inside of the run, which trains from step {first} to step {last}; it needs "
                "steps before and after every growth"
            )
        if step.layout is not None and step.layout.world_size != layout.world_size:
            raise ValueError(
                f"{key}.layout needs {step.layout.world_size} processes, but layout has {layout.world_size}; the same processes "
                "train every stage, so change a degree of parallelism"
            )
        before = step.at_step


def _sections(
    distillation: DistillationSettings | None, growth: Sequence[GrowthStep]
) -> Iterator[tuple[str, DistillationSettings]]:
    """Every section distillation of a run file with its key."""
    if distillation is not None:
        yield "distillation", distillation
    for number, step in enumerate(growth):
        if isinstance(step.distillation, DistillationSettings):
            yield f"growth.{number}.distillation", step.distillation


def check_teacher(
    distillation: DistillationSettings | None,
    growth: Sequence[GrowthStep],
    first: int,
    *,
    starts_grown: bool,
    tag: str | None,
) -> None:
    """Raise ValueError if the teacher is the model before a growth and there is none, or if its weight would begin too late.

    ``starts_grown`` says whether the run begins with a growth on load, and ``tag`` names that source's tag.
    """
    for key, section in _sections(distillation, growth):
        if section.cache is not None and growth:
            raise ValueError(
                f"{key}.cache {section.cache}: a run that grows cannot read a cache; train its stages as runs of their own "
                "(docs/progressive.md), or remove cache"
            )
    if distillation is None:
        return
    if distillation.teacher == BEFORE_GROWTH and not (growth or starts_grown):
        raise ValueError(
            f"distillation.teacher: {BEFORE_GROWTH} needs a growth: the section growth, or model.initialize_from with a recipe"
        )
    if distillation.teacher == BEFORE_GROWTH and starts_grown and tag is not None:
        raise ValueError(
            f"distillation.teacher: {BEFORE_GROWTH} reads the source's latest tag, but model.tag is {tag}; let the source's file "
            "latest name that tag, and remove model.tag"
        )
    if distillation.start_step is not None and distillation.start_step > first:
        raise ValueError(
            f"distillation.start_step {distillation.start_step} is after the run's first step {first}; the weight is annealed "
            "from a step that the run has or that lies before it"
        )
