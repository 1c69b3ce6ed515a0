"""Checks a run before torch is imported, so that mistakes show in one second instead of ten."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from incr_ds.arch.architecture import Architecture, check_context, saved_architecture
from incr_ds.arch.training import check_shared_samples
from incr_ds.checkpoint.publish import check_writable
from incr_ds.config.distillation import BEFORE_GROWTH, DistillationSettings
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.data.facts import document_end
from incr_ds.data.index_file import open_index
from incr_ds.errors import ConfigError, IncrError
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.launch.packages import require
from incr_ds.sharding.placement import check_layout

# Environment variables that every launcher sets for its ranks.
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_NAME = 200  # bytes of one name, which leaves room for suffixes


def check_model(run: RunSettings) -> list[str]:
    """Check that the run's models are valid in their layouts and sequence length. Raises IncrError if one is not.

    Returns a line for every stage of a run that grows. A model that is only grown on load depends on the source's tensors.
    In that case only the recipe is checked.
    """
    if run.growth:
        # It plans growths, for which torch is needed.
        from incr_ds.launch.stages import check_teachers, first_architecture, plan_stages, stage_lines

        stages = plan_stages(run, first_architecture(run))
        check_teachers(stages)
        return stage_lines(stages)
    if isinstance(run.model.initialize_from, GrowthStart):
        load_settings(Path(run.model.initialize_from.recipe), GrowthRecipe)
        return []
    architecture = _architecture(run)
    if architecture is not None:
        check_layout(architecture, run.layout)
        check_context(architecture, run.batch.sequence_length, "batch.sequence_length")
        check_shared_samples(architecture, run.batch.sequence_parallel)
    return []


def missing_here(run: RunSettings) -> list[str]:
    """What the run needs and this machine lacks: packages, folders, data, a writable output. One message for each."""
    return [str(problem) for problem in _raised(_local_checks(run))]


def check_run(run: RunSettings) -> None:
    """Check that everything that ``run`` names exists and is consistent, as far as small files show.

    Raises the original error if there is only one, or a ConfigError that lists all of them.
    """
    problems = list(_problems(run))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


def check_world_size(layout: ParallelLayout) -> None:
    """Raise ConfigError unless the launcher started ``layout.world_size`` processes."""
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise ConfigError(
            f"no {', '.join(missing)} in the environment: start training with a launcher, for instance "
            f"deepspeed --num_gpus {layout.world_size} launchers/pretrain.py --config RUN.yaml"
        )
    started = os.environ["WORLD_SIZE"]
    if not started.isdigit() or int(started) != layout.world_size:
        raise ConfigError(
            f"layout: tensor_parallel {layout.tensor_parallel} x pipeline_parallel {layout.pipeline_parallel} x "
            f"data_parallel {layout.data_parallel} needs {layout.world_size} processes, but {started} were started; "
            "start that many, or change data_parallel"
        )


def _problems(run: RunSettings) -> Iterator[IncrError]:
    return _raised([partial(check_model, run), partial(deepspeed_config, run), *_local_checks(run)])


def _local_checks(run: RunSettings) -> list[Callable[[], object]]:
    """Checks whose result depends on the machine."""
    prefixes = [corpus.prefix for corpus in run.data.train]
    prefixes += run.data.held_out.values() if run.evaluation else []
    return [
        partial(require, "deepspeed", "megatron.core", "tensorboard", *(["wandb"] if run.wandb else [])),
        partial(_check_folders, run),
        partial(_check_output, run.output),
        partial(document_end, run),
        *(partial(open_index, prefix) for prefix in dict.fromkeys(prefixes)),
    ]


def _raised(checks: Iterable[Callable[[], object]]) -> Iterator[IncrError]:
    for check in checks:
        try:
            check()
        except IncrError as error:
            yield error


def _architecture(run: RunSettings) -> Architecture | None:
    """The run's model, or None if only its reader knows where its config is."""
    if run.model.config is not None:
        return saved_architecture(Path(run.model.config))
    config = Path(str(run.model.initialize_from)) / "config.json"
    return saved_architecture(config) if config.is_file() else None


def _check_output(output: str) -> None:
    if not output or "\0" in output or any(len(name.encode()) > _LONGEST_NAME for name in Path(output).parts):
        raise ConfigError(
            f"output: {output!r:.100}: not a valid path: expected names of at most {_LONGEST_NAME} bytes without NUL."
        )
    check_writable(Path(output))


def _check_folders(run: RunSettings) -> None:
    origin, steps = run.model.initialize_from, tuple(enumerate(run.growth))
    named = {
        "model.initialize_from": origin.source if isinstance(origin, GrowthStart) else origin,
        "distillation.teacher": _teacher_folder(run.distillation),
        "distillation.cache": None if run.distillation is None else run.distillation.cache,
        **{f"growth.{number}.distillation.teacher": _teacher_folder(step.distillation) for number, step in steps},
        "data.tokenizer": run.data.tokenizer,
    }
    missing = [
        f"{key}: {folder}: no such folder" for key, folder in named.items() if folder and not Path(folder).is_dir()
    ]
    if missing:
        raise ConfigError("; ".join(missing) + ".")


def _teacher_folder(settings: object) -> str | None:
    """The folder that a section distillation names, if it names one."""
    if not isinstance(settings, DistillationSettings) or settings.teacher == BEFORE_GROWTH:
        return None
    return settings.teacher
