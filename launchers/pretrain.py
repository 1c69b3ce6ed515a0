"""Pre-trains from a run file: deepspeed launchers/pretrain.py --config RUN.yaml [--set a.b=v ...]."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from incr_ds.cli.command import error_text
from incr_ds.config.fields import load_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import IncrError
from incr_ds.launch.preflight import check_model, check_run, check_world_size
from incr_ds.launch.stopping import STOPPED, StopRequest, launchers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Config = Annotated[
    list[Path], typer.Option(help="Run file; see ds_configs/runs. Repeatable: later files win, section by section.")
]
Override = Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the run file; repeatable.")]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Check the run, print its settings and stages, and end."),
]
NoResume = Annotated[bool, typer.Option("--no-resume", help="Refuse to continue a run that has checkpoints.")]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True, help="Passed by the deepspeed launcher.")]


@app.command()
def main(
    config: Config,
    override: Override = None,
    print_config: PrintConfig = False,
    no_resume: NoResume = False,
    local_rank: LocalRank = -1,
) -> None:
    """Train a run to its last step. If started again, it continues from its newest complete checkpoint.

    Exit codes: 0 if the run is done, 75 if it was stopped and can be started again, 2 if something in the run file or in
    a file that it names has to be changed first.
    """
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        with StopRequest(launchers(local_rank >= 0)) as stop:
            run = load_settings(config, RunSettings, override)
            if print_config:
                stages = check_model(run)
                typer.echo(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), nl=False)
                for line in stages:
                    typer.echo(f"# {line}")
                return
            check_world_size(run.layout)
            check_run(run)
            from incr_ds.train.pretraining import pretrain

            if pretrain(run, resume=not no_resume, stop=stop).stopped:
                raise typer.Exit(STOPPED)
    except (IncrError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            typer.echo(f"pretrain: {error_text(error)}", err=True)
        sys.stderr.flush()
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
