"""Takes the steps of a run, or of one stage of a run that grows: train, evaluate, log and save when due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.multipliers import Multipliers
from incr_ds.config.training import RunSettings
from incr_ds.data.samples import batches, held_out_batches
from incr_ds.data.slices import slices
from incr_ds.data.teacher_cache import TeacherCache
from incr_ds.train.batches import Batch
from incr_ds.train.checkpoints import (
    PendingSave,
    TrainingState,
    begin_save,
    prune,
    set_aside_diverged,
)
from incr_ds.train.engine import StepResult, TrainingEngine
from incr_ds.train.evaluation import bits_per_byte
from incr_ds.train.flops import Peak
from incr_ds.train.health import after_step, divergence
from incr_ds.train.inputs import Data
from incr_ds.train.metrics import EvaluationRow, HeldOut, Position, TrainRow
from incr_ds.train.monitoring import Monitor
from incr_ds.train.ranks import all_ranks, any_rank, on_rank_zero
from incr_ds.train.recovery import DivergedError, next_sample
from incr_ds.train.saving import Saver
from incr_ds.train.schedule import (
    distillation_temperature,
    distillation_weight,
    learning_rate,
    new_parameters_ratio,
    step_seed,
    steps_taught,
)
from incr_ds.train.skew import OwnWork, Skew, host, skew
from incr_ds.train.stopwatch import Lap, Stopwatch, memory_bytes

Batches = Iterator[Batch]


class Heart(Protocol):
    """Receives a sign of life from the training loop, as a watchdog does."""

    def beat(self) -> None:
        """Report that the process works."""
        ...


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
    heart: Heart
    cache: TeacherCache | None = None

    def begin(self, state: TrainingState) -> PendingSave:
        """Begin to save ``state``."""
        self.heart.beat()
        return begin_save(self.engine, self.run, self.architecture, state, self.multipliers)

    def prune(self, newest: Path) -> None:
        """Delete the checkpoints that need not be kept beside ``newest``."""
        on_rank_zero(lambda: prune(self.run, newest))


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
    watch = Stopwatch(state.position.tokens)
    feed = watch.waiting(_feed(job, state))
    saver = Saver(job, run.checkpoint, newest, job.monitor.say)
    stopped, due = any_rank(bool(stop.reason)), False
    if not stopped:
        state = evaluate_if_due(job, state)
    while state.position.step < last and not stopped:
        state, problem = train_step(job, state, feed, watch)
        if problem is not None:
            saver.finish()
            raise _diverged(job, state, problem)
        stopped = any_rank(bool(stop.reason))
        if not stopped:
            state = evaluate_if_due(job, state)
            stopped = any_rank(bool(stop.reason))
        step = state.position.step
        due = (
            due or saver.due or step == last or step % run.checkpoint.interval == 0 or step in run.checkpoint.keep_steps
        )
        saves = stopped or (due and (state.health.is_good or step == last))
        if saves:
            with watch.saving():
                saver.save(state, must=stopped or step == last)
            due = False
        elif due and step % run.checkpoint.interval == 0:
            job.monitor.say(f"step {step}: not saved, because the run is not healthy: {_condition(state)}")
        with watch.saving():
            published = saver.poll()
        if published or saves or step == state.evaluated_step:
            watch.restart(state.position.tokens)
        job.heart.beat()
    return Outcome(state, saver.newest, stopped and state.position.step < last)


def train_step(job: Job, state: TrainingState, feed: Batches, watch: Stopwatch) -> tuple[TrainingState, str | None]:
    """Take one optimizer step, and log it if due or skipped. Returns the reason, if any, why the run must not continue."""
    run, before = job.run, state.position
    samples = run.batch.size_at(before.step)
    rate = learning_rate(run.schedule, before.step)
    alpha, temperature = _teaching(job, before.step)
    # Reseeding at each step makes dropout a function of the step as well, so that resuming needs no generator state.
    torch.manual_seed(step_seed(run.seed, before.step, job.engine.data_parallel_rank))
    ratio = _new_ratio(job, before.step)
    result = job.engine.train_step(
        feed,
        learning_rate=rate,
        alpha=alpha,
        temperature=temperature,
        new_ratio=1.0 if ratio is None else ratio,
        global_batch_size=samples,
    )
    after, flops = _advance(job, before, samples, taught=bool(alpha), skipped=result.skipped)
    health = after_step(state.health, result.ce, result.skipped, run.divergence)
    edges = (run.schedule.start_step + 1, run.schedule.last_step)
    if result.skipped or not math.isfinite(result.loss):
        job.monitor.say(_bad_batch(job, state, result))
    if result.skipped or after.step in edges or after.step % run.log_interval == 0:
        lap, memory = watch.lap(after.tokens), memory_bytes()
        slow = _skew(job, lap, after.step)
        speed = (
            lap.tokens_per_second * flops / (after.tokens - before.tokens) / run.layout.world_size
        )  # of one process, in FLOP/s
        job.monitor.record(
            after,
            TrainRow(
                loss=result.loss,
                ce=result.ce,
                divergence=result.divergence if alpha else None,
                alpha=alpha,
                temperature=temperature,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                skipped=result.skipped,
                loss_scale=result.loss_scale,
                router_loss=None if result.routing is None else result.routing.loss,
                expert_load=None if result.routing is None else result.routing.expert_load,
                tflops_per_rank=speed / 1e12,
                mfu=_share_of_peak(job, speed),
                memory_bytes=memory[0],
                peak_memory_bytes=memory[1],
                slowest_rank=None if slow is None else slow.slowest.rank,
                slowest_ratio=None if slow is None else slow.ratio,
                new_learning_rate=None if ratio is None else rate * ratio,
                **asdict(lap),
            ),
        )
    # A step that was skipped has left the weights as they were, whatever its loss.
    if not math.isfinite(result.loss) and not result.skipped:
        problem: str | None = f"the loss is {result.loss} (ce {result.ce}, kl {result.divergence})"
    else:
        problem = divergence(health, run.divergence, is_last_step=after.step == run.schedule.last_step)
    if problem is not None:
        problem += f"; gradient norm {result.gradient_norm:.3g}, learning rate {rate:.3g}"
    return replace(state, position=after, health=health), problem


def _advance(job: Job, before: Position, samples: int, *, taught: bool, skipped: bool) -> tuple[Position, float]:
    """The position after one step of ``samples``, and the FLOPs of the step."""
    tokens = samples * job.run.batch.sequence_length
    flops = tokens * (job.costs.student + (job.costs.teacher if taught else 0))
    after = replace(
        before,
        step=before.step + 1,
        consumed_samples=before.consumed_samples + samples,
        tokens=before.tokens + tokens,
        flops=before.flops + flops,
        skipped_steps=before.skipped_steps + skipped,
    )
    return after, flops


def _new_ratio(job: Job, step: int) -> float | None:
    """Factor of the learning rate of new parameters. None if the run has none with a rate of their own."""
    settings = job.run.optimizer.new_parameters
    if settings is None or not any(own.new for own in job.multipliers.values()):
        return None
    return new_parameters_ratio(settings, step - job.run.schedule.start_step)


def _teaching(job: Job, step: int) -> tuple[float, float]:
    """Weight and temperature of the teacher. Once the weight is 0 it stays 0, and the teacher's memory is freed."""
    settings, taught = job.run.distillation, steps_taught(job.run, step)
    alpha = distillation_weight(settings, taught)
    if not alpha and job.engine.forget_teacher():
        job.monitor.say(f"step {step}: the teacher's weight is 0 from here on, and its memory is freed")
    return alpha, distillation_temperature(settings, taught)


