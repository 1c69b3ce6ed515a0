"""Runs training from start to end, stage after stage: open, build, load, grow or resume, then train.

A run that does not grow has one stage. Otherwise each stage ends with a checkpoint, from which the next one grows in memory
(launch/stages.py). A checkpoint knows its stage, so a killed run resumes in it. If it is at the end of its stage, the
growth is repeated.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import marks_only, read_multipliers, without_marks
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.lock import locked
from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.data.teacher_cache import TeacherCache
from incr_ds.errors import ConfigError
from incr_ds.launch.stages import Stage, check_new_parameters, plan_stages, stage_lines
from incr_ds.report.history import note_end, note_start
from incr_ds.report.run_report import REPORT, write_report
from incr_ds.train.cached_teacher import cached_samples, first_sample, open_cache
from incr_ds.train.checkpoints import TrainingState, newest_complete, remove_unfinished, saved_state
from incr_ds.train.distributed import end_processes
from incr_ds.train.engine import TrainingEngine, build_engine, initialize_distributed
from incr_ds.train.flops import device_peak
from incr_ds.train.inputs import Data, open_data
from incr_ds.train.loop import Costs, Heart, Job, Outcome, Running, Stop, train
from incr_ds.train.metrics import GrowthRow, Position
from incr_ds.train.monitoring import Monitor, RunMonitor, Silence
from incr_ds.train.ranks import all_ranks, any_rank, is_first_rank, on_rank_zero, together
from incr_ds.train.recovery import DivergedError, may_roll_back, next_sample, rolled_back
from incr_ds.train.resuming import changed_settings, stage_in
from incr_ds.train.schedule import distillation_weight, steps_taught
from incr_ds.train.start import Start, check_growth, find_resharding, find_start
from incr_ds.train.watchdog import Watchdog


@dataclass(frozen=True)
class Session:
    """What all stages of a run share. ``start`` is how the first one starts."""

    run: RunSettings
    stages: tuple[Stage, ...]
    start: Start
    data: Data
    stop: Stop
    heart: Heart


def pretrain(run: RunSettings, *, resume: bool = True, stop: Stop | None = None) -> Outcome:
    """Train ``run`` to its last step, from its newest complete checkpoint if it has one.

    With ``resume`` false, a run that already has checkpoints is refused. ``stop`` is checked between steps: if a rank has a
    reason, all ranks save and return. Only one run may write to an output at a time. Raises IncrError for user mistakes.
    """
    initialize_distributed(run.layout)
    try:
        return train_run(run, resume=resume, stop=stop)
    finally:
        end_processes()


def train_run(run: RunSettings, *, resume: bool = True, stop: Stop | None = None) -> Outcome:
    """``pretrain`` in processes that are connected, and stay so."""
    stop = stop or Running()
    stop.join()
    start = find_start(run)
    stages = plan_stages(run, start.architecture)
    check_new_parameters(run, stages, start.multipliers)
    with ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(locked(Path(run.output))))
        on_rank_zero(lambda: remove_unfinished(run))
        heart = stack.enter_context(Watchdog(Path(run.output), all_ranks().rank, run.watchdog_seconds))
        newest = newest_complete(run, print)
        if newest is not None and not resume:
            raise ConfigError(f"--no-resume: {newest} exists; remove it, or set another output.")
        saved = None if newest is None else on_rank_zero(lambda: read_manifest(newest)["facts"])
        data = open_data(run, start.architecture, saved)
        return _train_stages(Session(run, stages, start, data, stop, heart), newest)


def _train_stages(session: Session, newest: Path | None) -> Outcome:
    """Train from the checkpoint ``newest`` to the end of the last stage, or until a stop."""
    state = None if newest is None else _resumed_state(session, newest)
    number, resumed = 0 if state is None else _next_stage(session, state), state
    with ExitStack() as screen:
        monitors: list[Monitor] = []

        def monitor() -> Monitor:
            """Opened once the first engine has what it needs, so that a refused run keeps its metrics."""
            if not monitors:
                monitors.append(screen.enter_context(open_monitor(session.run, resumed)))
                for line in (*stage_lines(session.stages), *map(str, session.data.uses)):
                    monitors[0].say(line)
            return monitors[0]

        while True:
            stage = session.stages[number]
            try:
                outcome = _train_stage(session, stage, state, newest, monitor)
            except DivergedError as error:  # on all ranks
                if not may_roll_back(session.run, error):
                    _note_end(monitor(), session, f"diverged: {error}", is_over=True)
                    together()
                    raise
                state, newest = _roll_back(session, error, monitor()), error.healthy
                number = _next_stage(session, state)
                continue
            finally:
                _free_memory()
            state, newest = outcome.state, outcome.checkpoint
            is_last = stage is session.stages[-1]
            stopped = outcome.stopped or (not is_last and any_rank(bool(session.stop.reason)))
            if stopped or is_last:
                end = _say_end(monitor(), session, replace(outcome, stopped=stopped))
                _note_end(monitor(), session, end, is_over=not stopped)
                break
            number += 1
        together()  # a launcher ends all ranks after the first, so none may end before all have closed their files
    return replace(outcome, stopped=stopped)


def _train_stage(
    session: Session,
    stage: Stage,
    state: TrainingState | None,
    newest: Path | None,
    monitor: Callable[[], Monitor],
) -> Outcome:
    """Train ``stage`` from the run's ``state``, which ``newest`` holds, or from its beginning."""
    session.heart.beat()
    began, run = time.perf_counter(), stage.run
    start, begins = _start_of(session, stage, state, newest), not _is_inside(stage, state)
    teacher, cache = _taught(session, stage, state)
    if start is not None:
        check_growth(start)
    multipliers = start.multipliers if start is not None else read_multipliers(Path(str(newest)))
    weights = None if start is None else start.weights
    engine = build_engine(run, stage.architecture, weights, teacher, multipliers)
    try:
        current, description = _loaded(engine, session, stage, state, newest, start)
        job = Job(
            stage.number,
            run,
            stage.architecture,
            engine,
            session.data,
            _costs(stage, teacher),
            monitor(),
            multipliers,
            session.heart,
            cache,
        )
        if stage.plan is not None and begins:
            job.monitor.record(current.position, _growth_row(stage, time.perf_counter() - began))
        _say_start(job, description)
        return train(job, current, newest, session.stop)
    finally:
        engine.release()


