"""Resolves a run with every number that follows from its run file, for a layout of any size, without its processes.

Only config.json files and recipes are read. A run without growth needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from incr_ds.arch.architecture import Architecture, check_context, saved_architecture
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import FILE
from incr_ds.arch.training import check_trainable, check_vocabularies
from incr_ds.config.distillation import BEFORE_GROWTH
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.data.index_file import open_index
from incr_ds.data.mixture import CorpusUse, corpus_uses
from incr_ds.errors import ConfigError
from incr_ds.launch.balance import placed
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.launch.preflight import missing_here
from incr_ds.launch.rank_plan import PipelineStage, holdings, plan_ranks
from incr_ds.launch.retention import CheckpointSize, OnDisk, checkpoint_size, on_disk, saved_steps
from incr_ds.launch.unevenness import uneven
from incr_ds.sharding.placement import check_layout

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Speed:
    """An assumption: the share ``mfu`` of ``peak_flops``, one device's operations per second."""

    mfu: float
    peak_flops: float


@dataclass(frozen=True)
class RunPart:
    """A stage of the run: all of it, or what lies before, between or after its growths.

    ``taught_steps`` are those in which the teacher runs. FLOPs are of the whole part, all ranks together.
    """

    number: int
    run: RunSettings
    architecture: Architecture
    teacher: Architecture | None
    pipeline: tuple[PipelineStage, ...]
    checkpoint: CheckpointSize
    taught_steps: int
    student_flops: int
    teacher_flops: int
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.run.schedule.last_step - self.run.schedule.start_step

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(number of steps, samples of each) for every size of the global batch."""
        return self.run.batch.spans(self.run.schedule.start_step, self.run.schedule.last_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the first step's global batch."""
        return self.spans[0][1] * self.run.batch.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(steps * size for steps, size in self.spans) * self.run.batch.sequence_length

    @property
    def flops(self) -> int:
        """Operations of student and teacher."""
        return self.student_flops + self.teacher_flops

    @property
    def bubble(self) -> float:
        """The share of the time in which a pipeline stage waits for others, if all stages are equally fast."""
        waits = self.run.layout.pipeline_parallel - 1
        works = sum(steps * count for (steps, _), count in zip(self.spans, self.run.accumulations, strict=True))
        return waits * self.steps / (works + waits * self.steps)

    def seconds(self, speed: Speed) -> float:
        """Time at ``speed``."""
        return self.flops / (speed.mfu * speed.peak_flops * self.run.layout.world_size)


