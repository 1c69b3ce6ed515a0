"""Runs training from start to end: open, build, load or resume, then train, evaluate, log and save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import Multipliers, read_multipliers
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.lock import locked
from incr_ds.config.training import RunSettings
from incr_ds.data.samples import batches, held_out_batches
from incr_ds.errors import ConfigError, IncrError
from incr_ds.train.checkpoints import (
    TrainingState,
    load_checkpoint,
    newest_complete,
    remove_unfinished,
    save_checkpoint,
    set_aside_diverged,
)
from incr_ds.train.engine import StepResult, TrainingEngine, build_engine, initialize_distributed
from incr_ds.train.evaluation import bits_per_byte
from incr_ds.train.flops import Peak, device_peak, forward_flops_per_token, training_flops_per_token
from incr_ds.train.health import Health, after_step, divergence
from incr_ds.train.inputs import Data, open_data
from incr_ds.train.metrics import EvaluationRow, Position, TrainRow
from incr_ds.train.monitoring import Monitor, RunMonitor, Silence
from incr_ds.train.ranks import any_rank, is_first_rank, on_rank_zero, together
from incr_ds.train.resuming import changed_settings
from incr_ds.train.schedule import distillation_temperature, distillation_weight, learning_rate, step_seed
from incr_ds.train.start import Start, check_growth, find_start

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class DivergedError(IncrError):
    """The run no longer learns: its loss is not a number or rose, or its gradients are not finite."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its position, its newest checkpoint (None: stopped before the first step), and ``stopped``.

    ``stopped`` says whether it ended on request before its last step.
    """

    position: Position
    checkpoint: Path | None
    stopped: bool


@dataclass(frozen=True)
class Costs:
    """Operations per token of the student's step and of the teacher's forward pass, and one process's peak."""

    student: int
    teacher: int
    peak: Peak | None


@dataclass(frozen=True)
class Job:
    """One process's part of a run: everything that is the same at every step."""

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


def pretrain(run: RunSettings, *, resume: bool = True, stop: Stop | None = None) -> Outcome:
    """Train ``run`` to its last step, from its newest complete checkpoint if it has one.

    With ``resume`` false, a run that already has checkpoints is refused. ``stop`` is checked between steps: if a rank has a
    reason, all ranks save and return. Only one run may write to an output at a time. Raises IncrError for user mistakes.
    """
    stop = stop or Running()
    initialize_distributed(run.layout)
    stop.join()
    start = find_start(run)
    teacher = None if run.distillation is None else open_described(Path(run.distillation.teacher))
    with ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(locked(Path(run.output))))
        on_rank_zero(lambda: remove_unfinished(run))
        data = open_data(run, start.architecture)
        newest = newest_complete(run, print)
        if newest is not None and not resume:
            raise ConfigError(f"--no-resume: {newest} exists; remove it, or set another output.")
        return _train_from(run, start, teacher, newest, data, stop)


def _train_from(
    run: RunSettings, start: Start, teacher: LogicalCheckpoint | None, newest: Path | None, data: Data, stop: Stop
) -> Outcome:
    multipliers = start.multipliers if newest is None else read_multipliers(newest)
    weights = start.weights if newest is None else None
    if newest is None:
        check_growth(start)
    engine = build_engine(run, start.architecture, weights, teacher, multipliers)
    try:
        state, description = load_state(engine, run, start, newest, data)
        with open_monitor(run, None if newest is None else state.position.step) as monitor:
            costs = _costs(run, start.architecture, teacher)
            job = Job(run, start.architecture, engine, data, costs, monitor, multipliers)
            _say_start(job, description)
            outcome = train(job, state, newest, stop)
        together()  # a launcher ends all ranks after the first, so none may end before all have closed their files
        return outcome
    finally:
        engine.close()


def train(job: Job, state: TrainingState, newest: Path | None, stop: Stop) -> Outcome:
    """Run steps, evaluations and checkpoints from ``state`` to the last step or a stop. ``newest`` holds ``state``.

    No checkpoint is due while the loss is too high or steps are skipped. The next one is saved when the run is healthy again.
    """
    run, last = job.run, job.run.schedule.train_steps
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
    stopped = stopped and state.position.step < last
    _say_end(job, state.position, newest, stop.reason or "another rank's request" if stopped else None)
    return Outcome(state.position, newest, stopped)