def evaluate_if_due(job: Job, state: TrainingState) -> TrainingState:
    """Evaluate on held-out data at the first and last step and every ``interval``, once per step, resumed or not."""
    run, step = job.run, state.position.step
    if run.evaluation is None or state.evaluated_step == step:
        return state
    if step not in (run.schedule.start_step, run.schedule.last_step) and step % run.evaluation.interval:
        return state
    start = time.perf_counter()
    samples = run.evaluation.samples
    found = {}
    for name, held_out in job.data.held_out.items():
        feed = _own_slices(job, held_out_batches(held_out, samples, run.batch, _sample_rank(job), run.sample_ranks))
        count = samples // (run.batch.micro_batch_size * run.sample_ranks)
        means = job.engine.evaluate(feed, count, taught=_asks_teacher(run, step))
        bits = bits_per_byte(means.ce, run.data.held_out[name])
        found[name] = HeldOut(means.ce, _perplexity(means.ce), bits, means.teacher_kl)
    job.monitor.record(state.position, _evaluation_row(run, found, time.perf_counter() - start))
    return replace(state, evaluated_step=step)


def _asks_teacher(run: RunSettings, step: int) -> bool:
    """Whether an evaluation after ``step`` steps asks the teacher: if it runs, and its weight in the next step is above 0.

    A cached teacher does not run, and its cache has no held-out tokens.
    """
    settings = run.distillation
    return (
        settings is not None and settings.cache is None and bool(distillation_weight(settings, steps_taught(run, step)))
    )


