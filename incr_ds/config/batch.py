"""Sizes of a training step in samples and tokens, and how the global batch changes over the steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings


class RampStep(Settings):
    """One change of the global batch."""

    at_step: int = Field(ge=1)
    """The number of steps taken before the change. Also a share of train_steps, like 10%."""
    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step from then on."""


class BatchSettings(Settings):
    """Sizes in samples and tokens. The number of micro-batches per step follows from them."""

    sequence_length: int = Field(ge=1)
    """Tokens per sample."""
    micro_batch_size: int = Field(ge=1)
    """Samples per forward pass of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step, of all ranks together. With a ramp, that of the schedule's first steps."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Data-parallel ranks that share each sample. Each has an equal slice of its tokens."""
    ramp: list[RampStep] = Field(default_factory=list)
    """Changes of the global batch on the way, in the order of their steps."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, (one, other) in enumerate(pairwise(self.ramp), start=1):
            if other.at_step <= one.at_step:
                raise ValueError(
                    f"ramp.{number}.at_step {other.at_step} is not after {one.at_step}, the step of the change before it"
                )
        return self

    def size_at(self, step: int) -> int:
        """Samples of optimizer step number ``step`` of the schedule, counted from 0."""
        return next(
            (change.global_batch_size for change in reversed(self.ramp) if change.at_step <= step),
            self.global_batch_size,
        )

    def spans(self, first: int, stop: int) -> list[tuple[int, int]]:
        """(number of steps, samples of each) for the steps from ``first`` up to ``stop``, span by span."""
        changes = self.changes_between(first, stop)
        ends = [step for step, _ in changes[1:]] + [max(first, stop)]
        return [(end - begin, size) for (begin, size), end in zip(changes, ends, strict=True)]

    def changes_between(self, first: int, stop: int) -> list[tuple[int, int]]:
        """(step, samples of it) for step ``first`` and every change of size before ``stop``."""
        steps = [first, *(change.at_step for change in self.ramp if first < change.at_step < stop)]
        return [(step, self.size_at(step)) for step in steps]

    def samples_between(self, first: int, stop: int) -> int:
        """Samples of the steps from ``first`` up to ``stop``."""
        return sum(steps * size for steps, size in self.spans(first, stop))

    def steps_back(self, step: int, samples: int) -> int:
        """Number of steps, the last of which is the one before ``step``, that read ``samples``."""
        steps = 0
        while samples > 0:
            steps += 1
            samples -= self.size_at(step - steps)
        return steps
