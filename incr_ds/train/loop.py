"""The story of a training run: open, build, load or resume, then train, evaluate, log and save until the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture, check_context
from incr_ds.arch.dynamics import Dynamics, read_dynamics
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.logical import LogicalCheckpoint
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError, IncrError
from incr_ds.integrity import open_described
from incr_ds.train.checkpoints import (
    TrainingState,
    changed_settings,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)
from incr_ds.train.data import (
    Samples,
    batches,
    check_vocabulary,
    data_fingerprint,
    held_out_batches,
    open_held_out_data,
    open_training_data,
)
from incr_ds.train.engine import StepResult, TrainingEngine, build_engine, initialize_distributed
from incr_ds.train.evaluation import bits_per_byte
from incr_ds.train.flops import Peak, device_peak, forward_flops_per_token, training_flops_per_token
from incr_ds.train.metrics import EvaluationRow, Position, TrainRow
from incr_ds.train.monitoring import Monitor, RunMonitor, Silence
from incr_ds.train.ranks import is_first_rank, on_rank_zero
from incr_ds.train.schedule import distillation_weight, learning_rate, temperature
from incr_ds.train.signals import StopSignals
from incr_ds.train.start import Start, find_start

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class DivergedError(IncrError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: where it stands, its newest checkpoint, and whether a signal stopped it."""

    position: Position
    checkpoint: Path
    stopped: bool


@dataclass(frozen=True)
class Data:
    """What a run reads: training and held-out samples, and the fingerprint of every data set by its prefix."""

    train: Samples
    held_out: Samples | None
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Costs:
    """Operations per token of the student's step and of the teacher's forward pass, and the peak of one process."""

    student: int
    teacher: int
    peak: Peak


@dataclass(frozen=True)
class Job:
    """One process's part of a run: everything that stays the same from step to step."""

    run: RunSettings
    architecture: Architecture
    engine: TrainingEngine
    data: Data
    costs: Costs
    monitor: Monitor
    dynamics: Mapping[str, Dynamics]


def pretrain(run: RunSettings, *, resume: bool = True) -> Outcome:
    """Train ``run`` to its last step, from its newest complete checkpoint if it has one.

    With ``resume`` false, a run that already has checkpoints is refused. SIGTERM or SIGUSR1 saves after the current
    step and returns. Raises IncrError for what the user can mend.
    """
    with StopSignals() as signals:
        initialize_distributed(run.layout)
        start = find_start(run)
        teacher = None if run.distillation is None else open_described(Path(run.distillation.teacher))
        data = open_data(run, start.architecture)
        newest = newest_complete(run, print)
        if newest is not None and not resume:
            raise ConfigError(f"--no-resume: {newest} exists; remove it, or name another output.")
        dynamics = start.dynamics if newest is None else read_dynamics(newest)
        weights = start.weights if newest is None else None
        engine = build_engine(run, start.architecture, weights, teacher, dynamics)
        try:
            state, account = load_state(engine, run, start, newest, data)
            with open_monitor(run, None if newest is None else state.position.step) as monitor:
                costs = _costs(run, start.architecture, teacher)
                job = Job(run, start.architecture, engine, data, costs, monitor, dynamics)
                _say_start(job, account)
                return train(job, state, newest, signals)
        finally:
            engine.close()


def train(job: Job, state: TrainingState, newest: Path | None, signals: StopSignals) -> Outcome:
    """Steps, evaluations and checkpoints from ``state`` to the last step or a signal; ``newest`` holds ``state``."""
    run, stopped, saved = job.run, False, -1
    feed, watch = _feed(job, state.position), Stopwatch(state.position.tokens)
    state = evaluate_if_due(job, state)
    while state.position.step < run.schedule.train_steps and not stopped:
        state = replace(state, position=train_step(job, state.position, feed, watch))
        state = evaluate_if_due(job, state)
        stopped = signals.agreed()
        step = state.position.step
        if stopped or step == run.schedule.train_steps or step % run.checkpoint.interval == 0:
            newest, saved = save_checkpoint(job.engine, run, job.architecture, state, job.dynamics), step
            job.monitor.say(f"saved {newest}")
        if step in (state.evaluated_step, saved):
            watch.restart(state.position.tokens)
    if newest is None:
        raise AssertionError("a run of at least one step ends with a checkpoint")
    _say_end(job, state.position, newest, stopped)
    return Outcome(state.position, newest, stopped)


def train_step(job: Job, before: Position, feed: Batches, watch: Stopwatch) -> Position:
    """Take one optimizer step and log it if it is due; DivergedError if its loss is not finite."""
    run = job.run
    rate = learning_rate(run.schedule, before.step)
    alpha = distillation_weight(run.distillation, before.step)
    heat = temperature(run.distillation, before.step)
    # A generator that starts anew each step makes dropout, too, a function of the step: resuming needs no state.
    torch.manual_seed(hash((run.seed, before.step, job.engine.data_parallel_rank)))
    result = job.engine.train_step(feed, learning_rate=rate, alpha=alpha, temperature=heat)
    tokens = run.batch.global_batch_size * run.batch.sequence_length
    flops = tokens * (job.costs.student + (job.costs.teacher if alpha else 0))
    after = Position(
        step=before.step + 1,
        consumed_samples=before.consumed_samples + run.batch.global_batch_size,
        tokens=before.tokens + tokens,
        flops=before.flops + flops,
    )
    _check_finite(result, after.step, rate)
    if after.step == 1 or after.step == run.schedule.train_steps or after.step % run.log_interval == 0:
        seconds, speed = watch.lap(after.tokens)
        mfu = speed * flops / tokens / (job.costs.peak.flops_per_second * run.layout.world_size)
        job.monitor.record(
            after,
            TrainRow(
                loss=result.loss,
                ce=result.ce,
                divergence=result.divergence,
                alpha=alpha,
                temperature=heat,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                skipped=result.skipped,
                tokens_per_second=speed,
                mfu=mfu,
                seconds=seconds,
            ),
        )
    return after