def _evaluation_row(run: RunSettings, found: Mapping[str, HeldOut], seconds: float) -> EvaluationRow:
    """The means over all held-out sets, and each of them if they have names."""
    loss = fmean(each.loss for each in found.values())
    bits = [each.bits_per_byte for each in found.values() if each.bits_per_byte is not None]
    distances = [each.teacher_kl for each in found.values() if each.teacher_kl is not None]
    return EvaluationRow(
        loss=loss,
        perplexity=_perplexity(loss),
        bits_per_byte=fmean(bits) if len(bits) == len(found) else None,
        teacher_kl=fmean(distances) if distances else None,
        seconds=seconds,
        sets={} if isinstance(run.data.validation, str) else found,
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _feed(job: Job, state: TrainingState) -> Batches:
    if not job.engine.reads_data:
        return iter(())
    first = next_sample(job.run, state)
    rank, size = _sample_rank(job), job.run.sample_ranks
    cache = job.cache if job.engine.computes_loss else None
    return _own_slices(job, batches(job.data.train, first, job.run.batch, rank, size, cache, state.position.step))


def _sample_rank(job: Job) -> int:
    """Index of the part of the global batch that this rank reads, alone or with the ranks that share its samples."""
    return job.engine.data_parallel_rank // job.run.batch.sequence_parallel


def _own_slices(job: Job, feed: Batches) -> Batches:
    """This rank's slices of the samples in ``feed``."""
    ranks = job.run.batch.sequence_parallel
    return feed if ranks == 1 else slices(feed, job.engine.data_parallel_rank % ranks, ranks)


def _skew(job: Job, lap: Lap, step: int) -> Skew | None:
    """Compare the ranks' own work since the last lap, and name one that delays the others. All ranks call this."""
    forward, ranks = job.engine.forward_seconds(), all_ranks()
    if forward is None:
        return None
    batch = job.run.batch
    steps = batch.steps_back(step, round(lap.tokens_per_second * lap.seconds / batch.sequence_length))
    mine = OwnWork(ranks.rank, host(), job.engine.stage, forward + lap.data_seconds / steps)
    found = skew(ranks.gather(mine), lap.seconds / steps, job.run.slow_rank_ratio)
    if found.counts:
        job.monitor.say(f"step {step}: {found}")
    return found


def _share_of_peak(job: Job, flops_per_second: float) -> float | None:
    peak = job.costs.peak
    return None if peak is None else flops_per_second / peak.flops_per_second


def _diverged(job: Job, state: TrainingState, problem: str) -> DivergedError:
    """The error of a run that must not continue, on all ranks. Checkpoints saved since it was healthy are set aside."""
    healthy = on_rank_zero(lambda: set_aside_diverged(job.run))
    resumes = f"the run resumes from {healthy}" if healthy else "there is no checkpoint to resume from"
    stage = job.stage
    rate_key, length_key = (
        (f"growth.{stage - 1}.learning_rate", f"growth.{stage - 1}.rewarmup_steps")
        if stage
        else ("schedule.learning_rate", "schedule.warmup_steps")
    )
    tried = f" It went back {state.roll_backs} time(s) (divergence.max_roll_backs)." if state.roll_backs else ""
    message = (
        f"step {state.position.step}: {problem}. Nothing was saved after it.{tried} Lower {rate_key} or lengthen {length_key}; "
        f"{resumes}."
    )
    return DivergedError(message, state, problem, healthy)


def _bad_batch(job: Job, state: TrainingState, result: StepResult) -> str:
    """A line that names the samples of a step whose loss or gradients are not finite. ``state`` is the one before it."""
    first = next_sample(job.run, state)
    last = first + job.run.batch.size_at(state.position.step) - 1
    effect = "the step was skipped" if result.skipped else "the weights have changed"
    scale = "" if result.loss_scale is None else f", loss scale {result.loss_scale:g}"
    return (
        f"step {state.position.step + 1}: not finite: loss {result.loss:.6g}, gradient norm {result.gradient_norm:.6g}{scale}, "
        f"on samples {first} to {last}; {effect}"
    )


def _condition(state: TrainingState) -> str:
    health = state.health
    if health.risen:
        return f"cross entropy {health.smoothed:.4g}, lowest {health.lowest:.4g}, for {health.risen} step(s)"
    return f"the last {health.skipped} step(s) were skipped"
