"""Turns a study file into runs: ordinary run files, and which checkpoint each of them starts from. Pure: it opens no checkpoint.

An arm trains one trunk at a constant learning rate. From checkpoints of the trunk, branches decay the rate to zero, and only a
branch's final loss counts. A grown arm's trunk starts from a checkpoint of its source's, by growth on load. All runs of a seed
read the same samples in the same order. Positions are counted in optimizer steps since the first sample, the source's included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, saved_architecture
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.checkpoint.runs import step_folder
from incr_ds.config.fields import merged
from incr_ds.config.study import ArmSettings, StudySettings
from incr_ds.errors import ConfigError
from incr_ds.study.known import Key, read_known

# The learning rate of an arm at its first seed's largest budget: None while it is not decided.
Choice = Callable[[str], float | None]


@dataclass(frozen=True)
class Trunk:
    """A trunk: ``first`` is the position where it starts. ``budget`` is None if it serves all budgets of its arm."""

    arm: str
    seed: int
    rate: float
    budget: int | None
    first: int

    @property
    def folder(self) -> str:
        """Its folder below the study's output."""
        budget = "" if self.budget is None else f"-budget{self.budget}"
        return f"{self.arm}/seed{self.seed}-lr{self.rate:g}{budget}"


@dataclass(frozen=True)
class Measured:
    """What the loss after a branch belongs to: a budget, the fraction of it, and the branch's last position."""

    budget: int
    fraction: float
    position: int


