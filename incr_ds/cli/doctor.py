"""Checks a machine before a run: each finding with what was found, what is expected and what to do."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import USER_MISTAKE, command, console, loading, print_json
from incr_ds.cli.options import Json


@command
def main(
    output: Annotated[Path | None, typer.Option(help="Folder of a run's output, whose disk to check.")] = None,
    needs_gib: Annotated[
        float | None, typer.Option(min=0.0, help="GiB that the run's checkpoints need at once; see --dry-run.")
    ] = None,
    json: Json = False,
) -> None:
    """Check versions, compiler, GPUs, port, shared memory, disk, clock, Slurm and limits.

    Exit codes: 0 without an error, 2 with one. Warnings do not change it.
    """
    with loading():
        from incr_ds.launch.doctor import GIB, findings
        from incr_ds.launch.machine import examine

        machine = examine(output)
    found = findings(machine, None if needs_gib is None else int(needs_gib * GIB))
    errors = sum(one.level == "error" for one in found)
    if json:
        print_json({"errors": errors, "findings": [asdict(one) for one in found]})
    else:
        for one in found:
            console.print(f"{one.level:<8} {one.subject}: {one.found}", markup=False)
            if one.action:
                console.print(f"         expected {one.expected}. {one.action}.", markup=False)
        warnings = sum(one.level == "warning" for one in found)
        console.print(f"{errors} errors, {warnings} warnings, {len(found) - errors - warnings} ok")
    if errors:
        sys.exit(USER_MISTAKE)
