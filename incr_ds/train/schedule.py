"""Learning rate, distillation weight and temperature as pure functions of the step.

A step is the index of the optimizer step to be taken, from 0 to train_steps - 1.
"""

from __future__ import annotations

import hashlib
import math

from incr_ds.config.distillation import DistillationSettings
from incr_ds.config.optimizer import NewParameterSettings
from incr_ds.config.schedule import ScheduleSettings
from incr_ds.config.training import RunSettings


def learning_rate(schedule: ScheduleSettings, step: int) -> float:
    """Learning rate of ``step`` of the whole schedule: the schedule's, times the share that a re-warm-up has reached.

    Re-warm-up is linear over ``rewarmup_steps`` steps from ``start_step`` on, from ``rewarmup_from`` to 1, step by step as
    in the warm-up.
    """
    rate, taken = scheduled_rate(schedule, step), step - schedule.start_step
    if taken >= schedule.rewarmup_steps:
        return rate
    share = (taken + 1) / (schedule.rewarmup_steps + 1)
    return rate * (schedule.rewarmup_from + (1.0 - schedule.rewarmup_from) * share)


def scheduled_rate(schedule: ScheduleSettings, step: int) -> float:
    """Learning rate of ``step`` without re-warm-up.

    Warm-up is linear from ``warmup_from`` x peak to the peak at step ``warmup_steps``. Step s is at the fraction
    (s + 1) / (warmup_steps + 1) of the way, so that step 0 does not waste a batch on a rate of 0. ``cosine`` and ``linear``
    then go from the peak to the minimum, reached at ``train_steps``. ``wsd`` stays at the peak and then falls linearly over the
    last ``decay_steps`` to the minimum, reached at ``train_steps``. ``constant`` stays.
    """
    peak, lowest = schedule.learning_rate, schedule.min_learning_rate
    if step < schedule.warmup_steps:
        share = (step + 1) / (schedule.warmup_steps + 1)
        return peak * (schedule.warmup_from + (1.0 - schedule.warmup_from) * share)
    if schedule.decay in ("cosine", "linear"):
        span = schedule.train_steps - schedule.warmup_steps
        progress = min(1.0, (step - schedule.warmup_steps) / span)
        left = 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return lowest + (peak - lowest) * left
    start = schedule.train_steps - schedule.decay_steps
    if schedule.decay == "wsd" and step >= start:
        progress = min(1.0, (step - start) / schedule.decay_steps)
        return peak + (lowest - peak) * progress
    return peak


def new_parameters_ratio(settings: NewParameterSettings, taken: int) -> float:
    """Factor of the learning rate of new parameters after ``taken`` steps of the run or stage.

    It rises linearly from ``warmup_from`` x its value, step by step as in the schedule's warm-up.
    """
    if taken >= settings.warmup_steps:
        return settings.learning_rate_ratio
    share = (taken + 1) / (settings.warmup_steps + 1)
    return settings.learning_rate_ratio * (settings.warmup_from + (1.0 - settings.warmup_from) * share)


def steps_taught(run: RunSettings, step: int) -> int:
    """Number of steps since the annealing of the teacher's weight began, as ``step`` starts."""
    stated = run.distillation.start_step if run.distillation is not None else None
    return step - (run.schedule.start_step if stated is None else stated)


def distillation_weight(settings: DistillationSettings | None, step: int) -> float:
    """The a of (1 - a) CE + a T^2 KL after ``step`` steps of annealing: from ``weight`` to ``final_weight``; 0 if unset."""
    if settings is None:
        return 0.0
    return _anneal(settings.weight, settings.final_weight, settings, step)


def distillation_temperature(settings: DistillationSettings | None, step: int) -> float:
    """The T of the divergence, annealed to ``final_temperature`` in the same way if that is set; 1 if unset."""
    if settings is None:
        return 1.0
    if settings.final_temperature is None:
        return settings.temperature
    return _anneal(settings.temperature, settings.final_temperature, settings, step)


def _anneal(first: float, last: float, settings: DistillationSettings, step: int) -> float:
    progress = min(1.0, step / settings.anneal_steps)
    if settings.anneal == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    # Exactly ``last`` at the end: the engine drops the teacher when the weight is 0.
    return last if step >= settings.anneal_steps else first + (last - first) * progress


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator in ``step`` on data-parallel rank ``rank``.

    Unlike Python's ``hash``, it is the same on every machine and in every version of Python.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