@dataclass(frozen=True)
class StudyJob:
    """One run of a study: ``trunk`` itself, or, with ``measured``, a branch of it.

    ``run`` is the content of its run file, ``start`` the checkpoint that must exist first. ``before`` are the checkpoints whose
    costs come before this run's, the source's first; the first ``of_source`` of them are the source's. ``recipe`` is written
    beside the run file. ``flops`` are the run's own, as predicted. ``known`` is what an earlier run of the study measured.
    """

    name: str
    trunk: Trunk
    run: dict[str, Any]
    steps: int
    flops: float
    start: Path | None = None
    before: tuple[Path, ...] = ()
    of_source: int = 0
    recipe: dict[str, Any] | None = None
    measured: Measured | None = None
    known: Mapping[str, Any] | None = None

    @property
    def final(self) -> Path:
        """The checkpoint after its last step."""
        return self.checkpoint(self.steps)

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` steps of this run."""
        return step_folder(Path(self.run["output"]), step)


@dataclass(frozen=True)
class Design:
    """A study with its models, and the results that are known without running it, by branch.

    ``choose`` gives the learning rate of an arm, or None while it is not decided.
    """

    study: StudySettings
    choose: Choice
    models: dict[str, Architecture] = field(default_factory=dict)
    known: Mapping[Key, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        batch = self.study.common["batch"]
        return int(batch["global_batch_size"] * batch["sequence_length"])

    def steps(self, tokens_per_parameter: float) -> int:
        """The position after ``tokens_per_parameter`` of the target."""
        target = self.models[self.study.target].num_parameters
        return max(1, round(tokens_per_parameter * target / self.step_tokens))


def open_design(study: StudySettings, choose: Choice) -> Design:
    """Read the models of a study. Raises ConfigError for a config that is missing or not valid."""
    models = {name: saved_architecture(Path(path)) for name, path in study.models.items()}
    return Design(study, choose, models, read_known(study.known, identity(study, models)))


def identity(study: StudySettings, models: Mapping[str, Architecture]) -> dict[str, Any]:
    """The settings that the result of a branch depends on, beside what identifies it. Models are compared by their sizes."""
    shared = study.model_dump(mode="json", include={"target", "decay", "common", "held_out", "held_out_samples"})
    kept = {"model", "growth", "warmup_steps", "warmup_from", "distillation"}
    return {
        **shared,
        "models": {name: _description(model) for name, model in models.items()},
        "arms": {name: arm.model_dump(mode="json", include=kept) for name, arm in study.arms.items()},
    }


def _description(model: Architecture) -> dict[str, Any]:
    return {"model_type": model.family.model_type, "tied": model.tied, **model.sizes}


def jobs(design: Design) -> tuple[StudyJob, ...]:
    """All runs whose learning rates are decided, each after the runs that it starts from; the first seed of all arms first.

    Trunks that no branch needs any more are left out.
    """
    return _needed(_all_jobs(design))


def _all_jobs(design: Design) -> tuple[StudyJob, ...]:
    return tuple(
        job
        for seed in design.study.seeds
        for arm in design.study.arms
        if seed in design.study.arm_seeds(arm)
        for rate in _rates(design, arm, seed)
        for trunk in _trunks(design, arm, seed, rate)
        for job in _runs(design, trunk)
    )


def _needed(planned: tuple[StudyJob, ...]) -> tuple[StudyJob, ...]:
    """All branches, and the trunks that those start from which are not known. A known branch that one starts from is run."""
    by_output = {Path(job.run["output"]): job for job in planned}
    used: set[Path] = set()
    waiting = [job for job in planned if job.measured and job.known is None]
    while waiting:
        start = waiting.pop().start
        if start is not None and start.parents[1] not in used:
            used.add(start.parents[1])
            waiting.append(by_output[start.parents[1]])
    kept = ((job, Path(job.run["output"]) in used) for job in planned)
    return tuple(replace(job, known=None) if is_used else job for job, is_used in kept if job.measured or is_used)


def final_job(design: Design, arm: str, seed: int, rate: float, budget: int) -> StudyJob | None:
    """The last branch of an arm at ``budget``: the run whose loss decides between learning rates."""
    found = [
        job
        for trunk in _trunks(design, arm, seed, rate)
        if trunk.budget in (None, budget)
        for job in _runs(design, trunk)
        if job.measured and job.measured.budget == budget
    ]
    return found[-1] if found else None


def _rates(design: Design, arm: str, seed: int) -> list[float]:
    """The first seed tries all learning rates, the others take the best of them."""
    stated = design.study.arms[arm].learning_rates
    if seed == design.study.arm_seeds(arm)[0]:
        return stated
    chosen = design.choose(arm)
    return [] if chosen is None else [chosen]


def _trunks(design: Design, arm: str, seed: int, rate: float) -> list[Trunk]:
    own = design.study.arms[arm]
    if own.growth is None:
        return [Trunk(arm, seed, rate, None, 0)]
    if design.choose(own.growth.source) is None:
        return []
    return [
        Trunk(arm, seed, rate, budget, design.steps(own.growth.at * budget)) for budget in design.study.budgets(arm)
    ]


def _runs(design: Design, trunk: Trunk) -> Iterator[StudyJob]:
    """A trunk's run and those of its branches."""
    branches = list(_branches(design, trunk))
    kept = sorted({_decay_start(design, end) for _, _, end in branches} | _growth_positions(design, trunk))
    source = _source_job(design, trunk)
    job = _trunk_job(design, trunk, kept, source)
    yield job
    for budget, fraction, end in branches:
        yield _branch_job(design, trunk, job, Measured(budget, fraction, end))


def _branches(design: Design, trunk: Trunk) -> Iterator[tuple[int, float, int]]:
    """Budget, fraction and last position of every branch."""
    for budget in design.study.budgets(trunk.arm):
        for fraction in design.study.arms[trunk.arm].branches if trunk.budget in (None, budget) else ():
            yield budget, fraction, design.steps(budget * fraction)


def _growth_positions(design: Design, trunk: Trunk) -> set[int]:
    """Where other arms grow from this trunk."""
    study = design.study
    return {
        design.steps(arm.growth.at * budget)
        for name, arm in study.arms.items()
        if arm.growth and arm.growth.source == trunk.arm and not arm.growth.decayed
        for budget in study.budgets(name)
        if trunk.seed in study.arm_seeds(name) and trunk.budget in (None, budget)
    }


def _decay_start(design: Design, end: int) -> int:
    return end - max(1, round(design.study.decay * end))


def _source_job(design: Design, trunk: Trunk) -> tuple[StudyJob, Path] | None:
    """The job and the checkpoint that a grown trunk starts from."""
    growth = design.study.arms[trunk.arm].growth
    if growth is None:
        return None
    rate = design.choose(growth.source)
    for source in _trunks(design, growth.source, trunk.seed, rate) if rate else ():
        if source.budget in (None, trunk.budget):
            runs = list(_runs(design, source))
            if not growth.decayed and runs:
                return runs[0], runs[0].checkpoint(trunk.first - source.first)
            for job in runs:
                if job.measured and job.measured.position == trunk.first:
                    return job, job.final
    raise ConfigError(
        f"arms.{trunk.arm}.growth: {growth.source} has no branch that ends at {growth.at} of the budget {trunk.budget}; add its "
        "position to the source's budgets."
    )


def _trunk_job(design: Design, trunk: Trunk, kept: list[int], source: tuple[StudyJob, Path] | None) -> StudyJob:
    arm = design.study.arms[trunk.arm]
    name = f"{trunk.folder}/trunk"
    output = f"{design.study.output}/{name}"
    steps = [position - trunk.first for position in kept]
    schedule = {
        "train_steps": steps[-1],
        "learning_rate": trunk.rate,
        "decay": "constant",
        "warmup_steps": min(arm.warmup_steps, steps[-1]),
        "warmup_from": arm.warmup_from,
    }
    own: dict[str, Any] = {"schedule": schedule, "checkpoint": {"keep_steps": steps}}
    teacher_flops = 0.0
    if source is None:
        own["model"] = {"config": design.study.models[arm.model]}
    else:
        own["model"] = {"initialize_from": {"source": str(source[1]), "recipe": f"{output}/recipe.yaml"}}
        if arm.distillation:
            own["distillation"] = _distillation(design, trunk, arm, source[1], steps[0])
            teacher = design.models[design.study.arms[arm.growth.source].model]  # type: ignore[union-attr]
            teacher_flops = own["distillation"]["anneal_steps"] * design.step_tokens * _forward(design, teacher)
    flops = steps[-1] * _step_flops(design, arm.model) + teacher_flops
    before = () if source is None else (*source[0].before, source[1])
    return StudyJob(
        name=name,
        trunk=trunk,
        run=_run_file(design, trunk, output, trunk.first, own),
        steps=steps[-1],
        flops=flops,
        start=None if source is None else source[1],
        before=before,
        of_source=len(before),
        recipe=None if source is None else _recipe(design, arm),
    )


def _branch_job(design: Design, trunk: Trunk, trunk_job: StudyJob, measured: Measured) -> StudyJob:
    start = _decay_start(design, measured.position)
    steps = measured.position - start
    name = f"{trunk.folder}/branch-{measured.position}"
    checkpoint = trunk_job.checkpoint(start - trunk.first)
    schedule = {"train_steps": steps, "learning_rate": trunk.rate, "decay": "wsd", "decay_steps": steps}
    own = {"schedule": schedule, "model": {"initialize_from": str(checkpoint)}, "checkpoint": {"keep_last": 1}}
    return StudyJob(
        name=name,
        trunk=trunk,
        run=_run_file(design, trunk, f"{design.study.output}/{name}", start, own),
        steps=steps,
        flops=steps * _step_flops(design, design.study.arms[trunk.arm].model),
        start=checkpoint,
        before=(*trunk_job.before, checkpoint),
        of_source=trunk_job.of_source,
        measured=measured,
        known=design.known.get((trunk.arm, trunk.seed, trunk.rate, measured.budget, measured.position)),
    )


def _run_file(design: Design, trunk: Trunk, output: str, first: int, own: dict[str, Any]) -> dict[str, Any]:
    samples = first * design.study.common["batch"]["global_batch_size"]
    stated = merged(design.study.common, own)
    return merged(stated, {"output": output, "seed": trunk.seed, "data": {"start_sample": samples}})


def _distillation(design: Design, trunk: Trunk, arm: ArmSettings, teacher: Path, first_branch: int) -> dict[str, Any]:
    taught = arm.distillation
    assert taught is not None
    steps = max(1, round(taught.share * (design.steps(float(trunk.budget or 0)) - trunk.first)))
    if steps > first_branch:
        raise ConfigError(
            f"arms.{trunk.arm}.distillation.share {taught.share}: it ends after {steps} steps, but the first branch leaves the "
            f"trunk after {first_branch}; lower share."
        )
    return {
        "teacher": str(teacher),
        "weight": taught.weight,
        "final_weight": taught.final_weight,
        "anneal_steps": steps,
    }


def _recipe(design: Design, arm: ArmSettings) -> dict[str, Any]:
    """The arm's recipe with the config fields that change between the two models as its target."""
    assert arm.growth is not None
    before = design.models[design.study.arms[arm.growth.source].model].config
    after = design.models[arm.model].config
    target = {key: value for key, value in after.items() if before.get(key) != value}
    return {**arm.growth.recipe, "target": target}


def _step_flops(design: Design, model: str) -> float:
    length = design.study.common["batch"]["sequence_length"]
    return float(design.step_tokens * training_flops_per_token(design.models[model], length))


def _forward(design: Design, model: Architecture) -> float:
    return float(forward_flops_per_token(model, design.study.common["batch"]["sequence_length"]))