def _taught(
    session: Session, stage: Stage, state: TrainingState | None
) -> tuple[LogicalCheckpoint | None, TeacherCache | None]:
    """The teacher to build, or the cache to read instead. Neither if the teacher's weight is 0 from here on."""
    run, begun = stage.run, state if _is_inside(stage, state) else None
    step = run.schedule.start_step if begun is None else begun.position.step
    if run.distillation is None or not distillation_weight(run.distillation, steps_taught(run, step)):
        return None, None
    teacher = open_described(Path(run.distillation.teacher))
    if run.distillation.cache is None:
        return teacher, None
    first = first_sample(run) if begun is None else next_sample(run, begun)
    needed = cached_samples(run, step, first)
    return None, open_cache(run, session.data, teacher, stage.architecture.sizes["vocab"], needed)


def _start_of(session: Session, stage: Stage, state: TrainingState | None, newest: Path | None) -> Start | None:
    """How ``stage`` starts or is resharded, or None if it continues from ``newest`` in the layout of that checkpoint."""
    if newest is not None and _is_inside(stage, state):
        return find_resharding(stage.run, newest) if stage.run.resume.reshard else None
    return session.start if stage.plan is None else find_start(stage.run)


def _is_inside(stage: Stage, state: TrainingState | None) -> bool:
    """Whether the run stands in ``stage``, and not before it."""
    return state is not None and state.position.stage == stage.number