@dataclass(frozen=True)
class DryRun:
    """A resolved run. ``missing`` says what it needs and this machine lacks. Without ``speed`` there is no time.

    ``data`` has the corpora that are on this machine.
    """

    run: RunSettings
    parts: tuple[RunPart, ...]
    disk: OnDisk
    data: tuple[CorpusUse, ...]
    missing: tuple[str, ...]
    speed: Speed | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(part.tokens for part in self.parts)

    @property
    def flops(self) -> int:
        """Operations of the whole run, teachers included."""
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float | None:
        """Time of the whole run at ``speed``."""
        return None if self.speed is None else sum(part.seconds(self.speed) for part in self.parts)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all devices together at ``speed``."""
        if self.speed is None:
            return None
        busy = (part.seconds(self.speed) * part.run.layout.world_size for part in self.parts)
        return sum(busy) / SECONDS_PER_HOUR


def dry_run(run: RunSettings, speed: Speed | None = None) -> DryRun:
    """Resolve ``run``. Raises IncrError if its models, layouts, batch or DeepSpeed settings cannot be trained."""
    unknown = _unknown_marks(run)
    if run.optimizer.new_parameters is not None and not unknown:
        _check_new_parameters(run)
    parts = tuple(_parts(run))
    growths = [step.at_step for step in run.growth]
    steps = saved_steps(run.checkpoint, run.schedule.start_step, run.schedule.last_step, growths)
    sizes = [next(part.checkpoint for part in parts if step <= part.run.schedule.last_step) for step in steps]
    disk = on_disk(run.checkpoint, steps, growths, sizes)
    missing = (*missing_here(run), *unknown)
    return DryRun(run, parts, disk, tuple(corpus_uses(run, _tokens_here(run))), missing, speed)


def _check_new_parameters(run: RunSettings) -> None:
    """Refuse optimizer.new_parameters as the run would, if nothing is new."""
    from incr_ds.launch.stages import check_new_parameters, first_architecture, plan_stages, starting_multipliers

    stages = plan_stages(run, first_architecture(run, _described)) if run.growth else ()
    check_new_parameters(run, stages, starting_multipliers(run, _described))


def _unknown_marks(run: RunSettings) -> list[str]:
    """What a run with optimizer.new_parameters needs of a folder of which only config.json is here."""
    origin = run.model.initialize_from
    if run.optimizer.new_parameters is None or origin is None:
        return []
    folder = Path(origin.source if isinstance(origin, GrowthStart) else origin)
    if any(path.is_file() and path.name != "config.json" for path in folder.rglob("*")):
        return []
    return [f"{folder / FILE}: no such file; it says which layers are new for optimizer.new_parameters."]


def _tokens_here(run: RunSettings) -> dict[str, int]:
    """Tokens of the training corpora that are on this machine; the others are reported as missing."""
    found = {}
    for corpus in run.data.train:
        with suppress(ConfigError):
            found[corpus.prefix] = open_index(corpus.prefix).num_tokens
    return found


def stated_speed(run: RunSettings, mfu: float | None, peak_tflops: float | None) -> Speed | None:
    """The speed that a user assumes. Raises ConfigError for a share or a peak that cannot be, or one without the other."""
    if mfu is None:
        if peak_tflops is not None:
            raise ConfigError("--peak-tflops: has no effect without --mfu, the share of the peak to assume.")
        return None
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak above 0 and at most 1, for example 0.4.")
    peak = run.peak_flops if peak_tflops is None else peak_tflops * 1e12
    if peak is None:
        raise ConfigError(
            "--mfu: a share of which peak? State --peak-tflops, one device's peak in TFLOP/s (H100: 989 in dense bf16), or "
            "peak_flops in the run file."
        )
    if not peak > 0:
        raise ConfigError(f"--peak-tflops {peak_tflops:g}: expected a positive number.")
    return Speed(mfu, peak)


def _parts(run: RunSettings) -> Iterator[RunPart]:
    taught_by_itself = run.distillation is not None and run.distillation.teacher == BEFORE_GROWTH
    if not (run.growth or taught_by_itself or isinstance(run.model.initialize_from, GrowthStart)):
        yield _single_part(run)
        return
    # It plans growths, for which torch is needed.
    from incr_ds.launch.stages import check_stage, check_teachers, first_architecture, plan_stages

    stages = plan_stages(run, first_architecture(run, _described))
    for stage, teacher in zip(stages, check_teachers(stages, _described), strict=True):
        check_stage(stage)
        yield _part(stage.number, stage.run, stage.architecture, teacher)


def _single_part(run: RunSettings) -> RunPart:
    origin = run.model.config if run.model.config is not None else str(run.model.initialize_from)
    is_file = run.model.config is not None
    architecture = saved_architecture(Path(origin)) if is_file else _described(Path(origin), run.model.tag)
    teacher = None
    if run.distillation is not None:
        teacher = _described(Path(run.distillation.teacher), None)
        check_vocabularies(architecture, teacher)
        check_layout(teacher, run.layout.of_teacher)
        check_trainable(teacher)
    check_trainable(architecture)
    check_layout(architecture, run.layout)
    check_context(architecture, run.batch.sequence_length, "batch.sequence_length")
    return _part(0, placed(run, architecture), architecture, teacher)


def _part(number: int, run: RunSettings, architecture: Architecture, teacher: Architecture | None) -> RunPart:
    deepspeed_config(run)
    if run.distillation is not None and run.distillation.cache is not None:
        teacher = None  # it ran before, in tools/cache_teacher.py
    length, first = run.batch.sequence_length, run.schedule.start_step
    frozen = frozen_tensors(architecture, run.model.freeze)
    taught = taught_steps(run)
    tokens = run.batch.samples_between(first, run.schedule.last_step) * length
    held = holdings(run, architecture)
    per_token = 0 if teacher is None else forward_flops_per_token(teacher, length)
    return RunPart(
        number=number,
        run=run,
        architecture=architecture,
        teacher=teacher,
        pipeline=plan_ranks(run, architecture, teacher, held),
        checkpoint=checkpoint_size(run, held),
        taught_steps=taught,
        student_flops=training_flops_per_token(architecture, length, frozen) * tokens,
        teacher_flops=per_token * run.batch.samples_between(first, first + taught) * length,
        notes=tuple(uneven(architecture, run)),
    )


def taught_steps(run: RunSettings) -> int:
    """Number of steps in which the teacher has a weight above 0, and so runs."""
    settings, schedule = run.distillation, run.schedule
    steps = schedule.last_step - schedule.start_step
    if settings is None or settings.weight == 0:
        return 0
    if settings.final_weight > 0:
        return steps
    since = schedule.start_step if settings.start_step is None else settings.start_step
    return max(0, min(steps, since + settings.anneal_steps - schedule.start_step))


def _described(folder: Path, tag: str | None) -> Architecture:
    """The model of a checkpoint folder, by its config.json alone, so that the checkpoint may be on another machine."""
    places = [folder / "config.json"] if tag is None else [folder / tag / "config.json", folder / "config.json"]
    found = [place for place in places if place.is_file()]
    if not found:
        raise ConfigError(
            f"{places[-1]}: no such file; a dry run needs the sizes of this model. If the checkpoint is on another machine, copy "
            "its config.json into a folder of this name here; nothing else of it is read."
        )
    return saved_architecture(found[0])


def largest(part: RunPart) -> PipelineStage:
    """The pipeline stage whose ranks need the most memory."""
    return max(part.pipeline, key=lambda stage: stage.memory.total)
