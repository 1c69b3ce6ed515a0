"""A short trial of every recipe of a study: a few hundred steps after growth, and the order of their losses.

A probe is the beginning of the study's own trunks, so the study goes on from it later. Early losses can mislead: the summary of
a finished study says how well they predicted its ranking (``probe``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from incr_ds.checkpoint.runs import step_of
from incr_ds.errors import ConfigError
from incr_ds.study.design import Design, StudyJob, jobs
from incr_ds.study.execution import is_done
from incr_ds.study.summary import mean_loss, training_losses


@dataclass(frozen=True)
class Probed:
    """The mean training loss of an arm over the last steps of its probe, and before its growth."""

    arm: str
    before: float
    loss: float


def probe_jobs(design: Design, steps: int) -> tuple[StudyJob, ...]:
    """The first ``steps`` of every grown arm's trunk at its largest budget, and the runs that they start from.

    Each with its first seed and one learning rate: the chosen one, or the first that is stated. Raises ConfigError if an arm's
    trunk is shorter.
    """
    planned = {job.name: job for job in jobs(replace(design, choose=lambda arm: _rate(design, arm)))}
    chosen: dict[str, StudyJob] = {}
    for trunk in _grown_trunks(design, planned):
        if trunk.steps < steps:
            raise ConfigError(f"--probe {steps}: {trunk.name} has only {trunk.steps} steps; probe fewer.")
        for job in _sources(planned, trunk):
            chosen[job.name] = job
        chosen[trunk.name] = _beginning(trunk, steps)
    return tuple(chosen.values())


def ranking(design: Design, steps: int) -> list[Probed]:
    """The arms whose probe is done, the lowest loss first."""
    found = []
    for job in probe_jobs(design, steps):
        if job.of_source and is_done(job):
            source = job.before[-1]
            before = mean_loss(training_losses(source.parents[1]), step_of(source))
            after = mean_loss(training_losses(Path(job.run["output"])), steps)
            found.append(Probed(job.trunk.arm, before, after))
    return sorted(found, key=lambda probed: probed.loss)


def _rate(design: Design, arm: str) -> float:
    return design.choose(arm) or design.study.arms[arm].learning_rates[0]


def _grown_trunks(design: Design, planned: dict[str, StudyJob]) -> Iterator[StudyJob]:
    study = design.study
    for job in planned.values():
        trunk = job.trunk
        first = trunk.seed == study.arm_seeds(trunk.arm)[0] and trunk.rate == _rate(design, trunk.arm)
        if job.measured is None and first and trunk.budget == study.budgets(trunk.arm)[-1]:
            yield job


def _sources(planned: dict[str, StudyJob], job: StudyJob) -> Iterator[StudyJob]:
    """The runs that wrote the checkpoints before ``job``, as far as its growth."""
    for checkpoint in job.before:
        source = next(one for one in planned.values() if Path(one.run["output"]) == checkpoint.parents[1])
        yield source if source.measured else _beginning(source, step_of(checkpoint))


def _beginning(trunk: StudyJob, steps: int) -> StudyJob:
    """The first ``steps`` of a trunk's run."""
    schedule = {**trunk.run["schedule"], "train_steps": steps}
    return replace(trunk, run={**trunk.run, "schedule": schedule}, steps=steps, flops=trunk.flops * steps / trunk.steps)
