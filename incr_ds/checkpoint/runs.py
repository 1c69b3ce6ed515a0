"""Where a training run keeps its checkpoints, and which one is the newest."""

from __future__ import annotations

import re
from pathlib import Path

from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.errors import CheckpointError

CHECKPOINTS = "checkpoints"  # in the output folder
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(output: Path, step: int) -> Path:
    """Path of a run's checkpoint after ``step`` steps."""
    return output / CHECKPOINTS / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The number of steps before a run's checkpoint, by its name."""
    return int(folder.name.removeprefix("step_"))


def step_folders(output: Path) -> list[Path]:
    """A run's checkpoints, newest first. A copy that somebody made (step_00000020.bak) is not one of them."""
    found = {path: _STEP.fullmatch(path.name) for path in (output / CHECKPOINTS).glob("step_*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def newest_in_run(folder: Path) -> Path:
    """The newest complete checkpoint if ``folder`` is a run's output folder, otherwise ``folder`` itself.

    Complete means that every file in the manifest exists with its size. Contents are checked as they are read. Raises
    CheckpointError if the run has no complete checkpoint.
    """
    problems = []
    for path in step_folders(folder):
        try:
            verify_manifest(path, lambda _, listed: str(listed["xxh3"]))
        except CheckpointError as error:
            problems.append(f"  {error}")
        else:
            return path
    if problems:
        raise CheckpointError("\n".join([f"{folder}: a training run without a complete checkpoint:", *problems]))
    return folder