def evaluate_if_due(job: Job, state: TrainingState) -> TrainingState:
    """Held-out evaluation at the first and last step and every ``interval``, once per step, resumed or not."""
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


def open_data(run: RunSettings, architecture: Architecture) -> Data:
    """Open the run's data on every rank; rank 0 first, which checks it and builds the shuffled indices.

    Raises ConfigError for missing or damaged files, too few held-out samples, and tokens outside the vocabulary.
    """

    def opened(builds_index: bool) -> tuple[Samples, Samples | None]:
        cache, length = Path(run.output) / "data_index", run.batch.sequence_length
        size = run.data.start_sample + run.schedule.train_steps * run.batch.global_batch_size
        trained = open_training_data(run.data.train, length, run.seed, cache, size, builds_index=builds_index)
        if run.evaluation is None:
            return trained, None
        wanted = run.evaluation.samples
        return trained, open_held_out_data(str(run.data.validation), length, cache, wanted, builds_index=builds_index)

    def prepared() -> dict[str, str]:
        prefixes = [corpus.prefix for corpus in run.data.train]
        prefixes += [run.data.validation] if run.evaluation and run.data.validation else []
        opened(True)
        for prefix in prefixes:
            check_vocabulary(prefix, architecture.sizes["vocab"])
        return {prefix: data_fingerprint(prefix) for prefix in prefixes}

    check_context(architecture, run.batch.sequence_length, "batch.sequence_length")
    fingerprints = on_rank_zero(prepared)
    return Data(*opened(False), fingerprints)


def load_state(
    engine: TrainingEngine, run: RunSettings, start: Start, newest: Path | None, data: Data
) -> tuple[TrainingState, str]:
    """Bring the engine to where the run goes on, and say how."""
    settings = run.model_dump(mode="json")
    fresh = TrainingState(position=Position(), evaluated_step=-1, data=data.fingerprints, settings=settings)
    if newest is not None:
        state = load_checkpoint(engine, run, newest, data.fingerprints)
        changes = changed_settings(state.settings, settings)
        changed = f"; changed settings: {', '.join(changes)}" if changes else ""
        return replace(state, settings=settings), f"resumed from {newest}, step {state.position.step}{changed}"
    if start.checkpoint is not None:
        engine.load(start.checkpoint, str(start.tag))
    if start.weights is not None and start.with_moments:
        weights = start.weights
        on_rank_zero(lambda: sum(1 for _ in weights.self_check()))
        engine.fill_optimizer(weights)
    return fresh, start.account


def open_monitor(run: RunSettings, resumed_step: int | None) -> Monitor:
    """The monitor of this rank: rank 0 records and shows, the others are silent."""
    if not is_first_rank():
        return Silence()
    steps = run.schedule.train_steps
    return RunMonitor(Path(run.output), resumed_step=resumed_step, train_steps=steps, tensorboard=run.tensorboard)


class Stopwatch:
    """Seconds and tokens per second since the last lap."""

    def __init__(self, tokens: int) -> None:
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Begin a lap at ``tokens``, so that what happened before (saving, evaluation) is not counted."""
        self._time, self._tokens = time.perf_counter(), tokens

    def lap(self, tokens: int) -> tuple[float, float]:
        """Seconds since the lap began and tokens per second in it; begins the next one."""
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
    return Costs(training_flops_per_token(architecture, length, frozen), taught, device_peak(run.precision))


def _check_finite(result: StepResult, step: int, rate: float) -> None:
    if not math.isfinite(result.loss):
        raise DivergedError(
            f"step {step}: the loss is {result.loss} (ce {result.ce}, kl {result.divergence}, gradient norm "
            f"{result.gradient_norm}, learning rate {rate:.3g}); nothing was saved after it. Lower "
            "schedule.learning_rate or lengthen schedule.warmup_steps; the run resumes from its newest checkpoint."
        )


def _say_start(job: Job, account: str) -> None:
    run, layout, peak = job.run, job.run.layout, job.costs.peak
    model = f"{job.architecture.family.model_type}, {job.architecture.num_parameters:,} parameters"
    tokens = run.batch.global_batch_size * run.batch.sequence_length
    job.monitor.say(f"model: {model}; {account}")
    job.monitor.say(
        f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"ZeRO-{layout.zero_stage}, {run.precision}; {tokens:,} tokens a step in {run.accumulation_steps} micro-batches"
    )
    frozen = frozen_tensors(job.architecture, run.model.freeze)
    if frozen:
        trained = sum(spec.numel for spec in job.architecture.stored if spec.name not in frozen)
        job.monitor.say(f"model.freeze: {trained:,} of them train, and {len(frozen)} tensors stay as they are")
    if job.dynamics:
        rates = [own.lr for own in job.dynamics.values()]
        job.monitor.say(
            f"optimizer: {len(rates)} tensors at {min(rates):.4g} to {max(rates):.4g} times the learning rate, as the growth "
            "asks (optimizer.multipliers: none trains all alike)"
        )
    job.monitor.say(f"mfu is against {peak.flops_per_second / 1e9:,.0f} GFLOP/s a process ({peak.origin})")


def _say_end(job: Job, position: Position, checkpoint: Path, stopped: bool) -> None:
    how = "stopped by a signal" if stopped else "finished"
    job.monitor.say(
        f"{how} after step {position.step} of {job.run.schedule.train_steps}: {position.tokens:,} tokens, "
        f"{position.flops:.3e} FLOPs; checkpoint {checkpoint}"
    )