def train_step(job: Job, state: TrainingState, feed: Batches, watch: Stopwatch) -> TrainingState:
    """Take one optimizer step, and log it if due. Raises DivergedError if the run must not continue."""
    run, before = job.run, state.position
    rate = learning_rate(run.schedule, before.step)
    alpha = distillation_weight(run.distillation, before.step)
    temperature = distillation_temperature(run.distillation, before.step)
    # Reseeding at each step makes dropout a function of the step as well, so that resuming needs no generator state.
    torch.manual_seed(step_seed(run.seed, before.step, job.engine.data_parallel_rank))
    result = job.engine.train_step(feed, learning_rate=rate, alpha=alpha, temperature=temperature)
    tokens = run.batch.global_batch_size * run.batch.sequence_length
    flops = tokens * (job.costs.student + (job.costs.teacher if alpha else 0))
    after = Position(
        step=before.step + 1,
        consumed_samples=before.consumed_samples + run.batch.global_batch_size,
        tokens=before.tokens + tokens,
        flops=before.flops + flops,
    )
    health = after_step(state.health, result.ce, result.skipped, run.divergence)
    if after.step == 1 or after.step == run.schedule.train_steps or after.step % run.log_interval == 0:
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
    if run.evaluation is None or job.data.held_out is None or state.evaluated_step == step:
        return state
    if step not in (0, run.schedule.train_steps) and step % run.evaluation.interval:
        return state
    start, layout = time.perf_counter(), run.layout
    rank, samples = job.engine.data_parallel_rank, run.evaluation.samples
    feed = held_out_batches(job.data.held_out, samples, run.batch, rank, layout.data_parallel)
    loss = job.engine.evaluate(feed, samples // (run.batch.micro_batch_size * layout.data_parallel))
    values = EvaluationRow(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=bits_per_byte(loss, str(run.data.validation)),
        seconds=time.perf_counter() - start,
    )
    job.monitor.record(state.position, values)
    return replace(state, evaluated_step=step)


def load_state(
    engine: TrainingEngine, run: RunSettings, start: Start, newest: Path | None, data: Data
) -> tuple[TrainingState, str]:
    """Load what the run continues from, and return the state and a description of it."""
    settings = run.model_dump(mode="json")
    fresh = TrainingState(position=Position(), evaluated_step=-1, data=data.fingerprints, settings=settings)
    if newest is not None:
        state = load_checkpoint(engine, run, newest, data.fingerprints, start.architecture)
        changes = changed_settings(state.settings, settings)
        changed = f"; changed settings: {', '.join(changes)}" if changes else ""
        return replace(state, settings=settings), f"resumed from {newest}, step {state.position.step}{changed}"
    if start.checkpoint is not None:
        engine.load(start.checkpoint, str(start.tag))
    if start.weights is not None and start.with_moments:
        weights = start.weights
        on_rank_zero(lambda: sum(1 for _ in weights.self_check()))
        engine.fill_optimizer(weights)
    return fresh, start.description


def open_monitor(run: RunSettings, resumed_step: int | None) -> Monitor:
    """The monitor of this rank: rank 0 records and prints, the others are silent."""
    if not is_first_rank():
        return Silence()
    steps = run.schedule.train_steps
    return RunMonitor(Path(run.output), resumed_step=resumed_step, train_steps=steps, tensorboard=run.tensorboard)


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
    first = job.run.data.start_sample + position.consumed_samples
    return batches(job.data.train, first, job.run.batch, job.engine.data_parallel_rank, job.run.layout.data_parallel)


def _costs(run: RunSettings, architecture: Architecture, teacher: LogicalCheckpoint | None) -> Costs:
    length = run.batch.sequence_length
    taught = 0 if teacher is None else forward_flops_per_token(teacher.architecture, length)
    frozen = frozen_tensors(architecture, run.model.freeze)
    return Costs(training_flops_per_token(architecture, length, frozen), taught, device_peak(run.peak_flops))


def _mfu(job: Job, flops_per_second: float) -> float | None:
    peak = job.costs.peak
    return None if peak is None else flops_per_second / (peak.flops_per_second * job.run.layout.world_size)


def _check_healthy(job: Job, health: Health, result: StepResult, step: int, rate: float) -> None:
    """Raise DivergedError on all ranks if the run must not continue. Checkpoints saved since it was healthy are set aside."""
    if not math.isfinite(result.loss):
        problem: str | None = f"the loss is {result.loss} (ce {result.ce}, kl {result.divergence})"
    else:
        problem = divergence(health, job.run.divergence, is_last_step=step == job.run.schedule.train_steps)
    if problem is None:
        return
    healthy = on_rank_zero(lambda: set_aside_diverged(job.run))
    resumes = f"the run resumes from {healthy}" if healthy else "there is no checkpoint to resume from"
    raise DivergedError(
        f"step {step}: {problem}; gradient norm {result.gradient_norm:.3g}, learning rate {rate:.3g}. Nothing was saved after "
        f"it. Lower schedule.learning_rate or lengthen schedule.warmup_steps; {resumes}."
    )


def _condition(state: TrainingState) -> str:
    health = state.health
    if health.risen:
        return f"cross entropy {health.smoothed:.4g}, lowest {health.lowest:.4g}, for {health.risen} step(s)"
    return f"the last {health.skipped} step(s) were skipped"


def _say_start(job: Job, description: str) -> None:
    run, layout, peak = job.run, job.run.layout, job.costs.peak
    model = f"{job.architecture.family.model_type}, {job.architecture.num_parameters:,} parameters"
    tokens = run.batch.global_batch_size * run.batch.sequence_length
    job.monitor.say(f"model: {model}; {description}")
    job.monitor.say(
        f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"ZeRO-{layout.zero_stage}, {run.precision}; {tokens:,} tokens per step in {run.accumulation_steps} micro-batches"
    )
    frozen = frozen_tensors(job.architecture, run.model.freeze)
    if frozen:
        trained = sum(spec.numel for spec in job.architecture.stored if spec.name not in frozen)
        job.monitor.say(f"model.freeze: {trained:,} of them train, and {len(frozen)} tensors stay unchanged")
    if job.multipliers:
        rates = [own.lr for own in job.multipliers.values()]
        job.monitor.say(
            f"optimizer: {len(rates)} tensors train with {min(rates):.4g} to {max(rates):.4g} times the learning rate, as the "
            "growth requires (optimizer.multipliers: none trains all alike)"
        )
    if peak is not None:
        job.monitor.say(f"mfu is relative to {peak.flops_per_second / 1e12:,.0f} TFLOP/s per process ({peak.origin})")


def _say_end(job: Job, position: Position, checkpoint: Path | None, reason: str | None) -> None:
    how = "finished" if reason is None else f"stopped by {reason}"
    job.monitor.say(
        f"{how} after step {position.step} of {job.run.schedule.train_steps}: {position.tokens:,} tokens, "
        f"{position.flops:.3e} FLOPs; {f'checkpoint {checkpoint}' if checkpoint else 'nothing to save yet'}"
    )
