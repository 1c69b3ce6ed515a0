"""Judges after every step whether a run is still learning, from numbers that all ranks share.

The state is kept in checkpoints, so that a resumed run judges like an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from incr_ds.config.training import DivergenceSettings

_WEIGHT = 0.1  # of a step's cross entropy in the smoothed one: about ten steps


@dataclass(frozen=True, kw_only=True)
class Health:
    """``smoothed`` is the exponential moving average of the cross entropy in nats, ``lowest`` its lowest value.

    ``risen`` counts the last steps in a row in which it was too far above that value, and ``skipped`` those whose gradients
    were not finite.
    """

    smoothed: float | None = None
    lowest: float | None = None
    risen: int = 0
    skipped: int = 0

    @property
    def is_good(self) -> bool:
        """Whether all is well, so that a checkpoint saved now is safe to go back to."""
        return not (self.risen or self.skipped)


def after_step(before: Health, ce: float, skipped: bool, settings: DivergenceSettings) -> Health:
    """Compute the health after one more step with cross entropy ``ce``."""
    if not math.isfinite(ce):
        return replace(before, skipped=before.skipped + 1 if skipped else before.skipped)
    smoothed = ce if before.smoothed is None else before.smoothed + _WEIGHT * (ce - before.smoothed)
    lowest = smoothed if before.lowest is None else min(before.lowest, smoothed)
    rises = settings.max_loss_rise is not None and smoothed > lowest + settings.max_loss_rise
    return Health(
        smoothed=smoothed,
        lowest=lowest,
        risen=before.risen + 1 if rises else 0,
        skipped=before.skipped + 1 if skipped else 0,
    )


def divergence(health: Health, settings: DivergenceSettings, *, is_last_step: bool) -> str | None:
    """The reason why a run must stop, or must not count as a success; None if there is none."""
    if health.skipped >= settings.max_skipped_steps:
        return (
            f"the gradients of the last {health.skipped} steps were not finite, and no step was taken "
            f"(divergence.max_skipped_steps: {settings.max_skipped_steps})"
        )
    if health.risen >= settings.rise_steps or (is_last_step and health.risen):
        return (
            f"the loss rose: cross entropy, averaged over about 10 steps, is {health.smoothed:.4g}, and was {health.lowest:.4g} "
            f"at its lowest; it has been more than divergence.max_loss_rise {settings.max_loss_rise} above that for "
            f"{health.risen} step(s)"
        )
    return None
