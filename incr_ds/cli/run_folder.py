"""Finds the checkpoint if a command gets a training run's output folder."""

from __future__ import annotations

from pathlib import Path

from incr_ds.checkpoint.runs import newest_in_run
from incr_ds.cli.command import errors


def located(folder: Path) -> Path:
    """Apply ``newest_in_run``, and print a line that names the checkpoint if it is another folder."""
    found = newest_in_run(folder)
    if found != folder:
        errors.print(f"{folder}: a training run; its newest complete checkpoint is {found.name}", markup=False)
    return found
