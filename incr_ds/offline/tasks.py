"""Zero-shot tasks of EleutherAI's lm-evaluation-harness (package lm-eval) on any supported checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.errors import ConfigError
from incr_ds.offline.compare import load_model
from incr_ds.offline.generation import load_tokenizer

_MOST_NAMES = 20


def evaluate_tasks(
    checkpoint: LogicalCheckpoint,
    tokenizer: Path,
    tasks: Sequence[str],
    task_files: Path | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Metrics of ``checkpoint`` by task, without examples in the prompt.

    ``task_files`` is a folder of task files (YAML). They may name Python functions, which then run. A task of the harness
    itself downloads its data set. ``limit`` takes only the first questions of each task. Raises ConfigError for an unknown
    task, and for task files or data sets that the harness cannot use.
    """
    # The harness reports to no server on its own, and this keeps its libraries from it, too.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if task_files is not None and not task_files.is_dir():
        raise ConfigError(f"--task-files {task_files}: expected a folder of task files.")
    manager = TaskManager(include_path=None if task_files is None else str(task_files))
    _check_known(tasks, manager, task_files)
    model = HFLM(
        pretrained=load_model(checkpoint, device=device),
        tokenizer=load_tokenizer(tokenizer),
        batch_size=batch_size,
    )
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ValueError, KeyError) as error:  # what the harness and its data sets raise for files and data
        raise ConfigError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {error}"[:2000]) from error
    return {name: _metrics(values) for name, values in found["results"].items()}


def _check_known(tasks: Sequence[str], manager: Any, task_files: Path | None) -> None:
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if not unknown:
        return
    own = sorted(path.stem for path in task_files.rglob("*.yaml")) if task_files is not None else []
    hint = f"; files in {task_files}: {', '.join(own[:_MOST_NAMES]) or 'none'}" if task_files is not None else ""
    raise ConfigError(f"--tasks: {', '.join(unknown)}: lm-eval knows {len(known):,} tasks, but not this one{hint}.")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task, by metric; lm-eval appends the filter's name, which is none for most."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
