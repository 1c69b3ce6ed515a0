"""Write the report of training runs: loss, speed, settings and provenance, in one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Json
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require


@command
def main(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of training runs, to be shown side by side.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the run's folder, if there is one run.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the report of RUNS, one or several, as one HTML file. It reads what is on disk and works during a run, too."""
    require("matplotlib")
    with loading():
        from incr_ds.report.run_report import REPORT, write_report
    if len(runs) > 1 and output is None:
        raise ConfigError(f"--output: expected a file for the report of {len(runs)} runs, such as --output {REPORT}.")
    if repeated := next((run for run in runs if runs.count(run) > 1), None):
        raise ConfigError(f"{repeated}: given twice; name each run once.")
    path = output or runs[0] / REPORT
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {path}: expected a file in a folder that exists.")
    numbers = write_report(runs, path)
    if json:
        print_json({"report": str(path), "runs": numbers})
    else:
        for name, found in numbers.items():
            console.print(f"{name}: {found['state']}", markup=False)
        console.print(f"wrote {path}", markup=False)