def _loaded(
    engine: TrainingEngine,
    session: Session,
    stage: Stage,
    state: TrainingState | None,
    newest: Path | None,
    start: Start | None,
) -> tuple[TrainingState, str]:
    """Load what the stage continues from or starts with. Returns the state, and a description of it."""
    settings = session.run.model_dump(mode="json")
    changes = [] if state is None else changed_settings(state.settings, settings)
    changed = f"; changed settings: {', '.join(changes)}" if changes else ""
    if newest is not None and state is not None and _is_inside(stage, state):
        resumed = f"resumed from {newest}, step {state.position.step}"
        if start is None:
            engine.load(newest, f"global_step{state.position.step}")
        elif start.weights is not None:
            engine.fill_optimizer(start.weights)  # whose bytes the manifest has proven
            resumed += f", {start.description}"
        data = session.data
        state = replace(state, settings=settings, data=data.fingerprints, past_mixes=data.past)
        return state, resumed + changed
    assert start is not None
    load_start(engine, start)
    position = begin(stage.run) if state is None else replace(state.position, stage=stage.number)
    fresh = TrainingState(
        position=position,
        evaluated_step=-1,
        data=session.data.fingerprints,
        settings=settings,
        past_mixes=session.data.past,
    )
    return fresh, start.description + changed


def load_start(engine: TrainingEngine, start: Start) -> None:
    """Load what an engine built from ``start`` needs besides weights."""
    if start.checkpoint is not None:
        engine.load(start.checkpoint, str(start.tag))
    if start.weights is not None and start.with_moments:
        weights = start.weights
        on_rank_zero(lambda: sum(1 for _ in weights.self_check()))
        engine.fill_optimizer(weights)


def begin(run: RunSettings) -> Position:
    """The position at which ``run`` begins: samples and tokens of the steps before its first count, their FLOPs do not."""
    step = run.schedule.start_step
    samples = run.batch.samples_between(0, step)
    return Position(step=step, consumed_samples=samples, tokens=samples * run.batch.sequence_length)


def _resumed_state(session: Session, newest: Path) -> TrainingState:
    """The state that ``newest`` holds. Raises ConfigError or LayoutError unless the run continues it."""
    run = session.run
    number = on_rank_zero(lambda: stage_in(newest, read_manifest(newest)["facts"], run))
    stage = session.stages[number]
    return saved_state(run, newest, session.data.fingerprints, stage.architecture, stage.run.layout)


def _roll_back(session: Session, error: DivergedError, monitor: Monitor) -> TrainingState:
    """Go back to the newest healthy checkpoint. It is read like that of a run that resumes."""
    healthy = error.healthy
    assert healthy is not None
    monitor.say(f"{error} Going back to it.")
    state, row = rolled_back(session.run, error, _resumed_state(session, healthy))
    monitor.rewind(state.position, state.evaluated_step)
    monitor.record(state.position, row)
    return state


def _next_stage(session: Session, state: TrainingState) -> int:
    """The stage to train next: the state's own, or the one after it if that is over, with its last evaluation."""
    number = state.position.stage
    run, step = session.stages[number].run, state.position.step
    evaluated = run.evaluation is None or state.evaluated_step == step
    over = step >= run.schedule.last_step and evaluated and number + 1 < len(session.stages)
    return number + 1 if over else number


def open_monitor(run: RunSettings, resumed: TrainingState | None) -> Monitor:
    """The monitor of this rank: rank 0 records and prints, the others are silent. ``resumed`` is where the run resumes.

    If rank 0 cannot open it, all ranks raise the error.
    """
    opened: list[Monitor] = []
    on_rank_zero(lambda: opened.append(_run_monitor(run, resumed)))
    return opened[0] if opened else Silence()


def _run_monitor(run: RunSettings, resumed: TrainingState | None) -> RunMonitor:
    content = run.model_dump(mode="json")
    note_start(Path(run.output), content)
    position, evaluated = (None, None) if resumed is None else (resumed.position, resumed.evaluated_step)
    return RunMonitor(
        Path(run.output),
        resumed=position,
        evaluated_step=evaluated,
        train_steps=run.schedule.last_step,
        tensorboard=run.tensorboard,
        wandb=run.wandb,
        config=content,
    )


def _growth_row(stage: Stage, seconds: float) -> GrowthRow:
    plan, origin = stage.plan, stage.run.model.initialize_from
    assert plan is not None and isinstance(origin, GrowthStart)
    before, after = plan.source.num_parameters, plan.target.num_parameters
    return GrowthRow(
        recipe=origin.recipe,
        parameters_before=before,
        parameters=after,
        function_preserving=plan.function_preserving,
        seconds=seconds,
    )


