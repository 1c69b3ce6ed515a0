"""Takes the steps of a run, or of one stage of a run that grows: train, evaluate, log and save when due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.multipliers import Multipliers
from incr_ds.config.training import RunSettings
from incr_ds.data.samples import batches, held_out_batches
from incr_ds.errors import IncrError
from incr_ds.train.checkpoints import (
    TrainingState,
    save_checkpoint,
    set_aside_diverged,
)
from incr_ds.train.engine import StepResult, TrainingEngine
from incr_ds.train.evaluation import bits_per_byte
from incr_ds.train.flops import Peak
from incr_ds.train.health import Health, after_step, divergence
from incr_ds.train.inputs import Data
from incr_ds.train.metrics import EvaluationRow, HeldOut, Position, TrainRow
from incr_ds.train.monitoring import Monitor
from incr_ds.train.ranks import any_rank, on_rank_zero
from incr_ds.train.schedule import distillation_temperature, distillation_weight, learning_rate, step_seed, steps_taught

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class DivergedError(IncrError):
    """The run no longer learns: its loss is not a number or rose, or its gradients are not finite."""


@dataclass(frozen=True)
class Outcome:
    """How a run or a stage ended: its state, its newest checkpoint (None: stopped before the first step), and ``stopped``.

    ``stopped`` says whether it ended on request before its last step.
    """

    state: TrainingState
    checkpoint: Path | None
    stopped: bool

    @property
    def position(self) -> Position:
        """Where it ended."""
        return self.state.position


@dataclass(frozen=True)
class Costs:
    """Operations per token of the student's step and of the teacher's forward pass, and one process's peak."""

    student: int
    teacher: int
    peak: Peak | None


@dataclass(frozen=True)
class Job:
    """One process's part of a run, or of one stage of a run that grows: everything that is the same at every step."""

    stage: int
    run: RunSettings
    architecture: Architecture
    engine: TrainingEngine
    data: Data
    costs: Costs
    monitor: Monitor
    multipliers: Mapping[str, Multipliers]


class Stop(Protocol):
    """A request to stop that this process received, by signal or otherwise."""

    @property
    def reason(self) -> str | None:
        """What requested the stop, or None."""
        ...

    def join(self) -> None:
        """Mark this process as one of a group: from now on the ranks decide together."""
        ...


@dataclass(frozen=True)
class Running:
    """A ``Stop`` without any request."""

    reason: str | None = None

    def join(self) -> None:
        """Do nothing."""


def train(job: Job, state: TrainingState, newest: Path | None, stop: Stop) -> Outcome:
    """Run steps, evaluations and checkpoints from ``state`` to the last step or a stop. ``newest`` holds ``state``.

    No checkpoint is due while the loss is too high or steps are skipped. The next one is saved when the run is healthy again.
    """
    run, last = job.run, job.run.schedule.last_step
    feed, watch = _feed(job, state.position), Stopwatch(state.position.tokens)
    stopped, due, saved = any_rank(bool(stop.reason)), False, -1
    if not stopped:
        state = evaluate_if_due(job, state)
    while state.position.step < last and not stopped:
        state = train_step(job, state, feed, watch)
        stopped = any_rank(bool(stop.reason))
        if not stopped:
            state = evaluate_if_due(job, state)
            stopped = any_rank(bool(stop.reason))
        step = state.position.step
        due = due or step == last or step % run.checkpoint.interval == 0 or step in run.checkpoint.keep_steps
        if stopped or (due and (state.health.is_good or step == last)):
            newest, saved, due = save_checkpoint(job.engine, run, job.architecture, state, job.multipliers), step, False
            job.monitor.say(f"saved {newest}")
        elif due and step % run.checkpoint.interval == 0:
            job.monitor.say(f"step {step}: not saved, because the run is not healthy: {_condition(state)}")
        if step in (state.evaluated_step, saved):
            watch.restart(state.position.tokens)
    return Outcome(state, newest, stopped and state.position.step < last)


def train_step(job: Job, state: TrainingState, feed: Batches, watch: Stopwatch) -> TrainingState:
    """Take one optimizer step, and log it if due. Raises DivergedError if the run must not continue."""
    run, before = job.run, state.position
    rate = learning_rate(run.schedule, before.step)
    taught = steps_taught(run, before.step)
    alpha = distillation_weight(run.distillation, taught)
    temperature = distillation_temperature(run.distillation, taught)
    # Reseeding at each step makes dropout a function of the step as well, so that resuming needs no generator state.
    torch.manual_seed(step_seed(run.seed, before.step, job.engine.data_parallel_rank))
    result = job.engine.train_step(feed, learning_rate=rate, alpha=alpha, temperature=temperature)
    tokens = run.batch.global_batch_size * run.batch.sequence_length
    flops = tokens * (job.costs.student + (job.costs.teacher if alpha else 0))
    after = replace(
        before,
        step=before.step + 1,
        consumed_samples=before.consumed_samples + run.batch.global_batch_size,
        tokens=before.tokens + tokens,
        flops=before.flops + flops,
    )
    health = after_step(state.health, result.ce, result.skipped, run.divergence)
    edges = (run.schedule.start_step + 1, run.schedule.last_step)
    if after.step in edges or after.step % run.log_interval == 0:
        seconds, speed = watch.lap(after.tokens)
        job.monitor.record(
            after,
            TrainRow(
                loss=result.loss,
                ce=result.ce,
                divergence=result.divergence,
                alpha=alpha,
                temperature=temperature,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                skipped=result.skipped,
                tokens_per_second=speed,
                mfu=_mfu(job, speed * flops / tokens),
                seconds=seconds,
            ),
        )
    _check_healthy(job, health, result, after.step, rate)
    return replace(state, position=after, health=health)


