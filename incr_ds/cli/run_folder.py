"""A training run's output folder where a command asks for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from incr_ds.checkpoint.runs import newest_in_run
from incr_ds.cli.command import errors


def located(folder: Path) -> Path:
    """``newest_in_run``, and a line beside the output that says which it is."""
    found = newest_in_run(folder)
    if found != folder:
        errors.print(f"{folder}: a training run; its newest complete checkpoint is {found.name}", markup=False)
    return found
