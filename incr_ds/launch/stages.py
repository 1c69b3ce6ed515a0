"""Plans the stages of a run that grows: the part before its first growth, and one part after each growth.

A stage is an ordinary run. Its model starts as the growth of the checkpoint that the stage before it saves at its end, and
its schedule is a part of the whole run's. So each stage can also be run alone (docs/progressive.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, check_context, saved_architecture
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import Multipliers, marks_only, read_multipliers, without_marks
from incr_ds.arch.training import check_trainable, check_vocabularies, router_factor
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.runs import step_folder
from incr_ds.config.distillation import BEFORE_GROWTH, DistillationSettings
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.stages import GrowthStep
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.errors import ConfigError, IncrError, LayoutError
from incr_ds.growth.advice import Trained, advise
from incr_ds.growth.changes import load_recipe
from incr_ds.growth.multipliers import grown_multipliers
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.launch.balance import placed
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.launch.model_states import ELEMENT
from incr_ds.sharding.expert_products import grouped_experts
from incr_ds.sharding.optimizer_groups import group_count, set_apart
from incr_ds.sharding.placement import check_layout

STATED = "stated"
Describe = Callable[[Path, str | None], Architecture]


def _opened(folder: Path, tag: str | None) -> Architecture:
    """The model of a checkpoint that is there in whole."""
    return open_described(folder, tag).architecture


@dataclass(frozen=True)
class Stage:
    """One stage: an ordinary run of ``architecture`` from step run.schedule.start_step to run.schedule.last_step.

    ``plan`` is the growth that it begins with (None: the run's first stage). ``rewarmup`` says where its re-warm-up comes
    from.
    """

    number: int
    run: RunSettings
    architecture: Architecture
    plan: GrowthPlan | None = None
    rewarmup: str = STATED

    @property
    def first_step(self) -> int:
        """Number of steps that the run has taken when the stage begins."""
        return self.run.schedule.start_step

    @property
    def last_step(self) -> int:
        """Number of steps that the run has taken when the stage ends."""
        return self.run.schedule.last_step


def first_architecture(run: RunSettings, describe: Describe = _opened) -> Architecture:
    """The model that the run begins with, by its config.json, its checkpoint folder, or its source and recipe.

    ``describe`` gives the model of a folder and a tag.
    """
    origin = run.model.initialize_from
    if origin is None:
        return saved_architecture(Path(str(run.model.config)))
    if isinstance(origin, str):
        return describe(Path(origin), run.model.tag)
    source = describe(Path(origin.source), run.model.tag)
    return _planned(source, origin.recipe).target


def plan_stages(run: RunSettings, first: Architecture) -> tuple[Stage, ...]:
    """The stages of ``run``, which begins with the model ``first``. A run without growth has one, which is the run itself.

    Every recipe is planned for the model before it, and every stage checked: its layout, context, frozen tensors, teacher
    and schedule. Raises the error of the first stage that cannot be trained, with the key ``growth.N``.
    """
    teaching = _teaching(run, 0)
    if not run.growth and teaching == run.distillation:
        return (Stage(0, placed(run, first), first),)
    end = run.growth[0].at_step if run.growth else run.schedule.last_step
    stages = [Stage(0, placed(_derived(run, 0, run, {"end_step": end}), first), first)]
    if run.growth:
        check_stage(stages[0])
    for number in range(1, len(run.growth) + 1):
        with _named(f"growth.{number - 1}"):
            stages.append(_grown_stage(run, stages[-1], number))
            check_stage(stages[-1])
            deepspeed_config(stages[-1].run)
    return tuple(stages)


def check_recipe_layout(recipe: GrowthRecipe, where: str, layout: ParallelLayout) -> None:
    """Raise LayoutError if a recipe that is applied on load states other degrees than the run's ``layout``."""
    stated = recipe.layout.model_fields_set if "layout" in recipe.model_fields_set else set()
    ours, theirs = layout.model_dump(), recipe.layout.model_dump()
    differing = [
        f"{key} {theirs[key]} (this run: {ours[key]})" for key in sorted(stated & set(ours)) if theirs[key] != ours[key]
    ]
    if differing:
        raise LayoutError(
            f"{where}: layout states {', '.join(differing)}. The run file decides the layout of a growth on load: remove "
            "layout from the recipe, or make the two agree."
        )


def stage_lines(stages: Sequence[Stage]) -> list[str]:
    """What each stage trains, and how, for the user; empty for a run that does not grow."""
    return [f"stage {stage.number}: {'; '.join(_facts(stage))}" for stage in stages] if len(stages) > 1 else []


def _planned(source: Architecture, recipe: str) -> GrowthPlan:
    return plan_growth(source, load_recipe(Path(recipe), lambda: source), recipe)


def _grown_stage(run: RunSettings, before: Stage, number: int) -> Stage:
    step = run.growth[number - 1]
    plan = _planned(before.architecture, step.recipe)
    # As it is stated: balanced stages are others for another model.
    layout = next((each.layout for each in reversed(run.growth[:number]) if each.layout is not None), run.layout)
    check_recipe_layout(plan.recipe, step.recipe, layout)
    rate = step.learning_rate or before.run.schedule.learning_rate
    ramp, reason = _rewarmup(step, plan, before.run, rate)
    end = run.growth[number].at_step if number < len(run.growth) else run.schedule.last_step
    schedule = {"start_step": step.at_step, "end_step": end, "learning_rate": rate, **ramp}
    source = {"source": _checkpoint(run, step), "recipe": step.recipe}
    changes: dict[str, Any] = {
        "layout": layout.model_dump(),
        "model": {"config": None, "tag": None, "initialize_from": source, "load_optimizer": True},
    }
    if step.micro_batch_size is not None:
        changes["batch"] = {"micro_batch_size": step.micro_batch_size}
    grown = placed(_derived(run, number, before.run, schedule, **changes), plan.target)
    return Stage(number, grown, plan.target, plan, reason)


def _derived(
    run: RunSettings, number: int, before: RunSettings, schedule: dict[str, Any], **sections: dict[str, Any]
) -> RunSettings:
    """The ordinary run of stage ``number``: that of the stage before it, with keys of its sections replaced."""
    content = before.model_dump()
    for name, changes in {"schedule": schedule, **sections}.items():
        content[name] = {**content[name], **changes}
    teaching = _teaching(run, number)
    content |= {"growth": [], "distillation": None if teaching is None else teaching.model_dump()}
    advised = number > 0 and run.growth[number - 1].rewarmup_steps is None
    hint = " (the re-warm-up is the advised one; state rewarmup_steps for another)" if advised else ""
    return parse_settings(content, RunSettings, f"the run from step {content['schedule']['start_step']} on{hint}")


def _teaching(run: RunSettings, number: int) -> DistillationSettings | None:
    """The section distillation of stage ``number``, with its teacher's folder and the step that it counts from."""
    stated, since = run.distillation, run.schedule.start_step
    for step in run.growth[:number]:
        if step.distillation != "keep":
            stated, since = None if step.distillation == "none" else step.distillation, step.at_step
    if stated is None or (number == 0 and stated.teacher != BEFORE_GROWTH):
        return stated
    if stated.teacher != BEFORE_GROWTH:
        return stated if stated.start_step is not None else stated.model_copy(update={"start_step": since})
    origin = run.model.initialize_from
    if number == 0:  # the growth on load, if there is one, is the newest
        return stated.model_copy(update={"teacher": origin.source}) if isinstance(origin, GrowthStart) else None
    step = run.growth[number - 1]
    return stated.model_copy(update={"teacher": _checkpoint(run, step), "start_step": step.at_step})


def _checkpoint(run: RunSettings, step: GrowthStep) -> str:
    """The checkpoint that a growth starts from."""
    return str(step_folder(Path(run.output), step.at_step))


def _rewarmup(step: GrowthStep, plan: GrowthPlan, before: RunSettings, rate: float) -> tuple[dict[str, Any], str]:
    """The keys of the schedule's re-warm-up after a growth to the peak ``rate``, and where they come from."""
    if step.rewarmup_steps is not None:
        return {"rewarmup_steps": step.rewarmup_steps, "rewarmup_from": step.rewarmup_from or 0.0}, STATED
    optimizer = before.optimizer.model_dump(include={"betas", "eps", "weight_decay"})
    group = {"lr": before.schedule.learning_rate, **optimizer}
    trained = Trained({"schedule": {"learning_rate": rate}}, [group], bool(before.model.freeze))
    advices = {advice.key: advice for advice in advise(plan, trained, None) if advice.section == "schedule"}
    length, start = advices.get("warmup_steps"), advices.get("warmup_from")
    reasons = "; ".join(advice.reason for advice in (start, length) if advice is not None)
    found = {"rewarmup_steps": length.value if length else 0, "rewarmup_from": start.value if start else 0.0}
    return found, f"advised for this growth: {reasons}" if reasons else "nothing grows"


def check_stage(stage: Stage) -> None:
    """Refuse what would fail when the stage's engine is built."""
    run, architecture = stage.run, stage.architecture
    check_trainable(architecture)
    check_layout(architecture, run.layout)
    router_factor(run.loss, architecture)
    grouped_experts(run.model.experts, architecture, run.layout.tensor_parallel, ELEMENT[run.precision])
    check_context(architecture, run.batch.sequence_length, "batch.sequence_length")
    frozen = frozen_tensors(architecture, run.model.freeze)
    follows = run.optimizer.multipliers == "checkpoint"
    apart = set_apart(run.optimizer.name, architecture)
    multipliers = {}
    if stage.plan is not None:
        multipliers = grown_multipliers(stage.plan, {}, set_apart(run.optimizer.name, stage.plan.source))
    if not follows:
        multipliers = marks_only(multipliers)
    if run.optimizer.new_parameters is None:
        multipliers = without_marks(multipliers)
    group_count(architecture, run.layout, multipliers, frozen, apart)


def check_new_parameters(run: RunSettings, stages: Sequence[Stage], start: Mapping[str, Multipliers]) -> None:
    """Raise ConfigError if optimizer.new_parameters is set, and neither the model that the run starts with nor a growth on
    the way has new layers. ``start`` says which tensors of the former are new."""
    plans = [stage.plan for stage in stages if stage.plan is not None]
    if run.optimizer.new_parameters is None or marks_only(start):
        return
    if not any(layer.is_new for plan in plans for layer in plan.layers):
        origin = run.model.initialize_from or run.model.config
        where = origin.source if isinstance(origin, GrowthStart) else origin
        raise ConfigError(
            f"optimizer.new_parameters: nothing is new: neither the growth of {where} nor one on the way adds layers, or the "
            "checkpoint is older than this key. Width growth adds no tensors. Remove the key, or grow in depth."
        )


def starting_multipliers(run: RunSettings, describe: Describe = _opened) -> Mapping[str, Multipliers]:
    """The multipliers, and marks of new tensors, that the model which the run begins with has."""
    origin = run.model.initialize_from
    if not isinstance(origin, GrowthStart):
        return {} if origin is None else read_multipliers(Path(origin))
    plan = _planned(describe(Path(origin.source), run.model.tag), origin.recipe)
    return grown_multipliers(plan, read_multipliers(Path(origin.source)))


def check_teachers(stages: Sequence[Stage], describe: Describe = _opened) -> tuple[Architecture | None, ...]:
    """The teacher of each stage (None: it has none), each checked against its stage's model and layout.

    Raises an error if a teacher has another vocabulary than the model, or does not fit its layout.
    """
    return tuple(_checked_teacher(stages, stage, describe) for stage in stages)


def _checked_teacher(stages: Sequence[Stage], stage: Stage, describe: Describe) -> Architecture | None:
    if stage.run.distillation is None:
        return None
    teacher = _teacher(stages, stage.run.distillation.teacher, describe)
    with _named(f"growth.{stage.number - 1}" if stage.number else "layout"):
        check_vocabularies(stage.architecture, teacher)
        check_layout(teacher, stage.run.layout.of_teacher)
        check_trainable(teacher)
    return teacher


def _teacher(stages: Sequence[Stage], folder: str, describe: Describe) -> Architecture:
    """The model in ``folder``, which may be what a stage before will save there."""
    for before, stage in zip(stages, stages[1:], strict=False):
        origin = stage.run.model.initialize_from
        if isinstance(origin, GrowthStart) and origin.source == folder:
            return before.architecture
    return describe(Path(folder), None)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Begin the messages of errors with ``key``."""
    try:
        yield
    except IncrError as error:
        raise type(error)(f"{key}: {error}") from error


def _facts(stage: Stage) -> Iterator[str]:
    run, schedule = stage.run, stage.run.schedule
    yield f"steps {stage.first_step + 1} to {stage.last_step}"
    by = ""
    if stage.plan is not None and isinstance(run.model.initialize_from, GrowthStart):
        keeps = "keeps the function" if stage.plan.function_preserving else "does not keep the function"
        by = f", grown from {stage.plan.source.num_parameters:,} by {run.model.initialize_from.recipe}, which {keeps}"
    yield f"{stage.architecture.family.model_type}, {stage.architecture.num_parameters:,} parameters{by}"
    layout = run.layout
    yield (
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"ZeRO-{layout.zero_stage}, {' then '.join(map(str, run.accumulations))} micro-batches of {run.batch.micro_batch_size}"
    )
    yield f"peak learning rate {schedule.learning_rate:g}"
    if stage.plan is not None:
        length = f"{schedule.rewarmup_steps} steps from {schedule.rewarmup_from:g} of the rate"
        yield f"re-warm-up {length if schedule.rewarmup_steps else 'none'} ({stage.rewarmup})"
    taught = run.distillation
    yield "no teacher" if taught is None else f"teacher {taught.teacher}, weight {taught.weight:g}"