def evaluate_if_due(job: Job, state: TrainingState) -> TrainingState:
    """Evaluate on held-out data at the first and last step and every ``interval``, once per step, resumed or not."""
    run, step = job.run, state.position.step
    if run.evaluation is None or state.evaluated_step == step:
        return state
    if step not in (run.schedule.start_step, run.schedule.last_step) and step % run.evaluation.interval:
        return state
    start, layout = time.perf_counter(), run.layout
    rank, samples = job.engine.data_parallel_rank, run.evaluation.samples
    found = {}
    for name, held_out in job.data.held_out.items():
        feed = held_out_batches(held_out, samples, run.batch, rank, layout.data_parallel)
        loss = job.engine.evaluate(feed, samples // (run.batch.micro_batch_size * layout.data_parallel))
        found[name] = HeldOut(loss, _perplexity(loss), bits_per_byte(loss, run.data.held_out[name]))
    job.monitor.record(state.position, _evaluation_row(run, found, time.perf_counter() - start))
    return replace(state, evaluated_step=step)


def _evaluation_row(run: RunSettings, found: Mapping[str, HeldOut], seconds: float) -> EvaluationRow:
    """The means over all held-out sets, and each of them if they have names."""
    loss = fmean(each.loss for each in found.values())
    bits = [each.bits_per_byte for each in found.values() if each.bits_per_byte is not None]
    return EvaluationRow(
        loss=loss,
        perplexity=_perplexity(loss),
        bits_per_byte=fmean(bits) if len(bits) == len(found) else None,
        seconds=seconds,
        sets={} if isinstance(run.data.validation, str) else found,
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


class Stopwatch:
    """Seconds and tokens per second since the last lap."""

    def __init__(self, tokens: int) -> None:
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start a lap at ``tokens``, so that the time since the last lap (saving, evaluation) is not counted."""
        self._time, self._tokens = time.perf_counter(), tokens

    def lap(self, tokens: int) -> tuple[float, float]:
        """Seconds since the lap started and tokens per second in it. Starts the next lap."""
        seconds = time.perf_counter() - self._time
        speed = (tokens - self._tokens) / seconds
        self.restart(tokens)
        return seconds, speed


def _feed(job: Job, position: Position) -> Batches:
    if not job.engine.reads_data:
        return iter(())
    first = job.run.data.start_sample + position.consumed_samples  # also in a run that begins at a later step
    return batches(job.data.train, first, job.run.batch, job.engine.data_parallel_rank, job.run.layout.data_parallel)


def _mfu(job: Job, flops_per_second: float) -> float | None:
    peak = job.costs.peak
    return None if peak is None else flops_per_second / (peak.flops_per_second * job.run.layout.world_size)


def _check_healthy(job: Job, health: Health, result: StepResult, step: int, rate: float) -> None:
    """Raise DivergedError on all ranks if the run must not continue. Checkpoints saved since it was healthy are set aside."""
    if not math.isfinite(result.loss):
        problem: str | None = f"the loss is {result.loss} (ce {result.ce}, kl {result.divergence})"
    else:
        problem = divergence(health, job.run.divergence, is_last_step=step == job.run.schedule.last_step)
    if problem is None:
        return
    healthy = on_rank_zero(lambda: set_aside_diverged(job.run))
    resumes = f"the run resumes from {healthy}" if healthy else "there is no checkpoint to resume from"
    stage = job.stage
    rate_key, length_key = (
        (f"growth.{stage - 1}.learning_rate", f"growth.{stage - 1}.rewarmup_steps")
        if stage
        else ("schedule.learning_rate", "schedule.warmup_steps")
    )
    raise DivergedError(
        f"step {step}: {problem}; gradient norm {result.gradient_norm:.3g}, learning rate {rate:.3g}. Nothing was saved after "
        f"it. Lower {rate_key} or lengthen {length_key}; {resumes}."
    )


def _condition(state: TrainingState) -> str:
    health = state.health
    if health.risen:
        return f"cross entropy {health.smoothed:.4g}, lowest {health.lowest:.4g}, for {health.risen} step(s)"
    return f"the last {health.skipped} step(s) were skipped"
