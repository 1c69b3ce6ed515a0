"""The learning-rate schedule of a run file, and steps that are stated as shares of it."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings

_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?) ?%")


def in_steps(stated: Any, train_steps: Any) -> Any:
    """Convert a percentage of ``train_steps``, like 1%, to steps, rounded up; leave everything else for validation."""
    share = _SHARE.fullmatch(stated) if isinstance(stated, str) and isinstance(train_steps, int) else None
    return stated if share is None else math.ceil(Fraction(share[1]) * train_steps / 100)


class ScheduleSettings(Settings):
    """The learning rate over the optimizer steps of this run: linear warm-up, then ``decay``.

    ``start_step`` and ``end_step`` cut this run out of a longer schedule of ``train_steps``.
    """

    train_steps: int = Field(ge=1)
    """Optimizer steps of the whole schedule."""
    learning_rate: float = Field(gt=0.0)
    """The peak learning rate."""
    min_learning_rate: float = Field(default=0.0, ge=0.0)
    """The rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up. Also a share of train_steps, like 1%."""
    warmup_from: float = Field(default=0.0, ge=0.0, le=1.0)
    """The fraction of the peak at which warm-up starts; above 0 it is a re-warm-up after growth."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows warm-up. wsd stays constant, then decays linearly over decay_steps."""
    decay_steps: int = Field(default=0, ge=0)
    """The steps of wsd's final decay. Also a share of train_steps."""
    start_step: int = Field(default=0, ge=0)
    """Where this run begins in the schedule. Rate, data and dropout are those of the same steps of the whole."""
    end_step: int | None = None
    """The step at which this run ends; null is train_steps."""
    rewarmup_steps: int = Field(default=0, ge=0)
    """Over so many steps after start_step, the rate rises linearly to the schedule's."""
    rewarmup_from: float = Field(default=0.0, ge=0.0, le=1.0)
    """The factor of the schedule's rate at which that begins."""

    @model_validator(mode="before")
    @classmethod
    def _shares_of_steps(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        stated = {key: content[key] for key in ("warmup_steps", "decay_steps") if key in content}
        return {**content, **{key: in_steps(value, content.get("train_steps")) for key, value in stated.items()}}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_steps + self.decay_steps > self.train_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} exceed "
                f"train_steps {self.train_steps}"
            )
        if self.decay == "wsd" and self.decay_steps == 0:
            raise ValueError("decay: wsd needs decay_steps, the length of the final decay")
        if self.decay != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps belongs to decay: wsd, not to decay: {self.decay}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _part_fits(self) -> Self:
        if not self.start_step < self.last_step <= self.train_steps:
            raise ValueError(
                f"start_step {self.start_step} and end_step {self.last_step} are not a part of the schedule's {self.train_steps} "
                "steps: expected 0 <= start_step < end_step <= train_steps"
            )
        if self.rewarmup_steps and not self.start_step:
            raise ValueError(
                f"rewarmup_steps {self.rewarmup_steps} belongs to a run with a start_step; at step 0 it is warmup_steps"
            )
        if self.rewarmup_steps > self.last_step - self.start_step:
            raise ValueError(
                f"rewarmup_steps {self.rewarmup_steps} exceed the {self.last_step - self.start_step} steps from "
                f"{self.start_step} to {self.last_step}"
            )
        return self

    @property
    def last_step(self) -> int:
        """The number of steps of the whole schedule that are taken when this run ends."""
        return self.train_steps if self.end_step is None else self.end_step