def _free_memory() -> None:
    """Free the memory of a stage's engine, which holds references to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _costs(stage: Stage, teacher: LogicalCheckpoint | None) -> Costs:
    run, length = stage.run, stage.run.batch.sequence_length
    taught = 0 if teacher is None else forward_flops_per_token(teacher.architecture, length)
    frozen = frozen_tensors(stage.architecture, run.model.freeze)
    return Costs(training_flops_per_token(stage.architecture, length, frozen), taught, device_peak(run.peak_flops))


def _say_start(job: Job, description: str) -> None:
    run, layout, peak = job.run, job.run.layout, job.costs.peak
    model = f"{job.architecture.family.model_type}, {job.architecture.num_parameters:,} parameters"
    sizes = " then ".join(
        f"{size * run.batch.sequence_length:,} tokens per step in {run.accumulation_at(step)} micro-batches"
        for step, size in run.batch.changes_between(run.schedule.start_step, run.schedule.last_step)
    )
    ranks = run.batch.sequence_parallel
    shared = "" if ranks == 1 else f"; {ranks} data-parallel ranks share each sample"
    job.monitor.say(f"model: {model}; {description}")
    job.monitor.say(
        f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"ZeRO-{layout.zero_stage}, {run.precision}; {sizes}{shared}"
    )
    if job.cache is not None:
        facts = job.cache.facts
        job.monitor.say(
            f"teacher: {facts.top_k:,} of {facts.vocabulary:,} entries from {job.cache.folder}; FLOPs do not count it"
        )
    frozen = frozen_tensors(job.architecture, run.model.freeze)
    if frozen:
        trained = sum(spec.numel for spec in job.architecture.stored if spec.name not in frozen)
        job.monitor.say(f"model.freeze: {trained:,} of them train, and {len(frozen)} tensors stay unchanged")
    multiplied = without_marks(job.multipliers)
    if multiplied:
        rates = [own.lr for own in multiplied.values()]
        job.monitor.say(
            f"optimizer: {len(rates)} tensors train with {min(rates):.4g} to {max(rates):.4g} times the learning rate, as the "
            "growth requires (optimizer.multipliers: none trains all alike)"
        )
    fresh, apart = marks_only(job.multipliers), run.optimizer.new_parameters
    if apart is not None and fresh:
        job.monitor.say(
            f"optimizer.new_parameters: {len(fresh)} tensors of new layers train with {apart.learning_rate_ratio:g} times the "
            f"learning rate, after {apart.warmup_steps} steps of warm-up from {apart.warmup_from:g} of that"
        )
    if peak is not None:
        job.monitor.say(f"mfu is relative to {peak.flops_per_second / 1e12:,.0f} TFLOP/s per process ({peak.origin})")


def _say_end(monitor: Monitor, session: Session, outcome: Outcome) -> str:
    """Show how the run ended. Returns it in short."""
    position, checkpoint = outcome.position, outcome.checkpoint
    reason = session.stop.reason or "another rank's request"
    end = f"{f'stopped by {reason}' if outcome.stopped else 'finished'} after step {position.step}"
    monitor.say(
        f"{end} of {session.run.schedule.last_step}: {position.tokens:,} tokens, {position.flops:.3e} FLOPs; "
        f"{f'checkpoint {checkpoint}' if checkpoint else 'nothing to save yet'}"
    )
    return end


def _note_end(monitor: Monitor, session: Session, end: str, *, is_over: bool) -> None:
    """Keep how the run ended, and write its report if it is over. A report that cannot be written changes nothing else.

    A run that was asked to stop has little time left. It ends at once, and tools/report.py can write its report.
    """
    output = Path(session.run.output)
    if not is_first_rank():
        return
    try:
        note_end(output, end)
        if session.run.report and is_over:
            write_report([output], output / REPORT)
            monitor.say(f"report: {output / REPORT}")
    except Exception as error:
        monitor.say(f"{output / REPORT}: not written ({error}); tools/report.py {output} writes it")
