"""Runs the jobs of a study that are not done, side by side, until all are done or the time is over.

What is done is read from the disk: a trunk by its last checkpoint, a branch by its result.json. So a study that was killed
goes on where it was, and an arm that was added later uses what exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.lock import locked
from incr_ds.checkpoint.publish import MANIFEST
from incr_ds.checkpoint.runs import step_folders, step_of
from incr_ds.config.fields import parse_settings
from incr_ds.config.json_file import read_json
from incr_ds.config.study import StudySettings
from incr_ds.config.training import RunSettings
from incr_ds.data.index_file import open_index
from incr_ds.errors import CheckpointError
from incr_ds.launch.preflight import check_run
from incr_ds.study.design import Design, StudyJob, final_job, jobs, open_design
from incr_ds.study.worker import RESULT, initialize, run_job

POLL_SECONDS = 1.0
LOOK_SECONDS = 20.0  # how often a free process looks for runs that a checkpoint of another has made possible


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is: jobs and FLOPs that are done, of those that are known, and what is training now."""

    done: int
    known: int
    flops_done: float
    flops_known: float
    running: tuple[str, ...]
    seconds_left: float | None


def opened(study: StudySettings) -> Design:
    """The study's design with the learning rates that its results decide."""
    design: Design = open_design(study, lambda arm: best_rate(design, arm))
    return design


def assumed(study: StudySettings) -> Design:
    """The study's design as if the middle learning rate of every arm were the best, to see its size beforehand."""
    return open_design(study, lambda arm: _middle(study.arms[arm].learning_rates))


def check_study(study: StudySettings) -> None:
    """Raise IncrError if a run file of the study is not valid, or if data that it names is missing. Writes nothing."""
    runs = [parse_settings(job.run, RunSettings, f"the study's run {job.name}") for job in jobs(assumed(study))]
    check_run(next(run for run in runs if run.model.config is not None))
    for prefix in study.held_out.values():
        open_index(prefix)


def best_rate(design: Design, arm: str) -> float | None:
    """The learning rate with the lowest loss at the arm's first seed and largest budget; None until all are measured."""
    stated = design.study.arms[arm].learning_rates
    if len(stated) == 1:
        return stated[0]
    seed, budget = design.study.arm_seeds(arm)[0], design.study.budgets(arm)[-1]
    losses = {}
    for rate in stated:
        job = final_job(design, arm, seed, rate, budget)
        result = None if job is None else result_of(job)
        if result is None:
            return None
        losses[rate] = result.get("loss", float("inf"))
    return min(losses, key=lambda rate: losses[rate])


def result_of(job: StudyJob) -> dict[str, Any] | None:
    """What was measured after a job, or None. A trunk that diverged makes its branches diverged."""
    if job.known is not None:
        return dict(job.known)
    for folder in (Path(job.run["output"]), job.start.parents[1] if job.start and job.measured else None):
        if folder is not None and (folder / RESULT).is_file():
            return read_json(folder / RESULT, CheckpointError)
    return None


def is_done(job: StudyJob) -> bool:
    """Whether a job is finished, or can never be because its trunk diverged."""
    if job.measured is not None:
        return result_of(job) is not None
    output = Path(job.run["output"])
    return (output / RESULT).is_file() or any(
        step_of(folder) >= job.steps and (folder / MANIFEST).is_file() for folder in step_folders(output)
    )


def execute(
    study: StudySettings,
    seconds: float | None,
    report: Callable[[StudyProgress], None],
    select: Callable[[Design], tuple[StudyJob, ...]] = jobs,
) -> bool:
    """Run the jobs that ``select`` names, for at most ``seconds`` (None: to the end). Returns whether all are done.

    ``report`` hears of progress.
    """
    design, deadline = opened(study), None if seconds is None else time.monotonic() + seconds
    with locked(Path(study.output)), _pool(study) as (pool, stop):
        running: dict[Future[bool], StudyJob] = {}
        started, trained = time.monotonic(), 0.0
        try:
            while not stop.is_set():
                left = [job for job in select(design) if not is_done(job)]
                names = {job.name for job in running.values()}
                for job in left:
                    if len(running) < study.processes and job.name not in names and _can_start(job):
                        running[pool.submit(run_job, job, study)] = job
                        names.add(job.name)
                known = (select(design), select(assumed(study)))
                report(_progress(known, left, running, trained, time.monotonic() - started))
                if not running:
                    _refuse_stuck(left)
                    return True
                free = len(running) < study.processes
                for future in _wait(running, deadline, stop, LOOK_SECONDS if free else None):
                    job = running.pop(future)
                    trained += job.flops if _has_ended(future, job) else 0.0
        except BaseException:
            stop.set()
            raise
        wait(running)
        for future, job in running.items():
            _has_ended(future, job)
    return all(is_done(job) for job in select(design))


def _has_ended(future: Future[bool], job: StudyJob) -> bool:
    """Whether a job trained to its end. Raises CheckpointError if something killed its process."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"{job.run['output']}: a process of the study was killed while this run trained, perhaps because memory ran out. "
            "What is saved stays, and the same command goes on from it. If it happens again, lower processes in the study file."
        ) from error


def _wait(
    running: dict[Future[bool], StudyJob], deadline: float | None, stop: Any, longest: float | None
) -> set[Future[bool]]:
    """Wait for a job to end, at most ``longest`` seconds, or set ``stop`` at the deadline."""
    began = time.monotonic()
    while True:
        finished, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        if deadline is not None and now > deadline:
            stop.set()
        if finished or stop.is_set() or (longest is not None and now - began > longest):
            return finished


def _refuse_stuck(left: list[StudyJob]) -> None:
    """Raise CheckpointError if a run waits for a checkpoint that no run will write any more."""
    if left:
        start = Path(str(left[0].start))
        raise CheckpointError(
            f"{start}: missing, but {left[0].name} starts from it, and its own run is past that step. A study file that was "
            f"changed may need other checkpoints. Remove {start.parents[1]} to train that run again."
        )


def _can_start(job: StudyJob) -> bool:
    return job.start is None or (job.start / MANIFEST).is_file()


@contextmanager
def _pool(study: StudySettings) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that run jobs. They are spawned, so that each has its own torch and process group."""
    context = get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(study.processes, context, initialize, (stop, study.threads)) as pool:
        yield pool, stop


def _progress(
    jobs_known: tuple[tuple[StudyJob, ...], tuple[StudyJob, ...]],
    left: list[StudyJob],
    running: dict[Future[bool], StudyJob],
    trained: float,
    seconds: float,
) -> StudyProgress:
    """How far the jobs are, of those that are known and of those that are expected once all rates are decided."""
    known, in_all = jobs_known
    total, open_flops = sum(job.flops for job in known), sum(job.flops for job in left)
    expected = sum(job.flops for job in in_all)
    speed = trained / seconds if trained else None
    return StudyProgress(
        done=len(known) - len(left),
        known=len(known),
        flops_done=total - open_flops,
        flops_known=max(total, expected),
        running=tuple(job.name for job in running.values()),
        seconds_left=None if speed is None else (max(total, expected) - total + open_flops) / speed,
    )


def _middle(rates: list[float]) -> float:
    return sorted(rates)[len(rates) // 2]
